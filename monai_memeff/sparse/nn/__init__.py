"""Layers on sparse tensors, and the table that turns dense networks into sparse ones."""
