"""The training loop: batches, learning rate, validation, and a state on disk from which it goes on."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3NextForCausalLM

from demo_training.data import SHARES, split
from demo_training.forward import forward
from demo_training.muon import Muon

SEQUENCES, LENGTH = 8, 256  # of a batch
PEAK_RATE, WARMUP_STEPS, DECAY_SHARE = 3e-3, 30, 0.35  # the last DECAY_SHARE of the steps fall linearly to 0
MUON_SCALE = 6.0  # Muon's rate over AdamW's
# What Muon trains; the embeddings, the head, the routers, the convolutions and the vectors are AdamW's.
MATRICES = re.compile(r"(qkvz|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)(\.weight)?$")
BALANCE = 0.01  # weight of the load-balancing loss
LOG_STEPS, VALIDATION_STEPS, SAVE_S = 20, 200, 120


@dataclass(slots=True)
class Tokens:
    """A domain's text as token ids, and where a sequence may start."""

    ids: np.ndarray
    starts: np.ndarray
    num_bytes: int


def encode(tokenizer: Tokenizer, units: list[str]) -> Tokens:
    """Concatenate the tokens of `units`; a sequence may start at any unit that has LENGTH tokens after it."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(units)]
    ids = np.concatenate([np.array(part, dtype=np.int64) for part in encoded])
    starts = np.cumsum([0, *map(len, encoded)])[:-1]
    return Tokens(ids, starts[starts < len(ids) - LENGTH], sum(len(unit.encode()) for unit in units))


def tokenize(
    tokenizer: Tokenizer, domains: dict[str, list[str]]
) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Training and validation tokens of every domain."""
    parts = {name: split(units) for name, units in domains.items()}
    train = {name: encode(tokenizer, kept) for name, (kept, _) in parts.items()}
    return train, {name: encode(tokenizer, held_out) for name, (_, held_out) in parts.items()}


def sequences(tokens: Tokens, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` stretches of LENGTH + 1 tokens that start where a unit does: [count, LENGTH + 1]."""
    return np.stack([tokens.ids[i : i + LENGTH + 1] for i in rng.choice(tokens.starts, count)])


def batch(train: dict[str, Tokens], seed: int, step: int) -> Tensor:
    """The sequences of a step, the domains drawn by their shares: [SEQUENCES, LENGTH + 1]."""
    rng = np.random.default_rng((seed, step))
    names = rng.choice(list(SHARES), SEQUENCES, p=list(SHARES.values()))
    return torch.from_numpy(np.concatenate([sequences(train[str(name)], 1, rng) for name in names]))


def balance_loss(routing: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Switch Transformer's load-balancing loss, the mean over the layers: 1 where all experts serve alike."""
    losses = []
    for probs, chosen in routing:
        share = torch.bincount(chosen.flatten(), minlength=probs.shape[-1]) / chosen.numel()
        losses.append(probs.shape[-1] * (share * probs.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def validate(model: Qwen3NextForCausalLM, held_out: dict[str, Tokens], count: int = 8) -> dict[str, float]:
    """Nats per token of the same `count` held-out sequences of each domain."""
    losses = {}
    for name, tokens in held_out.items():
        ids = torch.from_numpy(sequences(tokens, count, np.random.default_rng(0)))
        logits, _ = forward(model, ids[:, :-1])
        losses[name] = round(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())), 4)
    return losses


@dataclass(slots=True)
class Budget:
    """How long to train: a number of steps, or minutes from which the number follows.

    With minutes, the learning rate stays at its peak until 1 - DECAY_SHARE of them have passed; the number of
    steps is fixed then, so that the same run is had again from that number, without a clock.
    """

    steps: int | None
    cpu_minutes: float  # of this process, so that one that is stopped or shares its cores trains no less
    wall_minutes: float

    def decide(self, step: int, cpu_s: float, wall_s: float) -> None:
        """Fix the number of steps if it is time to."""
        passed = max(cpu_s / (60 * self.cpu_minutes), wall_s / (60 * self.wall_minutes))
        if self.steps is None and passed >= 1 - DECAY_SHARE:
            self.steps = math.ceil(step / (1 - DECAY_SHARE))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        if self.steps is not None:
            rate *= min(1.0, (self.steps - step) / (DECAY_SHARE * self.steps))
        return rate


@dataclass(slots=True)
class Progress:
    """What is saved beside the weights."""

    step: int = 0
    steps: int | None = None  # of the whole run, once that is known
    cpu_s: float = 0.0
    wall_s: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)  # of each validation


class Trainer:
    """A run, which can be ended at any time and goes on from its last saved state."""

    def __init__(self, model: Qwen3NextForCausalLM, directory: Path, seed: int) -> None:
        self.model, self.file, self.seed = model, directory / "state.pt", seed
        matrices = [(name, p) for name, p in model.named_parameters() if MATRICES.search(name)]
        others = [p for name, p in model.named_parameters() if not MATRICES.search(name)]
        adam = torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.optimizers = (adam, Muon(matrices, lr=PEAK_RATE))
        self.progress = Progress()
        if self.file.exists():
            saved = torch.load(self.file)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.progress = Progress(**saved["progress"])

    def save(self) -> None:
        """Write the state, whole or not at all."""
        partial = self.file.with_suffix(".partial")
        progress = {name: getattr(self.progress, name) for name in Progress.__slots__}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(
            {"model": self.model.state_dict(), "optimizers": optimizers, "progress": progress}, partial
        )
        os.replace(partial, self.file)

    def step(self, ids: Tensor, rate: float) -> float:
        """One update; the loss of the text in nats per token."""
        logits, routing = forward(self.model, ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + BALANCE * balance_loss(routing)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, scale in zip(self.optimizers, (1.0, MUON_SCALE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def run(self, train: dict[str, Tokens], held_out: dict[str, Tokens], budget: Budget) -> None:
        """Train until the budget is spent, with a line of JSON to stdout now and then."""
        progress, recent = self.progress, []
        cpu_start, wall_start = time.process_time() - progress.cpu_s, time.monotonic() - progress.wall_s
        saved_s, budget.steps = progress.cpu_s, progress.steps or budget.steps
        while budget.steps is None or progress.step < budget.steps:
            recent.append(self.step(batch(train, self.seed, progress.step), budget.rate(progress.step)))
            progress.step += 1
            progress.cpu_s, progress.wall_s = time.process_time() - cpu_start, time.monotonic() - wall_start
            budget.decide(progress.step, progress.cpu_s, progress.wall_s)
            progress.steps = budget.steps
            last = progress.step == budget.steps
            if progress.step % LOG_STEPS == 0 or last:
                self.report(sum(recent[-LOG_STEPS:]) / len(recent[-LOG_STEPS:]), budget.rate(progress.step))
            if progress.step % VALIDATION_STEPS == 0 or last:
                point = {"step": progress.step, "train": round(sum(recent) / len(recent), 4)}
                progress.curve.append({**point, **validate(self.model, held_out)})
                recent.clear()
                sys.stdout.write(json.dumps(progress.curve[-1]) + "\n")
            if progress.cpu_s - saved_s > SAVE_S or last:
                self.save()
                saved_s = progress.cpu_s

    def report(self, loss: float, rate: float) -> None:
        """A line on how far the run is."""
        progress = self.progress
        line = {
            "step": progress.step,
            "of": progress.steps,
            "loss": round(loss, 4),
            "rate": round(rate, 6),
            "cpu_s": round(progress.cpu_s),
            "wall_s": round(progress.wall_s),
            "tokens_per_cpu_s": round(progress.step * SEQUENCES * LENGTH / progress.cpu_s),
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
