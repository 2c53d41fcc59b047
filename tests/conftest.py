"""Fixtures that the whole suite shares. Ray starts once a session, when the first test asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Before anything imports torch or starts Ray: two cores, several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A shell ignores Ctrl-C for what it starts in the background, and so would every process that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide this machine's GPUs from all tests but those of GPUs: deployments would choose them by themselves."""
    selected = config.getoption("markexpr").replace("not gpu", "")
    if "gpu" not in selected and "MOE_TEST_DEVICE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of this test session's own, stopped at its end."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning"
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches that the code under test writes out of the home directory."""
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
