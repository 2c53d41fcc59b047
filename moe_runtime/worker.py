"""RankWorker: what runs inside a rank's actor. A thin shell around scheduler, runner and collectives.

Life: `__init__` asks the device what it is; `where`, `host_store` and `join` bring the ranks together; `load`
reads this rank's weights and makes its caches; `open_server` and `serve` serve until `stop`, or until Ray ends it.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch

from moe_kernels.device import DeviceProfile
from moe_models.interfaces import ExpertShard, LayerCacheSpec, StateCacheSpec, TokenDispatcher
from moe_runtime.building import build_model, choose_kernels, describe_model, read_weights
from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.pool import allocate
from moe_runtime.cache.sizing import checkpoint_interval
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.delivery import Delivery
from moe_runtime.experts.routing_tap import RoutingTap
from moe_runtime.gpu_checks import gpu_ids, require_cuda, require_triton
from moe_runtime.grammar.cache import GrammarCache
from moe_runtime.grammar.compiler import GrammarCompiler
from moe_runtime.memory import plan_rank_caches
from moe_runtime.modelfiles import dtype_name
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.dispatch import ExpertLoad, make_dispatchers
from moe_runtime.parallel.groups import ProcessGroups, connect_store, host_store
from moe_runtime.probe import RankProbe
from moe_runtime.profiling import work_space_bytes
from moe_runtime.rank_spec import RankReport, RankSpec, RankStats, StartUpStep
from moe_runtime.runner import Runner
from moe_runtime.scheduler import Scheduler, SchedulerConfig
from moe_runtime.step_loop import LoopStats, StepLoop
from moe_runtime.timing.timer import PartTimer
from moe_runtime.tokenizer import find_eos_token_ids, find_tokenizer
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.rank_server import RankServer
from moe_runtime.warmup import warm_up
from moe_runtime.weights.speed import read_speed

_MAX_MASK_THREADS = 8


class RankWorker:
    """One rank: its device, its share of the experts, the sequences that the driver gave it."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._config = spec.config
        self._node_ip = ray.util.get_node_ip_address()
        if spec.config.device == "cuda":
            require_cuda(f"rank {spec.rank} on node {self._node_ip}")
        self._profile = DeviceProfile.query(spec.config.device)
        self._device = torch.device(spec.config.device)
        self._threads = spec.config.threads_per_rank or max(1, _node_cores() // spec.ranks_on_node)
        torch.set_num_threads(self._threads)
        self._groups: ProcessGroups | None = None
        self._loop: StepLoop | None = None

    # ------------------------------------------------------------------------- coming together

    def where(self) -> tuple[str, int]:
        """This rank's node address and process id."""
        return self._node_ip, os.getpid()

    def host_store(self) -> tuple[str, int]:
        """Rank 0: open the store where the ranks meet; returns its address."""
        self._store, address = host_store(
            self._node_ip, self._spec.placement.num_ranks, self._config.process_group_timeout_s
        )
        return address

    def join(self, meeting_point: tuple[str, int]) -> None:
        """Join the process groups; returns when every rank is there."""
        size, timeout_s = self._spec.placement.num_ranks, self._config.process_group_timeout_s
        store = self._store if self._spec.rank == 0 else connect_store(meeting_point, size, timeout_s)
        self._groups = ProcessGroups.join(
            store,
            self._spec.rank,
            size,
            self._node_ip,
            self._device,
            timeout_s,
            same_host=self._spec.ranks_on_node == size,
        )

    # ------------------------------------------------------------------------- loading

    def load(self) -> Iterator[StartUpStep]:
        """Build the model, read this rank's weights, make the caches, compile; yields progress as it goes."""
        spec, config = self._spec, self._config
        experts = spec.placement.experts_of_rank[spec.rank]
        self._dtype: torch.dtype = getattr(torch, dtype_name(spec.model_files.config, config.dtype))
        shard = ExpertShard(spec.placement.num_experts, experts)
        facts = describe_model(spec.target, spec.model_files)
        self._plan = choose_kernels(self._profile, spec, facts, self._dtype)
        if self._device.type == "cuda" and self._plan.warm_up_rows():
            require_triton()
        model = build_model(spec.target, spec.model_files, shard, self._plan, self._dtype, self._device)
        for num_bytes in read_weights(model, spec.model_files):
            yield StartUpStep("load", num_bytes)

        specs = model.cache_specs()
        self._cache_plan, self._max_model_len = plan_rank_caches(
            specs,
            config,
            self._device,
            facts.max_position_embeddings,
            spec.ranks_on_node,
            work_space_bytes(model, config, spec.placement.num_ranks, len(experts), self._device),
        )
        weights = tuple(model.parameters())
        self._weight_bytes = sum(weight.nbytes for weight in weights)
        isa = self._plan.linear.isa
        self._read_speed = None if isa is None else partial(read_speed, weights, isa)
        caches = allocate(specs, self._cache_plan, self._device)
        yield from warm_up(
            model,
            caches,
            self._plan,
            block_size=config.block_size,
            num_local_experts=len(experts),
            device=self._device,
        )
        self._runner = Runner(
            model,
            caches,
            block_size=config.block_size,
            vocab_size=facts.vocab_size,
            num_mask_threads=max(1, min(_MAX_MASK_THREADS, self._threads // 2)),
        )
        self._vocab_size = facts.vocab_size
        self._tokenizer = find_tokenizer(spec.model_files)
        self._scheduler = self._new_scheduler(specs)
        self._moe_layers = facts.moe_layers
        self._load = ExpertLoad(len(facts.moe_layers), len(experts), self._device)
        self._tap = RoutingTap(len(facts.moe_layers), facts.num_experts_per_tok, self._device)
        self._timer = self._new_timer()
        self._timer.watch(model)
        capacity = StepCapacity(
            max_tokens=config.max_num_batched_tokens,
            hidden_size=facts.hidden_size,
            top_k=facts.num_experts_per_tok,
            dtype=self._dtype,
        )
        self._dispatchers, self._dispatcher_reason = make_dispatchers(
            config.dispatcher, self._groups, spec.placement, capacity, self._device
        )

    def report(self) -> RankReport:
        """What this rank is and has, once it is loaded."""
        return RankReport(
            rank=self._spec.rank,
            node_ip=self._node_ip,
            pid=os.getpid(),
            gpu_ids=gpu_ids() if self._device.type == "cuda" else (),
            device=self._profile.name,
            kernel_plan=tuple(self._plan.describe().splitlines()),
            dispatcher=self._dispatcher_reason,
            num_local_experts=len(self._spec.placement.experts_of_rank[self._spec.rank]),
            weight_bytes=self._weight_bytes,
            cache_bytes=self._cache_plan.bytes,
            cache_tokens=self._cache_plan.max_tokens,
            max_model_len=self._max_model_len,
            threads=self._threads,
        )

    # ------------------------------------------------------------------------- serving

    def open_server(self, key: bytes) -> tuple[str, int]:
        """Listen for drivers and peers that know `key`; returns the address."""
        self._mailbox = Mailbox(self._spec.generation)
        self._probe = RankProbe(
            self._mailbox.call,
            self._timer,
            self._tap,
            rank=self._spec.rank,
            num_ranks=self._spec.placement.num_ranks,
            read_speed=self._read_speed,
        )
        self._server = RankServer(self._node_ip, key, self._mailbox)
        return self._server.address

    def serve(self, peer_addresses: Sequence[tuple[str, int]]) -> None:
        """Run steps with all the other ranks until one is told to stop.

        Args:
            peer_addresses: of the other ranks' servers.
        """
        torch.set_num_threads(self._threads)
        self._server.connect_peers(peer_addresses)
        self._loop = StepLoop(
            scheduler=self._scheduler,
            runner=self._runner,
            delivery=Delivery(self._tokenizer),
            mailbox=self._mailbox,
            server=self._server,
            agree=self._agree,
            dispatcher_for_step=self._dispatcher_for_step,
            timer=self._timer,
            generation=self._spec.generation,
            grammars=self._grammars(),
        )
        # What start-up made stays: a collection that went through all of it would take as long as some steps.
        gc.collect()
        gc.freeze()
        try:
            self._loop.run()
        finally:
            gc.unfreeze()
            self._server.close()

    # ------------------------------------------------------------------------- beside the loop

    def stop(self) -> None:
        """Have every rank leave `serve` at its next agreement."""
        self._mailbox.stop()

    def pause(self, paused: bool) -> None:
        """Keep work back until it is taken back; all ranks are told the same."""
        self._mailbox.pause(paused)

    def probe(self, method: str, *args: Any) -> Any:
        """Result of a method of RankProbe."""
        return getattr(self._probe, method)(*args)

    def stats(self) -> RankStats:
        """What this rank has done and holds now."""
        loop, rank = self._loop, self._spec.rank
        return RankStats(
            rank=rank,
            scheduler=dataclasses.asdict(self._scheduler.stats),
            loop=dataclasses.asdict(loop.stats if loop else LoopStats()),
            step_parts=self._timer.seconds(),
            prompt_step_parts=self._timer.prompt_seconds(),
            step_sizes=tuple(loop.step_sizes) if loop else (),
            moe_layers=self._moe_layers,
            local_experts=self._spec.placement.experts_of_rank[rank],
            expert_tokens=tuple(map(tuple, self.expert_load())),
            sent_bytes=dataclasses.asdict(self._dispatchers.traffic),
        )

    def expert_load(self) -> list[list[int]]:
        """Tokens that each local expert of each MoE layer computed so far."""
        return self._load.tokens_per_expert().tolist()

    def _dispatcher_for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        return self._tap.watch(self._load.watch(self._dispatchers.for_step(token_counts)))

    def _agree(self, values: list[int]) -> list[list[int]]:
        return [values] if self._groups is None else self._groups.agree(values)

    def _grammars(self) -> GrammarCache | None:
        """For structured requests; xgrammar is imported when the first one comes."""
        tokenizer, files = self._tokenizer, self._spec.model_files
        if tokenizer is None:
            return None
        end_ids = find_eos_token_ids(files, tokenizer)
        return GrammarCache(lambda: GrammarCompiler(tokenizer, self._vocab_size, end_ids))

    def _new_timer(self) -> PartTimer[Any]:
        if self._device.type == "cuda":
            return PartTimer.on_device()
        host = self._groups.host if self._groups is not None else None
        return PartTimer.on_host(host.waited_s if host is not None else None)

    def _new_scheduler(self, specs: Sequence[LayerCacheSpec]) -> Scheduler:
        config, plan = self._config, self._cache_plan
        return Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                max_model_len=self._max_model_len,
                policy=config.scheduling_policy,
                max_waiting=config.max_waiting,
                enable_prefix_caching=config.enable_prefix_caching,
                has_state=any(isinstance(spec, StateCacheSpec) for spec in specs),
                state_checkpoint_interval=checkpoint_interval(
                    specs, config.block_size, config.state_checkpoint_interval
                ),
            ),
            BlockAllocator(plan.num_blocks, plan.block_size),
            SlotAllocator(plan.num_slots),
        )


def _node_cores() -> int:
    return len(os.sched_getaffinity(0))
