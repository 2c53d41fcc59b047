"""From what was asked for to running peers, and why the others are left out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from moe_runtime.bench.compare_options import CompareWorkload, PeerOptions
from moe_runtime.bench.peers.catalog import Peer, find_peers
from moe_runtime.bench.peers.conversion import GgufFiles
from moe_runtime.bench.peers.process import PeerProcess, Start
from moe_runtime.errors import BenchmarkPeerError, ConfigError


class PeerStarter:
    """Checks which peers are there, then prepares, then starts them.

    A peer that was asked for by name and cannot run is an error; any other is left out.
    """

    def __init__(self, options: PeerOptions) -> None:
        """Look for all of them.

        Raises:
            ConfigError: --peers or --peer-python is wrong, or a peer that was asked for is not installed.
        """
        self._options = options
        self._starts: list[tuple[Peer, Start]] = []
        self.left_out: dict[str, str] = {}  # why, by name
        self._installed = []
        for peer in find_peers(options.peers, options.pythons):
            why = peer.missing()
            if why is None:
                self._installed.append(peer)
            elif peer.required:
                raise ConfigError(f"--peers {peer.name}: {why}")
            else:
                self.left_out[peer.name] = why

    @property
    def in_float32(self) -> frozenset[str]:
        """Those whose tokens are comparable to another engine's in float32."""
        return frozenset(peer.name for peer in self._installed if peer.in_float32)

    def prepare(self, checkpoint: Path, name: str, workload: CompareWorkload, scratch: Path) -> None:
        """Convert the checkpoint for those that need it, before anything is measured or even started.

        Args:
            name: of the checkpoint, for files made from it.
            scratch: directory for them where no --gguf-cache was given.

        Raises:
            ConfigError: a peer that was asked for has no file that it can read.
        """
        directory = scratch if self._options.gguf_cache is None else Path(self._options.gguf_cache)
        ggufs = GgufFiles(directory, self._options.converter)
        for peer in self._installed:
            try:
                gguf = str(ggufs.get(checkpoint, name, peer.variant)) if peer.reads_gguf else None
            except BenchmarkPeerError as error:
                if peer.required:
                    raise ConfigError(f"--peers {peer.name}: {error}") from error
                self.left_out[peer.name] = str(error)
                continue
            shapes = workload.shapes
            start = Start(
                checkpoint=str(checkpoint),
                variant=peer.variant,
                threads=workload.threads,
                max_len=workload.max_len,
                max_seqs=max(shape.num_requests for shape in shapes),
                max_prompt_tokens=max(shape.num_requests * shape.input_len for shape in shapes),
                gguf=gguf,
            )
            self._starts.append((peer, start))

    def start(self, stack: ExitStack) -> list[PeerProcess]:
        """Start them, one after another; each is paused once it has loaded the checkpoint.

        Args:
            stack: ends them.

        Raises:
            BenchmarkPeerError: a peer that was asked for does not start.
        """
        running = []
        for peer, start in self._starts:
            process = PeerProcess(
                peer.name, peer.command, start, tune=self._options.tune, timeout_s=self._options.timeout_s
            )
            try:
                running.append(stack.enter_context(process))
            except BenchmarkPeerError as error:
                if peer.required:
                    raise
                self.left_out[peer.name] = str(error)
        return running
