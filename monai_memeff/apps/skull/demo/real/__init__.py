"""A head that really has a hole: where it is, what the healthy bone teaches, and what fills it."""
