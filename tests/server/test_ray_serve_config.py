"""A configuration for `serve deploy`: it is accepted, a dead rank is replaced, and deleting drains what is at work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.cluster.head import ENVIRONMENT, free_ports
from tests.runtime.cluster.program import running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCENARIO = Path(__file__).with_name("serve_config_scenario.py")
STEP_S = 300  # a step starts Serve, replicas or ranks


def test_a_configuration_is_accepted_dead_ranks_are_replaced_and_deleting_drains(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with running(tmp_path, [SCENARIO, f"http://127.0.0.1:{port}"], ENVIRONMENT) as scenario:
        scenario.wait_for("the configuration is accepted", STEP_S)
        scenario.wait_for("the dead ranks are replaced", STEP_S)
        scenario.wait_for("the application is drained", STEP_S)
        scenario.succeed()
        scenario.assert_left_nothing(timeout_s=60)
