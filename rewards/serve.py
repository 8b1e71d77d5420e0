"""Serve rewards over HTTP, for `--reward remote=http://HOST:PORT` elsewhere: a model too large, or of another world.

    python -m rewards.serve --reward jpeg_compressibility composition --weights 0.002 1 --port 8000

Loopback needs no token; any other address does. The protocol, and what is safe, are in docs/remote.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from rewards import build, wire

_MODULES = ("fastapi", "uvicorn")
_CONNECTIONS = 128  # at a time; more are answered 503, and clients come again


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description="Serve rewards over HTTP.")
    parser.error = lambda message: stop(f"{message}; see --help")  # one line, without the usage
    parser.add_argument("--reward", nargs="+", required=True, metavar="NAME[=SOURCE]", help="see python -m rewards")
    parser.add_argument("--weights", nargs="+", type=float, help="one a reward (default: 1 each)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument(
        "--token_file", "--token-file", type=Path, help=f"holds the bearer token (default: the variable {wire.TOKEN})"
    )
    parser.add_argument(
        "--max_mb", "--max-mb", type=float, default=128.0, help="largest request, in 10^6 bytes (default: 128)"
    )
    parser.add_argument(
        "--max_images", "--max-images", type=int, default=64, help="most images of a request (default: 64)"
    )
    return parser.parse_args(argv)


def stop(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2, as all commands do (rlg.cli is out of reach from here)."""
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def read_token(file: Path | None) -> str | None:
    """The token of a file, or else of the environment. Raises ValueError for an unfit one, OSError for no file."""
    if file is not None:
        return wire.check_token(file.read_text(), str(file))
    token = os.environ.get(wire.TOKEN)
    return wire.check_token(token, wire.TOKEN) if token else None


def serve(args: argparse.Namespace) -> None:
    """Load the rewards, and serve until interrupted. Raises ValueError or OSError for what the user can mend."""
    if args.max_mb <= 0 or args.max_images <= 0:
        raise ValueError("--max_mb and --max_images must be positive")
    token = read_token(args.token_file)
    if token is None and not wire.is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} is open to other machines, and there is no token: give --token_file, or set "
            f"{wire.TOKEN}"
        )
    if missing := [module for module in _MODULES if importlib.util.find_spec(module) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'rlg[serve]'")
    import uvicorn

    from rewards.app import Limits, create

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _listen(args.host, args.port) as listener:  # before the rewards are loaded, which may take minutes
        mix = build(args.reward, args.weights, device)
        app = create(mix, token, Limits(args.max_mb, args.max_images))
        host, port = listener.getsockname()[:2]
        print(f"serving {', '.join(mix.names)} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        config = uvicorn.Config(app, limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=5, log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must lie between 0 and 65535, got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def main() -> None:
    """Command line."""
    args = arguments()
    try:
        serve(args)
    except (ValueError, OSError) as error:
        stop(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
