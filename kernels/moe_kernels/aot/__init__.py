"""Compiling the Triton kernels ahead of time for GPUs that are not here, and what the compiled code tells."""
