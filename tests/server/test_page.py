"""The built-in page: its files, what guards them, and the load that it asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count

import pytest

from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.rank_spec import RankStats
from moe_runtime.server.app import make_app
from moe_runtime.server.page_routes import FOLDER, page_router
from tests.server.conftest import Served
from tests.server.fake_engine import server_config

# A name of an XML format is written as a URL, and fetched by nobody.
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'


class WithPage(Served):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.app = make_app(self.engine, server_config(**settings), extra_routers=[page_router()])
        self.state = self.app.state.server


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_files_need_no_key_and_come_with_their_type_and_policy(
    run: Callable[..., None], path: str, media_type: str
) -> None:
    async def scenario() -> None:
        async with WithPage(api_keys=("key",)).client() as client:
            response = await client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert {policy[kind] for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}

    run(scenario())


def test_the_page_and_its_scripts_name_every_file_and_no_other() -> None:
    html = (FOLDER / "index.html").read_text()
    scripts = "".join(file.read_text() for file in FOLDER.glob("*.js"))
    named = {*re.findall(r'(?:src|href)="page/([^"]+)"', html), *re.findall(r'from "\./([^"]+)"', scripts)}
    assert named == {file.name for file in FOLDER.iterdir()} - {"index.html"}


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.iterdir()))
def test_no_file_names_another_site_or_runs_inline_code(name: str) -> None:
    text = (FOLDER / name).read_text().replace(NAMESPACE, "")
    assert re.findall(r"\w+://|[\"'(]//\w|\beval\(|new Function|innerHTML|\son\w+=|style=", text) == []
    assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []


def test_other_paths_under_the_pages_folder_are_not_there(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with WithPage().client() as client:
            for path in ("/page/", "/page/index.html", "/page/../load.py", "/page/%2e%2e/load.py"):
                assert (await client.get(path)).status_code == 404

    run(scenario())


def _loaded(num_choices: float) -> list[RankStats]:
    """A rank with two MoE layers of four experts, of which expert 1 was chosen so often."""
    return [
        RankStats(
            rank=0,
            scheduler={"num_running": 2, "num_waiting": 1, "blocks_used": 1, "blocks_total": 4},
            loop={"prompt_tokens": 0.0, "generation_tokens": num_choices},
            moe_layers=(0, 2),
            local_experts=(0, 1, 2, 3),
            expert_tokens=((0, int(num_choices), 0, 0),) * 2,
        )
    ]


def test_what_the_scripts_read_is_in_the_load(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served, times = WithPage(), count(100.0, 1.0)  # each look at the clock finds it a second on
        choices = count(0.0, 5.0)
        metrics = DeploymentMetrics(
            lambda: _loaded(next(choices)), model_name="demo", clock=lambda: next(times)
        )
        served.state.attach(served.engine, metrics)
        async with served.client() as client:
            for _ in range(2):
                load = (await client.get("/v1/load")).json()
        assert load["ranks_answer"] is True
        assert load["layers"] == [0, 2]
        assert load["rank_of_expert"] == [0, 0, 0, 0]
        assert load["tokens"] == [[0, 5, 0, 0], [0, 5, 0, 0]]
        assert load["window_seconds"] > 0
        assert load["balancedness"]["overall"] == 1.0
        assert load["series"][-1]["generation_tokens_per_second"] > 0
        assert load["series"][-1]["prompt_tokens_per_second"] == 0
        (rank,) = load["ranks"]
        read = ("rank", "share", "running", "waiting", "kv_cache_usage")
        assert {name: rank[name] for name in read} == dict(zip(read, (0, 1.0, 2, 1, 0.25), strict=True))

    run(scenario())
