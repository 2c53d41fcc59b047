"""The forward pass of Qwen3-Next in float32, written for training a small model on few CPU cores.

It runs on the modules of transformers' `Qwen3NextForCausalLM`, whose weights therefore load there unchanged, and
computes the same logits (`check_against_transformers`); it only avoids what costs time at this size: small chunks
in the delta rule, one gather and one concatenation around the experts instead of a scatter for each of them.

Shapes: B sequences, S tokens of each, T = B*S, H hidden, K experts of a token, E experts, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from transformers import Qwen3NextForCausalLM

CHUNK = 32  # tokens of the delta rule that are solved at once: the work in a chunk grows with its square


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Qwen3-Next's zero-centred RMSNorm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), 1.0 + weight, eps)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The chunked gated delta rule (Yang et al., 2024) from an empty state: [B, N, S, D] -> [B, N, S, D].

    `log_decay` and `beta` are [B, N, S]; `q` and `k` are normalised, `q` scaled. S is a multiple of CHUNK.
    """
    b, n, s, d = v.shape
    q, k, v = (x.reshape(b, n, s // CHUNK, CHUNK, x.shape[-1]) for x in (q, k, v))
    total = log_decay.reshape(b, n, -1, CHUNK).cumsum(-1)
    beta = beta.reshape(b, n, -1, CHUNK, 1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    from_start, to_end = total.exp().unsqueeze(-1), (total[..., -1:] - total).exp().unsqueeze(-1)

    k_beta = k * beta
    system = (k_beta @ k.transpose(-1, -2)) * decay
    wanted = torch.cat((v * beta, k_beta * from_start), -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    new_v, k_read = solved.split((d, k.shape[-1]), -1)
    within = (q @ k.transpose(-1, -2)) * decay
    q, k = q * from_start, (k * to_end).transpose(-1, -2)
    kept = total[..., -1].exp()[..., None, None]

    state = v.new_zeros(b, n, k.shape[-2], d)
    out = []
    chunks = (part.unbind(2) for part in (q, k, new_v, k_read, within, kept))  # an index would cost a fill
    for q_c, k_c, new_v_c, k_read_c, within_c, kept_c in zip(*chunks, strict=True):
        change = new_v_c - k_read_c @ state
        out.append(q_c @ state + within_c @ change)
        state = state * kept_c + k_c @ change
    return torch.stack(out, 2).reshape(b, n, s, d)


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise causal convolution of x [B, S, C] with weight [C, 1, W], then SiLU; W shifted products."""
    width, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = padded[:, :length] * weight[:, 0, 0]
    for i in range(1, width):
        out = out + padded[:, i : i + length] * weight[:, 0, i]
    return F.silu(out)


def gated_delta_net(layer: Any, x: Tensor) -> Tensor:
    """A Gated DeltaNet layer: x [B, S, H] -> [B, S, H]."""
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    mixed = causal_conv(torch.cat([part.flatten(2) for part in (q, k, v)], -1), layer.conv1d.weight)
    q, k, v = mixed.split((layer.key_dim, layer.key_dim, layer.value_dim), -1)
    q, k = (part.unflatten(-1, (-1, layer.head_k_dim)) for part in (q, k))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    group = layer.num_v_heads // layer.num_k_heads
    q, k = (part.repeat_interleave(group, 2).transpose(1, 2) for part in (q * layer.head_k_dim**-0.5, k))
    v = v.unflatten(-1, (-1, layer.head_v_dim)).transpose(1, 2)
    log_decay = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    out = delta_rule(q, k, v, log_decay.transpose(1, 2), b.sigmoid().transpose(1, 2)).transpose(1, 2)
    normed = F.rms_norm(out, (out.shape[-1],), layer.norm.weight, layer.layer_norm_epsilon)
    return layer.out_proj((normed * F.silu(z)).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first dimensions of x [B, N, S, D]; cos and sin are [1, S, R]."""
    turned, kept = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    return torch.cat((turned, kept), -1)


def attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gated causal attention: x [B, S, H] -> [B, S, H]."""
    q, gate = layer.q_proj(x).unflatten(-1, (-1, 2 * layer.head_dim)).chunk(2, -1)
    k, v = (proj(x).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.k_proj, layer.v_proj))
    q = rms_norm(q, layer.q_norm.weight, layer.q_norm.eps).transpose(1, 2)
    k = rms_norm(k, layer.k_norm.weight, layer.k_norm.eps).transpose(1, 2)
    k, v = rotate(k, cos, sin), v.transpose(1, 2)
    k, v = (part.repeat_interleave(layer.num_key_value_groups, 1) for part in (k, v))
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
    return layer.o_proj(out.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid())


def sparse_experts(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture-of-experts block: x [T, H] -> its output [T, H], router probabilities [T, E], chosen [T, K]."""
    probs = F.linear(x, block.gate.weight).softmax(-1)
    top, chosen = probs.topk(block.gate.top_k, -1)
    weights = top / top.sum(-1, keepdim=True)

    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=probs.shape[-1]).tolist()
    rows = x.repeat_interleave(block.gate.top_k, 0).index_select(0, order).split(counts)
    gate_up = torch.cat([r @ w.T for r, w in zip(rows, block.experts.gate_up_proj.unbind(), strict=True)])
    gate, up = gate_up.chunk(2, -1)
    rows = (F.silu(gate) * up).split(counts)
    down = torch.cat([r @ w.T for r, w in zip(rows, block.experts.down_proj.unbind(), strict=True)])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    routed = (weights.unsqueeze(1) @ down.index_select(0, back).view(*chosen.shape, -1)).squeeze(1)

    shared = block.shared_expert
    shared_out = shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))
    return routed + block.shared_expert_gate(x).sigmoid() * shared_out, probs, chosen


def forward(model: Qwen3NextForCausalLM, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits [B, S, V] of token ids [B, S], and each layer's router probabilities [T, E] and choices [T, K]."""
    base, eps = model.model, model.config.rms_norm_eps
    x = base.embed_tokens(ids)
    cos, sin = base.rotary_emb(x, torch.arange(ids.shape[1]).unsqueeze(0))
    routing = []
    for layer in base.layers:
        normed = rms_norm(x, layer.input_layernorm.weight, eps)
        if layer.block_type == "linear_attention":
            x = x + gated_delta_net(layer.linear_attn, normed)
        else:
            x = x + attention(layer.self_attn, normed, cos, sin)
        normed = rms_norm(x, layer.post_attention_layernorm.weight, eps)
        out, probs, chosen = sparse_experts(layer.mlp, normed.flatten(0, 1))
        x = x + out.view_as(x)
        routing.append((probs, chosen))
    return model.lm_head(rms_norm(x, base.norm.weight, eps)), routing


def check_against_transformers(model: Qwen3NextForCausalLM, ids: Tensor) -> float:
    """The greatest difference of this module's logits from transformers'; AssertionError above 1e-4."""
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        difference = float((forward(model, ids)[0] - wanted).abs().max())
    if not difference < 1e-4:
        raise AssertionError(f"logits differ from transformers' by {difference}, more than 1e-4")
    return difference
