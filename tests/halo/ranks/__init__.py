"""The rank executor."""
