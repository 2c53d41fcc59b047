"""`moe-runtime stop NAME`: end a named deployment."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("stop", help="end a named deployment")
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moe_runtime.connecting import ensure_ray
    from moe_runtime.named import stop_deployment

    connected = ensure_ray(must_outlive_us=True)
    try:
        stop_deployment(args.name)
    finally:
        if connected:
            import ray

            ray.shutdown()
    print(f"stopped {args.name}")
    return 0
