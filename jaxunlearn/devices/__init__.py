"""Where a run computes: the mesh of devices, the processes that make it, the memory of a step."""
