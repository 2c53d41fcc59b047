"""A form after reasoning, through a real rank: the demo checkpoint, with a token of its own for </think>."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest

from moe_runtime import AsyncLLM
from moe_runtime.server.app import make_app
from tests.server.conftest import listening
from tests.server.fake_engine import DEMO, server_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ ending }}"
CLOSE = 0  # the id that </think> takes over; it ends texts in the checkpoint as it is
FORM = "[a-f]{3}-[0-9]{4}"


def _reasoning_checkpoint(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (token,) = [added for added in tokenizer["added_tokens"] if added["id"] == CLOSE]
    del tokenizer["model"]["vocab"][token["content"]]
    tokenizer["model"]["vocab"]["</think>"] = CLOSE
    token |= {"content": "</think>", "special": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, changed in (
        ("generation_config.json", {"eos_token_id": [2]}),
        ("tokenizer_config.json", {"pad_token": "<|im_end|>"}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | changed))
    return folder


def test_a_model_reasons_before_its_form_and_not_where_the_prompt_has_closed_the_reasoning(
    ray_session: None, tmp_path: Path
) -> None:
    async def ask(client: openai.AsyncOpenAI, ending: str, seed: int) -> Any:
        answer = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Which?"}],
            temperature=1.0,
            seed=seed,
            max_tokens=400,
            logit_bias={str(CLOSE): 5},  # random weights close no tag by themselves
            extra_body={
                "structured_outputs": {"regex": FORM},
                "chat_template_kwargs": {"ending": ending},
                "top_k": 0,
                "top_p": 1.0,
            },
        )
        return answer.choices[0]

    async def scenario() -> None:
        engine = await AsyncLLM.start(str(_reasoning_checkpoint(tmp_path / "model")), dtype="float32")
        config = server_config(reasoning_parser="qwen3", chat_template=TEMPLATE)
        try:
            async with (
                listening(make_app(engine, config)) as url,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
            ):
                asks = [
                    ask(client, ending, seed)
                    for ending in ("<think>\n", "<think>\n\n</think>\n\n")
                    for seed in range(6)
                ]
                choices = await asyncio.gather(*asks)
        finally:
            await engine.shutdown()
        for choice in choices:
            assert choice.finish_reason == "stop", choice
            assert re.fullmatch(FORM, choice.message.content), choice
        thoughts = [getattr(choice.message, "reasoning_content", None) or "" for choice in choices]
        assert any(len(thought) > 20 for thought in thoughts[:6])
        assert not any(thoughts[6:])

    asyncio.run(asyncio.wait_for(scenario(), 240))
