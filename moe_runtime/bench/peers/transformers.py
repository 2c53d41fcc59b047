"""The same checkpoint in transformers: its own model class, generating greedily for a whole batch."""

from __future__ import annotations

import time
from typing import Any

_EXPERTS = "grouped_mm"  # the fastest of transformers' ways on CPUs


class Peer:
    """transformers, for prompts of one length."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(settings["threads"])
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["checkpoint"], dtype=getattr(torch, settings["variant"]), experts_implementation=_EXPERTS
        ).eval()
        # No token ends a text: every request is to have the same length.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )
        self.facts = {
            "version": transformers.__version__,
            "settings": {"dtype": settings["variant"], "experts": _EXPERTS, "torch": torch.__version__},
        }

    def generate(self, prompts: list[list[int]], output_len: int, tune: bool) -> dict[str, Any]:
        """`output_len` greedy tokens after each prompt; there is nothing to tune."""
        input_ids = self._torch.tensor(prompts)
        clock = _Clock()
        with self._torch.inference_mode():
            whole = self._model.generate(
                input_ids,
                attention_mask=self._torch.ones_like(input_ids),
                max_new_tokens=output_len,
                streamer=clock,
            )
        tokens = whole[:, input_ids.shape[1] :].tolist()
        return {
            "seconds": time.perf_counter() - clock.began,
            "first_token_seconds": clock.first_token - clock.began,
            "decode_tokens": len(prompts) * (output_len - 1),
            "tokens": tokens,
        }


class _Clock:
    """A streamer of transformers that keeps the time of the first new tokens; all sequences have theirs at once."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first_token = 0.0
        self._num_puts = 0

    def put(self, value: Any) -> None:
        """Called with the prompts, then with each step's tokens."""
        self._num_puts += 1
        if self._num_puts == 2:
            self.first_token = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""
