"""The reward server among strangers: other sites' pages, silent and slow clients, clients that left, large images."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.paths import ROOT

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rewards import RewardMix, ServerError  # noqa: E402
from rewards.server.app import Limits  # noqa: E402
from rewards.server.client import Server  # noqa: E402
from tests.rewards.test_remote import PATIENCE, request_for, running, stub  # noqa: E402

JSON = {"content-type": "application/json"}


def bright(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(RewardMix({"bright": bright}, (1.0,))) as address:
        yield address


def wait_for(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < ends, "it does not happen"
        time.sleep(0.01)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"origin": "http://HOST"}, 200),  # its own
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"content-type": "text/plain"}, 415),  # what a page sends without asking first
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": ""}, 415),
        ({"origin": "http://evil.test"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"host": "evil.test"}, 403),  # DNS rebinding: the name of the page, the address of this machine
        ({"host": "evil.test", "origin": "http://evil.test"}, 403),
        ({"host": "127.0.0.1.evil.test"}, 403),
        ({"host": ""}, 403),
    ],
)
def test_a_page_of_another_site_is_refused(headers: dict[str, str], status: int, url: str) -> None:
    own = url.removeprefix("http://")
    sent = JSON | {name: value.replace("HOST", own) for name, value in headers.items()}
    answer = httpx.post(f"{url}/score", content=json.dumps(request_for(1)), headers=sent)
    assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    if status == 403:
        assert httpx.get(f"{url}/health", headers=sent).status_code == 403
        assert httpx.options(f"{url}/score", headers=sent).status_code == 403


def test_a_server_for_others_has_any_name_and_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards.server import callers

    seen: list[Any] = []
    monkeypatch.setattr("tests.rewards.test_remote.create", lambda *given: seen.append(given) or create_open(*given))
    with running(RewardMix({"bright": bright}, (1.0,)), "token") as address:
        answer = httpx.get(f"{address}/health", headers={"host": "rewards.lab:8000"})
        assert answer.status_code == 200
        assert httpx.post(f"{address}/score", json=request_for(1), headers={"host": "lab"}).status_code == 401
    assert seen and callers.host_of("[fe80::1]:80") == "fe80::1" and callers.host_of("[") == ""


def create_open(*given: Any) -> Any:
    from rewards.server.app import create

    return create(*given, local=False)


def closed_within(connection: socket.socket, seconds: float) -> bytes:
    """What a server says before it hangs up; fails where it does not."""
    connection.settimeout(seconds)
    said = b""
    try:
        while part := connection.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    except TimeoutError:
        pytest.fail(f"the server holds the connection for over {seconds} s")
    return said


def test_connections_that_say_nothing_lock_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.server.callers.HEAD_SECONDS", 1.0)
    with running(RewardMix({"bright": bright}, (1.0,)), connections=20) as url, ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port_of(url)))) for _ in range(24)]
        assert httpx.get(f"{url}/health").status_code == 503
        assert all(closed_within(each, PATIENCE) == b"" for each in silent)
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_drip_are_not_waited_for(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a second request on a connection that was fine."""
    monkeypatch.setattr("rewards.server.callers.HEAD_SECONDS", 0.5)
    with running(RewardMix({"bright": bright}, (1.0,))) as url:
        with socket.create_connection(("127.0.0.1", port_of(url))) as connection:
            connection.sendall(start)
            if start:
                assert b"200 OK" in connection.recv(65536)
            began = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() - began < PATIENCE:
                    connection.sendall(b"G")
                    time.sleep(0.05)
        assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_stalls_or_drips_is_not_waited_for(drips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.server.app.STALL_SECONDS", PATIENCE if drips else 0.5)
    monkeypatch.setattr("rewards.server.app.BODY_SECONDS", 0.5 if drips else PATIENCE)
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n"
    with running(RewardMix({"bright": bright}, (1.0,))) as url:
        with socket.create_connection(("127.0.0.1", port_of(url))) as connection:
            connection.sendall(head + b"{")
            for _ in range(20 if drips else 0):
                time.sleep(0.05)
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
            assert closed_within(connection, PATIENCE / 2).startswith(b"HTTP/1.1 408 ")
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_part_that_comes_with_the_limit_does_not_lift_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both timers are due in one turn of the event loop, the part's first."""
    from rewards.server import app

    monkeypatch.setattr(app, "BODY_SECONDS", 0.02)

    class Request:
        headers: ClassVar[dict[str, str]] = {}

        async def stream(self) -> AsyncIterator[bytes]:
            loop = asyncio.get_running_loop()
            part = loop.create_future()
            loop.call_later(0.01, part.set_result, b"{")
            loop.call_soon(time.sleep, 0.1)
            yield await part
            yield b"}"

    with pytest.raises(app.HTTPException) as refused:
        asyncio.run(app._read(Request(), 100, lambda count: None))  # type: ignore[arg-type]
    assert refused.value.status_code == 408


def test_requests_of_clients_that_left_are_not_scored() -> None:
    scored: list[str] = []
    go_on = threading.Event()

    def slow(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        scored.extend(prompts)
        go_on.wait(PATIENCE)
        return torch.zeros(len(prompts))

    def send(prompt: str, seconds: float) -> int:
        body = request_for(1) | {"prompts": [prompt]}
        try:
            return httpx.post(f"{url}/score", json=body, timeout=seconds).status_code
        except httpx.TimeoutException:
            return 0

    with running(RewardMix({"slow": slow}, (1.0,))) as url:
        first = threading.Thread(target=send, args=("first", PATIENCE))
        first.start()
        wait_for(lambda: bool(scored))
        assert [send(f"left {i}", 0.2) for i in range(3)] == [0, 0, 0]  # they wait behind the first, and go
        alive: list[int] = []
        last = threading.Thread(target=lambda: alive.append(send("alive", PATIENCE)))
        last.start()
        go_on.set()
        last.join(PATIENCE)
        first.join(PATIENCE)
    assert alive == [200] and scored == ["first", "alive"]


def test_requests_that_wait_hold_no_more_than_they_may() -> None:
    go_on, inside = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        inside.set()
        go_on.wait(PATIENCE)
        return torch.zeros(len(prompts))

    body = json.dumps(request_for(1))
    limits = Limits(megabytes=len(body) / 1e6, waiting=2.5)
    with running(RewardMix({"slow": slow}, (1.0,)), None, limits) as url:

        def send(found: list[int]) -> None:
            found.append(httpx.post(f"{url}/score", content=body, headers=JSON, timeout=PATIENCE).status_code)

        answers: list[int] = []
        threads = [threading.Thread(target=send, args=(answers,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert inside.wait(PATIENCE)
        wait_for(lambda: len(answers) == 3)  # two are held, the one being scored and one more
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(answers) == [200, 200, 503, 503, 503]
        send(answers)
        assert answers[-1] == 200  # what is done is not counted any more


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_drips_is_not_waited_for(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps every single read within its limit, in the headers too."""
    monkeypatch.setattr("rewards.server.client.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("rewards.server.client.TRIES", 1)
    hung_up = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(start)
        with suppress(OSError):
            while not hung_up.wait(0.05):
                connection.sendall(b" ")
        hung_up.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        url, started = f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
        with pytest.raises(ServerError, match=rf"^{url} cannot be reached \(ReadTimeout: no whole answer in 0.5 s\)"):
            Server(url).get("/health")
        assert time.monotonic() - started < PATIENCE / 2
        assert hung_up.wait(PATIENCE)  # the client closed the connection, and left no thread behind


def test_a_client_works_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""
    server, _ = stub(lambda request: httpx.Response(200, json={"a": 1}))

    async def cell() -> Any:
        return server.get("/health")

    assert asyncio.run(cell()) == {"a": 1}


def black(side: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG", compress_level=9)
    return base64.b64encode(file.getvalue()).decode()


def peak(pid: int) -> float:
    """The most memory that a process ever held, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3


def body_of(count: int, side: int) -> dict[str, Any]:
    return {"images": [black(side)] * count, "prompts": ["a"] * count, "metadata": [{}] * count}


def test_a_small_body_of_huge_images_takes_no_gigabytes() -> None:
    """64 black images of 2048 x 2048 are a megabyte as PNGs, and were 10 GB and a minute."""
    command = [sys.executable, "-m", "rewards.serve", "--reward", "jpeg_compressibility", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            assert httpx.post(f"{url}/score", json=body_of(1, 64), timeout=PATIENCE).status_code == 200
            before = peak(process.pid)
            refused = httpx.post(f"{url}/score", json=body_of(64, 2048), timeout=PATIENCE)
            assert refused.status_code == 422
            assert "64 images have 268435456 pixels together, over the limit of 67108864" in refused.json()["detail"]
            assert peak(process.pid) - before < 100
            taken = httpx.post(f"{url}/score", json=body_of(16, 2048), timeout=PATIENCE)
            assert taken.status_code == 200 and len(set(taken.json()["total"])) == 1 == 17 - len(taken.json()["total"])
            assert peak(process.pid) - before < 1200
        finally:
            process.terminate()
