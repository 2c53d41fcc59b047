"""Weights: read the headers of safetensors files, plan which slices a rank needs, and load only those."""
