"""A rank worker that prints, logs and writes as native code does."""

from __future__ import annotations

import logging
import os

from moe_runtime.rank_spec import RankReport, RankSpec
from moe_runtime.worker import RankWorker


class LoudWorker(RankWorker):
    """Says a line in its constructor and three more when it is loaded; ranks differ in a number only."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        print("made", spec.rank)

    def report(self) -> RankReport:
        print("printed", self._spec.rank)
        logging.getLogger("moe_runtime.loud").info("logged %d", self._spec.rank)
        os.write(2, b"native %d\n" % self._spec.rank)
        return super().report()
