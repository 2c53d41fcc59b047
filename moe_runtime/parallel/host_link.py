"""HostLink: ranks of one host joined by shared memory, with waits that sleep and that notice a peer's death.

The memory is an anonymous file (memfd) of rank 0, which the others open through /proc. It has no name in
/dev/shm, so nothing can be left behind whichever process dies, and /dev/shm's size, which containers keep small,
does not bound it: it lives as long as some rank maps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import psutil

from moe_kernels.native.build import NativeBuildError
from moe_runtime.errors import ConfigError, PeerLostError
from moe_runtime.parallel import host_library
from moe_runtime.parallel.host_library import MAX_RANKS, MAX_VALUES
from moe_runtime.parallel.peers import Peer

# A wait sleeps for this long, looks whether its peers live, and sleeps again.
_SLICE_S = 0.2
# Before it sleeps a wait spins for this long, where there are more cores than ranks.
_SPIN_S = 20e-6

_PAGE = mmap.ALLOCATIONGRANULARITY

Agree = Callable[[list[int]], list[list[int]]]


class LinkUnavailableError(Exception):
    """These ranks cannot share memory; the message says why, in a few words."""


class HostLink:
    """Phases that all ranks of a host go through together. Belongs to one thread."""

    def __init__(
        self, rank: int, size: int, file: int, peers: Sequence[Peer], timeout_s: float, spin_s: float
    ) -> None:
        self.rank = rank
        self.size = size
        self.library = host_library.host_library()
        self._file = file
        self._peers = tuple(peers)
        self._timeout_s = timeout_s
        self._lost: str | None = None  # the failure after which no peer can be waited for
        self._error: BaseException | None = None  # what ended the call that goes on
        self._control = mmap.mmap(file, _control_bytes())
        self._control_address = ctypes.c_char.from_buffer(self._control)
        looks = self._look_after()
        next(looks)
        self._on_wait = host_library.WaitCallback(looks.send)
        self._link: int | None = self.library.moe_link_new(
            ctypes.addressof(self._control_address),
            rank,
            size,
            int(spin_s * 1e9),
            int(_SLICE_S * 1e9),
            self._on_wait,
        )
        assert self._link is not None, "out of memory"
        self._waited_ns = ctypes.c_int64.from_address(self.library.moe_waited_ns(self._link))
        self._sent = (ctypes.c_int64 * 2).from_address(self.library.moe_sent_bytes(self._link))

    @classmethod
    def join(
        cls, rank: int, size: int, agree: Agree, timeout_s: float, spin_s: float | None = None
    ) -> HostLink:
        """Join the ranks of this host; each calls this at the same time.

        Args:
            agree: every rank's list of whole numbers, in rank order, by some other way.
            timeout_s: seconds after which a wait gives up on a silent peer.
            spin_s: seconds that a wait spins before it sleeps; None: by the number of cores.

        Raises:
            LinkUnavailableError: on every rank, where some rank cannot take part.
        """
        file, problem = _open_own(rank, size)
        me = Peer.me()
        told = agree([problem == "", me.pid, me.start_ticks, file])
        peers = [Peer(pid, start) for _, pid, start, _ in told]
        if not problem and all(ok for ok, *_ in told) and rank > 0:
            file, problem = _open_of(peers, told[0][3])
        failed = [r for r, (ok,) in enumerate(agree([problem == ""])) if not ok]
        if failed:
            if file >= 0:
                os.close(file)
            raise LinkUnavailableError(problem or f"rank {failed[0]} could not join")
        if spin_s is None:
            spin_s = 0.0 if size >= len(os.sched_getaffinity(0)) else _SPIN_S
        return cls(rank, size, file, peers, timeout_s, spin_s)

    def waited_s(self) -> float:
        """Seconds that this rank has waited for others in its calls so far; 0 once it has left."""
        return self._waited_ns.value * 1e-9

    def sent_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has written for others so far, by dispatch and by combine; 0 once it has left."""
        return self._sent[0], self._sent[1]

    def agree(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's `values` (at most MAX_VALUES, the same number on each), in rank order."""
        count = len(values)
        assert count <= MAX_VALUES
        mine = (ctypes.c_int64 * count)(*values)
        everyone = (ctypes.c_int64 * (count * self.size))()
        self.run(
            "the agreement before a step",
            self.library.moe_agree,
            self._link,
            ctypes.addressof(mine),
            count,
            ctypes.addressof(everyone),
        )
        return [everyone[start : start + count] for start in range(0, count * self.size, count)]

    @property
    def address(self) -> int | None:
        """What the library's functions know this link by; None once this rank has left."""
        return self._link

    def run(self, what: str, function: Callable[..., int], *args: Any) -> None:
        """Call a function of the library that waits for peers. After a failure every later call fails.

        Raises:
            PeerLostError: a peer died, left, or was silent for too long.
        """
        self.check_open(what)
        self.check(what, function(*args))

    def check_open(self, what: str) -> None:
        """Raise PeerLostError if an earlier call has failed, or this rank has left."""
        if self._lost is not None:
            raise PeerLostError(f"{what} failed: {self._lost}")

    def check(self, what: str, state: int) -> None:
        """Raise what ended a call of the library early, given what it returned; see `run`."""
        if state == host_library.DONE:
            return
        error = self._error or self._reason(what, state)
        self._lost = str(error) or type(error).__name__
        raise error

    def map(self, num_bytes: int) -> mmap.mmap:
        """The first `num_bytes` after the control block, which this rank alone uses, as a mapping.

        The mapping starts at the control block's first byte: use what lies at `data_offset()` and after. Ranks
        that ask for the same number of bytes see the same memory.

        Raises:
            ConfigError: the machine has not that much memory left.
        """
        total = data_offset() + num_bytes
        missing = total - os.fstat(self._file).st_size
        if missing > 0:
            available = psutil.virtual_memory().available
            if missing > available:
                raise ConfigError(
                    f"the ranks' shared buffers need {missing / 1e6:.0f} MB, this machine has "
                    f"{available / 1e6:.0f} MB of memory left; lower max_num_batched_tokens, or use "
                    f"dispatcher='all_to_all'"
                )
            os.ftruncate(self._file, total)
        return mmap.mmap(self._file, total)

    def close(self) -> None:
        """Leave: peers that wait for this rank, now or later, raise PeerLostError. Safe to call again."""
        if self._link is None:
            return
        self.library.moe_leave(self._link)
        self._waited_ns = ctypes.c_int64()  # the counters go with the link
        self._sent = (ctypes.c_int64 * 2)()
        self.library.moe_link_free(self._link)
        self._link = None
        self._lost = self._lost or "this rank has left"
        del self._control_address
        self._control.close()
        os.close(self._file)

    def _look_after(self) -> Generator[int, int, None]:
        """What the library calls while it waits, with the nanoseconds so far: is given 0 to wait on, 1 to end.

        A generator, as it is within its `try` when Python runs the handlers of signals, which it does first: what
        one raises in a callback that is a function reaches nobody.
        """
        end = 0
        while True:
            try:
                # Handlers run at the end of a loop too, so it is in here; the outer one goes on after an error.
                while True:
                    waited_ns = yield end
                    end = 0
                    self._check_peers()
                    # A slice that has begun counts, so that a wait does not end a slice too late.
                    if waited_ns * 1e-9 >= self._timeout_s - _SLICE_S / 2:
                        raise self._timed_out()
            except GeneratorExit:
                return
            except BaseException as error:  # KeyboardInterrupt too: `check` raises it
                self._error, end = error, 1

    def _check_peers(self) -> None:
        for rank, peer in enumerate(self._peers):
            if not peer.is_alive():
                raise PeerLostError(
                    f"{self._name(rank)}, which shares memory with rank {self.rank}, has died"
                )

    def _timed_out(self) -> PeerLostError:
        behind = [r for r in range(self.size) if self.library.moe_is_behind(self._link, r)]
        names = ", ".join(map(self._name, behind)) or "a peer"
        return PeerLostError(f"rank {self.rank} waited {self._timeout_s:g} s for {names}")

    def _reason(self, what: str, state: int) -> Exception:
        if state != host_library.PEER_LEFT:
            return AssertionError(f"{what} ended in state {state}")
        try:
            self._check_peers()  # one that left may have seen another die
        except PeerLostError as error:
            return error
        return PeerLostError(f"{self._name(self.library.moe_who_left(self._link))} has left")

    def _name(self, rank: int) -> str:
        return f"rank {rank} (pid {self._peers[rank].pid})"


def data_offset() -> int:
    """Where a mapping's data begins, in bytes; a multiple of the page size."""
    return -(-_control_bytes() // _PAGE) * _PAGE


def _control_bytes() -> int:
    return int(host_library.host_library().moe_control_bytes())


def _open_own(rank: int, size: int) -> tuple[int, str]:
    """Rank 0: the file that the ranks will share; others: -1. And why this rank cannot take part, or ""."""
    if size > MAX_RANKS:
        return -1, f"{size} ranks on one host, at most {MAX_RANKS} can share memory"
    try:
        host_library.host_library()
        if rank > 0:
            return -1, ""
        file = os.memfd_create("moe_runtime")
        os.ftruncate(file, data_offset())
    except (NativeBuildError, OSError) as error:
        return -1, str(error)
    return file, ""


def _open_of(peers: Sequence[Peer], file_of_first: int) -> tuple[int, str]:
    """The file of rank 0, opened here, and "" or why not."""
    strangers = [r for r, peer in enumerate(peers) if not peer.is_alive()]
    if strangers:  # in another container, say, where process ids mean other processes
        return -1, f"rank {strangers[0]}'s process cannot be seen from here"
    with contextlib.suppress(OSError):
        return os.open(f"/proc/{peers[0].pid}/fd/{file_of_first}", os.O_RDWR | os.O_CLOEXEC), ""
    return -1, f"rank 0's memory cannot be opened through /proc/{peers[0].pid}/fd"
