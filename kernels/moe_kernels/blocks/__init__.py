"""Layers in one call of native code, where a call from Python costs as much as the work in it: decodes on CPUs.

Each block computes what the operations of the other packages compute one after another, in the same order and with the
same roundings, so a layer may use either. `select` says for which models it may (`KernelPlan.blocks`). A block is made
once: it keeps the addresses of its weights and caches, which have to stay where they are.

Shape legend: T tokens (at least 1), H hidden, B sequences, C convolution channels, W convolution width, N value heads,
D key or head size, V value size, M key heads, R rotary size, E experts, K top-k, F intermediate of the shared expert.
"""

from __future__ import annotations

from ctypes import Structure, byref

import torch

from moe_kernels.blocks import structures
from moe_kernels.blocks.weights import (
    AttentionWeights,
    DeltaNetWeights,
    SharedExpertWeights,
    Weight,
)
from moe_kernels.native.library import native_function
from moe_kernels.sequences import PackedSequences


class Step:
    """What the layers of one step share; its tensors are on the host."""

    def __init__(
        self,
        sequences: PackedSequences,
        state_slots_B: torch.Tensor,
        kv_slots_T: torch.Tensor,
        block_tables_BM: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
    ) -> None:
        checkpoints = sequences.checkpoints_on_host
        cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
        self._kept = (sequences, checkpoints, state_slots_B, kv_slots_T, block_tables_BM, cos_TR, sin_TR)
        self.structure = structures.Step(
            sequences.cu_seqlens.data_ptr(),
            sequences.context_lens_B.data_ptr(),
            checkpoints.data_ptr(),
            state_slots_B.data_ptr(),
            kv_slots_T.data_ptr(),
            block_tables_BM.data_ptr(),
            cos_TR.data_ptr(),
            sin_TR.data_ptr(),
            len(sequences.query_lens),
            sequences.num_decodes,
            checkpoints.shape[0],
            block_tables_BM.stride(0),
            cos_TR.shape[1],
        )


class _Block:
    """A native function and its layer's structure, with what that points to."""

    _name: str

    def __init__(self, structure: Structure, kept: tuple[object, ...], isa: str) -> None:
        self.structure, self._kept = structure, kept
        self._layer = byref(structure)
        self._run = native_function(self._name, isa)


class _MixerBlock(_Block):
    """x plus a layer's output for norm(x)."""

    def __init__(self, structure: Structure, kept: tuple[object, ...], eps: float, isa: str) -> None:
        super().__init__(structure, kept, isa)
        self.eps = eps

    def __call__(self, x_TH: torch.Tensor, step: Step) -> torch.Tensor:
        """out_TH; updates the caches."""
        out_TH = torch.empty_like(x_TH)
        tokens = tokens_of(x_TH, self.eps)
        check_memory(self._run(tokens, self._layer, byref(step.structure), out_TH.data_ptr()), x_TH)
        return out_TH


class DeltaNetBlock(_MixerBlock):
    """x plus Gated DeltaNet of norm(x)."""

    _name = "moe_gated_delta_net"

    def __init__(
        self, weights: DeltaNetWeights, eps: float, conv_state: torch.Tensor, state: torch.Tensor, isa: str
    ) -> None:
        """
        Args:
            conv_state: [slots, C, W - 1].
            state: float32 [slots, N, D, V].
            isa: instruction set, one of `moe_kernels.native.units.LEVELS`.
        """
        assert conv_state.is_contiguous(), "a layer's states lie in one piece"
        assert state.is_contiguous(), "a layer's states lie in one piece"
        _, num_heads, key_size, value_size = state.shape
        channels, width = weights.conv_CW.shape
        structure = structures.DeltaNet(
            weights.norm_H.data_ptr(),
            structures.matrix(weights.in_proj_qkvz),
            structures.matrix(weights.in_proj_ba),
            structures.matrix(weights.out_proj),
            weights.conv_CW.data_ptr(),
            weights.a_log_N.data_ptr(),
            weights.dt_bias_N.data_ptr(),
            weights.gated_norm_V.data_ptr(),
            conv_state.data_ptr(),
            state.data_ptr(),
            (channels - num_heads * value_size) // (2 * key_size),
            num_heads,
            key_size,
            value_size,
            width,
        )
        super().__init__(structure, (weights, conv_state, state), eps, isa)


class AttentionBlock(_MixerBlock):
    """x plus gated attention of norm(x)."""

    _name = "moe_gated_attention"

    def __init__(
        self,
        weights: AttentionWeights,
        eps: float,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        isa: str,
    ) -> None:
        """
        Args:
            k_cache, v_cache: [blocks, block size, M, D].
            isa: instruction set, one of `moe_kernels.native.units.LEVELS`.
        """
        _, block_size, kv_heads, head_size = k_cache.shape
        structure = structures.Attention(
            weights.norm_H.data_ptr(),
            structures.matrix(weights.in_proj),
            structures.matrix(weights.out_proj),
            weights.q_norm_D.data_ptr(),
            weights.k_norm_D.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_size,
            weights.out_proj.weight_NK.shape[1] // head_size,
            kv_heads,
            head_size,
            head_size**-0.5,
        )
        super().__init__(structure, (weights, k_cache, v_cache), eps, isa)


class RouterBlock(_Block):
    """norm(x), and the choice of its experts."""

    _name = "moe_norm_and_route"

    def __init__(
        self, norm_H: torch.Tensor, eps: float, router: Weight, top_k: int, renormalize: bool, isa: str
    ) -> None:
        structure = structures.Router(norm_H.data_ptr(), structures.matrix(router), top_k, renormalize)
        super().__init__(structure, (norm_H, router), isa)
        self.eps, self.top_k = eps, top_k

    def __call__(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(norm(x) [T, H], ids of its experts, int64 [T, K], their weights [T, K])."""
        num_tokens = x_TH.shape[0]
        normed_TH, weights_TK = torch.empty_like(x_TH), x_TH.new_empty(num_tokens, self.top_k)
        ids_TK = torch.empty((num_tokens, self.top_k), dtype=torch.int64, device="cpu")
        pointers = normed_TH.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()
        check_memory(self._run(tokens_of(x_TH, self.eps), self._layer, *pointers), x_TH)
        return normed_TH, ids_TK, weights_TK


class SharedExpertBlock(_Block):
    """x + routed + sigmoid(gate(normed)) * shared_expert(normed)."""

    _name = "moe_add_experts"

    def __init__(self, shared: SharedExpertWeights, isa: str) -> None:
        structure = structures.SharedExpert(
            structures.matrix(shared.gate_up), structures.matrix(shared.down), structures.matrix(shared.gate)
        )
        super().__init__(structure, (shared,), isa)

    def __call__(self, x_TH: torch.Tensor, normed_TH: torch.Tensor, routed_TH: torch.Tensor) -> torch.Tensor:
        """out_TH."""
        routed_TH, out_TH = routed_TH.contiguous(), torch.empty_like(x_TH)
        pointers = normed_TH.data_ptr(), routed_TH.data_ptr(), out_TH.data_ptr()
        check_memory(self._run(tokens_of(x_TH, 0.0), self._layer, *pointers), x_TH)
        return out_TH


def tokens_of(x_TH: torch.Tensor, eps: float) -> object:
    """What native code is given of a step's tokens."""
    assert x_TH.is_contiguous(), "tokens lie in one piece"
    is_bf16 = x_TH.dtype == torch.bfloat16
    return byref(structures.Tokens(x_TH.data_ptr(), *x_TH.shape, is_bf16, torch.get_num_threads(), eps))


def check_memory(status: int, x_TH: torch.Tensor) -> None:
    """Raise MemoryError if a layer's function returned that there is none."""
    if status:
        raise MemoryError(f"no memory for what a layer of {tuple(x_TH.shape)} needs between its operations")
