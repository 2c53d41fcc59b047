"""Routing, placement and traffic against counting: random choices, every rank a token may start on, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.simulate.dispatch import copies_per_token
from moe_runtime.simulate.placement import PLACEMENTS, balanced
from moe_runtime.simulate.routing import Layout, ReplayedRouting, ZipfRouting, parse_routing
from moe_runtime.simulate.trace import read_trace, write_trace

EXPERTS, TOP_K = 32, 4


def _choices(tokens: int, seed: int, skew: float = 0.0) -> np.ndarray:
    """Top-k of perturbed log-popularities: drawing without replacement."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, EXPERTS + 1) ** -skew
    keys = np.log(weights) + rng.gumbel(size=(tokens, EXPERTS))
    return np.argsort(-keys, axis=1)[:, :TOP_K]


def _replay(*layers: np.ndarray) -> ReplayedRouting:
    return ReplayedRouting("test", EXPERTS, layers)


def _count_copies(kind: str, choices_TK: np.ndarray, layout: Layout) -> tuple[float, float]:
    """(over NVLink, over the network) of one token, by sending every token from every rank."""
    per_rank = EXPERTS // layout.num_ranks
    node = [rank // layout.ranks_per_node for rank in range(layout.num_ranks)]
    up = out = 0
    for chosen in choices_TK:
        ranks = [expert // per_rank for expert in chosen]
        for home in range(layout.num_ranks):
            if kind == "deepep_low_latency":
                up += sum(r != home and node[r] == node[home] for r in ranks)
                out += sum(node[r] != node[home] for r in ranks)
            elif kind == "all_to_all":
                up += sum(r != home and node[r] == node[home] for r in set(ranks))
                out += sum(node[r] != node[home] for r in set(ranks))
            elif kind == "deepep_normal":
                out += len({node[r] for r in ranks} - {node[home]})
                # It arrives at the rank of the home's place in the node, and goes on to the others from there.
                place = home % layout.ranks_per_node
                up += sum(r % layout.ranks_per_node != place for r in set(ranks))
            else:
                up += layout.num_ranks - 1
                out += (layout.num_ranks - layout.ranks_per_node) / layout.ranks_per_node
    total = len(choices_TK) * layout.num_ranks
    return up / total, out / total


@pytest.mark.parametrize("kind", ["deepep_low_latency", "deepep_normal", "all_to_all", "all_gather"])
@pytest.mark.parametrize(("ranks", "per_node"), [(8, 4), (8, 8), (16, 4), (2, 1)])
def test_traffic_is_what_counting_finds(kind: str, ranks: int, per_node: int) -> None:
    choices_TK = _choices(60, seed=ranks, skew=0.5)
    layout = Layout(num_ranks=ranks, ranks_per_node=per_node, placement="contiguous")
    (load,) = _replay(choices_TK).loads(layout, len(choices_TK))
    copies = copies_per_token(kind, layout, load, TOP_K)

    assert (copies.scale_up, copies.scale_out) == pytest.approx(_count_copies(kind, choices_TK, layout))


def test_a_token_crosses_to_a_rank_once_however_many_of_its_experts_are_there() -> None:
    layout = Layout(num_ranks=2, ranks_per_node=2, placement="contiguous")
    (load,) = _replay(np.array([[0, 1, 2, 3], [28, 29, 30, 31]])).loads(layout, 2)

    assert load.ranks_per_token == 1
    assert copies_per_token("shared_memory", layout, load, TOP_K).scale_up == pytest.approx(0.5)
    assert copies_per_token("deepep_low_latency", layout, load, TOP_K).scale_up == pytest.approx(2)


def test_a_replayed_trace_has_the_traces_own_loads() -> None:
    layers = [_choices(96, seed, skew=1.0) for seed in (1, 2)]
    layout = Layout(num_ranks=4, ranks_per_node=4, placement="contiguous")
    loads = _replay(*layers).loads(layout, 96)

    assert len(loads) == 2
    for choices_TK, load in zip(layers, loads, strict=True):
        per_expert = np.bincount(choices_TK.ravel(), minlength=EXPERTS).reshape(4, 8)
        assert load.rows_R.tolist() == per_expert.sum(axis=1).tolist()
        assert load.touched_R.tolist() == (per_expert > 0).sum(axis=1).tolist()
        assert load.imbalance == pytest.approx(per_expert.sum(axis=1).max() / (96 * TOP_K / 4))


def test_a_long_trace_is_taken_in_windows_and_a_short_one_scaled() -> None:
    layout = Layout(num_ranks=4, ranks_per_node=4)
    routing = _replay(_choices(100, 3))

    windows = routing.loads(layout, 40)
    assert [load.rows_R.sum() for load in windows] == [160, 160]
    (scaled,) = routing.loads(layout, 1000)
    assert scaled.rows_R.sum() == pytest.approx(1000 * TOP_K)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_synthetic_choices_are_those_of_drawing_without_replacement(skew: float) -> None:
    routing = ZipfRouting(EXPERTS, TOP_K, skew)
    chosen_E = -np.expm1(-routing.expert_rates)
    drawn = np.bincount(_choices(20_000, 5, skew).ravel(), minlength=EXPERTS) / 20_000

    assert chosen_E.sum() == pytest.approx(TOP_K)
    assert np.abs(chosen_E - drawn).max() < 0.03


@pytest.mark.parametrize("ranks", [2, 4, 16, 32])
def test_synthetic_tokens_meet_as_many_ranks_as_drawn_ones(ranks: int) -> None:
    layout = Layout(num_ranks=ranks, ranks_per_node=max(1, ranks // 2), placement="contiguous")
    (drawn,) = _replay(_choices(20_000, 6)).loads(layout, 20_000)
    synthetic = ZipfRouting(EXPERTS, TOP_K).loads(layout, 1000)[0]

    assert synthetic.ranks_per_token == pytest.approx(drawn.ranks_per_token, rel=0.03)
    assert synthetic.nodes_per_token == pytest.approx(drawn.nodes_per_token, rel=0.06)


def test_every_token_has_its_rows_wherever_experts_are() -> None:
    for kind in PLACEMENTS:
        for ranks, redundant in ((1, 0), (5, 0), (8, 8), (64, 0), (64, 40)):
            layout = Layout(num_ranks=ranks, ranks_per_node=8, placement=kind, num_redundant=redundant)
            for load in ZipfRouting(EXPERTS, TOP_K, 1.0).loads(layout, 500):
                assert load.rows_R.sum() == pytest.approx(500 * TOP_K)
                assert len(load.rows_R) == ranks
                assert load.imbalance >= 1
                assert load.balanced().imbalance == pytest.approx(1)
                assert load.balanced().rows_R.sum() == pytest.approx(load.rows_R.sum())


def _imbalance(placement: str, redundant: int, skew: float) -> float:
    layout = Layout(num_ranks=8, ranks_per_node=8, placement=placement, num_redundant=redundant)
    return float(
        np.mean([load.imbalance for load in ZipfRouting(EXPERTS, TOP_K, skew).loads(layout, 50_000)])
    )


def test_balance_gets_worse_with_skew_and_better_with_placement_and_copies() -> None:
    by_skew = [_imbalance("contiguous", 0, skew) for skew in (0.0, 0.5, 1.0)]
    assert by_skew == sorted(by_skew)
    assert _imbalance("contiguous", 0, 0.8) > _imbalance("balanced", 0, 0.8) > _imbalance("balanced", 8, 0.8)


def test_balanced_placement_gives_every_rank_as_many_slots_and_hot_experts_the_copies() -> None:
    placed = balanced(np.array([8.0, 1, 1, 1, 1, 1]), num_ranks=4, num_redundant=2)

    assert np.bincount(placed.rank_of_slot).tolist() == [2, 2, 2, 2]
    assert placed.copies.tolist() == [3, 1, 1, 1, 1, 1]
    assert placed.slots_per_rank == 2


def test_traces_survive_the_file(tmp_path: Path) -> None:
    layers = [_choices(10, seed) for seed in (1, 2, 3)]
    write_trace(tmp_path / "trace.npz", EXPERTS, layers)
    found = read_trace(str(tmp_path / "trace.npz"))

    assert (found.num_experts, found.top_k) == (EXPERTS, TOP_K)
    assert all(np.array_equal(a, b) for a, b in zip(layers, found.choices, strict=True))


def test_a_recorded_trace_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """What `bench routing --save-trace` writes; the second of three layers of the model has no experts."""
    layers = tuple(_choices(10, seed).astype(np.int16) for seed in (1, 2))
    recorded = RoutingTrace(num_experts=EXPERTS, layers=(0, 2), choices_TK=layers, starts=np.array([0, 6]))
    recorded.save(tmp_path / "trace.npz")
    found = read_trace(str(tmp_path / "trace.npz"))

    assert (found.name, found.num_experts, found.top_k) == ("trace.npz", EXPERTS, TOP_K)
    assert len(found.choices) == 2
    assert all(np.array_equal(a, b) for a, b in zip(layers, found.choices, strict=True))


def _bad_files(folder: Path) -> dict[str, dict[str, object]]:
    good = np.zeros((5, TOP_K), np.int16)
    return {
        "must hold num_experts and layer_0": {"layer_0": good},
        "experts are 0 to 0; wanted 0 to -1": {"num_experts": 0, "layer_0": good},
        "layer_1: wanted whole numbers": {"num_experts": EXPERTS, "layer_0": good, "layer_1": good[:2]},
        "layer_0: wanted whole numbers": {"num_experts": EXPERTS, "layer_0": good.astype(np.float32)},
        "chooses 4 of 32 experts, the model 8 of 32": {"num_experts": EXPERTS, "layer_0": good},
    }


@pytest.mark.parametrize("message", list(_bad_files(Path())))
def test_bad_traces_are_refused(message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **_bad_files(tmp_path)[message])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        parse_routing(str(tmp_path / "bad.npz"), EXPERTS, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "must be uniform, zipf:SKEW or the path of a trace"),
        ("zipf:much", "the skew must be a number from 0 to 4"),
        ("zipf:-1", "the skew must be a number from 0 to 4"),
    ],
)
def test_bad_routings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_routing(text, EXPERTS, TOP_K)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"no \.npz file of NumPy"):
        read_trace(str(tmp_path / "text.npz"))
