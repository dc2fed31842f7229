"""Many cases, of which one may fail."""
