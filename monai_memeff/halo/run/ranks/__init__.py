"""The rank executor: every process runs the same plan on its own rows of the volume."""
