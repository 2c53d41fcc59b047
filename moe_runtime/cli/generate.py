"""`moe-runtime generate`: continue prompts on the terminal, and say how fast and by whose experts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.engine_args import add_engine_arguments, add_model_arguments, llm_arguments
from moe_runtime.cli.sampling_args import add_sampling_arguments, given_sampling
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.llm import LLM
    from moe_runtime.request import SamplingParams

_DEFAULT_MAX_TOKENS = 128


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("generate", help="continue prompts on the terminal")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; may be given several times"
    )
    parser.add_argument("--chat", action="store_true", help="send each prompt through the chat template")
    add_sampling_arguments(parser, "checkpoint")
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moe_runtime.llm import LLM
    from moe_runtime.request import SamplingParams

    if not args.prompt:
        raise ConfigError("generate needs a prompt; give --prompt TEXT, once or several times")
    given = given_sampling(args)
    # Checked before anything is started: bad values should not cost a start-up.
    SamplingParams(**given)
    with LLM(**llm_arguments(args), use_tqdm=sys.stderr.isatty()) as llm:
        defaults = dataclasses.replace(llm.get_default_sampling_params(), max_tokens=_DEFAULT_MAX_TOKENS)
        params = dataclasses.replace(defaults, **given)
        before = llm.expert_load()
        num_tokens, seconds = _stream_all(llm, args, params)
        print(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)
        _print_load(llm, before)
    return 0


def _stream_all(llm: LLM, args: argparse.Namespace, params: SamplingParams) -> tuple[int, float]:
    """Print every prompt with its continuation as it comes; returns output tokens and seconds."""
    num_tokens = 0
    start = time.perf_counter()
    for number, text in enumerate(args.prompt):
        if number:
            print("\n")
        prompt: Any = text
        if args.chat:
            tokenizer = llm.get_tokenizer()
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])
            prompt = {"prompt_token_ids": tokenizer.encode(rendered, add_special_tokens=False)}
        print(text, end="\n" if args.chat else "", flush=True)
        for delta in llm.stream(prompt, params):
            num_tokens += len(delta.new_token_ids)
            print(delta.text, end="", flush=True)
    print(flush=True)
    return num_tokens, max(time.perf_counter() - start, 1e-9)


def _print_load(llm: LLM, before: list[list[list[int]]]) -> None:
    """A table of how many tokens each rank's experts took since `before`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Tokens that each rank's experts took")
    for column in ("rank", "node", "device", "experts", "tokens", "share", "busiest expert"):
        table.add_column(column, justify="left" if column in ("node", "device") else "right")
    taken = [
        [[now - then for now, then in zip(a, b, strict=True)] for a, b in zip(after, old, strict=True)]
        for after, old in zip(llm.expert_load(), before, strict=True)
    ]
    totals = [sum(map(sum, layers)) for layers in taken]
    for report, layers, total in zip(llm.ranks, taken, totals, strict=True):
        busiest = max((max(layer, default=0) for layer in layers), default=0)
        share = total / max(sum(totals), 1)
        table.add_row(
            str(report.rank),
            report.node_ip,
            report.device,
            str(report.num_local_experts),
            str(total),
            f"{share:.1%}",
            str(busiest),
        )
    Console(stderr=True).print(table)
