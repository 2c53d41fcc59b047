"""The peer that runs vLLM, on a stand-in that takes what vLLM takes and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from moe_runtime.bench.peers import catalog
from moe_runtime.bench.peers.process import PeerProcess, Start
from moe_runtime.errors import BenchmarkPeerError

PEERS = Path(catalog.__file__).parent
PROMPTS = [[7, 1, 2], [40, 3, 4]]


@pytest.fixture(autouse=True)
def _vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is what `import vllm` finds, and no variable that the peer sets is there."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "vllm.py").write_text(Path(__file__).with_name("stand_in_vllm.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def _start(file: Path = PEERS / "vllm.py") -> PeerProcess:
    start = Start(
        checkpoint="/a/checkpoint",
        variant=catalog.KINDS["vllm"].variants[0],
        threads=2,
        max_len=8,
        max_seqs=2,
        max_prompt_tokens=6,
    )
    command = [sys.executable, str(PEERS / "serve.py"), str(file.with_suffix(""))]
    return PeerProcess("vllm", command, start, tune=True, timeout_s=60)


def test_it_answers_with_every_prompts_tokens_and_the_time_of_the_last_first_one() -> None:
    with _start() as peer:
        assert peer.facts == {
            "version": "0.32.0",
            "settings": {
                "dtype": "bfloat16",
                "max_model_len": 8,
                "max_num_seqs": 2,
                "max_num_batched_tokens": 8,
                "enable_prefix_caching": False,
            },
        }
        peer.resume()
        peer.warm_up(PROMPTS, 3)
        turn = peer.generate(PROMPTS, 5)
    assert turn.tokens == [[7, 8, 9, 10, 11], [40, 41, 42, 43, 44]]
    assert (turn.first_token_seconds, turn.decode_tokens) == (0.5, 8)
    assert 0 < turn.seconds < 60


def test_without_vllms_statistics_the_first_tokens_time_is_not_known(tmp_path: Path) -> None:
    script = (PEERS / "vllm.py").read_text()
    file = tmp_path / "peer.py"
    file.write_text(script.replace("disable_log_stats=False", "disable_log_stats=True"))
    with _start(file) as peer:
        peer.resume()
        assert peer.generate(PROMPTS, 5).first_token_seconds is None


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("disable_log_stats=", "log_stats="),
        ('"max_num_seqs"', '"max_seqs"'),
        ("ignore_eos=", "ignore_end="),
        ("use_tqdm=", "tqdm="),
    ],
)
def test_an_argument_that_vllm_does_not_take_is_refused(given: str, changed: str, tmp_path: Path) -> None:
    script = (PEERS / "vllm.py").read_text()
    assert given in script
    file = tmp_path / "peer.py"
    file.write_text(script.replace(given, changed))
    name = re.escape(changed.strip('"='))

    def run() -> None:
        with _start(file) as peer:
            peer.resume()
            peer.generate(PROMPTS, 5)

    with pytest.raises(BenchmarkPeerError, match=f"^vllm failed: TypeError: .*argument '{name}'"):
        run()


def test_a_peer_named_vllm_is_found_installed() -> None:
    (peer,) = catalog.find_peers(["vllm"], [])
    assert peer.missing() is None
    assert peer.command[-1] == "vllm"
