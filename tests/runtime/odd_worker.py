"""A rank worker whose rank 1 believes that it runs on a machine without vector instructions."""

from __future__ import annotations

import dataclasses

from moe_runtime.rank_spec import RankSpec
from moe_runtime.worker import RankWorker


class OddWorker(RankWorker):
    """Rank 1's profile has no instruction sets."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        if spec.rank == 1:
            self._profile = dataclasses.replace(self._profile, instruction_sets=())
