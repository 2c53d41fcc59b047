"""Kernels: pure functions on tensors, a folder per operation, with no knowledge of models or of Ray.

Importing this package, or any module in it, never touches an accelerator.
"""
