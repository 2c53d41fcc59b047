"""The same checkpoint in transformers, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_runtime.errors import ConfigError
from moe_runtime.modelfiles import dtype_name


class TransformersPeer:
    """transformers' own model class, generating greedily for a whole batch of equally long prompts."""

    name = "transformers"

    def __init__(self, path: Path, *, dtype: str, experts: str, num_threads: int) -> None:
        """
        Args:
            experts: transformers' way to compute experts: "grouped_mm", "batched_mm" or "eager".
            num_threads: of torch in this process.

        Raises:
            ConfigError: transformers is not installed, or `dtype` is none.
        """
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig
        except ImportError as error:
            raise ConfigError(
                "--compare transformers needs transformers; pip install 'moe-runtime[transformers]'"
            ) from error
        torch.set_num_threads(num_threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype_name({}, dtype)), experts_implementation=experts
        ).eval()
        # No token ends a text: every request is to have the same length.
        self._model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], output_len: int) -> list[list[int]]:
        """`output_len` greedy tokens after each prompt; the prompts have one length."""
        input_ids = torch.tensor([list(prompt) for prompt in prompts])
        whole = self._model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=output_len
        )
        tokens: list[list[int]] = whole[:, input_ids.shape[1] :].tolist()
        return tokens
