"""Two Ray nodes on one machine: EP=2 with a rank on each gives the tokens of EP=1, to two drivers at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from moe_runtime import LLM, SamplingParams
from moe_runtime.cli.main import main as command
from moe_runtime.errors import PlacementError

PROMPTS = ["The experts of this model", "a", "Once upon a time there was"]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def tokens(strategy: str, ranks: int, nodes: int, timeout_s: float = 60) -> list[list[int]]:
    with LLM(
        expert_parallel_size=ranks,
        placement_strategy=strategy,
        placement_timeout_s=timeout_s,
        device="cpu",
        dtype="float32",
        use_tqdm=False,
    ) as llm:
        used = {
            node
            for group in placement_group_table().values()
            if group["state"] == "CREATED"
            for node in group["bundles_to_node_id"].values()
        }
        assert len(used) == nodes, f"{ranks} ranks ran on {used}"
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


_OTHER_DRIVER = """
import sys
from moe_runtime import LLM, SamplingParams
llm = LLM.connect("shared")
params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
for _ in range(3):
    outputs = llm.generate(sys.argv[1:], params, use_tqdm=False)
print([list(output.outputs[0].token_ids) for output in outputs])
llm.shutdown()
"""


def check_two_drivers(address: str, expected: list[list[int]]) -> None:
    """One deployment over both nodes, two drivers at once: each gets its own answers."""
    with LLM(
        name="shared",
        expert_parallel_size=2,
        placement_strategy="STRICT_SPREAD",
        device="cpu",
        dtype="float32",
        use_tqdm=False,
    ) as llm:
        other = subprocess.Popen(
            [sys.executable, "-c", _OTHER_DRIVER, *reversed(PROMPTS)],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            text=True,
        )
        while other.poll() is None:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        assert other.stdout is not None
        assert other.stdout.read().strip() == str(expected[::-1])
    assert command(["stop", "shared"]) == 0


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
        cluster.wait_for_nodes()
        alone = tokens("PACK", ranks=1, nodes=1)
        assert tokens("STRICT_SPREAD", ranks=2, nodes=2) == alone
        assert tokens("SPREAD", ranks=3, nodes=2) == alone
        with pytest.raises(
            PlacementError, match="needs a node with CPUs for each of 3 ranks, the cluster has 2"
        ):
            tokens("STRICT_SPREAD", ranks=3, nodes=3, timeout_s=2)
        check_two_drivers(cluster.address, alone)
        left = {key: g["state"] for key, g in placement_group_table().items() if g["state"] != "REMOVED"}
        assert not left, f"placement groups left: {left}"
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
