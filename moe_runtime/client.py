"""EngineClient: a driver's connections to the ranks of a deployment, and its ledger of requests in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_runtime import errors
from moe_runtime.errors import EngineDeadError, MoeRuntimeError
from moe_runtime.request import EngineRequest, OutputDelta
from moe_runtime.routing import RequestRouter
from moe_runtime.transport import wire
from moe_runtime.transport.channel import Channel
from moe_runtime.transport.rank_server import BEAT_INTERVAL_S

# What a request's owner gets: pieces of its output as they come, or the error that ended it. Requests that share a
# sink get their pieces together, so it must be hashable.
Sink = Callable[[list[OutputDelta] | MoeRuntimeError], None]

# How long a lost connection waits for the error that tells its cause.
_CAUSE_WAIT_S = 5.0


@dataclass(slots=True)
class _InFlight:
    """A request that has not ended; kept whole, so that it could be sent again."""

    samples: Sequence[EngineRequest]
    sink: Sink
    rank: int
    open_samples: set[int]
    num_tokens: int  # prompt and outputs at most, for the router


class EngineClient:
    """Sends requests to ranks and hands what comes back to their owners. Its methods may be called from any thread.

    Sinks are called from reader threads; they must return at once.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], key: bytes, block_size: int) -> None:
        """Connect to every rank.

        Raises:
            ChannelError: a rank cannot be reached.
        """
        self._lock = threading.Lock()
        self._requests: dict[str, _InFlight] = {}
        self._router = RequestRouter(len(addresses), block_size)
        self._dead: MoeRuntimeError | None = None
        self._closing = threading.Event()
        self._channels: list[Channel] = []
        try:
            for address in addresses:
                self._channels.append(Channel.connect(address, key))
        except BaseException:
            self._close_channels()
            raise
        for rank, channel in enumerate(self._channels):
            threading.Thread(
                target=self._read, args=(rank, channel), name=f"rank-{rank}", daemon=True
            ).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def submit(self, samples: Sequence[EngineRequest], sink: Sink) -> None:
        """Send one request, all of its samples to one rank.

        Args:
            samples: share a request id that no other driver of the deployment uses.

        Raises:
            EngineDeadError: the deployment has ended.
        """
        first = samples[0]
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError(f"the deployment has ended: {self._dead}") from self._dead
            num_tokens = len(first.prompt_token_ids) + len(samples) * (first.params.max_tokens or 0)
            rank = self._router.route(first.prompt_token_ids, num_tokens)
            self._requests[first.request_id] = _InFlight(
                samples, sink, rank, {sample.sample_index for sample in samples}, num_tokens
            )
        self._channels[rank].send(wire.encode(wire.Submit.of(list(samples))))

    def abort(self, request_id: str) -> None:
        """End a request; its samples end with the finish reason "abort". One that has ended is left alone."""
        with self._lock:
            request = self._requests.get(request_id)
        if request is not None:
            self._channels[request.rank].send(wire.encode(wire.Abort([request_id])))

    def fail(self, error: MoeRuntimeError) -> None:
        """End every request with `error`; the client takes no more."""
        with self._lock:
            if self._dead is not None:
                return
            self._dead = error
            requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request.sink(error)

    def close(self) -> None:
        """Close the connections; requests in flight are aborted by the ranks."""
        self.fail(EngineDeadError("it was shut down"))
        self._closing.set()
        self._close_channels()

    # ------------------------------------------------------------------- threads

    def _read(self, rank: int, channel: Channel) -> None:
        channel.receive(self._handle)
        if not self._closing.wait(_CAUSE_WAIT_S):  # whoever watches the actors knows why, and says so first
            self.fail(errors.RankFailedError(f"rank {rank} closed its connection"))

    def _handle(self, data: bytes) -> None:
        message = wire.decode_to_driver(data)
        if isinstance(message, wire.Refused):
            self._refused(message)
            return
        of_sink: dict[Sink, list[OutputDelta]] = {}
        with self._lock:
            for delta in message.all():
                request = self._requests.get(delta.request_id)
                if request is None:
                    continue
                of_sink.setdefault(request.sink, []).append(delta)
                if delta.finish_reason is not None:
                    request.open_samples.discard(delta.sample_index)
                    if not request.open_samples:
                        self._forget(delta.request_id)
        for sink, deltas in of_sink.items():
            sink(deltas)

    def _refused(self, refused: wire.Refused) -> None:
        with self._lock:
            request = self._requests.get(refused.request_id)
            if request is None:
                return
            self._forget(refused.request_id)
        kind = getattr(errors, refused.error, MoeRuntimeError)
        request.sink(kind(refused.message))
        if len(request.samples) > 1:  # the rank may have taken some of them
            self._channels[request.rank].send(wire.encode(wire.Abort([refused.request_id])))

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        self._router.release(request.rank, request.num_tokens)

    def _beat(self) -> None:
        message = wire.encode(wire.Beat())
        while not self._closing.wait(BEAT_INTERVAL_S):
            for channel in self._channels:
                channel.send(message)

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()
