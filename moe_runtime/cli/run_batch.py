"""`moe-runtime run-batch`: answer a file of requests in OpenAI's batch format."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.engine_args import (
    add_engine_arguments,
    add_model_arguments,
    llm_arguments,
    start_or_attach,
)
from moe_runtime.cli.parser_args import add_parser_arguments, parser_settings
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.batch_file.answers import AnswerFile
    from moe_runtime.batch_file.run import BatchSummary
    from moe_runtime.frontend import Frontend
    from moe_runtime.server.config import ServerConfig


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "run-batch",
        help="answer a file of requests in OpenAI's batch format",
        description="Answer every request of a file; a run over an output file that is there already goes on with "
        "it. The exit status is 0 if every request of the input is answered without an error.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "-i",
        "--input-file",
        required=True,
        metavar="PATH",
        help="a request a line: custom_id, method, url, body",
    )
    parser.add_argument(
        "-o", "--output-file", required=True, metavar="PATH", help="an answer a line, in any order"
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="requests at work at once (default: what the ranks run at once)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may give the model (default: MODEL)",
    )
    parser.add_argument("--connect", metavar="NAME", help="use a named deployment that runs already")
    add_parser_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moe_runtime.batch_file.answers import AnswerFile
    from moe_runtime.batch_file.requests import check_requests
    from moe_runtime.batch_file.run import BatchSummary

    source, target = Path(args.input_file), Path(args.output_file)
    _check(args, source, target)
    custom_ids = check_requests(source)
    with AnswerFile(target, custom_ids) as output:
        summary = BatchSummary(total=len(custom_ids), skipped=len(output.answered))
        try:
            if summary.skipped < summary.total:
                _answer_with_engine(args, source, output, summary)
        finally:
            print(f"moe-runtime: {summary}: {target}", file=sys.stderr, flush=True)
    return 1 if summary.failed else 0


def _check(args: argparse.Namespace, source: Path, target: Path) -> None:
    """Find out before anything is started what cannot work."""
    from moe_runtime.config import EngineConfig

    if source.exists() and target.exists() and source.samefile(target):
        raise ConfigError(f"-i and -o are the same file, {source}; give the answers one of their own")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
    given = llm_arguments(args)
    model = [given.pop(name) for name in ("model", "revision", "model_class")]
    if args.connect is not None and (given or any(model)):
        raise ConfigError(
            "--connect uses a deployment as it runs; leave out MODEL and the deployment's flags"
        )
    EngineConfig.from_kwargs(given)
    _server_config(args, concurrency=1)


def _server_config(args: argparse.Namespace, concurrency: int) -> ServerConfig:
    from moe_runtime.server.config import ServerConfig

    model = args.model or args.connect or "demo"
    return ServerConfig(
        served_model_names=tuple(args.served_model_name or [model]),
        model_root=model,
        max_concurrent_requests=concurrency,
        request_timeout_s=None,
        **parser_settings(args),
    )


def _answer_with_engine(
    args: argparse.Namespace, source: Path, output: AnswerFile, summary: BatchSummary
) -> None:
    frontend = start_or_attach(args)
    try:
        asyncio.run(_answer_all(args, frontend, source, output, summary))
    finally:
        frontend.close()


async def _answer_all(
    args: argparse.Namespace, frontend: Frontend, source: Path, output: AnswerFile, summary: BatchSummary
) -> None:
    from tqdm import tqdm

    from moe_runtime.async_llm import AsyncLLM
    from moe_runtime.batch_file.in_process import InProcessHandle
    from moe_runtime.batch_file.requests import read_requests
    from moe_runtime.batch_file.run import run_batch
    from moe_runtime.server.app import make_app

    engine = AsyncLLM(frontend)
    config = frontend.plan.config
    concurrency = args.max_concurrency or config.max_num_seqs * config.expert_parallel_size
    app = make_app(engine, _server_config(args, concurrency))
    with tqdm(
        total=summary.total,
        initial=summary.skipped,
        unit="request",
        desc="Answering",
        disable=not sys.stderr.isatty(),
    ) as bar:

        def count(ok: bool) -> None:
            bar.update()
            if not ok:
                bar.set_postfix_str(f"{summary.failed} failed")

        async with InProcessHandle(app, engine.check_health) as handle:
            await run_batch(
                read_requests(source), handle, output, summary, concurrency=concurrency, on_done=count
            )
