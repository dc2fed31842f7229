"""Gradients of a captured network: those of the plain one, or the network is refused."""
