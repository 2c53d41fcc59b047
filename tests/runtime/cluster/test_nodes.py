"""Deployments on clusters of particular shapes, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.runtime.cluster.program import SCENARIOS, running
from tests.runtime.cluster.scenarios import two_hosts

pytestmark = pytest.mark.ray

# Ray refuses to believe in more GPUs than this variable names.
RAY_MAY_HAVE_GPUS = {"CUDA_VISIBLE_DEVICES": None}


@pytest.mark.slow
def test_one_rank_a_node_gives_the_tokens_of_one_rank(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "two_nodes.py"]) as program:
        program.succeed(timeout_s=180)
        program.assert_left_nothing()


@pytest.mark.slow
def test_ranks_wait_for_workers_that_join_late(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "late_worker.py"], RAY_MAY_HAVE_GPUS) as program:
        program.succeed(timeout_s=180)
        program.assert_left_nothing()


def _why_no_hosts() -> str | None:
    """Why this machine cannot make network namespaces, if it cannot."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "ss", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)} (iproute2, util-linux)"
    name = "moe-runtime-test-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None if made.returncode == 0 else f"ip netns add failed: {made.stderr.strip()}"


@pytest.mark.slow
def test_ranks_on_two_hosts_meet_over_the_wire_between_them(tmp_path: Path) -> None:
    reason = _why_no_hosts()
    if reason:
        pytest.skip(reason)
    try:
        with running(tmp_path, [SCENARIOS / "two_hosts.py"]) as program:
            program.succeed(timeout_s=300)
            program.assert_left_nothing()
    finally:
        two_hosts.remove_hosts()


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch may see a GPU; the scenario needs one without"
)
def test_gpu_ranks_get_their_own_gpu_or_a_reason(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "fake_gpus.py"], RAY_MAY_HAVE_GPUS) as program:
        program.succeed(timeout_s=180)
        program.assert_left_nothing()
