"""What transformers' own classes write greedily with the demo checkpoint, in float32."""

from __future__ import annotations

import torch

from moe_runtime.modelfiles import resolve_model


def greedy_text(prompt: str | list[dict[str, str]], max_tokens: int) -> str:
    """The continuation of a text, or the answer to a chat's messages, with the checkpoint's other defaults."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model(None).path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
