"""The C structures of native/layers.h and native/decoder.cpp, field by field, and how tensors are put into them."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int64, c_void_p

from moe_kernels.blocks.weights import ExpertWeights, Weight
from moe_kernels.native.signatures import ELEMENT_TYPES


class Matrix(Structure):
    """A linear layer's weight [rows, columns] and its scales, if it has some."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("type", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
    )


class Step(Structure):
    """Where the sequences of a step stand, in the batch and in the caches."""

    _fields_ = (
        ("starts", c_void_p),
        ("contexts", c_void_p),
        ("checkpoints", c_void_p),
        ("state_slots", c_void_p),
        ("kv_slots", c_void_p),
        ("tables", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("num_seqs", c_int64),
        ("num_decodes", c_int64),
        ("num_checkpoints", c_int64),
        ("table_stride", c_int64),
        ("rotary_size", c_int64),
    )


class Tokens(Structure):
    """x_TH, and what all operations on it share."""

    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        ("hidden", c_int64),
        ("is_bf16", c_int64),
        ("threads", c_int64),
        ("eps", c_float),
    )


class DeltaNet(Structure):
    """A Gated DeltaNet layer with its caches."""

    _fields_ = (
        ("norm_weight", c_void_p),
        ("in_proj_qkvz", Matrix),
        ("in_proj_ba", Matrix),
        ("out_proj", Matrix),
        ("conv_weight", c_void_p),
        ("a_log", c_void_p),
        ("dt_bias", c_void_p),
        ("gated_norm_weight", c_void_p),
        ("conv_states", c_void_p),
        ("states", c_void_p),
        ("key_heads", c_int64),
        ("value_heads", c_int64),
        ("key_size", c_int64),
        ("value_size", c_int64),
        ("conv_width", c_int64),
    )


class Attention(Structure):
    """A gated attention layer with its caches."""

    _fields_ = (
        ("norm_weight", c_void_p),
        ("in_proj", Matrix),
        ("out_proj", Matrix),
        ("q_norm_weight", c_void_p),
        ("k_norm_weight", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("block_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("scale", c_float),
    )


class Router(Structure):
    """What chooses a token's experts."""

    _fields_ = (
        ("norm_weight", c_void_p),
        ("router", Matrix),
        ("top_k", c_int64),
        ("renormalize", c_int64),
    )


class SharedExpert(Structure):
    """The expert that every token has, and its gate."""

    _fields_ = (("gate_up", Matrix), ("down", Matrix), ("gate", Matrix))


class RoutedExperts(Structure):
    """All experts of a layer, gate and up in one matrix."""

    _fields_ = (
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("gate_up_scale", c_void_p),
        ("down_scale", c_void_p),
        ("type", c_int64),
        ("num_experts", c_int64),
        ("intermediate", c_int64),
    )


class Layer(Structure):
    """Addresses of a decoder layer's structures; of the first two, one is null."""

    _fields_ = (
        ("delta_net", c_void_p),
        ("attention", c_void_p),
        ("router", c_void_p),
        ("experts", c_void_p),
        ("shared", c_void_p),
    )


class Decoder(Structure):
    """The embedding, all layers and the last norm."""

    _fields_ = (
        ("embedding", c_void_p),
        ("vocabulary", c_int64),
        ("layers", c_void_p),
        ("num_layers", c_int64),
        ("norm_weight", c_void_p),
    )


class Exchange(Structure):
    """How tokens come to the experts of all ranks, and their sums back."""

    _fields_ = (
        ("dispatch", c_void_p),
        ("combine", c_void_p),
        ("context", c_void_p),
        ("x", c_void_p),
        ("weights", c_void_p),
        ("rows", c_int64),
    )


class Between(Structure):
    """Memory for what lies between operations."""

    _fields_ = (
        ("x", c_void_p),
        ("mixed", c_void_p),
        ("normed", c_void_p),
        ("routed", c_void_p),
        ("weights", c_void_p),
        ("sums", c_void_p),
        ("ids", c_void_p),
    )


def matrix(given: Weight) -> Matrix:
    """Where a linear layer's weight lies."""
    weight, scale = given
    return Matrix(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        ELEMENT_TYPES[weight.dtype],
        *weight.shape,
    )


def routed_experts(given: ExpertWeights) -> RoutedExperts:
    """Where a layer's experts lie."""
    gate_up, down, *scales = given
    return RoutedExperts(
        gate_up.data_ptr(),
        down.data_ptr(),
        *[None if scale is None else scale.data_ptr() for scale in scales],
        ELEMENT_TYPES[gate_up.dtype],
        gate_up.shape[0],
        down.shape[2],
    )
