"""The demo app: what its server lets a visitor do, and the page in a browser."""

from __future__ import annotations

import builtins
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from rlg.app import __main__ as command
from rlg.app.__main__ import load, main
from rlg.app.generator import Column
from rlg.app.options import COMMAND
from rlg.app.page import LOOPBACK, answer, build, data_uri, launch, strip
from rlg.models.policy import Policy
from tests.conftest import requests_of

pytestmark = pytest.mark.xdist_group("app")  # one server for all
ARROW_RIGHT, ENTER, CONTROL_A = "\ue014", "\ue007", "\ue009a\ue000"  # WebDriver's codes
HOSTILE = "<img src=http://evil.test/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def loaded(
    tiny_policy: Callable[..., Policy],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Any]:
    """A generator with two adapters, one of them named in a hostile way, and its page."""
    other = tmp_path_factory.mktemp("other") / HOSTILE.replace("/", "∕") / "checkpoint-1"
    policy = tiny_policy("sd3", fresh=True)
    torch.manual_seed(5)
    for parameter in policy.trainable():
        torch.nn.init.normal_(parameter, std=0.05)
    policy.save_adapter(other)
    ckpts = ["--ckpt", str(tiny_checkpoint("sd3")), "--ckpt", str(other)]
    options = ["--reward", "jpeg_compressibility", "composition", "--prompts", "tinyworld:composition/test"]
    return load(COMMAND.parse([*ckpts, *options, "--max_steps", "3"]))


@pytest.fixture(scope="module")
def url(loaded: tuple[Any, Any]) -> Iterator[str]:
    """Address of the app, in this process."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    blocks = build(*loaded)
    yield launch(blocks, LOOPBACK, port, wait=False)
    blocks.close()


def asked(**changes: Any) -> list[Any]:
    """Values of the page's inputs."""
    values = dict(
        prompt="two red circles", w=1.5, compare="0 1", k=1, steps=2, cfg=1, negative="", sampler="ode", seed=0
    )
    return [*(values | changes).values()]


def quiet(*args: Any, **kwargs: Any) -> None:
    """A progress bar that nobody sees."""


def test_an_answer_shows_each_w(loaded: tuple[Any, Any]) -> None:
    ticks: list[tuple[int, int]] = []
    page = answer(*loaded, [*asked(), 0.5, 0.5], lambda done, **_: ticks.append(done))
    assert ticks == [(i, 6) for i in range(6)]
    assert [page.count(f'data-w="{w}"') for w in ("0", "1", "1.5", "2")] == [1, 1, 1, 0]
    assert len({part.partition('"')[0] for part in page.split('src="data:image/png;base64,')[1:]}) == 3
    assert page.count("<i>jpeg_compressibility</i>") == page.count("<i>composition</i>") == 3
    assert ">blend<" in page and "tuned" not in page
    again: list[Any] = []
    answer(*loaded, [*asked(w=2.0), 0.5, 0.5], lambda done, **_: again.append(done))
    assert again == [(4, 6), (5, 6)]  # base and blend were there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "must be numbers"),
        ({"w": "1"}, "must be numbers"),
        ({"w": float("nan")}, "must be numbers"),
        ({"steps": 1e300}, "must be numbers"),
        ({"k": True}, "must be numbers"),
        ({"steps": 4}, "between 1 and 3 steps, got 4"),
        ({"w": 4.5}, "w must be between 0 and 4, got 4.5"),
        ({"prompt": None}, "the prompt is empty"),
    ],
)
def test_what_a_request_may_not_ask_for(loaded: tuple[Any, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(*loaded, [*asked(**changes), 1, 0], quiet)


def test_prompts_are_text_on_the_page(loaded: tuple[Any, Any]) -> None:
    page = answer(*loaded, [*asked(prompt=HOSTILE), 1, 0], quiet)
    assert HOSTILE not in page and "&lt;img src=http" in page
    assert page.count("composition cannot judge this prompt") == 1  # which has no metadata for it, and no score


def test_the_best_score_of_a_row_is_marked() -> None:
    image = Image.new("RGB", (8, 8))
    columns = [
        Column((image, image), ({"a": a}, {"a": b, "c": 1.0})) for a, b in ((0.25, 1.0), (0.5, 1.0), (0.5, 1.0))
    ]
    page = strip([0.0, 1.0, 2.0], columns, 2.0, "note")
    assert page.count('class="rlg-best"') == 2  # of the first row; nothing is best where all are equal
    assert page.count("rlg-chosen") == 1 and page.count(">tuned<") == page.count(">base<") == 1


def test_large_images_are_sent_as_webp() -> None:
    small, large = (data_uri(Image.new("RGB", (side, 8))) for side in (256, 257))
    assert small.startswith("data:image/png;base64,") and large.startswith("data:image/webp;base64,")


def refusal(url: str, data: bytes | None = None, kind: str = "application/json", **headers: str) -> int:
    asked = urllib.request.Request(url, data, {"Content-Type": kind} | headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_offers_nothing_else(url: str) -> None:
    assert url.startswith(f"http://{LOOPBACK}:")
    with urllib.request.urlopen(f"{url}config", timeout=60) as reply:
        config = json.load(reply)
    assert config["analytics_enabled"] is False
    assert all(row["api_visibility"] == "private" for row in config["dependencies"])
    assert not config.get("space_id") and config["footer_links"] == []
    assert [refusal(f"{url}{path}") for path in ("docs", "redoc", "openapi.json")] == [404] * 3
    assert refusal(f"{url}gradio_api/file=/etc/passwd") in (403, 404)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n' + b"a" * 99 + b"\r\n--x--\r\n"
    )
    assert refusal(f"{url}gradio_api/upload", body, "multipart/form-data; boundary=x") >= 400


def test_pages_of_other_sites_are_refused(url: str) -> None:
    own = url.removesuffix("/")
    join = f"{url}gradio_api/queue/join"
    assert refusal(url) == refusal(url, Host="localhost:1") == 200
    assert refusal(url, Host="evil.test") == refusal(join, b"{}", Host="evil.test") == 403  # DNS rebinding
    assert refusal(join, b"{}", "text/plain", Origin="http://evil.test") == 403
    assert refusal(join, b"{}", "text/plain", Origin="null") == 403
    assert refusal(join, b"{}", Origin=own) == 422  # the page's own, which the queue then reads


def set_text(browser: Any, name: str, text: str) -> None:
    box = browser.find_element("css selector", f"#{name} textarea, #{name} input")
    box.send_keys(CONTROL_A, text)


@pytest.mark.browser
def test_the_page_in_a_browser(url: str, browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 240, poll_frequency=0.3)

    def images() -> dict[str, str]:
        of_column = "column => [column.dataset.w, column.querySelector('img').src]"
        columns = "Array.from(document.querySelectorAll('.rlg-column'))"
        return dict(browser.execute_script(f"return {columns}.map({of_column})"))

    browser.set_page_load_timeout(240)
    browser.get(url)
    button = wait.until(lambda b: b.find_element("id", "generate"))
    wait.until(lambda b: button.is_displayed())
    assert browser.title == "RLG" and "&lt;" not in browser.find_element("css selector", ".rlg-head").text
    assert HOSTILE.replace("/", "∕") in browser.find_element("css selector", ".rlg-head p").text
    button.click()
    first = wait.until(lambda b: len(found := images()) == 3 and found)
    assert list(first) == ["0", "1", "1.5"] and len(set(first.values())) == 3

    browser.find_element("css selector", "#w input[type=range]").send_keys(ARROW_RIGHT * 10)
    button.click()
    second = wait.until(lambda b: "2" in (found := images()) and found)
    assert list(second) == ["0", "1", "2"]
    assert (second["0"], second["1"]) == (first["0"], first["1"]) and second["2"] not in first.values()
    assert browser.find_element("css selector", ".rlg-chosen").get_attribute("data-w") == "2"

    browser.find_element("css selector", "#share-0 input[type=range]").send_keys(ARROW_RIGHT * 10)
    button.click()
    third = wait.until(lambda b: (found := images())["2"] != second["2"] and found)
    assert third["0"] == second["0"] and third["1"] != second["1"]

    browser.find_element("css selector", "button.label-wrap").click()
    wait.until(lambda b: b.find_element("css selector", "#compare textarea, #compare input").is_displayed())
    assert not browser.find_elements("css selector", "#negative textarea")
    set_text(browser, "compare", HOSTILE)
    button.click()
    toast = wait.until(lambda b: [node for node in b.find_elements("css selector", ".toast-body") if node.text])
    assert "must be numbers such as 0 1, got '<img src=http" in toast[0].text

    assert browser.get_log("browser") == []
    outside = [each for each in requests_of(browser) if not each.startswith((url, "data:", "blob:"))]
    assert outside == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ckpt is needed (or --tuned)"),
        (["--ckpt", "CKPT", "--max_w", "0"], "--max_w (0) must be between 1 and 100"),
        (["--ckpt", "CKPT", "--max_steps", "0"], "--max_steps (0) positive"),
        (["--ckpt", "CKPT", "--reward", "beauty"], "unknown reward 'beauty'"),
        (["--ckpt", "CKPT", "--ckpt", "OTHER"], "the adapters have several bases"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(
    tiny_checkpoint: Callable[[str], Path],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "gradio_module", SimpleNamespace)
    places = {"CKPT": str(tiny_checkpoint("sd3")), "OTHER": str(tiny_checkpoint("sd"))}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([places.get(text, text) for text in arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    said = [line for line in err.splitlines() if "Loading" not in line]
    assert len(said) == 1 and said[0].startswith("error: ") and message in said[0]


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit):
        main(["--ckpt", "anything"])
    assert "pip install '.[app]' in a clone" in capsys.readouterr().err
