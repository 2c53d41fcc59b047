"""ToolUse: what a chat request may call, what forces it to, and the parser that its answers need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from moe_runtime.errors import ConfigError
from moe_runtime.request import SamplingParams
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.errors import bad_request
from moe_runtime.server.parsers import (
    OutputParser,
    ToolChoice,
    finish_reason,
    make_output_parser,
    prompt_ends_in_reasoning,
    tags_before_form,
    tool_choice_schema,
    validate_tools,
)
from moe_runtime.server.protocol.chat import ChatCompletionRequest
from moe_runtime.structured_outputs import StructuredOutputsParams

# Of a prompt's last tokens: more than a tag that opens or closes reasoning, with its line breaks, can take.
PROMPT_END_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Checked; made by `of`."""

    config: ServerConfig
    request: ChatCompletionRequest
    choice: ToolChoice

    @classmethod
    def of(cls, request: ChatCompletionRequest, config: ServerConfig) -> Self:
        """Raises ApiError 400 for tools or a choice that cannot be served."""
        if request.tool_choice not in (None, "none") and not request.tools:
            raise bad_request("tool_choice needs tools to choose from", "tool_choice")
        try:
            choice = validate_tools(
                request.tools, request.tool_choice, can_parse_calls=config.enable_auto_tool_choice
            )
        except ConfigError as error:
            param = "tools" if str(error).startswith("tools") else "tool_choice"
            raise bad_request(str(error), param) from error
        return cls(config, request, choice)

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """Those that the prompt describes."""
        return None if self.choice == "none" else self.request.tools or None

    def structure(self) -> dict[str, StructuredOutputsParams]:
        """Sampling parameters that force a call where the choice asks for one.

        Raises ApiError 400 where something else constrains the answer, or a schema cannot be kept to.
        """
        schema = tool_choice_schema(
            self.request.tools or (),
            self.request.tool_choice,
            parallel_tool_calls=self.request.parallel_tool_calls is not False,
        )
        if schema is None:
            return {}
        if self.request.response_format not in (None, {"type": "text"}) or self.request.structured_outputs:
            raise bad_request(
                "tool_choice forces a call, so that nothing else can constrain the answer; leave out "
                "response_format and structured_outputs, or set tool_choice to 'auto'",
                "tool_choice",
            )
        try:
            return {"structured_outputs": StructuredOutputsParams(json=schema)}
        except ConfigError as error:
            raise bad_request(str(error), "tools") from error

    def after_reasoning(self, params: SamplingParams, prompt_end: str) -> SamplingParams:
        """Have the form of the answer, if it has one, begin where the model has reasoned.

        Args:
            prompt_end: text of the prompt's last PROMPT_END_TOKENS tokens, special ones included.
        """
        form, parser = params.structured_outputs, self.config.reasoning_parser
        if form is None or form.after is not None or parser is None:
            return params
        after, opening = tags_before_form(parser, prompt_ends_in_reasoning(prompt_end))
        form = dataclasses.replace(form, after=after, after_opening=opening)
        return dataclasses.replace(params, structured_outputs=form)

    def make_parser(self, prompt_end: str, form: StructuredOutputsParams | None) -> OutputParser:
        """A parser for one choice.

        Args:
            prompt_end: as for `after_reasoning`.
            form: that the answer is held to, if any; without a place for reasoning, all of it is content.
        """
        may_reason = form is None or form.after is not None
        return make_output_parser(
            tool_call_parser=self.config.tool_call_parser if self.config.enable_auto_tool_choice else None,
            reasoning_parser=self.config.reasoning_parser if may_reason else None,
            tools=self.request.tools or (),
            tool_choice=self.request.tool_choice,
            parallel_tool_calls=self.request.parallel_tool_calls is not False,
            prompt_ends_in_reasoning=prompt_ends_in_reasoning(prompt_end),
            has_form=form is not None,
        )

    def finish_reason(self, reason: str, *, called: bool) -> str:
        """OpenAI's for the engine's; `called`: whether the answer calls a function."""
        return finish_reason(reason, called=called, tool_choice=self.request.tool_choice)
