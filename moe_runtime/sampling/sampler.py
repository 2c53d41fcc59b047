"""Sampler: from logits to one token a sequence.

The order is vLLM's: logit_bias, min_tokens, penalties, grammars, then either the best token (greedy) or temperature,
min-p, top-k, top-p and a draw. Every row is worked out by itself, from its own logits, history and counter,
so a token does not depend on the other rows, on the rank or on whether it is a replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.sampling.adjust import adjust_logits
from moe_runtime.sampling.batch import SamplingBatch, SamplingRow
from moe_runtime.sampling.draw import draw_tokens
from moe_runtime.sampling.filters import filter_thresholds
from moe_runtime.sampling.logprobs import RankedLogprobs, ranked_logprobs
from moe_runtime.sampling.mask import TokenMask
from moe_runtime.sampling.uniform import uniforms

_ELEMENTS_AT_ONCE = 1 << 19  # 2 MB of float32: converted parts stay in a core's cache
_HOTTEST = 3e38  # float32 holds it; at infinity a masked logit would become NaN


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What was sampled, one entry a row of logits."""

    token_ids: list[int]
    logprobs: list[RankedLogprobs | None]  # the sampled token first, then the best; None if not asked for
    stuck: tuple[int, ...] = field(
        default=()
    )  # rows whose grammar and logit_bias left no token: theirs means nothing


class Sampler:
    """Samples one token a row; holds no state between calls."""

    def __init__(self, top_p_rounds: Sequence[int] = (64, 1024, 16384)) -> None:
        """`top_p_rounds`: how many best tokens top-p looks at, in turn, before it sorts a whole row."""
        self._top_p_rounds = tuple(top_p_rounds)

    def __call__(
        self, logits_NV: torch.Tensor, batch: SamplingBatch, mask: TokenMask | None = None
    ) -> SamplerOutput:
        """Sample from logits of any float dtype, from the tokens that `mask` leaves; N may be 0.

        Raises MoeRuntimeError if a row has no finite maximum (NaN or infinite logits come from the model).
        """
        num_rows = len(batch.rows)
        assert logits_NV.shape[0] == num_rows, f"{logits_NV.shape[0]} rows of logits, {num_rows} sequences"
        if num_rows == 0:
            return SamplerOutput([], [])
        x_NV = logits_NV if batch.all_plain else adjust_logits(logits_NV, batch, mask)
        best_N, tokens_N = _best(x_NV)
        if batch.random:
            drawn = self._draw(x_NV, best_N, batch)
            tokens_N[list(batch.random)] = drawn
        token_ids, finite = _on_host(tokens_N, best_N)
        stuck: tuple[int, ...] = ()
        if not all(finite):
            stuck = tuple(i for i in range(num_rows) if not finite[i])
            _refuse_broken_logits(logits_NV, batch, stuck)
        return SamplerOutput(token_ids, self._logprobs(logits_NV, tokens_N, batch), stuck)

    def _draw(self, x_NV: torch.Tensor, best_N: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Tokens of the random rows, in their order, int64."""
        draws = uniforms(
            [batch.rows[i].seed for i in batch.random],
            [batch.rows[i].sample_index for i in batch.random],
            [batch.rows[i].position for i in batch.random],
        )
        uniform_R = torch.from_numpy(draws).to(x_NV.device)
        # On CPUs a few rows at a time: the many passes over them find them in the cache, and what they
        # allocate is used again.
        on_cpu = x_NV.device.type == "cpu"
        size = max(1, _ELEMENTS_AT_ONCE // x_NV.shape[1]) if on_cpu else len(batch.random)
        drawn = []
        for start in range(0, len(batch.random), size):
            part = list(batch.random[start : start + size])
            # A view where these rows lie side by side, as they do if all are drawn.
            at = slice(part[0], part[-1] + 1) if part[-1] - part[0] + 1 == len(part) else part
            rows = [batch.rows[i] for i in part]
            drawn.append(self._draw_rows(x_NV[at], best_N[at, None], rows, uniform_R[start : start + size]))
        return torch.cat(drawn)

    def _draw_rows(
        self, x_RV: torch.Tensor, best_R1: torch.Tensor, rows: Sequence[SamplingRow], uniform_R: torch.Tensor
    ) -> torch.Tensor:
        """One token a row, int64; the logits are left as they are."""
        temperature_R1 = x_RV.new_tensor([[min(row.params.temperature, _HOTTEST)] for row in rows])
        weights_RV = (x_RV - best_R1).div_(temperature_R1).exp_()
        filtered = [i for i, row in enumerate(rows) if row.has_filter]
        if filtered:
            every = len(filtered) == len(rows)
            x_FV, weights_FV = (x_RV, weights_RV) if every else (x_RV[filtered], weights_RV[filtered])
            threshold_F1 = filter_thresholds(
                x_FV,
                weights_FV,
                best_R1[filtered],
                temperature_R1[filtered],
                [rows[i] for i in filtered],
                self._top_p_rounds,
            )
            weights_FV.mul_(x_FV >= threshold_F1)
            if not every:
                weights_RV[filtered] = weights_FV
        return draw_tokens(weights_RV, uniform_R)

    def _logprobs(
        self, logits_NV: torch.Tensor, tokens_N: torch.Tensor, batch: SamplingBatch
    ) -> list[RankedLogprobs | None]:
        found: list[RankedLogprobs | None] = [None] * len(batch.rows)
        wanted = list(batch.with_logprobs)
        if wanted:
            num_best = [batch.rows[i].params.logprobs or 0 for i in wanted]
            ranked = ranked_logprobs(logits_NV[wanted], tokens_N[wanted], num_best)
            for i, logprobs in zip(wanted, ranked, strict=True):
                found[i] = logprobs
        return found


def _refuse_broken_logits(logits_NV: torch.Tensor, batch: SamplingBatch, rows: Sequence[int]) -> None:
    """Raise MoeRuntimeError if one of the rows has no finite maximum, but for a grammar that left none."""
    for i in rows:
        if i not in batch.structured or not logits_NV[i].max().isfinite():
            raise MoeRuntimeError(
                f"the logits of sequence {i} of {len(batch.rows)} in this step have no finite "
                "maximum: the model's output holds NaN or infinity; check its weights and dtype"
            )


def _best(x_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and its token; ties go to the lowest token id, NaN counts as the largest."""
    if x_NV.device.type != "cpu":
        return x_NV.max(dim=-1)
    # On CPUs NumPy searches with vector instructions and torch does not, which makes a factor of five to ten.
    at_once = max(1, _ELEMENTS_AT_ONCE // x_NV.shape[1])
    if len(x_NV) <= at_once:
        best_N, tokens_N = _best_of_part(x_NV)
    else:
        best, tokens = zip(*map(_best_of_part, x_NV.split(at_once)), strict=True)
        best_N, tokens_N = np.concatenate(best), np.concatenate(tokens)
    return torch.from_numpy(best_N), torch.from_numpy(tokens_N)


def _best_of_part(x_NV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = x_NV.float().numpy()
    tokens = x.argmax(-1)
    return x[np.arange(len(tokens)), tokens], tokens


def _on_host(tokens_N: torch.Tensor, best_N: torch.Tensor) -> tuple[list[int], list[int]]:
    """The tokens, and 1 for each whose logit is finite."""
    if best_N.device.type == "cpu":
        return tokens_N.tolist(), np.isfinite(best_N.numpy()).tolist()
    # One transfer for both.
    token_ids, finite = torch.stack([tokens_N, best_N.isfinite().long()]).tolist()
    return token_ids, finite
