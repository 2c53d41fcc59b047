"""Write a trained model as a checkpoint in the Hub's own format and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3NextForCausalLM

from demo_training.card import Run, model_card
from demo_training.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, tokenizer_config


def generation_config() -> GenerationConfig:
    """How text is sampled by default; the penalty keeps so small a model from going in circles."""
    return GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=[IM_END, END_OF_TEXT],
        pad_token_id=END_OF_TEXT,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.05,
    )


def write_checkpoint(model: Qwen3NextForCausalLM, tokenizer: Path, run: Run, directory: Path) -> None:
    """Write the whole checkpoint in bfloat16, over what is there. The model is bfloat16 afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(model_card(model, run), encoding="utf-8")
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    text = json.dumps(tokenizer_config(), indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    model = model.to(torch.bfloat16)
    model.generation_config = generation_config()
    model.save_pretrained(directory)
