"""Layers that ranks compute in a way of their own: convolutions while rows travel, norms, activations in place."""
