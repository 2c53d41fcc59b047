"""Text to token ids and back: the tokenizer, its chat template, incremental detokenising, stop strings."""

from __future__ import annotations

from moe_runtime.tokenizer.detokenize import IncrementalDetokenizer
from moe_runtime.tokenizer.stop import StopChecker
from moe_runtime.tokenizer.tokenizer import Tokenizer, find_eos_token_ids, find_tokenizer, load_tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "StopChecker",
    "Tokenizer",
    "find_eos_token_ids",
    "find_tokenizer",
    "load_tokenizer",
]
