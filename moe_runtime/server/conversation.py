"""From a conversation to token ids: messages checked and brought into the shape that chat templates take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from moe_runtime.errors import PromptError
from moe_runtime.server.errors import bad_request
from moe_runtime.server.prompts import encode
from moe_runtime.tokenizer import Tokenizer

# Variables of the template that are set by fields of their own.
_RESERVED = frozenset(
    {"messages", "tools", "template", "chat_template", "add_generation_prompt", "continue_final_message"}
)
# Messages that are rendered on the event loop in a few milliseconds; longer conversations go to a thread.
_FEW_MESSAGES = 64
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


async def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    template_variables: dict[str, Any] | None = None,
    add_special_tokens: bool = False,
    max_model_len: int | None = None,
) -> list[int]:
    """Token ids of a conversation.

    Args:
        template: text of a chat template; None takes the checkpoint's.
        add_generation_prompt: open the assistant's turn; None: unless the final message is to be continued.
        max_model_len: refuse early what is far longer.

    Raises:
        ApiError: 400, a message has not the shape of one, or a field contradicts another.
        ConfigError: there is no chat template.
    """
    if continue_final_message and add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt contradict each other; set one of them",
            "continue_final_message",
        )
    variables = template_variables or {}
    if reserved := _RESERVED & variables.keys():
        name = min(reserved)
        raise bad_request(f"chat_template_kwargs may not hold {name!r}", "chat_template_kwargs")
    if not messages:
        raise bad_request("messages is empty; a conversation has at least one", "messages")
    opened = not continue_final_message if add_generation_prompt is None else add_generation_prompt

    def text_of_all() -> str:
        normal = [normalize(message, index) for index, message in enumerate(messages)]
        text = tokenizer.apply_chat_template(
            normal, add_generation_prompt=opened, tools=tools, chat_template=template, **variables
        )
        return _cut_after_final_message(text, normal[-1]) if continue_final_message else text

    try:
        is_short = len(messages) <= _FEW_MESSAGES
        text = text_of_all() if is_short else await asyncio.to_thread(text_of_all)
    except PromptError as error:
        raise bad_request(str(error), "messages") from None
    return await encode(
        tokenizer,
        text,
        add_special_tokens=add_special_tokens,
        max_model_len=max_model_len,
        param="messages",
    )


def normalize(message: dict[str, Any], index: int) -> dict[str, Any]:
    """One message as templates expect it: text as one string, arguments of calls as objects, nothing null."""
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise bad_request(f"{where}.role must be a string, got {role!r:.60}", f"{where}.role")
    normal = {key: value for key, value in message.items() if value is not None}
    # OpenAI's newer name; templates know the older one.
    normal["role"] = "system" if role == "developer" else role
    normal["content"] = text_of(message.get("content"), f"{where}.content")
    if "tool_calls" in normal:
        normal["tool_calls"] = _tool_calls(normal["tool_calls"], f"{where}.tool_calls")
    elif message.get("content") is None and role != "assistant":
        raise bad_request(f"{where}.content is missing", f"{where}.content")
    return normal


def text_of(content: object, where: str) -> str:
    """A message's content as one text; `where` names it in errors."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of parts, got {content!r:.60}", where)
    return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise bad_request(f"{where} must be an object with a type, got {part!r:.60}", where)
    if kind not in _TEXT_PARTS:
        raise bad_request(
            f"{where} has type {kind!r:.60}, but the model takes text only; send parts of type 'text'",
            where,
            code="unsupported_content",
        )
    field = f"{where}.{_TEXT_PARTS[kind]}"
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise bad_request(f"{field} must be a string, got {text!r:.60}", field)
    return text


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"{where} must be a list, got {calls!r:.60}", where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """Templates write arguments out as JSON, or name by name, and need the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise bad_request(f"{where} must be an object with a function, got {call!r:.60}", where)
    if not isinstance(function.get("name"), str):
        raise bad_request(f"{where}.function.name must be a string", f"{where}.function.name")
    arguments = arguments_of(function.get("arguments"), f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def arguments_of(given: object, where: str) -> dict[str, Any]:
    """A call's arguments as an object; `where` names them in errors."""
    arguments = given or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(f"{where} must be a JSON object as text, got {given!r:.60}", where)
    return arguments


def _cut_after_final_message(text: str, message: dict[str, Any]) -> str:
    """Take off what the template writes after the assistant's last message, so that the model goes on with it."""
    content = message["content"].strip()
    if message["role"] != "assistant" or not content:
        raise bad_request(
            "continue_final_message needs a last message of the assistant with content to go on with",
            "continue_final_message",
        )
    position = text.rfind(content)
    if position < 0:
        raise bad_request(
            "the chat template does not write the final message as it is, so that it cannot be continued",
            "continue_final_message",
        )
    return text[: position + len(content)]
