"""What ranks write arrives on the driver's own output, and so in its job's log, with rank and node in front."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

from tests.runtime.cluster.program import SCENARIOS, running

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def _said(output: str) -> set[tuple[str, str]]:
    """(rank and node, line) of each line that Ray carried from a rank."""
    return set(re.findall(r"\((rank \d+, [\d.]+) pid=\d+\S*\) (.*)$", output, flags=re.MULTILINE))


def test_every_line_of_every_rank_arrives_with_rank_and_node(tmp_path: Path) -> None:
    ip = ray.util.get_node_ip_address()
    arguments = ["--prompt", "a", "--max-tokens", "1", "--device", "cpu", "--expert-parallel-size", "2"]
    env = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "MOE_RUNTIME_LOG": "INFO"}
    with running(tmp_path, [SCENARIOS / "loud_ranks.py", "generate", *arguments], env) as program:
        program.succeed()
        stdout, stderr = _said(program.stdout), _said(program.stderr)
    for rank in range(2):
        who = f"rank {rank}, {ip}"
        assert {(who, f"made {rank}"), (who, f"printed {rank}")} <= stdout
        assert {(who, f"INFO moe_runtime.loud: logged {rank}"), (who, f"native {rank}")} <= stderr
