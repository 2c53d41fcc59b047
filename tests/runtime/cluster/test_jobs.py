"""`ray job submit` of an uninstalled checkout to a cluster that `ray start` made: serve, query, stop; a batch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.runtime.cluster.head import ENVIRONMENT, RAY, Head, free_ports, started_head
from tests.source_tree import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TIMEOUT_S = 180
RANKS = "--device cpu --expert-parallel-size 2"
# The command line with ranks that print, log, and write as native code does.
LOUD = "tests/runtime/cluster/scenarios/loud_ranks.py"


class Cluster:
    """A Ray of one node, and jobs submitted to it."""

    def __init__(self, head: Head, directory: Path) -> None:
        self.head = head
        self.jobs = JobSubmissionClient(head.dashboard)
        self._directory = directory

    def submit(self, arguments: str, *, program: str = "-m moe_runtime") -> str:
        """`ray job submit` of our command line, as the README says; returns the job's id."""
        runtime_env = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
        # The checkout has no compiled kernels, and nothing here depends on which ones there are.
        runtime_env["env_vars"] |= {"MOE_RUNTIME_KERNELS": "reference", "MOE_RUNTIME_LOG": "INFO"}
        runtime_env["excludes"].remove("/tests")  # it has the program that LOUD names
        file = self._directory / "runtime_env.yaml"
        file.write_text(yaml.safe_dump(runtime_env))
        job = f"job-{len(self.jobs.list_jobs())}"
        command = [
            RAY,
            "job",
            "submit",
            "--no-wait",
            f"--address={self.head.dashboard}",
            f"--submission-id={job}",
        ]
        places = [f"--working-dir={ROOT}", f"--runtime-env={file}"]
        entrypoint = [sys.executable, *shlex.split(f"{program} {arguments}")]
        submitted = subprocess.run(
            [*command, *places, "--", *entrypoint],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        return job

    def wait_for(self, job: str, what: str, holds: Callable[[], bool]) -> None:
        """Wait until something holds of a job."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {TIMEOUT_S} s for {what}\n{self.jobs.get_job_logs(job)}")
            time.sleep(0.2)

    def finish(self, job: str) -> tuple[JobStatus, int | None]:
        """Wait for a job's end; its status, and the exit status of its driver."""
        self.wait_for(job, "the job's end", lambda: self.jobs.get_job_status(job).is_terminal())
        info = self.jobs.get_job_info(job)
        return info.status, info.driver_exit_code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started_head(tmp_path_factory.mktemp("ray")) as head:
        yield Cluster(head, tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("ingress", ["uvicorn --ray-metrics", "serve"])
def test_a_server_is_submitted_queried_and_stopped_and_leaves_nothing(cluster: Cluster, ingress: str) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    job = cluster.submit(f"serve --ingress {ingress} --host 127.0.0.1 --port {port} {RANKS}")
    cluster.wait_for(job, "the ready line", lambda: f"at {url}" in cluster.jobs.get_job_logs(job))
    assert cluster.jobs.get_job_status(job) == JobStatus.RUNNING
    _query(url)
    if "--ray-metrics" in ingress:
        cluster.wait_for(job, "its metrics among the node's", lambda: _has_counted(cluster.head.metrics, 2))
    assert len(cluster.head.left()) > 2

    cluster.jobs.stop_job(job)
    assert cluster.finish(job)[0] == JobStatus.STOPPED
    cluster.wait_for(job, "the end of its actors and placement group", lambda: not cluster.head.left())
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
    assert "Traceback" not in cluster.jobs.get_job_logs(job)


def _query(url: str) -> None:
    """The official client, whole answers and streams."""
    greedy: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 8}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        whole = client.completions.create(prompt="Once", extra_body={"ignore_eos": True}, **greedy)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
        pieces = client.completions.create(
            prompt="Once", stream=True, extra_body={"ignore_eos": True}, **greedy
        )
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def _has_counted(metrics_url: str, num_requests: int) -> bool:
    """Whether the node's metrics have ours, and so many requests in them."""
    series = r"^ray_moe_runtime_e2e_request_latency_seconds_count(_total)?{.*} (\S+)$"
    found = re.findall(series, httpx2.get(metrics_url).text, re.MULTILINE)
    return [float(value) for _, value in found] == [num_requests]


def test_lines_of_every_rank_reach_the_log_of_the_job(cluster: Cluster) -> None:
    job = cluster.submit(f"generate --prompt a --max-tokens 1 {RANKS}", program=LOUD)
    assert cluster.finish(job) == (JobStatus.SUCCEEDED, 0)
    log = cluster.jobs.get_job_logs(job)
    for rank in range(2):
        for words in (f"printed {rank}", f"INFO moe_runtime.loud: logged {rank}", f"native {rank}"):
            assert re.search(rf"\(rank {rank}, [\d.]+ pid=\d+\) {words}$", log, re.MULTILINE), log


def test_a_job_that_cannot_start_says_why_and_fails(cluster: Cluster) -> None:
    job = cluster.submit(f"serve /no/such/model --host 127.0.0.1 --port 0 {RANKS}")
    assert cluster.finish(job) == (JobStatus.FAILED, 2)
    log = cluster.jobs.get_job_logs(job)
    assert "moe-runtime: error: " in log
    assert "/no/such/model" in log
    assert "Traceback" not in log
    cluster.wait_for(job, "the end of what it started", lambda: not cluster.head.left())


def test_a_batch_is_submitted_and_its_status_is_honest(cluster: Cluster, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    lines = [
        {**line, "custom_id": name, "body": {"model": "demo", "prompt": name, "max_tokens": 4}}
        for name in "abc"
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    arguments = f"run-batch -i {source} -o {target} {RANKS}"
    job = cluster.submit(arguments)
    assert cluster.finish(job) == (JobStatus.SUCCEEDED, 0)
    assert "3 of 3 requests answered" in cluster.jobs.get_job_logs(job)
    assert {json.loads(answer)["custom_id"] for answer in target.read_text().splitlines()} == set("abc")

    source.write_text("no request")
    job = cluster.submit(arguments)
    assert cluster.finish(job) == (JobStatus.FAILED, 2)
    assert "line 1: not JSON" in cluster.jobs.get_job_logs(job)
    cluster.wait_for(job, "the end of what the jobs started", lambda: not cluster.head.left())


def test_a_benchmark_is_submitted_and_its_last_line_is_its_result(cluster: Cluster) -> None:
    workload = "--concurrency 1,2 --num-rounds 1 --input-len 8 --output-len 4"
    job = cluster.submit(f"bench throughput --random-checkpoint tiny {workload} {RANKS}")
    assert cluster.finish(job) == (JobStatus.SUCCEEDED, 0)
    report = json.loads(cluster.jobs.get_job_logs(job).strip().splitlines()[-1])
    assert len(report["results"]) == 2
    cluster.wait_for(job, "the end of what it started", lambda: not cluster.head.left())
