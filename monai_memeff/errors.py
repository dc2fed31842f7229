"""Errors that callers tell apart: what a user gave cannot be used, and the message says why in one line."""

from __future__ import annotations


class InputError(ValueError):
    """An input that the work cannot use: one line that says the limit, the value and the way out."""
