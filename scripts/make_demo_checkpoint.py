"""Build the demo checkpoint that ships with moe_runtime: its tokenizer, chat template and small random weights.

    python scripts/make_demo_checkpoint.py [DIRECTORY]

Needs the `transformers` extra. The same Python and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Qwen3NextConfig, Qwen3NextForCausalLM

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[1] / "moe_runtime" / "demo_checkpoint"
SEED = 20250911
VOCAB_SIZE = 1024
MAX_LENGTH = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)

# Widely used modules with long, prose-like documentation.
CORPUS_MODULES = (
    "argparse", "asyncio/events", "asyncio/tasks", "collections/__init__", "contextlib", "csv", "datetime",
    "decimal", "difflib", "fractions", "functools", "heapq", "inspect", "json/__init__", "logging/__init__",
    "os", "pathlib", "pickle", "pydoc_data/topics", "random", "shutil", "statistics", "string", "subprocess",
    "tempfile", "textwrap", "threading", "typing", "unittest/case", "urllib/parse",
)  # fmt: skip

CHAT_TEMPLATE = """\
{#- Roles: system, user, assistant, tool. A turn is <|im_start|>role, a newline, text, <|im_end|>, a newline. -#}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content if part.type == 'text' -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages -%}
    {{- raise_exception('a conversation needs at least one message') -}}
{%- endif -%}
{%- set opening = text_of(messages[0].content) if messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {{- opening ~ '\\n\\n' if opening else '' -}}
    {{- 'You can call these functions, described as JSON, one a line:\\n<tools>\\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson ~ '\\n' -}}
    {%- endfor -%}
    {{- '</tools>\\nWrite a call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' -}}
{%- elif opening -%}
    {{- '<|im_start|>system\\n' ~ opening ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('a system message must be the first message') -}}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\\n' ~ text_of(message.content) ~ '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' ~ text_of(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set arguments = function.arguments -%}
            {{- '\\n<tool_call>{"name": ' ~ function.name | tojson ~ ', "arguments": ' -}}
            {{- (arguments if arguments is string else arguments | tojson) ~ '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' ~ text_of(message.content) ~ '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message.role ~ '; use system, user, assistant or tool') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

MODEL_CARD = """\
---
license: apache-2.0
library_name: moe-runtime
---

# Demo checkpoint of moe_runtime

A Qwen3-Next model of {parameters:,} parameters (hidden size 64, 3 Gated DeltaNet layers and 1 full-attention
layer, 32 experts of which 4 serve a token, a shared expert, vocabulary {vocab_size}), bfloat16.

**The weights are random. Nothing was trained, and the text it writes means nothing.** It is here so that
the whole path from a checkpoint to streamed tokens runs on any machine in seconds.

* Weights: drawn from a seeded generator by `scripts/make_demo_checkpoint.py`. Apache-2.0, as moe_runtime.
* Tokenizer: a byte-level BPE with {vocab_size} tokens, trained by the same script on the docstrings and help topics of
  Python {python}'s standard library, which are under the PSF License Agreement, version 2. No
  training text is in these files beyond the tokens themselves.
* Chat template: written for this checkpoint, in the ChatML manner (`<|im_start|>role ... <|im_end|>`), with the roles
  system, user, assistant and tool. Apache-2.0.
"""


def corpus() -> Iterator[str]:
    """Docstrings of some of the standard library, in a fixed order; for the help topics, every string."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in CORPUS_MODULES:
        tree = ast.parse((library / f"{module}.py").read_text(encoding="utf-8"))
        if module == "pydoc_data/topics":
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, the special tokens first; every text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers and moe_runtime read beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[IM_END],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
    }


def model_config() -> Qwen3NextConfig:
    """Small, with every part of the real architecture but dense layers and tied embeddings."""
    return Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
        pad_token_id=END_OF_TEXT,
    )


def draw_weights(model: Qwen3NextForCausalLM, seed: int) -> None:
    """Fill every parameter from one seeded generator, so that no part of the model is without effect.

    Norm weights stay near, not at, their neutral value; decays are slow enough that state matters; routers
    are sharp. Matrices keep the variance of their input.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                value = math.log(0.3) + 0.4 * noise
            elif name.endswith("dt_bias"):
                value = -2.0 + 0.5 * noise
            elif name.endswith("linear_attn.norm.weight"):
                value = 1.0 + 0.2 * noise
            elif "norm" in name:
                value = 0.2 * noise
            elif name.endswith("mlp.gate.weight"):
                value = noise * 2.0 / math.sqrt(parameter.shape[-1])
            elif name.endswith("embed_tokens.weight"):
                value = noise
            elif name.endswith("lm_head.weight"):
                value = noise * 3.0 / math.sqrt(parameter.shape[-1])
            else:
                value = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(value)


def write_checkpoint(directory: Path) -> None:
    """Write the whole checkpoint, over what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(corpus()).save(str(directory / "tokenizer.json"), pretty=False)
    text = json.dumps(tokenizer_config(), indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    model = Qwen3NextForCausalLM(model_config())
    draw_weights(model, SEED)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=[IM_END, END_OF_TEXT],
        pad_token_id=END_OF_TEXT,
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
    )
    model.save_pretrained(directory)
    card = MODEL_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=VOCAB_SIZE,
        python=platform.python_version(),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo checkpoint that ships with moe_runtime.")
    parser.add_argument("directory", type=Path, nargs="?", default=DEFAULT_DIRECTORY, help="where it goes")
    directory = parser.parse_args().directory
    write_checkpoint(directory)
    for path in sorted(directory.iterdir()):
        sys.stdout.write(f"{path.stat().st_size:>9,}  {path}\n")


if __name__ == "__main__":
    main()
