"""Peers' processes: stopped between turns, gone at the end, and one line that says what went wrong with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_runtime.bench.compare_options import PeerOptions
from moe_runtime.bench.peers import catalog
from moe_runtime.bench.peers.conversion import GgufFiles
from moe_runtime.bench.peers.process import PeerProcess, Start
from moe_runtime.bench.peers.starting import PeerStarter
from moe_runtime.errors import BenchmarkPeerError, ConfigError

_FAKE = str(Path(__file__).with_name("fake_peer"))


def _fake(behaviour: str, *, tune: bool = False) -> PeerProcess:
    start = Start(
        checkpoint="unused", variant=behaviour, threads=3, max_len=8, max_seqs=2, max_prompt_tokens=8
    )
    command = [sys.executable, str(Path(catalog.__file__).with_name("serve.py")), _FAKE]
    return PeerProcess(f"fake:{behaviour}", command, start, tune=tune, timeout_s=30)


def _status(pid: int) -> str:
    return psutil.Process(pid).status() if psutil.pid_exists(pid) else "gone"


def _eventually(pid: int, wanted: set[str]) -> str:
    """Its status once it is one of these; the kernel delivers signals when it likes."""
    deadline = time.monotonic() + 10
    while (status := _status(pid)) not in wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return status


def test_a_peer_is_stopped_between_turns_and_gone_at_the_end() -> None:
    with _fake("ok") as peer:
        pid = peer.facts["pid"]
        assert peer.facts["settings"]["threads"] == 3
        assert _eventually(pid, {psutil.STATUS_STOPPED}) == psutil.STATUS_STOPPED
        peer.resume()
        turn = peer.generate([[1, 2], [3, 4]], 3)
        assert turn.tokens == [[0, 0, 0], [1, 1, 1]]
        assert (turn.seconds, turn.first_token_seconds, turn.decode_tokens) == (2.0, 0.5, 4)
        peer.pause()
        assert _eventually(pid, {psutil.STATUS_STOPPED}) == psutil.STATUS_STOPPED
    assert _status(pid) == "gone"


def test_what_a_library_prints_does_not_disturb_the_protocol() -> None:
    with _fake("chatty") as peer:
        peer.resume()
        assert peer.generate([[1]], 1).tokens == [[0]]


@pytest.mark.parametrize(("tune", "number_of_tokens"), [(True, 9), (False, 4)])
def test_a_warm_up_tunes_with_the_whole_shape_or_generates_a_few_tokens(
    tune: bool, number_of_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    with _fake("ok", tune=tune) as peer:
        monkeypatch.setattr(peer, "generate", lambda prompts, n, tune=False: asked.append((n, tune)))
        peer.warm_up([[1]], 9)
    assert asked == [(number_of_tokens, tune)]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "fake:refuses failed: ValueError: no such checkpoint"),
        ("raises", "fake:raises failed: RuntimeError: out of cells"),
        ("short", "fake:short generated [2] tokens for 1 prompts; wanted 3 for each of 1"),
    ],
)
def test_a_failure_is_one_line(behaviour: str, message: str) -> None:
    def run() -> None:
        with _fake(behaviour) as peer:
            peer.resume()
            peer.generate([[1]], 3)

    with pytest.raises(BenchmarkPeerError, match=f"^{re.escape(message)}$"):
        run()


def test_a_peer_that_gives_no_answer_is_ended() -> None:
    with _fake("hangs") as peer:
        pid = peer.facts["pid"]
        peer.resume()
        peer._timeout_s = 0.2  # only now, as starting Python may take longer
        with pytest.raises(
            BenchmarkPeerError, match=r"^fake:hangs gave no answer in 0\.2 s; see --peer-timeout"
        ):
            peer.generate([[1]], 3)
        assert _status(pid) == "gone"


def test_a_death_names_the_status_and_the_last_line_on_stderr() -> None:
    with _fake("dies") as peer:
        peer.resume()
        peer.generate([[1]], 1)
        with pytest.raises(BenchmarkPeerError, match=r"ended with status -6: ggml_abort: cells"):
            peer.generate([[1]], 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux'")
def test_a_stopped_peer_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        f"import sys, time; sys.path[:0] = {sys.path!r}\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_bench_peers\n"
        "with test_bench_peers._fake('ok') as peer:\n"
        "    print(peer.facts['pid'], flush=True)\n"
        "    time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert _eventually(pid, {psutil.STATUS_STOPPED}) == psutil.STATUS_STOPPED
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert _eventually(pid, {"gone", psutil.STATUS_ZOMBIE}) in ("gone", psutil.STATUS_ZOMBIE)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    kinds = {name: replace(kind, module="no_module_of_this_name") for name, kind in catalog.KINDS.items()}
    monkeypatch.setattr(catalog, "KINDS", kinds)


@pytest.mark.usefixtures("nothing_installed")
def test_what_is_not_installed_is_left_out_with_the_way_to_install_it() -> None:
    left_out = PeerStarter(PeerOptions()).left_out
    assert list(left_out) == ["transformers:float32", "vllm:bfloat16", "llama.cpp:f16"]
    assert left_out["transformers:float32"] == "not installed (pip install 'moe-runtime[transformers]')"
    assert "--peer-python llama.cpp=PATH" in left_out["llama.cpp:f16"]


@pytest.mark.usefixtures("nothing_installed")
def test_what_was_asked_for_and_is_not_installed_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^--peers llama\.cpp:q8_0: not installed \(pip install"):
        PeerStarter(PeerOptions(peers=("llama.cpp:q8_0",)))


def test_a_checkpoint_without_a_converted_file_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BenchmarkPeerError, match=r"^no small-\w+-f16\.gguf in .*--llama-cpp-converter PATH"):
        GgufFiles(tmp_path, None).get(tmp_path, "small", "f16")


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text("")
    cache = tmp_path / "cache"
    with pytest.raises(
        BenchmarkPeerError, match=r"^convert_hf_to_gguf\.py failed on small: ModuleNotFoundError"
    ):
        GgufFiles(cache, str(converter)).get(tmp_path, "small", "f16")
    assert list(cache.iterdir()) == []


def test_converted_files_are_named_for_the_weights_that_they_were_made_from(tmp_path: Path) -> None:
    package = tmp_path / "llama.cpp" / "conversion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("class TextModel: pass\n")
    converter = package.parent / "convert_hf_to_gguf.py"
    converter.write_text(
        "import sys, pathlib\nfrom conversion.base import TextModel\n"
        "assert TextModel.set_vocab.__name__ == '_only_its_size'\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text(' '.join(sys.argv[1:]))\n"
    )
    (tmp_path / "config.json").write_text("{}")
    paths = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        paths.append(GgufFiles(tmp_path / "cache", str(converter)).get(tmp_path, "small", "q8_0"))
    assert paths[0] == paths[2] != paths[1]
    assert paths[0].read_text().startswith(f"{tmp_path} --no-mtp --outtype q8_0 --outfile ")
