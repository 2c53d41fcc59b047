"""Loading: parameters get the right values, only the rank's slices are read, and misfits are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moe_models.interfaces import TensorLoad, WeightMap
from moe_runtime.errors import CheckpointError
from moe_runtime.weights import load as load_module
from moe_runtime.weights.index import CheckpointIndex, index_files
from moe_runtime.weights.load import load_weights
from moe_runtime.weights.plan import plan_load

E, F, H = 6, 4, 8  # experts of the checkpoint, expert intermediate size, hidden size


class Toy(nn.Module):
    """Two projections in one parameter, stacked experts of which a rank holds some, and a bias."""

    def __init__(self, local: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.local = list(local)
        self.experts = nn.Parameter(torch.full((len(self.local), 2 * F, H), torch.nan, dtype=dtype))
        self.shared = nn.Parameter(torch.full((H, H), torch.nan, dtype=dtype))
        self.bias = nn.Parameter(torch.full((H,), torch.nan, dtype=dtype))

    def weight_map(self, *, fused: bool) -> WeightMap:
        expected: dict[str, tuple[int, ...]] = {"shared": (H, 1, H), "bias": (H,)}
        loads = [
            TensorLoad(source="shared", target="shared", source_index=(slice(None), 0)),
            TensorLoad(source="bias", target="bias", source_rows=torch.arange(H).flip(0)),
        ]
        if fused:
            expected["experts"] = (E, 2 * F, H)
        else:
            expected |= {f"experts.{e}.{part}": (F, H) for e in range(E) for part in ("gate", "up")}
        for i, e in enumerate(self.local):
            if fused:
                loads.append(
                    TensorLoad(source="experts", target="experts", source_index=(e,), target_index=(i,))
                )
                continue
            for part, rows in (("gate", slice(0, F)), ("up", slice(F, 2 * F))):
                loads.append(
                    TensorLoad(source=f"experts.{e}.{part}", target="experts", target_index=(i, rows))
                )
        return WeightMap(expected=expected, loads=tuple(loads), ignored=(r"mtp\..*",))


def _tensors(*, fused: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    experts = torch.randn(E, 2 * F, H, generator=generator).to(dtype)
    tensors = {"shared": torch.randn(H, 1, H, generator=generator), "bias": torch.arange(H).float()}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if fused:
        return {**tensors, "experts": experts}
    for e in range(E):
        tensors[f"experts.{e}.gate"] = experts[e, :F].clone()
        tensors[f"experts.{e}.up"] = experts[e, F:].clone()
    return tensors


def _save(path: Path, tensors: dict[str, torch.Tensor], *, num_files: int = 1) -> CheckpointIndex:
    names = sorted(tensors)
    files = [path / f"part{i}.safetensors" for i in range(num_files)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::num_files]}, file)
    return index_files(files)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("local", [tuple(range(E)), (1, 4), (5, 0, 2)], ids=str)
def test_values_arrive(tmp_path: Path, local: tuple[int, ...], fused: bool, num_files: int) -> None:
    model = Toy(local)
    load_weights(
        model, model.weight_map(fused=fused), _save(tmp_path, _tensors(fused=fused), num_files=num_files)
    )
    truth = _tensors(fused=True)
    assert torch.equal(model.experts, truth["experts"][list(local)])
    assert torch.equal(model.shared, truth["shared"][:, 0])
    assert torch.equal(model.bias, truth["bias"].flip(0))
    assert model.bias.requires_grad  # untouched: loading is no operation of autograd
    assert model.bias.grad_fn is None


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_convert_to_the_parameters(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    model = Toy((2,), wanted)
    tensors = _tensors(fused=True, dtype=stored)
    load_weights(model, model.weight_map(fused=True), _save(tmp_path, tensors))
    assert model.experts.dtype == wanted
    assert torch.equal(model.experts, tensors["experts"][[2]].to(wanted))


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
def test_two_ranks_read_each_their_own_half_of_the_experts(tmp_path: Path, fused: bool) -> None:
    index = _save(tmp_path, _tensors(fused=fused))
    common, experts = (H * H + H) * 4, E * 2 * F * H * 4
    for local in ((0, 1, 2), (3, 4, 5)):
        model = Toy(local)
        report = load_weights(model, model.weight_map(fused=fused), index)
        assert report.bytes_read == common + experts // 2


class RecordingFile:
    """Stands for `safe_open`: records every slice that is asked for, and where it lies in the file."""

    def __init__(self, real: Any, name: str, log: list[tuple[str, str, Any]]) -> None:
        self._real, self._name, self._log = real, name, log

    def __enter__(self) -> RecordingFile:
        self._open = self._real.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._real.__exit__(*args)

    def get_slice(self, tensor: str) -> Any:
        outer = self

        class Slice:
            def __getitem__(self, index: Any) -> torch.Tensor:
                outer._log.append((outer._name, tensor, index))
                read: torch.Tensor = outer._open.get_slice(tensor)[index]
                return read

        return Slice()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    log: list[tuple[str, str, Any]] = []
    real = load_module.safe_open
    monkeypatch.setattr(
        load_module, "safe_open", lambda file, **kwargs: RecordingFile(real(file, **kwargs), file.name, log)
    )
    return log


def test_fused_experts_are_read_one_by_one_in_file_order(
    tmp_path: Path, reads: list[tuple[str, str, Any]]
) -> None:
    model = Toy((5, 0, 2))
    load_weights(model, model.weight_map(fused=True), _save(tmp_path, _tensors(fused=True)))
    assert [index for _, tensor, index in reads if tensor == "experts"] == [(0,), (2,), (5,)]


def test_other_ranks_experts_are_not_touched_and_files_are_read_front_to_back(
    tmp_path: Path, reads: list[tuple[str, str, Any]]
) -> None:
    model = Toy((4, 1))
    index = _save(tmp_path, _tensors(fused=False), num_files=2)
    load_weights(model, model.weight_map(fused=False), index)
    names = [tensor for _, tensor, _ in reads]
    wanted = {f"experts.{e}.{part}" for e in (1, 4) for part in ("gate", "up")}
    assert sorted(names) == sorted(wanted | {"shared", "bias"})
    places = [(file, index[tensor].start) for file, tensor, _ in reads]
    assert places == sorted(places)


def test_progress_adds_up_to_the_plan(tmp_path: Path) -> None:
    model = Toy((0, 3))
    index, weight_map = _save(tmp_path, _tensors(fused=False), num_files=2), model.weight_map(fused=False)
    seen: list[int] = []
    report = load_weights(model, weight_map, index, on_progress=seen.append)
    plan = plan_load(model, weight_map, index)
    assert sum(seen) == report.bytes_read == plan.total_bytes
    assert (len(seen), report.files_read) == (report.slices_read, 2)


def test_tied_parameters_are_filled_through_either_name(tmp_path: Path) -> None:
    model = nn.Module()
    model.embed = nn.Parameter(torch.full((3, 2), torch.nan))
    model.head = model.embed
    index = _save(tmp_path, {"w": torch.arange(6.0).reshape(3, 2)})
    weight_map = WeightMap(expected={"w": (3, 2)}, loads=(TensorLoad(source="w", target="head"),))
    load_weights(model, weight_map, index)
    assert model.embed.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_scalars_and_empty_parameters(tmp_path: Path) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(torch.nan))
    model.none = nn.Parameter(torch.empty(0, 4))
    index = _save(tmp_path, {"scale": torch.tensor(2.5), "rows": torch.ones(3, 4)})
    weight_map = WeightMap(
        expected={"scale": (), "rows": (3, 4)},
        loads=(TensorLoad(source="scale", target="scale"),),  # a rank with no experts reads none
    )
    load_weights(model, weight_map, index)
    assert model.scale.item() == 2.5


# --------------------------------------------------------------------------- checkpoints that do not fit


def _refusal(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> str:
    model = Toy((0, 1))
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, model.weight_map(fused=False), _save(tmp_path, tensors))
    assert model.bias.isnan().all(), "something was loaded before the check"
    return str(caught.value)


def test_every_misfit_is_in_one_error(tmp_path: Path) -> None:
    tensors = _tensors(fused=False)
    del tensors["experts.3.up"]  # missing even though this rank does not read it
    tensors["surprise"] = torch.zeros(1)
    tensors["shared"] = torch.zeros(H, H)
    tensors["experts.5.gate"] = torch.zeros(F, H, dtype=torch.int8)
    message = _refusal(tmp_path, tensors)
    assert message == (
        "the checkpoint's tensors are not those of Toy: 1 missing (experts.3.up); 1 left over (surprise); "
        "1 of the wrong shape (shared is [8, 8], wanted [8, 1, 8]); "
        "1 of the wrong dtype (experts.5.gate is I8, wanted one of F32, F16, BF16); "
        "check that config.json and the weights are of the same model"
    )


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    tensors = _tensors(fused=False)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("experts")}
    message = _refusal(tmp_path, kept)
    assert "12 missing (experts.0.gate, " in message
    assert " and 4 more)" in message
    assert "left over" not in message


def test_the_other_expert_layout_is_a_misfit(tmp_path: Path) -> None:
    message = _refusal(tmp_path, _tensors(fused=True))
    assert "12 missing" in message
    assert "1 left over (experts)" in message


def test_ignored_tensors_may_be_there_whatever_they_are(tmp_path: Path) -> None:
    tensors = {**_tensors(fused=True), "mtp.layers.0.x": torch.zeros(3, dtype=torch.int64)}
    model = Toy((0,))
    load_weights(model, model.weight_map(fused=True), _save(tmp_path, tensors))
    tensors["other.mtp.x"] = torch.zeros(3)  # a pattern matches from the start of the name
    with pytest.raises(CheckpointError, match=r"1 left over \(other\.mtp\.x\)"):
        load_weights(model, model.weight_map(fused=True), _save(tmp_path, tensors))


def test_a_file_that_breaks_after_indexing(tmp_path: Path) -> None:
    model = Toy((0,))
    index = _save(tmp_path, _tensors(fused=True))
    file = tmp_path / "part0.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"part0\.safetensors cannot be read: .*; download or copy it again"
    ):
        load_weights(model, model.weight_map(fused=True), index)


# --------------------------------------------------------------------------- mistakes in a weight map


def _whole(**changes: Any) -> TensorLoad:
    return TensorLoad(**{"source": "w", "target": "p", **changes})


@pytest.mark.parametrize(
    ("loads", "words"),
    [
        ((), "leaves a part unfilled of the parameter p"),
        ((_whole(source_index=(slice(0, 3),), target_index=(slice(0, 3),)),), "leaves a part unfilled"),
        ((_whole(), _whole(source_index=(0,), target_index=(2,))), "fills a part twice"),
        ((_whole(target="q"),), "q is no parameter of Module"),
        ((_whole(source="v"),), "v is loaded but not among the expected tensors"),
        ((_whole(source_index=(0,)),), r"w gives \(6,\) where p takes \(4, 6\)"),
        ((_whole(source_rows=torch.tensor([0, 1])),), r"w gives \(2, 6\) where p takes \(4, 6\)"),
        ((_whole(source_index=(slice(0, 5),)),), "goes past the end of a dimension of 4"),
        ((_whole(source_index=(slice(None, None, 2),)),), "has a step"),
        ((_whole(source_index=(-1,)),), "index -1 of a dimension of 4"),
    ],
)
def test_a_wrong_weight_map_is_an_internal_error(
    tmp_path: Path, loads: tuple[TensorLoad, ...], words: str
) -> None:
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(4, 6))
    index = _save(tmp_path, {"w": torch.ones(4, 6)})
    with pytest.raises(AssertionError, match=words):
        plan_load(model, WeightMap(expected={"w": (4, 6)}, loads=loads), index)


def test_a_model_left_on_the_meta_device_is_an_internal_error(tmp_path: Path) -> None:
    model = Toy((0,)).to("meta")
    with pytest.raises(AssertionError, match="is on the meta device"):
        load_weights(model, model.weight_map(fused=True), _save(tmp_path, _tensors(fused=True)))
