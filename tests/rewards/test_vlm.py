"""The rewards `unifiedreward` and `qwenvl`, against a server that answers as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

httpx = pytest.importorskip("httpx")

from rewards import RewardError, ServerError, build  # noqa: E402
from rewards.server.wire import TOKEN  # noqa: E402
from rewards.vlm import CONCURRENT, QWEN, UNIFIED, read_score  # noqa: E402

PATIENCE = 100  # seconds until a test gives up; none waits for so long unless it fails


class Model:
    """A server that lists one model and says what `say` makes of a request's body: a text, or (status, answer)."""

    def __init__(self, model: str):
        self.model, self.bodies, self.tokens = model, [], set()
        self.say: Callable[[dict[str, Any]], Any] = lambda body: "Final Score: 4"
        handler = type("Handler", (_Handler,), {"model": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    model: Model
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(*((200, {"data": [{"id": self.model.model}]}) if self.path == "/v1/models" else (404, {})))

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.model.bodies.append(body)
        self.model.tokens.add(self.headers["authorization"])
        said = self.model.say(body)
        text = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        self._answer(*(said if isinstance(said, tuple) else (200, text)))

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture(params=[UNIFIED, QWEN], ids=lambda rubric: rubric.name)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """A server of each reward's model, which scores 4 of 5 unless told otherwise."""
    monkeypatch.delenv(TOKEN, raising=False)
    found = Model(request.param.model)
    found.rubric = request.param
    found.say = lambda body: right(found, 4)
    yield found
    found.server.shutdown()
    found.server.server_close()


def right(model: Model, score: Any) -> str:
    """An answer of the form that the model was asked for."""
    return f"Nice.\nFinal Score: {score}" if model.rubric is UNIFIED else f"Nice. <Score>{score}</Score>"


def batch(count: int, side: int = 64) -> tuple[torch.Tensor, list[str], list[dict]]:
    """Grey images, each darker than the one before, and as many prompts."""
    grey = torch.linspace(1, 0, count)[:, None, None, None].expand(count, 3, side, side)
    return grey, [f"prompt {{no}} {i}" for i in range(count)], [{}] * count


def image_of(body: dict[str, Any]) -> np.ndarray:
    (message,) = body["messages"]
    data = message["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_every_image_gets_its_own_score(model: Model) -> None:
    """The server scores by brightness, and answers in any order."""
    model.say = lambda body: right(model, round(image_of(body).mean() / 255 * 5))
    levels = [3, 0, 5, 1, 4, 2] * 2
    images = torch.tensor(levels)[:, None, None, None].expand(12, 3, 64, 64) / 5
    scores = build([f"{model.rubric.name}={model.url}"])(images, ["a prompt"] * 12, [{}] * 12)
    assert scores.total_B.tolist() == pytest.approx([level / 5 for level in levels])


def test_what_is_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    reward = build([f"{model.rubric.name}={model.url}/"])
    assert reward.waits == {model.rubric.name}
    assert reward(*batch(1)).total_B.tolist() == [pytest.approx(0.8)]
    (body,) = model.bodies
    side = 512 if model.rubric is UNIFIED else 64
    assert image_of(body).shape == (side, side, 3)
    assert body["temperature"] == 0 and body["model"] == model.rubric.model
    text = body["messages"][0]["content"][1]["text"]
    assert ("Description: prompt {no} 0" in text) == ("Final Score: x" in text) == (model.rubric is UNIFIED)
    assert model.tokens == {"Bearer secret"}
    assert reward(torch.zeros(0, 3, 64, 64), [], []).total_B.shape == (0,)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4.5", 0.9),
        ("**Final Score:** 3", 0.6),
        ("final score: 1\nno: Final Score: 2.", 0.4),
        ("Final Score: 0", 0.0),
        ("Final Score: 5.0/5", 1.0),
        ("Final Score: 6", None),
        ("Final Score: -1", None),
        ("Final Score: x", None),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_scores_of_unifiedreward_are_read_from_the_last_line_of_their_form(text: str, score: float | None) -> None:
    assert read_score(UNIFIED, text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<Score>4</Score>", 0.8),
        ("<Score>1</Score> <score> 2 </score>", 0.4),
        ("<Score>3.5</Score>", None),
        ("<Score>7</Score>", None),
        ("<Score>-1</Score>", None),
        ("4", None),
    ],
)
def test_scores_of_qwenvl_are_whole_numbers_in_tags(text: str, score: float | None) -> None:
    assert read_score(QWEN, text) == score


def test_answers_without_a_score_count_zero_and_are_warned_of_once(model: Model) -> None:
    model.say = lambda body: right(model, 5) if image_of(body).mean() > 200 else "I would\nrather not."
    reward = build([f"{model.rubric.name}={model.url}"])
    with pytest.warns(UserWarning, match=r"3 of 4 answers of http.* hold no score and count 0.*'I would rather not.'"):
        assert reward(*batch(4)).total_B.tolist() == [1, 0, 0, 0]
    model.say = lambda body: None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(*batch(4)).total_B.tolist() == [0] * 4
    assert reward.rewards[model.rubric.name].unread == 7


def test_requests_are_concurrent(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is given before as many requests are there as may be at a time."""
    monkeypatch.setattr("rewards.server.client.BACKOFF", 0.0)  # a broken barrier fails at once
    together = threading.Barrier(CONCURRENT)

    def say(body: dict[str, Any]) -> str:
        together.wait(PATIENCE)
        return right(model, 3)

    model.say = say
    reward = build([f"{model.rubric.name}={model.url}"])
    assert reward(*batch(2 * CONCURRENT, side=8)).total_B.tolist() == [pytest.approx(0.6)] * (2 * CONCURRENT)


def test_another_model_is_asked_for_by_name(model: Model) -> None:
    model.model = "mine/tuned"
    with pytest.raises(
        ValueError, match=rf"serves mine/tuned, not .*; name one: {model.rubric.name}={model.url}#MODEL"
    ):
        build([f"{model.rubric.name}={model.url}"])
    build([f"{model.rubric.name}={model.url}#mine/tuned"])(*batch(1))
    assert [body["model"] for body in model.bodies] == ["mine/tuned"]


def test_errors_name_the_server(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.server.client.BACKOFF", 0.0)
    name = model.rubric.name
    with pytest.raises(ValueError, match=f"^reward '{name}' needs its server: {name}=http://HOST:PORT/v1$"):
        build([name])
    with pytest.raises(ServerError, match="answered 404"):
        build([f"{name}={model.url.removesuffix('/v1')}"])
    reward = build([f"{name}={model.url}"])
    for answer, said in [
        ((500, {"error": {"message": "out of memory"}}), "answered 500: out of memory; gave up"),
        ((200, {"choices": []}), "answered without a message under 'choices'"),
    ]:
        model.say = lambda body, answer=answer: answer
        with pytest.raises(RewardError, match=f"^reward '{name}': {model.url} {said}"):
            reward(*batch(2))
    model.say = lambda body: (400, {"message": "too long"}) if image_of(body).mean() < 100 else right(model, 1)
    with pytest.raises(RewardError, match=f"'{name}' failed on image 2 of 3 .* {model.url} answered 400: too long$"):
        reward(*batch(3))
