"""The command line with ranks that print, log and write as native code does; all say the same but for numbers.

python loud_ranks.py ARGUMENTS OF moe-runtime
"""

from __future__ import annotations

import argparse
import functools
import sys

from moe_runtime.cli import generate
from moe_runtime.cli.main import main


def run_with_loud_ranks(args: argparse.Namespace) -> int:
    # Imports Ray, which reads its settings then: not before the command line has made them.
    from moe_runtime import deployment

    worker = "tests.runtime.cluster.loud_worker:LoudWorker"
    deployment.Engine = functools.partial(deployment.Engine, worker=worker)  # type: ignore[misc, assignment]
    return run(args)


run, generate.run = generate.run, run_with_loud_ranks
sys.exit(main())
