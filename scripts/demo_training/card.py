"""The model card: what the checkpoint is, from which text, how it was trained, and what its experts do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3NextForCausalLM

from demo_training.data import SHARES
from demo_training.forward import forward
from demo_training.training import (
    BALANCE,
    DECAY_SHARE,
    LENGTH,
    PEAK_RATE,
    SEQUENCES,
    Progress,
    Tokens,
    sequences,
)

CARD = """\
---
license: apache-2.0
language: en
library_name: moe-runtime
pipeline_tag: text-generation
---

# Demo checkpoint of moe_runtime

A Qwen3-Next model of {parameters:,} parameters, of which a token uses {active:,}: hidden size {hidden}, {linear} Gated
DeltaNet layers and {full} of full attention, {experts} experts of which {top_k} serve a token, a shared expert,
vocabulary {vocab:,}, bfloat16. It was trained from scratch so that the first text a newcomer sees is English. **It is
a demonstration: it knows next to nothing, and what it says is often wrong.** Use it to see a mixture of experts at
work, not for its answers.

Weights, tokenizer and chat template are Apache-2.0, as moe_runtime, and were made by
`scripts/train_demo_checkpoint.py`. The template is in the ChatML manner (`<|im_start|>role ... <|im_end|>`), with the
roles system, user, assistant and tool. The tokenizer is a byte-level BPE, trained on the same text.

## Training text

From Debian packages, which the script downloads and unpacks:

{sources}

It makes five domains; each sequence of a batch is from one of them, drawn by its share. One block of twenty paragraphs,
lines or conversations in a hundred is held out of the training of both the tokenizer and the model.

{domains}

* `novels`: the novels' paragraphs. `glosses`: a line for each of WordNet's rarer senses. `python`: the documentation
  without its markup. `humour`: the entries of the two satirical dictionaries.
* `conversations` are **made by rule, not written by people or by another model**: "What does X mean?" answered with
  WordNet's first sense of X, "What does the Python module X do?" with its synopsis, "Tell me a story." with a paragraph
  of a novel, and {greetings} greetings and questions about the model, with answers written for this checkpoint.
* Senses and entries that are, or are about, insults and sex were left out by a list of words.

WordNet is Copyright 2006 by Princeton University; its terms and those of the Python Software Foundation allow
this use. No training text is in these files beyond what the tokens and the weights hold.

## Training

* Seed {seed}. {steps:,} steps of {sequences} sequences of {length} tokens: {tokens:,} tokens.
* {cpu:.0f} minutes of one CPU core, {speed:,.0f} tokens a second of it; {wall:.0f} minutes of a clock, as other work
  shared the machine.
* {optimizers}; peak rate {rate}, which falls linearly to zero over the last {decay:.0%}
  of the steps; a load-balancing loss, times {balance}.
* `python scripts/train_demo_checkpoint.py --work DIRECTORY --steps {steps}` repeats the run without a clock, but for
  the order of sums, which differs between processors and numbers of threads.

Loss in nats a token, on the training text since the row before and on each domain's held-out text:

{curve}

## What the experts do

Counted over {counted:,} held-out tokens of each domain. For each layer and domain the table has the expert that the
domain chooses most often compared with all domains together: its number, its share of the domain's choices (equal
shares would be {equal:.1%}), and how many times its share of all choices that is. The bits are what the expert of a
single choice tells about the domain, on average, of the {most:.2f} bits that would name it.

{experts_table}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the card reports of a run."""

    progress: Progress
    seed: int
    sources: list[dict[str, str]]
    train: dict[str, Tokens]
    held_out: dict[str, Tokens]
    num_greetings: int


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bits_per_byte(nats_per_token: float, tokens: Tokens) -> float:
    """A loss in the unit that does not depend on the tokenizer."""
    return nats_per_token * len(tokens.ids) / tokens.num_bytes / math.log(2)


@torch.no_grad()
def expert_choices(
    model: Qwen3NextForCausalLM, held_out: dict[str, Tokens], ids: dict[str, Tensor]
) -> list[Tensor]:
    """For each layer, each domain's shares of its router's choices: [domains, E]."""
    num_experts = model.config.num_experts
    shares: list[list[Tensor]] = [[] for _ in model.model.layers]
    for name in held_out:
        for layer, (_, chosen) in enumerate(forward(model, ids[name])[1]):
            counts = torch.bincount(chosen.flatten(), minlength=num_experts).double()
            shares[layer].append(counts / counts.sum())
    return [torch.stack(layer) for layer in shares]


def information(shares: Tensor) -> float:
    """Mutual information of expert and domain in bits, the domains being equally likely: shares [domains, E]."""
    overall = shares.mean(0)
    return float((shares * (shares / overall).log2().nan_to_num(0.0, 0.0, 0.0)).sum(1).mean())


def experts_table(shares_of_layers: list[Tensor], names: list[str], kinds: list[str]) -> str:
    """A row for each layer: its kind, the information, and every domain's expert."""
    rows = []
    for layer, (shares, kind) in enumerate(zip(shares_of_layers, kinds, strict=True)):
        lift = shares / shares.mean(0).clamp_min(1e-9)
        lift[shares < 1 / shares.shape[1]] = 0.0  # an expert that hardly serves a domain is not that domain's
        best = lift.argmax(1).tolist()
        cells = [f"{e}: {shares[i, e]:.0%}, {lift[i, e]:.1f}x" for i, e in enumerate(best)]
        rows.append([f"{layer}, {kind}", f"{information(shares):.2f}", *cells])
    return table(["layer", "bits", *names], rows)


def curve_table(run: Run) -> str:
    """About a dozen points of the loss curve, and the last in bits a byte."""
    curve, names = run.progress.curve, list(run.held_out)
    every = max(1, len(curve) // 12)
    points = [point for i, point in enumerate(curve[:-1]) if i % every == 0 and i + every / 2 < len(curve)]
    rows = [
        [f"{p['step']:,}", f"{p['train']:.2f}", *(f"{p[n]:.2f}" for n in names)] for p in [*points, curve[-1]]
    ]
    last = [f"{bits_per_byte(curve[-1][name], run.held_out[name]):.2f}" for name in names]
    return table(["step", "train", *names], [*rows, ["bits a byte", "", *last]])


def active_parameters(model: Qwen3NextForCausalLM) -> int:
    """Parameters that serve a token: all but the experts it is not sent to, and of the embeddings one row."""
    config, count = model.config, 0
    for name, parameter in model.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        count += config.hidden_size if "embed_tokens" in name else int(parameter.numel() * share)
    return count


def model_card(model: Qwen3NextForCausalLM, run: Run) -> str:
    """The whole card of a trained model, float32."""
    config, progress = model.config, run.progress
    ids = {name: held_out_ids(tokens) for name, tokens in run.held_out.items()}
    domains = [
        [
            f"`{n}`",
            f"{SHARES[n]:.0%}",
            f"{t.num_bytes:,}",
            f"{len(t.ids):,}",
            f"{run.held_out[n].num_bytes:,}",
        ]
        for n, t in run.train.items()
    ]
    seen = progress.step * SEQUENCES * LENGTH
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        active=active_parameters(model),
        hidden=config.hidden_size,
        linear=config.layer_types.count("linear_attention"),
        full=config.layer_types.count("full_attention"),
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        vocab=config.vocab_size,
        sources=table(
            ["package", "version", "what is read", "licence", "SHA-256 of the package"],
            [
                [f"`{s['package']}`", s["version"], s["text"], s["licence"], f"`{s['sha256']}`"]
                for s in run.sources
            ],
        ),
        domains=table(["domain", "share", "bytes", "tokens", "bytes held out"], domains),
        greetings=run.num_greetings,
        steps=progress.step,
        sequences=SEQUENCES,
        length=LENGTH,
        tokens=seen,
        cpu=progress.cpu_s / 60,
        wall=progress.wall_s / 60,
        speed=seen / progress.cpu_s,
        seed=run.seed,
        optimizers="Muon for the matrices and AdamW for the rest",
        rate=PEAK_RATE,
        balance=BALANCE,
        decay=DECAY_SHARE,
        curve=curve_table(run),
        counted=next(iter(ids.values())).numel(),
        equal=1 / config.num_experts,
        most=math.log2(len(run.held_out)),
        experts_table=experts_table(
            expert_choices(model, run.held_out, ids),
            list(run.held_out),
            ["attention" if kind == "full_attention" else "DeltaNet" for kind in config.layer_types],
        ),
    )


def held_out_ids(tokens: Tokens, count: int = 16) -> Tensor:
    """Held-out sequences to count choices on: [count, LENGTH]."""
    return torch.from_numpy(sequences(tokens, count, np.random.default_rng(1)))[:, :-1]
