"""The `remote` reward and its server: the wire, retries, refusals, and both ends together."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from rewards import RewardError, RewardMix, ServerError, build  # noqa: E402
from rewards.server.app import Limits, create  # noqa: E402
from rewards.server.callers import ImpatientProtocol  # noqa: E402
from rewards.server.client import ANSWER_SECONDS, BACKOFF, CONNECT_SECONDS, TRIES, BadRequestError, Server  # noqa: E402
from rewards.server.wire import TOKEN, as_floats, from_pngs, to_png  # noqa: E402
from rlg.tinyworld.scenes import composition_prompts, draw  # noqa: E402

PATIENCE = 100  # seconds until a test gives up; none waits for so long unless it fails
SECRET = "s3cret-of-the-server"
OPEN = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}

Handler = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def rounded(count: int, side: int = 16) -> Tensor:
    """Noise on the 256 levels of a PNG."""
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(count)).float() / 255


def request_for(count: int = 2) -> dict[str, Any]:
    return {
        "images": [to_png(image) for image in rounded(count)],
        "prompts": [f"prompt {i}" for i in range(count)],
        "metadata": [{} for _ in range(count)],
    }


@contextmanager
def running(
    mix: RewardMix, token: str | None = None, limits: Limits | None = None, connections: int | None = None
) -> Iterator[str]:
    """The URL of a server in a thread, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create(mix, token, limits)
        options = {"limit_concurrency": connections, "log_level": "error"}
        server = uvicorn.Server(uvicorn.Config(app, http=ImpatientProtocol, ws="none", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()  # the socket listens already: a request waits until the server runs
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def stub(handler: Handler, url: str = "http://far.example:1") -> tuple[Server, list[float]]:
    """A client whose requests go to a function, and the seconds that it slept."""
    slept: list[float] = []
    return Server(url, sleep=slept.append, transport=httpx.MockTransport(handler)), slept


def in_turn(*answers: Any) -> Handler:
    """Answers with one after the other; raises those that are exceptions."""
    left = list(answers)

    def handler(request: Any) -> Any:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handler


def test_images_on_the_256_levels_travel_bit_for_bit_and_others_are_rounded() -> None:
    images = rounded(3)
    assert torch.equal(as_floats(from_pngs([to_png(image) for image in images], 256)), images)
    between = (images + 0.8 / 255 * (torch.rand(images.shape) - 0.5)).clamp(0, 1).requires_grad_()
    assert torch.equal(as_floats(from_pngs([to_png(image) for image in between], 256)), images)
    assert from_pngs([], 256).shape == (0, 3, 1, 1)


def encoded(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(side: int = 60000) -> str:
    """A PNG of a few bytes that says it is enormous."""
    data = io.BytesIO(base64.b64decode(encoded(Image.new("RGB", (1, 1)))))
    raw = bytearray(data.getvalue())
    raw[16:24] = side.to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return base64.b64encode(bytes(raw)).decode()


def two_headers() -> str:
    """A PNG of 300 x 300 behind the header of a small one."""
    small, large = (base64.b64decode(encoded(Image.new("RGB", (side, side)))) for side in (16, 300))
    return base64.b64encode(small[:33] + large[8:]).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no base64!", "image 1 is not a base64 PNG"),
        (base64.b64encode(pickle.dumps({"a": 1})).decode(), "image 1 is not a base64 PNG"),
        (encoded(Image.new("RGB", (16, 16)), "JPEG"), "image 1 is not a base64 PNG"),
        (encoded(Image.new("L", (16, 16))), "image 1 must be 8-bit RGB"),
        (to_png(rounded(1)[0])[:200], "image 1 is a damaged PNG"),
        (to_png(rounded(1, 8)[0]), "must be of one size, got 16x16 and 8x8|must be of one size, got 8x8 and 16x16"),
        (to_png(rounded(1, 17)[0]), "image 1 is 17x17, over the limit of 256 pixels"),
        (bomb(), "image 1 is 60000x60000, over the limit of 256 pixels"),
        (two_headers(), "image 1 is a damaged PNG"),
    ],
)
def test_what_is_no_plain_png_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_pngs([to_png(rounded(1)[0]), text], 256)


def test_a_server_that_comes_back_is_waited_for() -> None:
    bad = httpx.Response(500, json={"detail": "out of memory"})
    lost = httpx.ConnectError("connection refused")
    slow = httpx.ReadTimeout("timed out")
    answers = (bad, lost, slow, httpx.Response(429), httpx.Response(503), httpx.Response(200, json={"a": 1}))
    assert len(answers) == TRIES
    server, slept = stub(in_turn(*answers))
    assert server.post("/score", {}) == {"a": 1}
    assert slept == [BACKOFF * 2**n for n in range(TRIES - 1)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(500, json={"detail": "two\nlines"}), "answered 500: two lines"),
        (httpx.Response(502, text="<h1>Bad gateway</h1>"), "answered 502: <h1>Bad gateway</h1>"),
        (httpx.Response(429, json={"error": {"message": "slow down"}}), "answered 429: slow down"),
        (httpx.ConnectError("refused"), r"cannot be reached \(ConnectError: refused\)"),
        (httpx.ReadTimeout("timed out"), r"cannot be reached \(ReadTimeout: timed out\)"),
    ],
)
def test_a_server_that_stays_away_is_given_up_by_name(answer: Any, message: str) -> None:
    server, slept = stub(in_turn(*[answer] * TRIES))
    with pytest.raises(ServerError, match=rf"^http://far.example:1 {message}; gave up after {TRIES} tries$"):
        server.post("/score", {})
    assert len(slept) == TRIES - 1


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (httpx.Response(400, json={"detail": "no count"}), BadRequestError, "answered 400: no count"),
        (httpx.Response(422, json={"detail": "prompts: x"}), BadRequestError, "answered 422: prompts: x"),
        (
            httpx.Response(401, json={"detail": "who?"}),
            ServerError,
            f"answered 401: who.; the token is read from {TOKEN}",
        ),
        (httpx.Response(404, json={"detail": "Not Found"}), ServerError, "answered 404: Not Found"),
        (httpx.Response(413, json={"detail": "too large"}), ServerError, "answered 413: too large"),
        (httpx.Response(307, headers={"location": "http://thief.example"}), ServerError, "answered 307: Temporary"),
        (httpx.Response(200, text="<html>"), ServerError, "answered something that is not JSON: <html>"),
    ],
)
def test_an_answer_that_would_be_the_same_again_is_not_asked_for_again(answer: Any, kind: type, message: str) -> None:
    server, slept = stub(in_turn(answer))
    with pytest.raises(kind, match=f"^http://far.example:1 {message}"):
        server.post("/score", {})
    assert not slept


def test_a_silent_server_times_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.server.client.ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never says a word
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        slept: list[float] = []
        with pytest.raises(ServerError, match=rf"^{url} cannot be reached \(ReadTimeout: .*gave up after"):
            Server(url, sleep=slept.append).get("/health")
    assert len(slept) == TRIES - 1


def test_a_request_has_minutes_and_a_connection_seconds() -> None:
    seen: dict[str, float] = {}
    server, _ = stub(lambda request: seen.update(request.extensions["timeout"]) or httpx.Response(200, json={}))
    server.get("/health")
    assert seen["connect"] == CONNECT_SECONDS < seen["read"] == ANSWER_SECONDS


def test_the_token_is_sent_as_a_header_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def handler(request: Any) -> Any:
        seen.append((str(request.url), request.headers.get("authorization")))
        return httpx.Response(401)

    with caplog.at_level("DEBUG"):
        for token in (SECRET, None):
            monkeypatch.setenv(TOKEN, f" {token}\n") if token else monkeypatch.delenv(TOKEN)
            with pytest.raises(ServerError) as caught:
                stub(handler)[0].get("/health")
            assert SECRET not in str(caught.value)
    assert seen == [("http://far.example:1/health", f"Bearer {SECRET}"), ("http://far.example:1/health", None)]
    assert SECRET not in caplog.text
    monkeypatch.setenv(TOKEN, "two words")
    with pytest.raises(ValueError, match=f"^the token in {TOKEN} must be printable ASCII") as caught:
        stub(handler)
    assert "two words" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("remote", "reward 'remote' needs its server: remote=http://HOST:PORT"),
        ("remote=127.0.0.1:8000", "must be given as http://HOST:PORT, got '127.0.0.1:8000'"),
        ("remote=ftp://host", "got 'ftp://host'"),
        ("remote=http://host:port", "got 'http://host:port'"),
        ("remote=http://host:1?token=abc", r"got 'http://host:1\?token=abc'"),
        ("remote=http://me:secret@host:1", f"without a user; put a token into {TOKEN}$"),
    ],
)
def test_unfit_urls_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([source])


def test_a_remote_reward_is_the_local_one_to_the_bit() -> None:
    mix = build(["jpeg_compressibility", "composition"], [1.0, -3.0])
    scenes = composition_prompts("test")[:20]  # more than one request
    images = draw(scenes, torch.Generator().manual_seed(0)).roll(1, dims=0)[:20].mul(255).round() / 255
    prompts, metadata = [p.text for p in scenes], [p.metadata for p in scenes]
    with running(mix) as url:
        assert (
            httpx.get(f"{url}/health").json().items()
            >= {
                "status": "ok",
                "rewards": ["jpeg_compressibility", "composition"],
                "weights": [1.0, -3.0],
            }.items()
        )
        far = build([f"remote={url}"])
        assert far.waits == {"remote"}
        assert torch.equal(far(images, prompts, metadata).total_B, mix(images, prompts, metadata).total_B)
        order = torch.randperm(20).tolist()
        shuffled = far(images[order], [prompts[i] for i in order], [metadata[i] for i in order])
        assert torch.equal(shuffled.total_B, mix(images, prompts, metadata).total_B[order])
        assert far(images[:0], [], []).total_B.shape == (0,)
        body = {"images": [to_png(image) for image in images[:2]], "prompts": prompts[:2], "metadata": metadata[:2]}
        parts, expected = httpx.post(f"{url}/score", json=body).json()["parts"], mix(images, prompts, metadata).parts
        assert parts == {name: part[:2].tolist() for name, part in expected.items()}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"total": [1.0]}, "returned 1 scores for 2 images"),
        ({"total": [1.0, None]}, "returned None as the score of image 1 of 2"),
        ({"total": [True, 1.0]}, "returned True as the score of image 0 of 2"),
        ("NaN", "returned nan as the score of image 0 of 2"),
        ("Infinity", "returned inf as the score of image 0 of 2"),
        ({"scores": [1.0, 1.0]}, "answered without a list of scores under 'total'"),
        ([1.0, 1.0], "answered without a list of scores under 'total'"),
    ],
)
def test_an_answer_is_checked(answer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(request: Any) -> Any:
        if not json.loads(request.content)["prompts"]:
            return httpx.Response(200, json={"total": []})
        text = f'{{"total": [{answer}, 1.0]}}' if isinstance(answer, str) else json.dumps(answer)
        return httpx.Response(200, text=text)

    monkeypatch.setattr("rewards.remote.Server", lambda url: stub(handler, url)[0])
    mix = build(["remote=http://far.example:1"])
    with pytest.raises(RewardError, match=rf"^reward 'remote': http://far.example:1 {message}$"):
        mix(rounded(2), ["a", "b"], [{}, {}])


def test_a_server_that_fails_is_not_blamed_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def handler(request: Any) -> Any:
        asked.append(len(json.loads(request.content)["prompts"]))
        return httpx.Response(200, json={"total": []}) if len(asked) == 1 else httpx.Response(500)

    monkeypatch.setattr("rewards.remote.Server", lambda url: stub(handler, url)[0])
    mix = build(["remote=http://far.example:1"])
    with pytest.raises(
        RewardError, match=r"^reward 'remote': http://far.example:1 answered 500: Internal Server Error;"
    ):
        mix(rounded(3), ["a", "b", "c"], [{}] * 3)
    assert asked == [0] + [3] * TRIES


def picky(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    for row in metadata:
        if row.get("bad") == "data":
            raise ValueError("no such tag")
        if row.get("bad") == "luck":
            raise RuntimeError("out of memory")
        if row.get("bad") == "nan":
            return torch.full((len(prompts),), torch.nan)
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with a token and tight limits."""
    limits = Limits(megabytes=0.02, images=3, pixels=1024)
    with running(RewardMix({"picky": picky}, (1.0,)), SECRET, limits) as address:
        yield address


def post(url: str, **changes: Any) -> tuple[int, str]:
    """(status, message) of a request that is right but for the changes."""
    body = request_for(2) | changes
    answer = httpx.post(f"{url}/score", json=body, headers={"Authorization": f"Bearer {SECRET}"})
    return answer.status_code, answer.json().get("detail", "")


def test_only_the_token_opens_the_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for headers in ({}, {"Authorization": SECRET}, {"Authorization": "Bearer wrong"}):
        answer = httpx.post(f"{url}/score", content=b"x", headers=headers)
        assert (answer.status_code, answer.json()["detail"]) == (401, "the bearer token is missing or wrong")
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200 and SECRET not in health.text
    with pytest.raises(ServerError, match=f"^{url} answered 401: the bearer token is missing or wrong; the token is"):
        build([f"remote={url}"])
    monkeypatch.setenv(TOKEN, SECRET)
    assert build([f"remote={url}"]).names == ("remote",)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({}, 200, ""),
        ({"prompts": ["one"]}, 422, "2 images, but 1 prompts and 2 metadata"),
        ({"prompts": [1, 2]}, 422, "prompts.0: Input should be a valid string"),
        ({"metadata": None}, 422, "metadata: Input should be a valid array"),
        ({"more": 1}, 422, "more: Extra inputs are not permitted"),
        ({"images": ["AAAA", "AAAA"]}, 422, "image 0 is not a base64 PNG"),
        ({"images": [bomb(), bomb()]}, 422, "image 0 is 60000x60000, over the limit of 1024 pixels"),
        (request_for(4), 422, "4 images are over the limit of 3 (--max_images)"),
        ({"prompts": ["x" * 30000, "y"]}, 413, "the request is over the limit of 0.02 MB (--max_mb)"),
        (
            {"metadata": [{}, {"bad": "data"}]},
            400,
            "'picky' failed on image 1 of 2 (prompt 'prompt 1'): ValueError: no",
        ),
        ({"metadata": [{}, {"bad": "luck"}]}, 500, "on image 1 of 2 (prompt 'prompt 1'): RuntimeError: out of memory"),
        ({"metadata": [{}, {"bad": "nan"}]}, 500, "reward 'picky' returned nan for image 0 of 2"),
    ],
)
def test_what_a_server_refuses_it_says_in_one_line(
    changes: dict[str, Any], status: int, message: str, url: str
) -> None:
    found, said = post(url, **changes)
    assert found == status and message in said and "\n" not in said and "Traceback" not in said


@pytest.mark.parametrize("body", [b"", b"{", pickle.dumps(request_for(1)), b"[]", b"\xff\xfe"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes, url: str) -> None:
    answer = httpx.post(f"{url}/score", content=body, headers=OPEN)
    assert answer.status_code == 422 and "\n" not in answer.json()["detail"]


def test_a_body_of_unstated_length_is_cut_off_at_the_limit(url: str) -> None:
    chunks = (b"x" * 1000 for _ in range(100))
    answer = httpx.post(f"{url}/score", content=chunks, headers=OPEN)
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413


def test_the_reward_of_a_bad_prompt_is_named_through_the_wire(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    mix = build([f"remote={url}"])
    with pytest.raises(RewardError, match=r"^reward 'remote' failed on image 2 of 3 \(prompt 'c'\): .*: no such tag$"):
        mix(rounded(3), ["a", "b", "c"], [{}, {}, {"bad": "data"}])


def test_one_request_is_scored_at_a_time() -> None:
    inside, most, lock = 0, 0, threading.Lock()
    both_sent = threading.Barrier(2)

    def slow(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.2)  # long enough for the other request, if nothing held it back
        with lock:
            inside -= 1
        return images.mean(dim=(1, 2, 3))

    def send(url: str) -> None:
        both_sent.wait(PATIENCE)
        assert httpx.post(f"{url}/score", json=request_for(1)).status_code == 200

    with running(RewardMix({"slow": slow}, (1.0,))) as url:
        threads = [threading.Thread(target=send, args=(url,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert most == 1
