"""Train the demo checkpoint that ships with moe_runtime, from text that Debian packages hold, on CPU cores.

    python scripts/train_demo_checkpoint.py --work DIRECTORY [--out DIRECTORY] [--minutes 75 | --steps N]

Needs the `transformers` extra, apt-get and dpkg-deb. Packages in other versions than those that the shipped checkpoint
was trained on are refused without --allow-other-data. DIRECTORY keeps the packages, the tokens and the state of the
run, which is saved every two minutes: the same command goes on from there after an interruption. `--minutes 0` writes
the checkpoint from that state, however far it came. The log goes to stdout, as JSON lines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo_training import data, sources
from demo_training.card import Run
from demo_training.conversations import GREETINGS
from demo_training.export import write_checkpoint
from demo_training.forward import check_against_transformers
from demo_training.model import new_model
from demo_training.tokenizer import train_tokenizer
from demo_training.training import Budget, Tokens, Trainer, batch, tokenize

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[1] / "moe_runtime" / "demo_checkpoint"
SEED = 20250911


def prepare(work: Path, *, allow_other: bool) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Training and validation tokens of every domain; what was made before is read from `work`."""
    sources.fetch(work / "packages", allow_other=allow_other)
    cache = work / "tokens.pt"
    if not cache.exists():
        domains = data.domains(work / "packages", SEED)
        kept = (unit for units in domains.values() for unit in data.split(units)[0])
        tokenizer = train_tokenizer(part for unit in kept for part in data.SPECIAL.split(unit))
        tokenizer.save(str(work / "tokenizer.json"), pretty=False)
        torch.save(tokenize(Tokenizer.from_file(str(work / "tokenizer.json")), domains), cache)
    train, held_out = torch.load(cache, weights_only=False)  # our own file
    return train, held_out


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint that ships with moe_runtime.")
    parser.add_argument("--work", type=Path, required=True, help="packages, tokens and the state of the run")
    parser.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY, help="where the checkpoint goes")
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="of CPU time of each thread, to train for"
    )
    parser.add_argument(
        "--wall-minutes", type=float, default=240.0, help="of a clock, if those are over first"
    )
    parser.add_argument("--steps", type=int, help="steps to train, instead of minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="take packages in other versions than the shipped one's",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    try:
        train, held_out = prepare(args.work, allow_other=args.allow_other_data)
    except sources.SourceError as error:
        sys.exit(f"train_demo_checkpoint.py: {error}")
    trainer = Trainer(new_model(SEED), args.work, SEED)
    difference = check_against_transformers(trainer.model, batch(train, 0, 0)[:2, :-1])
    sys.stdout.write(f"greatest difference of logits from transformers': {difference:.1e}\n")
    if args.minutes > 0:
        trainer.run(train, held_out, Budget(args.steps, args.minutes * args.threads, args.wall_minutes))
    run = Run(
        progress=trainer.progress,
        seed=SEED,
        sources=sources.provenance(args.work / "packages"),
        train=train,
        held_out=held_out,
        num_greetings=len(GREETINGS),
    )
    write_checkpoint(trainer.model, args.work / "tokenizer.json", run, args.out)
    for path in sorted(args.out.iterdir()):
        sys.stdout.write(f"{path.stat().st_size:>9,}  {path}\n")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of this process, which is its own
    main()
