"""What `bench scaling` runs: the deployments that it compares, and the requests that it gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError

MODES = ("strong", "weak")
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One deployment of the comparison."""

    num_ranks: int
    threads: int | None = None  # CPU threads a rank; None: the runtime's own choice
    # This single rank has as many threads as all ranks of the layout of that size together; None: no such.
    same_cores_as: int | None = None

    @property
    def label(self) -> str:
        name = f"EP={self.num_ranks}"
        if self.threads is None:
            return name
        each = " each" if self.num_ranks > 1 else ""
        return f"{name}, {self.threads} thread{'s'[: self.threads > 1]}{each}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingWorkload:
    """Sizes, modes and requests; `--expert-parallel-sizes` and so on."""

    expert_parallel_sizes: tuple[int, ...] = (1, 2)
    mode: str = "both"  # strong: the same requests in all; weak: the same requests a rank; both
    concurrency: int = 32  # requests at once: in all (strong), of the smallest size (weak)
    input_len: int = 128  # tokens of each prompt
    output_len: int = 64  # tokens generated for each; 1 measures prefill alone
    num_rounds: int = 5  # in all, with every step timed and without
    seed: int = 0
    same_cores: bool = False  # also one rank with as many threads as all ranks together
    interleave: bool | None = None  # keep all deployments alive and take turns; None: where there is room

    def __post_init__(self) -> None:
        sizes = self.expert_parallel_sizes
        if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
            raise ConfigError(
                f"expert_parallel_sizes must be whole numbers of at least 1 that grow, got {list(sizes)}"
            )
        for name in ("concurrency", "input_len", "output_len", "num_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mode not in (*MODES, "both"):
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, both, got {self.mode!r}")

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.mode == "both" else (self.mode,)

    @property
    def phases(self) -> tuple[str, ...]:
        return (PREFILL,) if self.output_len == 1 else (PREFILL, DECODE)

    @property
    def num_timed(self) -> int:
        """Rounds with every step timed."""
        return max(1, self.num_rounds // 2)

    @property
    def num_served(self) -> int:
        """Rounds as at any other time; one at least, as of the others."""
        return (self.num_rounds + 1) // 2

    @property
    def smallest(self) -> int:
        return self.expert_parallel_sizes[0]

    def layouts(self, threads: int | None) -> list[Layout]:
        """Every deployment to start, the smallest first.

        Args:
            threads: CPU threads a rank, as the user set them.

        Raises:
            ConfigError: `same_cores` without them: ranks then share the node's cores as it is.
        """
        scaled = [Layout(num_ranks=n, threads=threads) for n in self.expert_parallel_sizes]
        if not self.same_cores:
            return scaled
        if threads is None:
            raise ConfigError("same_cores needs threads_per_rank, which says how many threads one rank has")
        alone = [
            Layout(num_ranks=1, threads=n * threads, same_cores_as=n)
            for n in self.expert_parallel_sizes
            if n > 1
        ]
        return [*scaled, *alone]

    def num_requests(self, mode: str, layout: Layout) -> int:
        """Requests of a round; a rank with all cores gets what the ranks get that it is compared with."""
        if mode == "strong":
            return self.concurrency
        return self.concurrency * (layout.same_cores_as or layout.num_ranks) // self.smallest

    def engine_args(self, layout: Layout, llm_args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of LLM for a layout."""
        return {
            "max_model_len": self.input_len + self.output_len,
            **llm_args,
            "expert_parallel_size": layout.num_ranks,
            **({} if layout.threads is None else {"threads_per_rank": layout.threads}),
        }
