"""The built-in page in headless Chromium, in front of real ranks. Screenshots are left as artefacts."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from moe_runtime import AsyncLLM
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.modelfiles import resolve_model
from moe_runtime.rank_spec import RankStats
from moe_runtime.server.app import make_app
from moe_runtime.server.page_routes import page_router
from tests.server.conftest import listening
from tests.server.fake_engine import FakeEngine, server_config

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING),
]

_Engine = tuple[Any, DeploymentMetrics]

KEY = "opens"
ANSWER = ".message.assistant .text"
TIMEOUT_S = 60
ENDS = (2, 0)  # eos_token_id of the demo checkpoint
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1440,900",
]


@contextmanager
def _serving(engines: Callable[[], AbstractAsyncContextManager[_Engine]]) -> Iterator[str]:
    """The URL of a server around an engine, on an event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    served: Future[str] = Future()
    leave = asyncio.Event()

    async def serve() -> None:
        app = make_app(None, server_config(api_keys=(KEY,)), extra_routers=[page_router()])
        async with engines() as (engine, metrics), listening(app) as url:
            app.state.server.attach(engine, metrics)
            served.set_result(url)
            await leave.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except Exception as error:
            served.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield served.result(TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(TIMEOUT_S)
        loop.close()


def _endless(folder: Path) -> Path:
    """The demo checkpoint, but that the tokens that end an answer have the logit 0, which is never the largest."""
    shutil.copytree(resolve_model(None).path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][list(ENDS)] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@asynccontextmanager
async def _demo(checkpoint: Path) -> AsyncIterator[_Engine]:
    """A checkpoint on two ranks."""
    llm = await AsyncLLM.start(checkpoint, expert_parallel_size=2, dtype="float32")
    try:
        yield llm, DeploymentMetrics.of(llm.deployment, model_name="demo")
    finally:
        await llm.shutdown()


@asynccontextmanager
async def _many_experts() -> AsyncIterator[_Engine]:
    """48 layers with 512 experts on 16 ranks, of which each rank's first expert has much of the work."""
    rng = np.random.default_rng(0)
    tokens_ME = np.ceil(rng.exponential(100, (48, 512)))
    tokens_ME[:, ::32] += 300
    times = count(1)

    def ask() -> list[RankStats]:
        grown_ME = (tokens_ME * next(times)).astype(int)
        return [_rank(rank, grown_ME[:, rank * 32 : rank * 32 + 32]) for rank in range(16)]

    yield FakeEngine(), DeploymentMetrics(ask, model_name="demo")


def _rank(rank: int, tokens_ML: np.ndarray) -> RankStats:
    return RankStats(
        rank=rank,
        scheduler={"num_running": 1, "num_waiting": 0, "blocks_used": rank, "blocks_total": 16},
        loop={"prompt_tokens": 0.0, "generation_tokens": float(tokens_ML[0].sum())},
        moe_layers=tuple(range(len(tokens_ML))),
        local_experts=tuple(range(rank * 32, rank * 32 + 32)),
        expert_tokens=tuple(tuple(row) for row in tokens_ML.tolist()),
    )


@pytest.fixture(scope="module")
def url(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    checkpoint = _endless(tmp_path_factory.mktemp("endless") / "demo")
    with _serving(partial(_demo, checkpoint)) as url:
        yield url


@pytest.fixture
def big_url() -> Iterator[str]:
    with _serving(_many_experts) as url:
        yield url


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser with a profile of its own; none of its processes outlives the test."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    processes = psutil.Process(driver.service.process.pid).children(recursive=True)
    yield driver
    driver.quit()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


@pytest.fixture
def wait(browser: Any) -> Callable[[Callable[[], Any]], Any]:
    """Wait until a condition holds; its value."""
    from selenium.webdriver.support.wait import WebDriverWait

    def wait(condition: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, TIMEOUT_S, poll_frequency=0.05).until(lambda _: condition())

    return wait


def _text(browser: Any, selector: str) -> str:
    """Of all elements that the selector finds, as it is in the document now."""
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent).join('')"
    return browser.execute_script(script, selector)


def _map(browser: Any) -> str:
    return browser.execute_script("return document.getElementById('map').toDataURL()")


def _num_tokens(browser: Any) -> int:
    """Choices of experts in the window that the map shows."""
    return int(browser.find_element("id", "map").get_attribute("data-tokens") or 0)


def _picture(browser: Any, tmp_path: Path, name: str) -> None:
    for folder in filter(None, (tmp_path, os.environ.get("TEST_ARTEFACTS"))):
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(Path(folder) / name))


def _open(browser: Any, url: str) -> None:
    """The page, with the key."""
    browser.get(url)
    _fill(browser, "key", KEY)
    browser.find_element("css selector", "#key-form button").click()


def _fill(browser: Any, name: str, value: str) -> None:
    field = browser.find_element("id", name)
    field.clear()
    field.send_keys(value)


def test_a_chat_streams_and_the_load_moves(
    url: str, browser: Any, wait: Callable[[Callable[[], Any]], Any], tmp_path: Path
) -> None:
    browser.get(url)
    wait(lambda: "key is needed" in _text(browser, "#state"))
    _fill(browser, "key", KEY)
    browser.find_element("css selector", "#key-form button").click()
    wait(lambda: "serving on 2 ranks" in _text(browser, "#state"))
    wait(lambda: _text(browser, "#model option") == "demo")
    idle = wait(lambda: _map(browser) if len(_text(browser, "#ranks th")) == 2 else None)

    _fill(browser, "max-tokens", "4000")
    _fill(browser, "temperature", "0")  # the same answer every time, and a long one
    _fill(browser, "prompt", "Which experts answer?\n")
    first = wait(lambda: _text(browser, ANSWER))
    grown = wait(lambda: now if len(now := _text(browser, ANSWER)) > len(first) else None)
    assert grown.startswith(first)
    wait(lambda: _num_tokens(browser) > 0)
    wait(lambda: re.fullmatch(r"[1-9][\d,.]*|0\.\d+", _text(browser, "#rate-out")))
    assert wait(lambda: now if (now := _map(browser)) != idle else None)
    browser.find_element("id", "map").send_keys("\ue014\ue015")  # right, down
    wait(lambda: "even share" in _text(browser, "#readout"))
    wait(lambda: re.fullmatch(r"last ([3-9]|1\d) s", _text(browser, "#window")))
    _picture(browser, tmp_path, "page.png")
    assert [entry for entry in browser.get_log("browser") if "401" not in entry["message"]] == []


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    url: str, browser: Any, wait: Callable[[Callable[[], Any]], Any]
) -> None:
    _open(browser, url)
    wait(lambda: _text(browser, "#model option") == "demo")
    _fill(browser, "max-tokens", "4000")
    _fill(browser, "temperature", "0")
    _fill(browser, "prompt", "Which experts answer?\n")
    wait(lambda: _text(browser, ANSWER))
    browser.find_element("id", "stop").click()
    wait(lambda: "stopped" in _text(browser, ".message footer"))
    _fill(browser, "max-tokens", "8")
    _fill(browser, "prompt", "And now?\n")
    wait(lambda: re.search(r"\d tokens", _text(browser, ".message footer")))
    assert len(browser.find_elements("css selector", ANSWER)) == 2


def test_a_refused_question_says_why_and_comes_back(
    url: str, browser: Any, wait: Callable[[Callable[[], Any]], Any]
) -> None:
    _open(browser, url)
    wait(lambda: _text(browser, "#model option") == "demo")
    _fill(browser, "max-tokens", "100000000")
    _fill(browser, "prompt", "too much\n")
    assert "context length is 8192" in wait(lambda: _text(browser, "[role=alert]"))
    assert browser.find_element("id", "prompt").get_property("value") == "too much"


def test_it_fits_a_phone(
    url: str, browser: Any, wait: Callable[[Callable[[], Any]], Any], tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 1500, "deviceScaleFactor": 2, "mobile": True},
    )
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    _open(browser, url)
    wait(lambda: len(_text(browser, "#ranks th")) == 2)
    _fill(browser, "max-tokens", "300")
    _fill(browser, "prompt", "Which experts answer?\n")
    wait(lambda: _num_tokens(browser) > 0)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    _picture(browser, tmp_path, "phone.png")


def test_the_map_shows_hundreds_of_experts(
    big_url: str, browser: Any, wait: Callable[[Callable[[], Any]], Any], tmp_path: Path
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    _open(browser, big_url)
    wait(lambda: _num_tokens(browser) > 0)
    canvas = browser.find_element("id", "map")
    assert canvas.size["width"] >= 512
    ActionChains(browser).move_to_element_with_offset(canvas, 0, 0).perform()
    wait(lambda: re.match(r"layer \d+ · expert \d+ · rank \d+: [\d,]+ tokens", _text(browser, "#readout")))
    _picture(browser, tmp_path, "many_experts.png")
