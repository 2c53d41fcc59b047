"""What travels between drivers and ranks, as msgpack: data only, so that a peer can send nothing that runs."""

from __future__ import annotations

from typing import Any

import msgspec

from moe_runtime.request import EngineRequest, OutputDelta, SamplingParams, StructuredOutputsParams


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Driver to rank: new requests, each as plain values."""

    requests: list[dict[str, Any]]

    @classmethod
    def of(cls, requests: list[EngineRequest]) -> Submit:
        return cls([msgspec.to_builtins(request, builtin_types=()) for request in requests])

    def engine_requests(self) -> list[EngineRequest]:
        """The requests; every value is checked as if a user had given it."""
        return [
            EngineRequest(
                **{
                    **fields,
                    "prompt_token_ids": tuple(fields["prompt_token_ids"]),
                    "eos_token_ids": tuple(fields["eos_token_ids"]),
                    "params": _sampling_params(fields["params"]),
                }
            )
            for fields in self.requests
        ]


def _sampling_params(fields: dict[str, Any]) -> SamplingParams:
    structured = fields["structured_outputs"]
    if structured is None:
        return SamplingParams(**fields)
    return SamplingParams(**{**fields, "structured_outputs": StructuredOutputsParams(**structured)})


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Driver to rank: end these requests."""

    request_ids: list[str]


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Driver to rank: I am alive; renews the driver's lease."""


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Rank to rank: leave the parking that followed agreement number `step`."""

    generation: int
    step: int


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """A new token of each of several completions, and nothing else about them: what most steps give.

    Columns of equal length, which take a fraction of the time that as many deltas take to make and to encode.
    """

    request_ids: list[str] = []
    sample_indices: list[int] = []
    token_ids: list[int] = []
    texts: list[str] = []  # that the token completed


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """Rank to driver: pieces of output, at most one of each completion."""

    deltas: list[OutputDelta]
    tokens: Tokens = msgspec.field(default_factory=Tokens)

    def all(self) -> list[OutputDelta]:
        """Every piece as a delta."""
        columns = self.tokens
        rows = zip(columns.request_ids, columns.sample_indices, columns.token_ids, columns.texts, strict=True)
        return [
            *self.deltas,
            *[
                OutputDelta(request_id=request, sample_index=index, new_token_ids=(token,), text=text)
                for request, index, token, text in rows
            ],
        ]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Rank to driver: a request that this rank cannot take, and why."""

    request_id: str
    error: str  # name of a class in moe_runtime.errors
    message: str


ToRank = Submit | Abort | Beat | Wake
ToDriver = Deltas | Refused

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_to_driver = msgspec.msgpack.Decoder(ToDriver)


def encode(message: ToRank | ToDriver) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode_to_rank(data: bytes) -> ToRank:
    """Inverse of `encode` for what ranks receive; msgspec.DecodeError for anything else."""
    return _to_rank.decode(data)


def decode_to_driver(data: bytes) -> ToDriver:
    """Inverse of `encode` for what drivers receive; msgspec.DecodeError for anything else."""
    return _to_driver.decode(data)
