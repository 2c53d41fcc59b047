"""Part: the parts that a step's time is divided into."""

from __future__ import annotations

from enum import IntEnum


class Part(IntEnum):
    """What a rank is at. At any moment of a step it is at exactly one, so that parts add up to steps."""

    ATTENTION = 0  # full attention layers, their projections included
    LINEAR_ATTENTION = 1  # Gated DeltaNet layers, their projections included
    EXPERTS = 2  # routed experts alone
    DISPATCH = 3  # carrying tokens to the ranks of their experts, and counting them
    COMBINE = 4  # carrying partial sums back, and adding them up
    WAITING = (
        5  # for other ranks: in the agreement before a step, and where a link knows, while tokens travel
    )
    OTHER = 6  # router, shared expert, norms, embedding, sampling, scheduling, delivery

    @property
    def label(self) -> str:
        """As metrics name it."""
        return self.name.lower()
