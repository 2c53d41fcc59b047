"""ExpertPlacement: the division of a model's logical experts over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from moe_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Every logical expert on one rank, the same in every MoE layer."""

    experts_of_rank: tuple[tuple[int, ...], ...]  # logical ids that each rank holds, in local order

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Equal runs of neighbours; where they do not divide evenly the first ranks hold one more.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        if num_ranks > num_experts:
            raise ConfigError(
                f"expert_parallel_size={num_ranks} is larger than the model's {num_experts} experts; "
                f"use at most {num_experts}"
            )
        base, more = divmod(num_experts, num_ranks)
        starts = [r * base + min(r, more) for r in range(num_ranks + 1)]
        return cls(tuple(tuple(range(a, b)) for a, b in pairwise(starts)))

    @property
    def num_experts(self) -> int:
        return sum(len(experts) for experts in self.experts_of_rank)

    @property
    def num_ranks(self) -> int:
        return len(self.experts_of_rank)

    def rank_of_expert(self) -> list[int]:
        """The rank of each logical expert, in the order of their ids."""
        ranks = [-1] * self.num_experts
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                ranks[expert] = rank
        return ranks
