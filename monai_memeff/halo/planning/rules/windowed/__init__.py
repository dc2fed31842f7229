"""Operators whose output rows are made from a window of input rows: convolution, pooling, padding, resizing."""
