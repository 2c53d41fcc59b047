"""SimModel: the sizes of a model that its step time depends on, from a config.json or built in.

Shape legend: H hidden, F expert intermediate, E experts, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_models.qwen3_next_config import Qwen3NextConfig
from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.modelfiles import resolve_model

_BF16 = 2  # bytes
_FP32 = 4
_DELTA_CHUNK = 64  # tokens of a chunk in a prefill of Gated DeltaNet


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """One kind of attention layer. Costs are of one layer and, unless said otherwise, one token."""

    name: str
    count: int  # layers of this kind
    linears: tuple[tuple[int, int], ...]  # (inputs, outputs) of each projection
    prefill_linears: tuple[tuple[int, int], ...] = ()  # further ones that only a prefill runs
    # What a decode runs instead, in bfloat16: (inputs, outputs, heads) of products of each head.
    decode_products: tuple[tuple[int, int, int], ...] = ()
    cache_bytes: int  # kept for each cached token
    state_bytes: int  # kept for each sequence; a decode step reads and writes it
    decode_flops: float  # for each cached token that one new token attends to
    prefill_flops: float  # the same in a prefill
    state_flops: float  # of a recurrence, in a prefill
    small_kernels: int  # norms, rotary, cache writes, gates: launched for each layer


@dataclass(frozen=True, slots=True, kw_only=True)
class SimModel:
    """Sizes in elements."""

    name: str
    hidden_size: int
    vocab_size: int
    mixers: tuple[Mixer, ...]
    num_dense_layers: int
    dense_intermediate: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    moe_intermediate: int
    shared_intermediate: int  # 0: no shared expert
    linear_bytes: float  # of one weight of projections and shared experts
    expert_bytes: float  # of one weight of routed experts

    @property
    def expert_weights(self) -> int:
        """Parameters of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.moe_intermediate

    @property
    def linear_weights(self) -> int:
        """Parameters outside routed experts, embedding and LM head; routers, norms and convolutions not counted."""
        mixers = sum(m.count * sum(i * o for i, o in m.linears + m.prefill_linears) for m in self.mixers)
        dense = self.num_dense_layers * 3 * self.hidden_size * self.dense_intermediate
        return mixers + dense + self.num_moe_layers * 3 * self.hidden_size * self.shared_intermediate

    def rank_weight_bytes(self, experts_of_rank: int) -> float:
        """Bytes of weights on a rank that holds so many experts of every MoE layer."""
        experts = self.num_moe_layers * experts_of_rank * self.expert_weights * self.expert_bytes
        bf16 = (
            self.num_moe_layers * self.num_experts * self.hidden_size + 2 * self.vocab_size * self.hidden_size
        )
        return experts + self.linear_weights * self.linear_bytes + bf16 * _BF16

    def sequence_bytes(self, num_tokens: float) -> float:
        """Cache bytes of a sequence of `num_tokens` tokens, recurrent states included."""
        return sum(m.count * (m.cache_bytes * num_tokens + m.state_bytes) for m in self.mixers)


def _full_attention(c: Qwen3NextConfig) -> Mixer:
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return Mixer(
        name="full_attention",
        count=c.layer_types.count("full_attention"),
        # Queries come with a gate of their size.
        linears=((c.hidden_size, 2 * heads + 2 * kv), (heads, c.hidden_size)),
        cache_bytes=2 * kv * _BF16,
        state_bytes=0,
        decode_flops=4 * heads,  # q.k and p.v
        prefill_flops=4 * heads,
        state_flops=0,
        small_kernels=6,  # norm, q norm, k norm, rotary, cache write, output gate
    )


def _delta_net(c: Qwen3NextConfig) -> Mixer:
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    d_k, d_v = c.linear_key_head_dim, c.linear_value_head_dim
    state = c.linear_num_value_heads * d_k * d_v * _FP32
    conv = (2 * keys + values) * (c.linear_conv_kernel_dim - 1) * _BF16
    # In a chunk of C tokens: k.k and q.k (C d_k each), their products with values (C d_v each), and reading,
    # correcting and writing the state (3 d_k d_v); Yang et al., Gated Delta Networks (arXiv 2412.06464).
    per_head = 2 * (2 * _DELTA_CHUNK * (d_k + d_v) + 3 * d_k * d_v)
    return Mixer(
        name="linear_attention",
        count=c.layer_types.count("linear_attention"),
        linears=(
            (c.hidden_size, 2 * keys + 2 * values),
            (c.hidden_size, 2 * c.linear_num_value_heads),
            (values, c.hidden_size),
        ),
        cache_bytes=0,
        state_bytes=state + conv,
        decode_flops=0,
        prefill_flops=0,
        state_flops=c.linear_num_value_heads * per_head,
        small_kernels=4,  # norm, convolution, gates, gated norm
    )


def from_config(
    name: str, config: Mapping[str, Any], *, linear_bytes: float, expert_bytes: float
) -> SimModel:
    """A Qwen3-Next from its parsed config.json.

    Raises:
        ConfigError: it is of another architecture, or a value in it cannot be used.
    """
    architectures = config.get("architectures") or ["none"]
    if architectures[0] != "Qwen3NextForCausalLM":
        raise ConfigError(
            f"{name} is a {architectures[0]}; simulate knows Qwen3NextForCausalLM, and the presets {', '.join(PRESETS)}"
        )
    try:
        c = Qwen3NextConfig.parse(config)
    except ValueError as error:
        raise ConfigError(f"config.json of {name}: {error}") from error
    if not c.sparse_layers:
        raise ConfigError(f"{name} has no layer with experts; there is no expert parallelism to simulate")
    return SimModel(
        name=name,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        mixers=tuple(m for m in (_full_attention(c), _delta_net(c)) if m.count),
        num_dense_layers=c.num_hidden_layers - len(c.sparse_layers),
        dense_intermediate=c.intermediate_size,
        num_moe_layers=len(c.sparse_layers),
        num_experts=c.num_experts,
        top_k=c.num_experts_per_tok,
        moe_intermediate=c.moe_intermediate_size,
        shared_intermediate=c.shared_expert_intermediate_size,
        linear_bytes=linear_bytes,
        expert_bytes=expert_bytes,
    )


def qwen3_next_80b(linear_bytes: float = 1, expert_bytes: float = 1) -> SimModel:
    """Qwen/Qwen3-Next-80B-A3B: the defaults of its configuration class."""
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "rope_theta": 10_000_000,
    }
    return from_config("qwen3-next-80b", config, linear_bytes=linear_bytes, expert_bytes=expert_bytes)


def deepseek_v3(linear_bytes: float = 1, expert_bytes: float = 1) -> SimModel:
    """DeepSeek-V3 and R1, to compare with what is published of them; nothing here can serve it.

    Multi-head latent attention in decode works in the latent space of 512 + 64 elements, for which the
    up-projections of keys and values become products of each head (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """
    hidden, heads, latent, rope = 7168, 128, 512, 64
    attention = Mixer(
        name="mla",
        count=61,
        linears=((hidden, 1536 + latent + rope), (1536, heads * 192), (heads * 128, hidden)),
        prefill_linears=((latent, heads * 256),),
        decode_products=((128, latent, heads), (latent, 128, heads)),
        cache_bytes=(latent + rope) * _BF16,
        state_bytes=0,
        decode_flops=2 * heads * (2 * latent + rope),
        prefill_flops=2 * heads * (192 + 128),
        state_flops=0,
        small_kernels=8,  # norm, norms of both latents, rotary, cache write, three quantisations of activations
    )
    return SimModel(
        name="deepseek-v3",
        hidden_size=hidden,
        vocab_size=129_280,
        mixers=(attention,),
        num_dense_layers=3,
        dense_intermediate=18_432,
        num_moe_layers=58,
        num_experts=256,
        top_k=8,
        moe_intermediate=2048,
        shared_intermediate=2048,
        linear_bytes=linear_bytes,
        expert_bytes=expert_bytes,
    )


PRESETS: Mapping[str, Callable[[float, float], SimModel]] = {
    "qwen3-next-80b": qwen3_next_80b,
    "deepseek-v3": deepseek_v3,
}
DTYPE_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "fp8": 1.0}


def find_model(name: str, dtype: str) -> SimModel:
    """A preset, or what the config.json of a checkpoint says; weights in `dtype`.

    Raises:
        ConfigError: no such dtype, or the model is of a kind that cannot be simulated.
        ModelNotFoundError: neither a preset nor a checkpoint.
    """
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"--dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}{did_you_mean(dtype, DTYPE_BYTES)}"
        )
    size = DTYPE_BYTES[dtype]
    if name in PRESETS:
        return PRESETS[name](size, size)
    if "/" not in name and "." not in name and (hint := did_you_mean(name, PRESETS)):
        raise ConfigError(f"there is no preset {name!r}{hint}")
    files = resolve_model(name, config_only=True)
    return from_config(files.name, files.config, linear_bytes=size, expert_bytes=size)
