"""Chat templates render as transformers renders them, in a sandbox, with clear errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import ConfigError, PromptError
from moe_runtime.modelfiles import resolve_model
from moe_runtime.tokenizer import Tokenizer, load_tokenizer

USER = [{"role": "user", "content": "Is 1 < 2 & 3 > 2?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city, as <text> & °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": USER,
    "system": [{"role": "system", "content": "Be brief."}, *USER],
    "turns": [*USER, {"role": "assistant", "content": "Yes.\n"}, {"role": "user", "content": "日本語?"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "tools": [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "21 °C"},
        {"role": "tool", "content": "22 °C"},
        {"role": "assistant", "content": "Mild."},
    ],
}
# Templates for what Hugging Face documents: whitespace control, loop controls, helpers, variables.
TEMPLATES = {
    "whitespace": "{% for m in messages %}\n  {% if m.content %}\n  x {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ add_generation_prompt }}",
    "date": "{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "extra": "{{ enable_thinking is defined and enable_thinking }} {{ tools is none }}",
}


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(None).path)


def _with_config(directory: Path, **config: Any) -> Tokenizer:
    shutil.copy(resolve_model(None).path / "tokenizer.json", directory)
    return load_tokenizer(dataclasses.replace(resolve_model(None), path=directory, tokenizer_config=config))


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_demo_template_as_transformers(
    demo: Tokenizer, oracle: Any, name: str, prompted: bool, tools: Any
) -> None:
    messages = copy.deepcopy(CONVERSATIONS[name])
    ours = demo.apply_chat_template(messages, add_generation_prompt=prompted, tools=tools)
    theirs = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted, tools=tools)
    assert ours == theirs
    assert messages == CONVERSATIONS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_may_use_as_transformers(demo: Tokenizer, oracle: Any, name: str) -> None:
    messages, template = CONVERSATIONS["turns"], TEMPLATES[name]
    ours = demo.apply_chat_template(messages, chat_template=template, enable_thinking=True)
    theirs = oracle.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        chat_template=template,
        enable_thinking=True,
    )
    assert ours == theirs
    assert ours.strip()


def test_demo_template_reads_as_chatml(demo: Tokenizer) -> None:
    assert demo.apply_chat_template(CONVERSATIONS["system"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nIs 1 < 2 & 3 > 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_demo_template_with_tools(demo: Tokenizer) -> None:
    text = demo.apply_chat_template(CONVERSATIONS["tools"], tools=TOOLS, add_generation_prompt=False)
    assert json.dumps(TOOLS[0], ensure_ascii=False) in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>' in text
    assert (
        "<tool_response>\n21 °C\n</tool_response>\n<tool_response>\n22 °C\n</tool_response><|im_end|>" in text
    )
    assert text.count("<|im_start|>user") == 2  # two answers of tools in a row share a turn
    assert text.endswith("<|im_start|>assistant\nMild.<|im_end|>\n")


def test_rendered_template_encodes_to_special_tokens(demo: Tokenizer) -> None:
    ids = demo.encode(demo.apply_chat_template(USER), add_special_tokens=False)
    assert ids[0] == demo.token_to_id("<|im_start|>")
    assert ids.count(2) == 1


def test_date_is_todays(demo: Tokenizer) -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    rendered = demo.apply_chat_template(USER, chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert rendered in (before, datetime.now().strftime("%Y-%m-%d"))


# --------------------------------------------------------------------------- where the template comes from


def test_template_as_a_string_in_the_config(tmp_path: Path) -> None:
    tokenizer = _with_config(tmp_path, chat_template="{{ messages[0].content }}!")
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(USER) == "Is 1 < 2 & 3 > 2?!"


def test_named_templates(tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "with tools", "rag": "retrieval"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    tokenizer = _with_config(tmp_path, chat_template=listed)
    assert tokenizer.apply_chat_template(USER) == "plain"
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "with tools"
    assert tokenizer.apply_chat_template(USER, chat_template="rag") == "retrieval"
    words = (
        r"has no chat template named 'rags'; did you mean 'rag'\?; it has \['default', 'rag', 'tool_use'\]"
    )
    with pytest.raises(ConfigError, match=words):
        tokenizer.apply_chat_template(USER, chat_template="rags")


def test_named_templates_without_a_default(tmp_path: Path) -> None:
    tokenizer = _with_config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(ConfigError, match=r"several chat templates and none is the default; .*\['rag'\]"):
        tokenizer.apply_chat_template(USER)


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert (
        _with_config(tmp_path, chat_template="from the config").apply_chat_template(USER) == "from the file"
    )


def test_no_template(tmp_path: Path) -> None:
    tokenizer = _with_config(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(
        ConfigError, match=r"has no chat template \(neither chat_template\.jinja nor .*use generate"
    ):
        tokenizer.apply_chat_template(USER)


def test_misshapen_template_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a text, or a list of objects with 'name' and 'template'"):
        _with_config(tmp_path, chat_template=[{"name": "default"}])


# --------------------------------------------------------------------------- what goes wrong


def test_syntax_error_names_the_line(demo: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"the chat template in .* is broken at line 2: "):
        demo.apply_chat_template(USER, chat_template="{{ 1 }}\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the chat template refuses these messages: a conversation needs at least one message"),
        (
            [*USER, {"role": "system", "content": "x"}],
            "refuses these messages: a system message must be the first",
        ),
        ([{"role": "robot", "content": "x"}], "refuses these messages: unknown role robot; use system, user"),
        ("hello", "messages must be a list of objects with role and content, not 'hello'"),
        ({"role": "user"}, "messages must be a list of objects"),
        (["hello"], r"messages\[0\] must be an object with a 'role', not 'hello'"),
        ([*USER, {"content": "x"}], r"messages\[1\] must be an object with a 'role'"),
    ],
)
def test_refused_messages(demo: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        demo.apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ no_such_function() }}",
    ],
)
def test_templates_cannot_break_out_or_crash(demo: Tokenizer, template: str) -> None:
    with pytest.raises(PromptError, match="the chat template cannot render these messages: "):
        demo.apply_chat_template(USER, chat_template=template)
