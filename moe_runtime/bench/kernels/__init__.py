"""`bench kernels`: what the kernels reach of what the hardware can do, or, with no GPU, what they compile to."""
