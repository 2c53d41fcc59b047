"""What runs in the next step of one rank, and what its sequences hold of the caches. No torch."""

from moe_runtime.scheduler.config import SchedulerConfig
from moe_runtime.scheduler.scheduler import Scheduler
from moe_runtime.scheduler.sequence import Sequence, SequenceStatus
from moe_runtime.scheduler.stats import SchedulerStats
from moe_runtime.scheduler.step import ScheduledEntry, ScheduledStep

__all__ = [
    "ScheduledEntry",
    "ScheduledStep",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Sequence",
    "SequenceStatus",
]
