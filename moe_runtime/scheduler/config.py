"""SchedulerConfig: the limits of one rank's steps, its queue and what it keeps in its caches."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.errors import ConfigError, did_you_mean

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one rank."""

    max_num_seqs: int  # sequences that run at once
    max_num_batched_tokens: int  # tokens of one step
    block_size: int  # tokens a KV block
    max_model_len: int  # tokens of a sequence, prompt and output
    policy: str = (
        "fcfs"  # who comes first: "fcfs" by arrival, "priority" by the request's priority and arrival
    )
    max_waiting: int | None = None  # sequences that may wait before more are refused; None: any number
    enable_prefix_caching: bool = True
    has_state: bool = True  # the model has linear attention: a prefix is of use only where its state is kept
    state_checkpoint_interval: int = (
        1024  # tokens of a prompt between kept states; rounded up to whole blocks
    )
    # Share of the state slots that may hold kept states; a running sequence takes one of them when it needs it.
    state_checkpoint_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "state_checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2 (a prompt and a new token), got {self.max_model_len}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence gets a token a step; raise the one "
                "or lower the other"
            )
        if self.policy not in POLICIES:
            hint = did_you_mean(str(self.policy), POLICIES)
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}{hint}")
        if self.max_waiting is not None and self.max_waiting < 1:
            raise ConfigError(
                f"max_waiting must be at least 1 (or None for no limit), got {self.max_waiting}"
            )
        if not 0 <= self.state_checkpoint_share <= 1:
            raise ConfigError(
                f"state_checkpoint_share must be between 0 and 1, got {self.state_checkpoint_share}"
            )
