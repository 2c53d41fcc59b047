"""A GGUF of the same checkpoint in llama.cpp, through the low-level API of llama-cpp-python.

Every prompt is a sequence of its own; after the prompts all sequences decode together, a token each in a step, and the
largest logit is taken with NumPy (its share of the time is reported). Which settings are fastest depends on the
machine, the weights' type and the shape of the work, so a request with `tune` tries some and keeps the best for
every later request of its shape.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

_CELLS = 256  # llama.cpp keeps sequences in multiples of these


@dataclass(frozen=True)
class Setup:
    """What can be chosen for a shape of work; the defaults are llama.cpp's, but for flash attention (auto)."""

    n_ubatch: int = 512  # tokens computed at once
    flash_attention: bool = True
    kv_unified: bool = False  # one cache for all sequences instead of one each
    prompts_at_once: bool = True  # all prompts in one call, or a call each

    def neighbours(self, num_prompts: int) -> list[dict[str, Any]]:
        """Changes worth trying, one after another."""
        changes: list[dict[str, Any]] = [{"n_ubatch": 2048}, {"n_ubatch": 256}, {"flash_attention": False}]
        if num_prompts > 1:
            changes += [{"prompts_at_once": False}, {"kv_unified": True}]
        return changes


class Peer:
    """llama.cpp on the CPU."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self._lib, self._np, self._settings = llama_cpp, numpy, settings
        # llama.cpp logs every tensor; keep the callback, which C holds on to.
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {settings['gguf']}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._chosen: dict[tuple[int, int, int], Setup] = {}  # by prompts, prompt length, output length
        self._context: Any = None
        self._context_key: Any = None
        self.facts = {
            "version": llama_cpp.__version__,
            "tunable": True,
            "settings": {
                "weights": settings["variant"],
                "build": llama_cpp.llama_print_system_info().decode().strip(),
            },
        }

    def generate(self, prompts: list[list[int]], output_len: int, tune: bool) -> dict[str, Any]:
        """`output_len` greedy tokens after each prompt; with `tune`, of the fastest setup that was tried."""
        shape = (len(prompts), len(prompts[0]), output_len)
        if tune:
            return self._tune(shape, prompts, output_len)
        return self._generate(self._chosen.get(shape, Setup()), prompts, output_len)

    def _tune(self, shape: tuple[int, int, int], prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """Change one thing at a time and keep what is faster."""
        best = Setup()
        self._generate(best, prompts, min(output_len, 2))  # pages of the file are read when first used
        fastest = self._generate(best, prompts, output_len)
        for change in best.neighbours(len(prompts)):
            tried = replace(best, **change)
            result = self._generate(tried, prompts, output_len)
            if result["seconds"] < fastest["seconds"]:
                best, fastest = tried, result
        self._chosen[shape] = best
        self._generate(best, prompts, min(output_len, 2))  # the first use of a context is slower
        return fastest

    def _generate(self, setup: Setup, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        context = self._context_for(setup, len(prompts), len(prompts[0]) + output_len)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        self._sampling_s = 0.0
        began = time.perf_counter()
        columns = [self._prefill(context, setup, prompts)]
        first_token = time.perf_counter()
        columns += self._decode(context, columns[0], len(prompts[0]), output_len - 1)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "first_token_seconds": first_token - began,
            "decode_tokens": len(prompts) * (output_len - 1),
            "tokens": self._np.stack(columns, axis=1).tolist(),
            "details": {**asdict(setup), "sampling_share": round(self._sampling_s / seconds, 4)},
        }

    def _context_for(self, setup: Setup, num_seqs: int, length: int) -> Any:
        """The context for this setup; there is one at a time, and making one is in nobody's time."""
        key = (setup, num_seqs, length)
        if key == self._context_key:
            return self._context
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = num_seqs * (-(-length // _CELLS) * _CELLS)
        params.n_batch = max(num_seqs * length, setup.n_ubatch)
        params.n_ubatch = setup.n_ubatch
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = self._settings["threads"]
        params.flash_attn_type = int(setup.flash_attention)
        params.kv_unified = setup.kv_unified
        params.no_perf = True
        if self._settings["variant"] == "f32":  # keys and values are kept in float16 otherwise
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context for {num_seqs} sequences of {length}: {setup}")
        self._context_key = key
        return self._context

    def _prefill(self, context: Any, setup: Setup, prompts: list[list[int]]) -> Any:
        """The prompts; returns each sequence's first token, [B]."""
        if setup.prompts_at_once:
            return self._run_prompts(context, list(enumerate(prompts)))
        parts = [self._run_prompts(context, [numbered]) for numbered in enumerate(prompts)]
        return self._np.concatenate(parts)

    def _run_prompts(self, context: Any, numbered: list[tuple[int, list[int]]]) -> Any:
        length = len(numbered[0][1])
        batch, tokens, positions, wanted = self._new_batch([s for s, _ in numbered for _ in range(length)])
        tokens[:] = self._np.concatenate([prompt for _, prompt in numbered])
        positions[:] = self._np.tile(self._np.arange(length), len(numbered))
        wanted[:] = 0
        wanted[length - 1 :: length] = 1
        try:
            return self._step(context, batch, len(numbered))
        finally:
            self._lib.llama_batch_free(batch)

    def _decode(self, context: Any, last: Any, position: int, num_steps: int) -> list[Any]:
        """`num_steps` tokens after the first ones, each [B]."""
        batch, tokens, positions, wanted = self._new_batch(list(range(len(last))))
        wanted[:] = 1
        columns = []
        for step in range(num_steps):
            tokens[:], positions[:] = last, position + step
            last = self._step(context, batch, len(last))
            columns.append(last)
        self._lib.llama_batch_free(batch)
        return columns

    def _new_batch(self, sequences: list[int]) -> tuple[Any, Any, Any, Any]:
        """A llama_batch with a token for each entry, and views of its tokens, positions and wanted logits."""
        n = len(sequences)
        batch = self._lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for row, sequence in enumerate(sequences):
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
        as_array = self._np.ctypeslib.as_array
        return (batch, *(as_array(p, (n,)) for p in (batch.token, batch.pos, batch.logits)))

    def _step(self, context: Any, batch: Any, num_rows: int) -> Any:
        """Compute a batch; returns the largest logit's token for each row that wanted logits, [num_rows]."""
        status = self._lib.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._lib.llama_synchronize(context)
        began = time.perf_counter()
        logits = self._lib.llama_get_logits(context)
        rows = self._np.ctypeslib.as_array(logits, (num_rows, self._vocab_size))
        chosen = rows.argmax(axis=1)
        self._sampling_s += time.perf_counter() - began
        return chosen
