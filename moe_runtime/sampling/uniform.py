"""Counter-based random numbers: one uniform draw for each (seed, sample index, position), with no state.

The generator is SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014, with the mixing constants of D. Stafford's variant 13). Its i-th output has a closed form, mix
of (state + (i + 1) * gamma), which makes it a hash of a counter. It is applied three times: the seed's
first output is the state of the request, output `sample_index` of that is the state of the sample, and
output `position` of that is the draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, made odd
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_UINT64_MASK = (1 << 64) - 1


def splitmix64(state: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Output number `index` (from 0) of the SplitMix64 stream that starts at `state`; arrays of one shape."""
    z = state + (index + np.uint64(1)) * _GAMMA  # uint64 arrays wrap around
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniforms(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Draws in [0, 1), one for each triple; seeds are taken modulo 2**64.

    53 bits each, so that every draw is exact in float64 and none is 1.
    """
    seed = np.array([s & _UINT64_MASK for s in seeds], dtype=np.uint64)
    request_state = splitmix64(seed, np.zeros_like(seed))
    sample_state = splitmix64(request_state, np.array(sample_indices, dtype=np.uint64))
    bits = splitmix64(sample_state, np.array(positions, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
