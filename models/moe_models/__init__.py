"""Models: `nn.Module`s written for packed batches and expert parallelism, and their weight-name maps.

Importing this package, or any module in it, never touches an accelerator.
"""
