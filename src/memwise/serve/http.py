"""Running a server: one address, checked and bound before anything is said about it."""

from __future__ import annotations

import socket
import sys

from memwise.errors import InvalidKnob
from memwise.serve.guard import App, check_exposure


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket at the address.

    Raises:
        InvalidKnob: it is open to a network without a token, or cannot be had.
    """
    check_exposure(host, token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise InvalidKnob(
            f"cannot listen on {host}, port {port} ({reason}); choose another one"
        ) from error


def serve(app: App, listening: socket.socket, told: str) -> None:
    """Answer requests until interrupted; those in flight are answered first.

    Args:
        app: the application.
        listening: where to listen.
        told: what is said on stderr about it; the URL follows.
    """
    import uvicorn

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{told} http://{shown}:{port}", file=sys.stderr)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=10, server_header=False, lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[listening])
