"""Serve rewards over HTTP, for `--reward remote=http://HOST:PORT` elsewhere.

It is for a model that is too large for the training machine, or needs other packages.

    python -m rewards.serve --reward jpeg_compressibility composition --reward_weights 0.002 1 --port 8000

Loopback needs no token; any other address does. docs/remote.md has the protocol, and says what is safe.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from rewards import build
from rewards.server import wire
from rlg import extras
from rlg.cli import fail_cleanly
from rlg.config_parser import Command, option

_MODULES = ("fastapi", "uvicorn")
_CONNECTIONS = 128  # connections at a time; more are answered 503, and clients come again


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `python -m rewards.serve`."""

    reward: tuple[str, ...] = option(help="see python -m rewards", metavar="NAME[=SOURCE]")
    reward_weights: tuple[float, ...] | None = option(None, "one a reward (default: 1 each)")
    device: str | None = option(None, "default: cuda if there is one")
    host: str = option("127.0.0.1", "address to listen on; the default is this machine alone")
    port: int = option(8000, "of the address; 0: any that is free")
    token_file: Path | None = option(None, f"holds the bearer token (default: the variable {wire.TOKEN})")
    max_mb: float = option(128.0, "largest request, in 10^6 bytes")
    max_images: int = option(64, "most images of a request")


COMMAND = Command("python -m rewards.serve", ServeOptions, "Serve rewards over HTTP.")


def read_token(file: Path | None) -> str | None:
    """The token of a file, or else of the environment.

    Raises ValueError for an unfit one, OSError for no file.
    """
    if file is not None:
        return wire.check_token(file.read_text(), str(file))
    token = os.environ.get(wire.TOKEN)
    return wire.check_token(token, wire.TOKEN) if token else None


def serve(options: ServeOptions) -> None:
    """Load the rewards, and serve until interrupted.

    Raises ValueError or OSError for faults that the user can mend.
    """
    if options.max_mb <= 0 or options.max_images <= 0:
        raise ValueError("--max_mb and --max_images must be positive")
    token = read_token(options.token_file)
    if token is None and not wire.is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} is open to other machines, and there is no token: give --token_file, or set "
            f"{wire.TOKEN}"
        )
    if missing := [module for module in _MODULES if importlib.util.find_spec(module) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: {extras.install('serve')}")
    import torch
    import uvicorn

    from rewards.server.app import Limits, create
    from rewards.server.callers import ImpatientProtocol

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # listen before the rewards are loaded, which may take minutes
    with _listen(options.host, options.port) as listener:
        mix = build(options.reward, options.reward_weights, device)
        app = create(mix, token, Limits(options.max_mb, options.max_images), local=wire.is_loopback(options.host))
        host, port = listener.getsockname()[:2]
        print(f"serving {', '.join(mix.names)} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server = {"limit_concurrency": _CONNECTIONS, "timeout_graceful_shutdown": 5, "log_level": "warning"}
        config = uvicorn.Config(app, http=ImpatientProtocol, ws="none", **server)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must lie between 0 and 65535, got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def main() -> None:
    """Run the command line."""
    with fail_cleanly():
        serve(COMMAND.parse())


if __name__ == "__main__":
    main()
