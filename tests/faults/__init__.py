"""Faults that would pass in silence: each module tries one kind, with its siblings."""
