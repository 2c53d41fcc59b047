"""The model's shape and its first weights."""

from __future__ import annotations

import math

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from demo_training.tokenizer import END_OF_TEXT, IM_END, MAX_LENGTH, VOCAB_SIZE


def model_config() -> Qwen3NextConfig:
    """Small, with the real architecture's parts and ratios: three DeltaNet layers to one of attention, many experts."""
    return Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
        pad_token_id=END_OF_TEXT,
    )


def new_model(seed: int) -> Qwen3NextForCausalLM:
    """The untrained model in float32; its decays start as Mamba 2's do, from slow to fast."""
    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(model_config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                step = torch.exp(torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)))
                parameter.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is `step`
            elif name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log())
    return model
