"""Choosing tokens from logits, vectorised over a batch, the same whatever the batch, the rank or a replay."""

from moe_runtime.sampling.batch import SamplingBatch, SamplingRow
from moe_runtime.sampling.logprobs import prompt_logprobs
from moe_runtime.sampling.mask import TokenMask
from moe_runtime.sampling.sampler import Sampler, SamplerOutput

__all__ = ["Sampler", "SamplerOutput", "SamplingBatch", "SamplingRow", "TokenMask", "prompt_logprobs"]
