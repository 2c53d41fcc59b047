"""When requests arrive: gaps drawn from a gamma distribution, as vLLM's client draws them."""

from __future__ import annotations

import math
import random
from itertools import accumulate

from moe_runtime.errors import ConfigError


def arrival_times(count: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds since the start of each of `count` arrivals, in order.

    Args:
        request_rate: requests a second; infinite has all arrive at once.
        burstiness: shape of the gamma distribution. 1 is a Poisson process, less comes in bursts, more is more
            even. Gaps have a coefficient of variation of `burstiness ** -0.5`.

    The gaps are stretched so that the last request arrives at `count / request_rate`: the rate is exact in every
    run, not only on average.

    Raises:
        ConfigError: a number is not above 0.
    """
    if not request_rate > 0:
        raise ConfigError(f"--request-rate must be above 0, or inf for all at once; got {request_rate:g}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"--burstiness must be above 0, got {burstiness:g}; 1 is a Poisson process")
    if math.isinf(request_rate):
        return [0.0] * count
    rng = random.Random(f"arrivals-{seed}")
    drawn = list(accumulate(rng.gammavariate(burstiness, 1.0) for _ in range(count)))
    # Gaps so uneven that they all underflow to 0 still have a rate.
    scale = count / request_rate / drawn[-1] if drawn and drawn[-1] > 0 else 0.0
    return [time * scale for time in drawn]
