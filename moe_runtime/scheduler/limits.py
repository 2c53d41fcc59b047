"""Where a request ends for want of room, and whether it could ever run at all."""

from __future__ import annotations

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.errors import PromptError
from moe_runtime.request import EngineRequest


def max_tokens_of(request: EngineRequest, max_model_len: int, blocks: BlockAllocator) -> int:
    """Tokens, prompt and output, at which a request ends.

    Raises PromptError, with the numbers, for one that could not run even alone.
    """
    prompt = len(request.prompt_token_ids)
    if not 0 < prompt < max_model_len:
        raise PromptError(
            f"request {request.request_id!r} has a prompt of {prompt} tokens; it must have at least 1 "
            f"and, with max_model_len {max_model_len}, at most {max_model_len - 1}"
        )
    wanted = request.params.max_tokens
    max_tokens = max_model_len if wanted is None else min(max_model_len, prompt + wanted)
    needed = blocks.blocks_for(max_tokens)
    if needed > blocks.capacity:
        raise PromptError(
            f"request {request.request_id!r} may reach {max_tokens} tokens and needs {needed} KV blocks "
            f"of {blocks.block_size} tokens, but this rank has {blocks.capacity}; lower "
            "max_tokens, shorten the prompt or enlarge the cache"
        )
    return max_tokens
