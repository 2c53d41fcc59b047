"""The loader on real Qwen3-Next checkpoints: both expert layouts, one file or shards, experts split over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.errors import CheckpointError
from moe_runtime.modelfiles import ModelFiles, resolve_model
from moe_runtime.weights.index import read_index
from moe_runtime.weights.load import LoadReport, load_weights
from tests.checkpoints import make_checkpoint, to_fused_layout, to_shards

NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """The same bfloat16 weights in three layouts."""
    root: Path = tmp_path_factory.mktemp("layouts")
    make_checkpoint(root / "single", dtype=torch.bfloat16)
    to_fused_layout(root / "single", root / "fused")
    to_shards(root / "single", root / "shards")
    return {name: resolve_model(root / name) for name in ("single", "fused", "shards")}


def _load(files: ModelFiles, local: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], LoadReport]:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(files.config, ExpertShard(NUM_EXPERTS, local), KernelPlan.reference())
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    index = read_index(files)
    report = load_weights(model, model.weight_map(index.__contains__), index)
    return dict(model.named_parameters()), report


def test_all_layouts_give_the_same_parameters(layouts: dict[str, ModelFiles]) -> None:
    single, report = _load(layouts["single"], tuple(range(NUM_EXPERTS)))
    assert not any(parameter.isnan().any() for parameter in single.values())
    assert report.bytes_read == read_index(layouts["single"]).total_bytes
    for name in ("fused", "shards"):
        other, _ = _load(layouts[name], tuple(range(NUM_EXPERTS)))
        assert all(torch.equal(other[key], value) for key, value in single.items())


@pytest.mark.parametrize("layout", ["single", "fused", "shards"])
def test_ranks_read_their_share_and_together_hold_every_expert(
    layouts: dict[str, ModelFiles], layout: str
) -> None:
    files = layouts[layout]
    whole, _ = _load(files, tuple(range(NUM_EXPERTS)))
    expert_bytes = sum(e.end - e.start for name, e in read_index(files).items() if ".mlp.experts." in name)
    other_bytes = read_index(files).total_bytes - expert_bytes
    for local in ((0, 3, 5), (1, 2, 4, 6, 7)):
        mine, report = _load(files, local)
        assert report.bytes_read == other_bytes + expert_bytes * len(local) // NUM_EXPERTS
        for name, parameter in mine.items():
            wanted = whole[name][list(local)] if ".mlp.experts." in name else whole[name]
            assert torch.equal(parameter, wanted), name


def test_a_shard_that_lacks_its_tensors_is_refused(layouts: dict[str, ModelFiles]) -> None:
    index_file = layouts["shards"].path / "model.safetensors.index.json"
    text = index_file.read_text()
    content = json.loads(text)
    first, last = sorted(set(content["weight_map"].values()))[::2]
    content["weight_map"]["model.norm.weight"] = (
        first if content["weight_map"]["model.norm.weight"] == last else last
    )
    index_file.write_text(json.dumps(content))
    try:
        with pytest.raises(
            CheckpointError, match=r"shards that do not hold them \(1\): model\.norm\.weight in"
        ):
            read_index(layouts["shards"])
    finally:
        index_file.write_text(text)


def test_a_config_of_another_model_is_refused(layouts: dict[str, ModelFiles]) -> None:
    files = layouts["single"]
    config = {
        **files.config,
        "num_hidden_layers": 3,
        "layer_types": files.config["layer_types"][:3],
        "vocab_size": 99,
    }
    model = Qwen3NextForCausalLM(config, ExpertShard.whole(NUM_EXPERTS), KernelPlan.reference())
    index = read_index(files)
    words = r"left over \(model\.layers\.3\.[^;]* more\); 2 of the wrong shape \(.* is \[257, 64\], wanted \[99, 64\]"
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, model.weight_map(index.__contains__), index)
