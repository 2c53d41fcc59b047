"""GGUF files of a checkpoint, made by llama.cpp's own converter and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from moe_runtime.errors import BenchmarkPeerError

_SCRIPT = Path(__file__).parent / "convert_gguf.py"
_SAMPLE_BYTES = 1 << 20  # of each end of a file of weights


class GgufFiles:
    """A directory of converted checkpoints, each named for what it was made from."""

    def __init__(self, directory: Path, converter: str | None) -> None:
        """
        Args:
            converter: path of convert_hf_to_gguf.py in a source tree of llama.cpp; without it only files that
                are there already can be had.
        """
        self._directory, self._converter = directory, converter

    def get(self, checkpoint: Path, name: str, variant: str) -> Path:
        """The checkpoint as a GGUF file whose weights are of type `variant`; converts it at the first time.

        Raises:
            BenchmarkPeerError: it is not there and cannot be made.
        """
        path = self._directory / f"{name}-{_fingerprint(checkpoint)}-{variant}.gguf"
        if path.exists():
            return path
        if self._converter is None:
            raise BenchmarkPeerError(
                f"no {path.name} in {self._directory} (give --llama-cpp-converter PATH/convert_hf_to_gguf.py, from "
                "llama.cpp's source tree, which llama-cpp-python's source distribution has in vendor/)"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        command = [sys.executable, str(_SCRIPT), self._converter, str(checkpoint)]
        # Without the layers of multi-token prediction, which no system here uses.
        command += ["--no-mtp", "--outtype", variant, "--outfile", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not unfinished.exists():
            unfinished.unlink(missing_ok=True)
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise BenchmarkPeerError(f"{Path(self._converter).name} failed on {name}: {said}")
        unfinished.rename(path)
        return path


def _fingerprint(checkpoint: Path) -> str:
    """Of config.json and the ends of the files of weights: reading 160 GB whole would take minutes."""
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
