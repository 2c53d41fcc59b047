"""Input items of the Responses API as the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_runtime.errors import did_you_mean
from moe_runtime.server.conversation import arguments_of, text_of
from moe_runtime.server.errors import bad_request

_ROLES = ("user", "assistant", "system", "developer")
# What a stateless conversation may not hold, and why.
_REFUSED = {
    "item_reference": "the server keeps no items; send the item itself",
    "compaction": "it was made by another server",
}

Item = dict[str, Any]
Message = dict[str, Any]


def messages_of(items: str | list[Item], instructions: str | None) -> list[Message]:
    """Messages of a conversation, oldest first.

    Raises:
        ApiError: 400, naming the item that has not the shape of one.
    """
    conversation = _Conversation()
    if instructions:
        conversation.add({"role": "system", "content": instructions}, "instructions")
    if isinstance(items, str):
        conversation.add({"role": "user", "content": items}, "input")
    elif not items:
        raise bad_request("input is empty; a conversation has at least one item", "input")
    else:
        for index, item in enumerate(items):
            conversation.add(item, f"input[{index}]")
    return conversation.messages


class _Conversation:
    """Reasoning, text and calls of one turn are items of their own here, and one message in a chat."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._in_turn = False  # whether the last message is the assistant's and may still grow
        self._adders: dict[str, Callable[[Item, str], None]] = {
            "message": self._add_message,
            "function_call": self._add_call,
            "function_call_output": self._add_call_output,
            "reasoning": self._add_reasoning,
        }

    def add(self, item: Item, where: str) -> None:
        """Take the next item; `where` names it in errors."""
        kind = item.get("type") or "message"
        adder = self._adders.get(kind) if isinstance(kind, str) else None
        if adder is None:
            known = ", ".join(self._adders)
            why = _REFUSED.get(kind) if isinstance(kind, str) else None
            hint = why or f"it must be one of {known}{did_you_mean(str(kind)[:60], self._adders)}"
            raise bad_request(
                f"{where}.type {kind!r:.60} is not taken: {hint}", f"{where}.type", "unsupported_content"
            )
        adder(item, where)

    def _add_message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise bad_request(
                f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.60}", f"{where}.role"
            )
        if item.get("content") is None:
            raise bad_request(f"{where}.content is missing", f"{where}.content")
        text = text_of(item["content"], f"{where}.content")
        if role == "assistant":
            # Text comes after reasoning and before calls.
            if self._in_turn and (self.messages[-1]["content"] or "tool_calls" in self.messages[-1]):
                self._in_turn = False
            self._turn()["content"] = text
        else:
            self._in_turn = False
            self._add(role, text)

    def _add_reasoning(self, item: Item, where: str) -> None:
        parts = item.get("content") or []
        if not parts and item.get("encrypted_content"):
            raise bad_request(
                f"{where}.encrypted_content is another server's; leave the item out",
                f"{where}.encrypted_content",
            )
        if not isinstance(parts, list):
            raise bad_request(
                f"{where}.content must be a list of parts, got {parts!r:.60}", f"{where}.content"
            )
        texts = [_field(part, "text", f"{where}.content[{index}]") for index, part in enumerate(parts)]
        if texts:
            self._in_turn = False
            self._turn()["reasoning_content"] = "\n".join(texts)

    def _add_call(self, item: Item, where: str) -> None:
        function = {
            "name": _field(item, "name", where),
            "arguments": arguments_of(item.get("arguments"), f"{where}.arguments"),
        }
        call = {"id": _field(item, "call_id", where), "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _add_call_output(self, item: Item, where: str) -> None:
        call_id = _field(item, "call_id", where)
        if item.get("output") is None:
            raise bad_request(f"{where}.output is missing", f"{where}.output")
        self._in_turn = False
        text = text_of(item["output"], f"{where}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _add(self, role: str, text: str) -> None:
        if role in ("system", "developer"):
            role = "system"
            # Many templates take one system message only, and `instructions` may be it.
            if self.messages and self.messages[-1]["role"] == "system":
                self.messages[-1]["content"] += f"\n\n{text}"
                return
        self.messages.append({"role": role, "content": text})

    def _turn(self) -> Message:
        """The assistant's message that is being put together, or a new one."""
        if not self._in_turn:
            self.messages.append({"role": "assistant", "content": ""})
            self._in_turn = True
        return self.messages[-1]


def _field(item: object, name: str, where: str) -> str:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise bad_request(f"{where}.{name} must be a string, got {value!r:.60}", f"{where}.{name}")
    return value
