"""What a process with a GPU of its own must be able to do, and what to install where it cannot."""

from __future__ import annotations

import ray
import torch

from moe_runtime.errors import ConfigError


def require_cuda(who: str) -> None:
    """Raise ConfigError if this process, to which Ray gave a GPU, cannot use it."""
    if torch.cuda.is_available():
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    raise ConfigError(
        f"{who} was given GPU {', '.join(gpu_ids())} by Ray, but its torch {torch.__version__} (built with "
        f"{build}) sees no CUDA device; install a CUDA build of torch and its driver there, or use device='cpu'"
    )


def gpu_ids() -> tuple[str, ...]:
    """Ids of the GPUs that Ray gave to this actor."""
    return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def require_triton() -> None:
    """Raise ConfigError where Triton cannot compile what launches its kernels.

    It does so at first use, with the system's compiler against Python's headers, which nothing else here needs.
    """
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        raise ConfigError(
            f"Triton cannot start here: {error}; it needs a C compiler and Python's headers: install them (Debian "
            "and Ubuntu: gcc and python3-dev), or set CC"
        ) from error
