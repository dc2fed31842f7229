"""Streaming a plan through one device; running it on many ranks."""
