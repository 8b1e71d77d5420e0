"""`python -m rewards.serve`: what it refuses, and that it serves what training asks for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from rewards import build, serve  # noqa: E402
from rewards.server.wire import TOKEN  # noqa: E402

PATIENCE = 100  # seconds until a test gives up; none waits for so long unless it fails
SECRET = "s3cret-of-the-server"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--reward", "composition", "--host", "0.0.0.0"],
            "--host 0.0.0.0 is open to other machines, and there is no",
        ),
        (["--reward", "composition", "--host", "::"], "--host :: is open to other machines"),
        (["--reward", "beauty"], "unknown reward 'beauty'"),
        (["--reward", "composition", "--reward_weights", "1", "2"], "1 rewards (composition) but 2 weights"),
        (["--reward", "composition", "--token_file", "none.txt"], "none.txt"),
        (["--reward", "composition", "--max_mb", "0"], "--max_mb and --max_images must be positive"),
        (["--reward", "composition", "--port", "70000"], "--port must lie between 0 and 65535, got 70000"),
        (["--port", "1"], "the following arguments are required: --reward; see --help"),
    ],
)
def test_serve_refuses_in_one_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0", *argv])
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("it serves"))
    with pytest.raises(SystemExit) as caught:
        serve.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1


def test_serve_refuses_a_port_that_is_taken_and_an_empty_token(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            serve.serve(serve.COMMAND.parse(["--reward", "composition", "--port", str(port)]))
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="token must be printable ASCII without blanks, and not empty"):
        serve.serve(serve.COMMAND.parse(["--reward", "composition", "--token_file", str(tmp_path / "token")]))


def test_the_command_serves_what_training_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    command = [sys.executable, "-m", "rewards.serve", "--reward", "jpeg_compressibility", "--port", "0"]
    command += ["--token-file", str(tmp_path / "token"), "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != TOKEN}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving jpeg_compressibility on http://127.0.0.1:")
            monkeypatch.setenv(TOKEN, SECRET)
            images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(5)).float() / 255
            prompts, metadata = ["a"] * 5, [{}] * 5
            far = build([f"remote={line.split()[-1]}"])(images, prompts, metadata)
            assert torch.equal(far.total_B, build(["jpeg_compressibility"])(images, prompts, metadata).total_B)
        finally:
            process.terminate()
            process.wait(PATIENCE)
