"""What a structured text may look like: the parameters and every check that needs no grammar compiler."""

from moe_runtime.structured_outputs.params import StructuredOutputsParams

__all__ = ["StructuredOutputsParams"]
