"""Ground room of integers and affines: voxel keys, grids, partitions; torch and numpy only."""
