"""Who may talk to a server, and at what length: with the token, and no page of another site.

A server on this machine is reachable by every page that its user's browser shows. So without a
token only requests addressed to this machine by name pass, and requests that a page of another
origin makes never do.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from memwise.budget import readable
from memwise.errors import InvalidKnob

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES = 16 << 20
"""The longest body of a request, unless another limit is set."""
_PATIENCE = 8  # limits' worth of a body that is too long are read before it is refused
_REFUSALS = {401: "Unauthorized", 403: "Forbidden", 413: "ContentTooLarge"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """An ASGI application that lets requests through to another one, or answers 401 or 403.

    Args:
        app: the application behind it.
        token: the bearer token that requests must carry; None = only requests addressed to this
            machine's own names pass.
        open_paths: paths that need no token because they hold no data.
    """

    def __init__(
        self, app: App, token: str | None = None, open_paths: tuple[str, ...] = ()
    ) -> None:
        self._app, self._token, self._open_paths = app, token, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await _refuse(send, *refusal)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != host:
            return 403, f"requests from pages of {origin} are not answered"
        if self._token is None:
            if urlsplit(f"//{host}").hostname not in LOOPBACK:
                return 403, f"host {host!r} is not this machine; start the server with a token"
            return None
        if scope["path"] in self._open_paths:
            return None
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return 401, "send the header 'Authorization: Bearer TOKEN'"
        return None


class Limit:
    """An ASGI application that reads a request's body for another one, or answers 413.

    The body is read whole before the application sees any of it, so one that is too long changes
    nothing, with or without the header that tells its length.

    Args:
        app: the application behind it.
        most_bytes: the longest body that passes.
    """

    def __init__(self, app: App, most_bytes: int = BODY_BYTES) -> None:
        if most_bytes < 1:
            raise InvalidKnob(f"most_bytes={most_bytes}: let bodies of at least 1 byte pass")
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        told = int(length) if length.isdigit() else 0
        # Most clients read no answer before all is sent, so a long body is read and dropped; one
        # that waits to be told whether to send it is told at once.
        patience = 0 if b"expect" in headers and told > self._most_bytes else _PATIENCE
        messages: list[MutableMapping[str, Any]] = []
        n_bytes = 0
        while n_bytes < patience * self._most_bytes and _goes_on(messages):
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if max(n_bytes, told) > self._most_bytes:
                messages.clear()
                message["body"] = b""
            messages.append(message)
        if max(n_bytes, told) > self._most_bytes:
            limit = readable(self._most_bytes)
            await _refuse(send, 413, f"the body is longer than {limit}; send it in several parts")
            return
        messages.reverse()

        async def again() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)


def _goes_on(messages: list[MutableMapping[str, Any]]) -> bool:
    return not messages or bool(messages[-1].get("more_body", False))


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to offer memories to a network without a token.

    Raises:
        InvalidKnob: `host` is reachable from elsewhere and there is no token.
    """
    if token is None and host not in LOOPBACK:
        raise InvalidKnob(f"host {host!r} is reachable from elsewhere; also give a token")
    if token is not None and (not token or not token.isascii() or not token.isprintable()):
        raise InvalidKnob("the token must be printable ASCII characters")


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": _REFUSALS[status], "message": message}).encode()
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the end of the body may not have been read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
