"""A model but for its head in one call: its layers one after another, their experts here or on several ranks.

Shape legend: T tokens (at least 1), G tokens of all ranks, N wanted tokens, V vocabulary, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_int64
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_kernels.blocks import (
    AttentionBlock,
    DeltaNetBlock,
    RouterBlock,
    SharedExpertBlock,
    Step,
    check_memory,
    structures,
    tokens_of,
)
from moe_kernels.blocks.weights import ExpertWeights
from moe_kernels.native.library import native_function
from moe_kernels.native.signatures import ELEMENT_TYPES


class LayerBlocks(NamedTuple):
    """A decoder layer, with those of its experts that are here."""

    mixer: DeltaNetBlock | AttentionBlock
    router: RouterBlock
    experts: ExpertWeights
    shared: SharedExpertBlock


@dataclass(frozen=True, slots=True)
class Exchange:
    """How native code carries the tokens of one step to the experts of all ranks and their weighted sums back.

    The functions at `dispatch` and `combine` are described at `struct Exchange` of native/decoder.cpp.
    """

    dispatch: int
    combine: int
    context: int  # first argument of both
    x_GH: torch.Tensor  # after a dispatch: the tokens of all ranks
    weights_GK: torch.Tensor
    check: Callable[[int], None]  # raises why one of the functions ended early, given what it returned


class DecoderBlock:
    """A model but for its head, in one call."""

    def __init__(
        self, embedding_VH: torch.Tensor, layers: Sequence[LayerBlocks], norm_H: torch.Tensor, isa: str
    ) -> None:
        """All norms with the same epsilon, all layers with the same number of experts a token."""
        experts = [structures.routed_experts(layer.experts) for layer in layers]
        array = (structures.Layer * len(layers))(
            *[_layer(layer, routed) for layer, routed in zip(layers, experts, strict=True)]
        )
        self._structure = structures.Decoder(
            embedding_VH.data_ptr(),
            embedding_VH.shape[0],
            addressof(array),
            len(layers),
            norm_H.data_ptr(),
        )
        self._kept = (embedding_VH, layers, experts, array, norm_H)
        self._embedding_VH, self._num_layers = embedding_VH, len(layers)
        self._eps, self._top_k = layers[0].router.eps, layers[0].router.top_k
        assert {(layer.mixer.eps, layer.router.eps) for layer in layers} == {(self._eps, self._eps)}
        assert {layer.router.top_k for layer in layers} == {self._top_k}
        self._run = native_function("moe_decoder", isa)

    def __call__(
        self,
        token_ids_T: torch.Tensor,
        step: Step,
        wanted_N: torch.Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden_NH after the last norm, ids of the experts that each layer chose); updates the caches.

        Args:
            wanted_N: int64, ascending: the tokens whose hidden states are wanted; None: all. The last layer's experts
                compute no other where all experts are here; its choices for those are -1.
            exchange: how to reach experts on other ranks; None: all are here.

        Ids are int64 [layers, T, K], with an exchange [layers, G, K]: local ids, -1 for experts elsewhere.

        Raises IndexError if a token is not in the vocabulary, and what the exchange raises.
        """
        num_tokens, hidden_size = token_ids_T.shape[0], self._embedding_VH.shape[1]
        x, mixed, normed, routed, out_TH = self._embedding_VH.new_empty(5, num_tokens, hidden_size)
        weights_TK = x.new_empty(num_tokens, self._top_k)
        between = structures.Between(*[t.data_ptr() for t in (x, mixed, normed, routed, weights_TK)])
        given_exchange, num_rows, wanted = None, num_tokens, wanted_N
        if exchange is not None:
            num_rows, wanted = exchange.x_GH.shape[0], None
            given_exchange = byref(_exchange(exchange))
            sums_GH = x.new_empty(num_rows, hidden_size)
            ids_TK = torch.empty((num_tokens, self._top_k), dtype=torch.int64, device="cpu")
            between.sums, between.ids = sums_GH.data_ptr(), ids_TK.data_ptr()
        chosen = torch.empty((self._num_layers, num_rows, self._top_k), dtype=torch.int64, device="cpu")
        reason = c_int64()
        status = self._run(
            tokens_of(x, self._eps),
            byref(self._structure),
            byref(step.structure),
            token_ids_T.data_ptr(),
            *((None, -1) if wanted is None else (wanted.data_ptr(), wanted.shape[0])),
            given_exchange,
            byref(between),
            chosen.data_ptr(),
            byref(reason),
            out_TH.data_ptr(),
        )
        if status == 2:
            raise IndexError(
                f"token ids from 0 to {self._structure.vocabulary - 1} wanted, got {token_ids_T.tolist()}"
            )
        if status == 3:
            assert exchange is not None, "nothing was exchanged"
            exchange.check(reason.value)
        check_memory(status, x)
        if wanted is not None:
            return out_TH[: wanted.shape[0]], chosen
        return (out_TH if wanted_N is None else out_TH[wanted_N]), chosen


def takes(experts: ExpertWeights) -> bool:
    """Whether a DecoderBlock knows the format that these are kept in."""
    return experts.gate_up_E2FH.dtype in ELEMENT_TYPES


def _layer(layer: LayerBlocks, experts: structures.RoutedExperts) -> structures.Layer:
    mixer = addressof(layer.mixer.structure)
    is_attention = isinstance(layer.mixer, AttentionBlock)
    return structures.Layer(
        None if is_attention else mixer,
        mixer if is_attention else None,
        addressof(layer.router.structure),
        addressof(experts),
        addressof(layer.shared.structure),
    )


def _exchange(given: Exchange) -> structures.Exchange:
    assert given.x_GH.is_contiguous(), "tokens lie in one piece"
    assert given.weights_GK.is_contiguous(), "tokens lie in one piece"
    return structures.Exchange(
        given.dispatch,
        given.combine,
        given.context,
        given.x_GH.data_ptr(),
        given.weights_GK.data_ptr(),
        given.x_GH.shape[0],
    )
