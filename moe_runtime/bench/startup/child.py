"""The process that `bench startup` starts: one LLM, one token; says on its last line when each phase began.

    python -m moe_runtime.bench.startup.child REQUEST

REQUEST is a JSON object: `llm` holds the arguments of LLM, or `connect` the name of a deployment.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.startup.phases import END
from moe_runtime.errors import MoeRuntimeError, UserError

if TYPE_CHECKING:
    from moe_runtime.rank_spec import StartUpStep

_PROMPT_TOKENS = 8


class PhaseWatch:
    """Remembers when phases began, from the calls that begin them."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """It begins now, unless it has begun already."""
        self.began.setdefault(phase, time.monotonic())

    def on_call(self, owner: Any, name: str, phase: str, only_with: str | None = None) -> None:
        """Have a phase begin whenever a function is called, perhaps only with a method's name among its arguments."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if only_with is None or only_with in args:
                self.mark(phase)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def count(self, step: StartUpStep) -> None:
        """A phase ends when the last rank is done with it, so the last step of each kind counts."""
        now = time.monotonic()
        if step.phase == "load":
            self.began["caches"] = now
        else:
            if step.amount == 0:  # the rank has its caches
                self.began["compile"] = now
            self.began["dispatchers"] = now

    def on_start_up(self) -> None:
        """Watch the calls that a driver makes on its way to a running deployment."""
        from moe_runtime import engine, frontend, named
        from moe_runtime.progress import StartUpProgress
        from moe_runtime.ranks import Ranks

        self.on_call(frontend, "ensure_ray", "ray")
        self.on_call(frontend, "inspect_model", "inspection")
        self.on_call(engine.Placement, "reserve", "placement")
        self.on_call(named.NamedDeployment, "attach", "attach")
        self.on_call(Ranks, "__init__", "actors")
        self.on_call(Ranks, "call_one", "join", only_with="host_store")
        self.on_call(Ranks, "stream", "load", only_with="load")
        self.on_call(Ranks, "call", "connect", only_with="report")
        self.on_call(frontend, "find_tokenizer", "connect")
        update = StartUpProgress.update

        def watched_update(progress: StartUpProgress, step: StartUpStep) -> None:
            self.count(step)
            update(progress, step)

        StartUpProgress.update = watched_update  # type: ignore[method-assign, assignment]


def main() -> int:
    """Run once."""
    request = json.loads(sys.argv[1])
    watch = PhaseWatch()
    try:
        _run(request, watch)
    except MoeRuntimeError as error:
        print(json.dumps({"error": str(error), "is_users": isinstance(error, UserError)}), flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def _run(request: dict[str, Any], watch: PhaseWatch) -> None:
    """Start or attach, generate, say what was measured, end."""
    from moe_runtime.bench.offline import greedy
    from moe_runtime.llm import LLM

    watch.on_start_up()
    watch.mark("checkpoint")
    name = request.get("connect")
    with LLM.connect(name) if name else LLM(**request["llm"], use_tqdm=False) as llm:
        watch.mark("first token")
        prompt = [number % llm.info.vocab_size for number in range(1, 1 + _PROMPT_TOKENS)]
        for _ in llm.stream(prompt, greedy(1)):
            watch.mark(END)
        result = {
            "began": watch.began,
            "cpu_s": time.process_time(),
            "model": llm.files.name,
            "parameters": llm.info.num_parameters,
            "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
            "expert_parallel_size": llm.config.expert_parallel_size,
            "device": llm.ranks[0].device,
        }
        # Said before the end, which is not what is measured, and in which Ray may still end this process its own way.
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
