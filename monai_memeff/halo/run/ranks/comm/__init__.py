"""Between the processes: transports, the mesh, and rows that move along routes which every rank computes alike."""
