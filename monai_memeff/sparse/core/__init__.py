"""Sparse tensors, their voxel sets, and the kernel maps planned for them."""
