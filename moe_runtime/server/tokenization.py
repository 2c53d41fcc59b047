"""/tokenize and /detokenize."""

from __future__ import annotations

from fastapi import Request, Response

from moe_runtime.server.conversation import render
from moe_runtime.server.errors import bad_request
from moe_runtime.server.http import json_answer, read_json
from moe_runtime.server.prompts import encode, served_name
from moe_runtime.server.protocol.tokenize import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from moe_runtime.server.state import ServerState


async def tokenize(http: Request) -> Response:
    """Token ids of a text or of a conversation; what is far too long for a prompt is refused as one is."""
    state: ServerState = http.app.state.server
    request = TokenizeRequest.parse(await read_json(http, state.config.body_timeout_s))
    served_name(request.model, state.config)
    tokenizer, max_model_len = state.engine.tokenizer, state.engine.max_model_len
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if request.prompt is not None:
        ids = await encode(
            tokenizer,
            request.prompt,
            add_special_tokens=request.add_special_tokens is not False,
            max_model_len=max_model_len,
        )
    else:
        ids = await render(
            tokenizer,
            request.messages or [],
            tools=request.tools,
            template=state.config.chat_template,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            template_variables=request.chat_template_kwargs,
            add_special_tokens=bool(request.add_special_tokens),
            max_model_len=max_model_len,
        )
    texts = [tokenizer.token(token_id) for token_id in ids] if request.return_token_strs else None
    return json_answer(
        TokenizeAnswer(count=len(ids), max_model_len=max_model_len, tokens=ids, token_strs=texts)
    )


async def detokenize(http: Request) -> Response:
    """The text of token ids, special tokens included."""
    state: ServerState = http.app.state.server
    request = DetokenizeRequest.parse(await read_json(http, state.config.body_timeout_s))
    served_name(request.model, state.config)
    text = state.engine.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return json_answer(DetokenizeAnswer(prompt=text))
