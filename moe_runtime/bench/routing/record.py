"""Recording the expert choices of a text, by the runtime's own ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.bench.offline import greedy
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.request import PromptInput

if TYPE_CHECKING:
    from moe_runtime.llm import LLM


def read_text(file: str | None) -> str:
    """The text of a file; by default a page that comes with the package.

    Raises:
        ConfigError: the file cannot be read as UTF-8, or is empty.
    """
    if file is None:
        return (resources.files("moe_runtime") / "demo_checkpoint" / "README.md").read_text("utf-8")
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"--text {file} is empty; give a file with some text")
    return text


def recording_args(llm_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of LLM with which every token of every prompt is computed, once."""
    return {**llm_args, "enable_prefix_caching": False}


def record(llm: LLM, token_ids: Sequence[int], window_len: int) -> RoutingTrace:
    """Compute the tokens in pieces of `window_len`, each by itself, and keep what their routers choose.

    The deployment must compute every token (`recording_args`), and must have nothing else to do.

    Raises:
        PromptError: a window is longer than the model allows.
    """
    windows = [list(token_ids[start : start + window_len]) for start in range(0, len(token_ids), window_len)]
    params = greedy(1)
    pieces: list[list[np.ndarray]] = []  # by window and layer
    llm.collective_rpc("probe", ("record_choices", True))
    try:
        for window in windows:
            prompts: list[PromptInput] = [window]
            llm.generate(prompts, params, use_tqdm=False)
            # One rank computed the window, so its tokens stand in order; the others have no rows.
            of_ranks = llm.collective_rpc("probe", ("take_choices",))
            pieces.append([np.concatenate(of_layer) for of_layer in zip(*of_ranks, strict=True)])
    finally:
        llm.collective_rpc("probe", ("record_choices", False))
    lengths = [len(window) for window in windows]
    if [len(layers[0]) for layers in pieces] != lengths:
        raise MoeRuntimeError(
            "the ranks computed other tokens than those of the text; nothing else may use them"
        )
    return RoutingTrace(
        num_experts=llm.info.num_experts,
        layers=llm.info.moe_layers,
        choices_TK=tuple(np.concatenate(of_layer) for of_layer in zip(*pieces, strict=True)),
        starts=np.cumsum([0, *lengths[:-1]]),
    )
