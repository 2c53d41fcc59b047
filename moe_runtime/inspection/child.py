"""The inspecting process: imports a model class under the guard, builds it on meta, answers once in JSON.

Runs in a fresh interpreter (see `task`), which may crash, hang or be killed without harm to anyone else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings as python_warnings
from collections.abc import Mapping
from typing import Any

from moe_runtime.inspection import manifest
from moe_runtime.inspection.guard import AcceleratorGuard, ForbiddenTouchError
from moe_runtime.inspection.touches import WAY_OUT, is_harness
from moe_runtime.registry import ModelTarget

_KINDS = ("expert", "attention", "linear_attention", "other")
_PR_SET_PDEATHSIG = 1


def main(reply_fd: int) -> None:
    """Read the request from standard input, write the reply to `reply_fd`, leave."""
    request = json.load(sys.stdin)
    _die_with_parent(request["parent_pid"])
    os.set_inheritable(reply_fd, False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a model that asks for input gets none
    reply = _answer(request)
    with os.fdopen(reply_fd, "w") as file:
        json.dump(reply, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that the model's import left behind must not hold the answer back


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    target = ModelTarget.from_dict(request["target"])
    recorder = manifest.SourceRecorder()
    recorder.start()
    guard = AcceleratorGuard()
    try:
        guard.install()
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            facts = _inspect(target, request, guard)
    except BaseException as error:  # SystemExit too: whatever ends the inspection is told
        return _failure(error, target, guard)
    facts["warnings"] = [*facts["warnings"], *(_swallowed(touch.text()) for touch in guard.touches)]
    facts["inspection"] = {
        "node": request["node"],
        "interpreter": sys.executable,
        "seconds": round(time.monotonic() - request["started"], 3),
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    return {"ok": True, "info": facts, "manifest": manifest.collect(recorder.files, request["started_ns"])}


def _inspect(target: ModelTarget, request: Mapping[str, Any], guard: AcceleratorGuard) -> dict[str, Any]:
    """Everything that ModelInfo holds, but for the tokenizer and the inspection itself."""
    config = request["config"]
    cls: Any = target.load()
    import torch

    from moe_kernels.select import KernelPlan
    from moe_models.interfaces import ExpertShard, KVCacheSpec
    from moe_runtime.quantization import weight_formats

    guard.activity = "describing"
    about = cls.describe(config)
    dtype = getattr(torch, request["dtype"])
    formats = weight_formats(request["kept_quantization"], about.moe_intermediate_size)
    plan = KernelPlan.reference().with_weights(**formats.dtypes())
    guard.activity = "building"
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = cls(config, ExpertShard.whole(about.num_experts), plan)
    counts, sizes, notes = _count_parameters(model)
    specs = model.cache_specs()
    return {
        "architecture": target.architecture,
        "model_class": target.display_name,
        "modalities": list(about.modalities),
        "layer_types": list(about.layer_types),
        "moe_layers": list(about.moe_layers),
        "hidden_size": about.hidden_size,
        "vocab_size": about.vocab_size,
        "max_model_len": about.max_position_embeddings,
        "tie_word_embeddings": about.tie_word_embeddings,
        "num_experts": about.num_experts,
        "num_experts_per_tok": about.num_experts_per_tok,
        "moe_intermediate_size": about.moe_intermediate_size,
        "shared_expert_intermediate_size": about.shared_expert_intermediate_size,
        "num_mtp_layers": about.num_mtp_layers,
        "dtype": request["dtype"],
        "quantization": request["quantization"],
        "parameters": counts,
        "parameter_bytes": sizes,
        "kv_bytes_per_token": sum(s.bytes_per_token for s in specs if isinstance(s, KVCacheSpec)),
        "state_bytes_per_request": sum(s.bytes_per_sequence for s in specs if not isinstance(s, KVCacheSpec)),
        "warnings": notes,
    }


def _count_parameters(model: Any) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Counts and bytes by kind, and what is odd about them. A tied parameter counts once, scales only as bytes."""
    from moe_models.interfaces import scale_parameters

    counts, sizes = dict.fromkeys(_KINDS, 0), dict.fromkeys(_KINDS, 0)
    real = []
    scales = scale_parameters(model)
    for name, parameter in model.named_parameters():
        kind = model.parameter_kind(name)
        if kind not in counts:
            raise ValueError(f"parameter_kind({name!r}) is {kind!r}; it must be one of {', '.join(_KINDS)}")
        counts[kind] += 0 if name in scales else parameter.numel()
        sizes[kind] += parameter.numel() * parameter.element_size()
        if parameter.device.type != "meta":
            real.append(name)
    notes = []
    if real:
        notes.append(
            f"{len(real)} parameters name a device of their own and took real memory, {real[0]} first; leave the "
            f"device to the caller"
        )
    return counts, sizes, notes


def _swallowed(touch_text: str) -> str:
    return (
        f"an accelerator was touched and the error swallowed; with a GPU present the model may behave differently. "
        f"{touch_text}"
    )


def _failure(error: BaseException, target: ModelTarget, guard: AcceleratorGuard) -> dict[str, Any]:
    """Which error the driver raises, and its text."""
    name = target.display_name
    if guard.touches and _caused_by_touch(error):
        touch = guard.touches[-1]
        return _reply("AcceleratorTouchError", f"{name}: {touch.text()}\n{WAY_OUT}")
    # A swallowed touch is often the reason for what failed later.
    trace = "\n".join([_model_traceback(error), *(f"before that, {touch.text()}" for touch in guard.touches)])
    if isinstance(error, SystemExit):
        text = f"{name} left the inspecting process while {guard.activity}: sys.exit({error.code!r})"
        return _reply("InspectionCrashError", text, trace)
    summary = f"{type(error).__name__}: {error}"
    if type(error).__module__ == "moe_runtime.errors":
        return _reply("ConfigError", str(error))
    if guard.activity == "importing":
        return _reply("ModelImportError", f"importing {name} failed: {summary}{_missing_hint(error)}", trace)
    if guard.activity == "describing" and isinstance(error, ValueError):
        return _reply("ConfigError", f"config.json does not suit {name}: {error}")
    return _reply("InspectionError", f"{guard.activity} {name} on the meta device failed: {summary}", trace)


def _reply(kind: str, message: str, trace: str = "") -> dict[str, Any]:
    return {"ok": False, "error": kind, "message": message, "traceback": trace}


def _missing_hint(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return (
        " (the workers must be able to import it: install it there, or send it with the runtime environment's "
        "working_dir or py_modules)"
    )


def _caused_by_touch(error: BaseException | None) -> bool:
    """Whether the touch's own exception is this one or one that it was raised from or in the handling of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ForbiddenTouchError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _model_traceback(error: BaseException) -> str:
    """The original traceback without the frames of the inspection and of the import machinery."""
    report = traceback.TracebackException.from_exception(error)
    link: traceback.TracebackException | None = report
    while link is not None:
        link.stack = traceback.StackSummary.from_list([f for f in link.stack if not is_harness(f.filename)])
        link = link.__cause__ or link.__context__
    return "".join(report.format()).rstrip()


def _peak_rss_bytes() -> int:
    """Largest resident size of this process; `getrusage` would report the parent's where that was larger."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
