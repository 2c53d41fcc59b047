"""Ray: joining the one that is there, or starting one, and leaving nothing behind when that is interrupted."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import FrameType
from typing import Literal

import psutil
import ray
import ray._private.utils
from ray._private.services import get_ray_address_from_environment

from moe_runtime.errors import ConfigError, RayStartError
from moe_runtime.reachable import accepts_connections
from moe_runtime.signals import exit_on_signal

_NO_CLUSTER = (
    "a named deployment outlives its driver, and there is no Ray cluster here that does; start one with "
    "`ray start --head`, or set RAY_ADDRESS"
)
_NOT_LET_IN = (
    "something listens at {address}, but it is no Ray cluster that lets us in; RAY_AUTH_MODE must be the same here as "
    "where the cluster was started, `token` or `disabled`"
)
# A head that is alive accepts at once; one whose machine is gone would be waited for.
_ANSWERS_WITHIN_S = 5.0


def ensure_ray(*, must_outlive_us: bool = False) -> bool:
    """Connect to the Ray that RAY_ADDRESS or the machine offers, else start one here.

    Args:
        must_outlive_us: a Ray started here would end with this process, so there must be one already.

    Returns whether this call connected, in which case the caller owes `ray.shutdown()`.

    Raises:
        ConfigError: RAY_ADDRESS leads nowhere, or there is no Ray that would outlive this process.
        RayStartError: Ray itself failed.
    """
    if ray.is_initialized():
        return False
    address = _find_cluster()
    if address is None:
        if must_outlive_us:
            raise ConfigError(_NO_CLUSTER)
        _init_ray("local")
        return True
    try:
        _init_ray(None)
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS") or must_outlive_us:
            raise ConfigError(_NOT_LET_IN.format(address=address)) from error
        # An earlier Ray left its address behind, and something else listens there now.
        _init_ray("local")
    return True


def _find_cluster() -> str | None:
    """The address of a Ray to join; None where there is none, so that one has to be started here.

    Raises:
        ConfigError: nothing listens at RAY_ADDRESS, or it is "auto" and there is none.
    """
    try:
        address = get_ray_address_from_environment(None, None)
    except ConnectionError as error:  # RAY_ADDRESS=auto
        raise _no_answer() from error
    if address in (None, "local"):
        return None
    if _listens(address):
        return str(address)
    # Ray itself would wait for minutes for a head that was killed and has left its address in a file.
    if os.environ.get("RAY_ADDRESS"):
        raise _no_answer()
    return None


def _listens(address: str) -> bool:
    """Whether anything accepts connections at host:port; True for what is no such address."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return True
    return accepts_connections(host.strip("[]"), int(port), _ANSWERS_WITHIN_S)


def _no_answer() -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}; start one there with "
        "`ray start --head`, or unset it"
    )


def _init_ray(address: Literal["local"] | None) -> None:
    """`ray.init` that leaves nothing behind when it is interrupted.

    Ray ends the servers that it has started by then, but not the agents that those have started, which need
    a minute to notice.

    Args:
        address: None for the cluster that Ray finds itself, as only then it shows the token that it keeps.
    """
    # Ray would start the ranks at niceness 15, and anything else on the machine would take their cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ours = psutil.Process()
    before = ours.children(recursive=True)
    try:
        with _signals_wait():
            _call_for_good(lambda: ray.init(address=address, include_dashboard=False, logging_level="error"))
    except BaseException as error:
        started = set(ours.children(recursive=True)).difference(before)
        ray.shutdown()
        for process in started:
            with contextlib.suppress(psutil.Error):
                if "ray" in " ".join(process.cmdline()):
                    process.kill()
        joins_in_vain = address is None and isinstance(error, ConnectionError)
        if isinstance(error, Exception) and not joins_in_vain:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RayStartError(
                f"Ray did not start ({address or 'joining a cluster'}): {reason[:300]}; a machine that is busy takes "
                "longer than the 30 s that Ray waits: try again, or start one with `ray start --head`"
            ) from error
        raise


def _call_for_good(function: Callable[[], object]) -> None:
    """Call it in a thread that lives as long as this process.

    Linux kills Ray's servers when the thread ends that has started them (PR_SET_PDEATHSIG), and a thread of asyncio's
    ends before the process has ended Ray.
    """
    if threading.current_thread() is threading.main_thread():
        function()
        return
    done: Future[None] = Future()
    _calls_for_good().put((function, done))
    done.result()


@functools.cache
def _calls_for_good() -> SimpleQueue[tuple[Callable[[], object], Future[None]]]:
    calls: SimpleQueue[tuple[Callable[[], object], Future[None]]] = SimpleQueue()

    def run() -> None:
        while True:
            function, done = calls.get()
            try:
                function()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    threading.Thread(target=run, name="parent-of-ray", daemon=True).start()
    return calls


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM do what they do only at the end of the context; a second Ctrl-C does it at once.

    An exception in the middle of `ray.init` crashes in Ray's native code now and then, and one in a process
    that Ray has forked prints a trace. Ray's own handler of SIGTERM ends what it has started by then, but not the
    agents that those have started; and a server that its client's death ends gets one SIGTERM for each thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wait(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in came:
            raise KeyboardInterrupt
        came.append(signum)

    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if terminate == signal.SIG_DFL:
        terminate = exit_on_signal
    handlers = {
        number: handler
        for number, handler in ((int(signal.SIGINT), interrupt), (int(signal.SIGTERM), terminate))
        if callable(handler)
    }
    for number in handlers:
        signal.signal(number, wait)
    set_by_ray = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_by_ray
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0]](came[0], None)
