"""One scan through a dense network and the four systems, side by side."""
