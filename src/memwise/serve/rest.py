"""REST: one route a verb, made from the list in `recall/api.py`, and the web page.

    GET  /                              the page
    GET  /healthz                       {"status": "ok"}
    GET  /v1/banks?k=&skip=             the banks of the file
    GET  /v1/banks/{bank}/{verb}?...    verbs that only read
    POST /v1/banks/{bank}/{verb}        all verbs, parameters as a JSON object

An error is `{"error": class, "message": text}` with the status in `STATUS`; a list is read page by
page with `k` and `skip`; a body longer than the limit gets 413 before any of it is used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any, get_args

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from memwise import __version__, errors
from memwise.errors import InvalidKnob, MemwiseError
from memwise.recall.api import VERBS, Param, Verb
from memwise.serve.guard import BODY_BYTES, App, Guard, Limit
from memwise.serve.http import listen, serve
from memwise.serve.mem0 import mem0_routes
from memwise.serve.pool import Pool, UnknownBank

STATUS: Mapping[type[MemwiseError], int] = {
    UnknownBank: 404,
    errors.UnknownMethod: 404,
    errors.UnknownItem: 404,
    errors.InvalidKnob: 400,
    errors.BudgetExceeded: 507,
    errors.MissingExtra: 501,
    errors.UnsupportedModel: 422,
    errors.StoreLocked: 503,
    errors.EmbedderMismatch: 409,
    errors.StoreCorrupt: 500,
    errors.StoreError: 409,
    errors.LLMUnavailable: 502,
    errors.EmbedderUnavailable: 502,
    MemwiseError: 500,
}
_MAKE = ("add", "import")
_PAGE = files("memwise.serve").joinpath("page.html")


def create_app(pool: Pool, token: str | None = None, body_bytes: int = BODY_BYTES) -> App:
    """The whole server as an ASGI application; it closes the pool when it shuts down.

    Args:
        pool: the served file.
        token: bearer token that requests must carry; None = only this machine may ask.
        body_bytes: the longest body that a request may have.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(
        title="memwise", version=__version__, lifespan=life, redoc_url=None, docs_url=None,
        summary="Long-term memory for agents in one file.",
    )  # fmt: skip
    app.add_exception_handler(MemwiseError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_api_route("/", _page(), include_in_schema=False)
    app.add_api_route("/healthz", lambda: JSONResponse({"status": "ok"}), name="healthz")
    for verb in VERBS.values():
        (_list_route if verb.name == "banks" else _route)(app, pool, verb)
    app.include_router(mem0_routes(pool))
    return Guard(Limit(app, body_bytes), token, open_paths=("/", "/healthz"))


def _route(app: FastAPI, pool: Pool, verb: Verb) -> None:
    path = f"/v1/banks/{{bank:path}}/{verb.name}"
    fields: dict[str, Any] = {p.name: _field(p) for p in verb.params}
    body = create_model(f"{verb.name.title()}Body", __config__=_STRICT, **fields)
    post = _endpoint(pool, verb, Annotated[body, Body()], None if _demands(verb) else body())
    app.add_api_route(path, post, methods=["POST"], name=verb.name, **_told(verb))
    if verb.hints.read_only:
        get = _endpoint(pool, verb, Annotated[_query(verb), Query()], None)
        app.add_api_route(path, get, methods=["GET"], name=f"{verb.name} by query", **_told(verb))


def _list_route(app: FastAPI, pool: Pool, verb: Verb) -> None:
    def banks(given: BaseModel) -> Response:
        names = pool.names()
        if not names:
            return JSONResponse([])
        with pool.borrow(names[0]) as memory:
            return JSONResponse(verb.call(memory, **given.model_dump()))

    shown = inspect.Parameter(
        "given", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[_query(verb), Query()]
    )
    banks.__dict__["__signature__"] = inspect.Signature([shown])
    app.add_api_route("/v1/banks", banks, methods=["GET"], name=verb.name, **_told(verb))


def _told(verb: Verb) -> dict[str, Any]:
    return {"summary": verb.summary, "description": verb.about, "tags": ["memory"]}


def _query(verb: Verb) -> type[BaseModel]:
    fields: dict[str, Any] = {p.name: _field(p, in_query=True) for p in verb.params}
    return create_model(f"{verb.name.title()}Query", __config__=_STRICT, **fields)


_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, str_strip_whitespace=False)


def _field(param: Param, *, in_query: bool = False) -> tuple[Any, Any]:
    kind = param.type
    if in_query and _is_mapping(param):
        kind = str | None
    shown = f"{param.doc} As a JSON object." if kind is not param.type else param.doc
    default = ... if param.required else param.default
    return kind, Field(default, description=shown)


def _is_mapping(param: Param) -> bool:
    return any(getattr(kind, "__origin__", kind) is dict for kind in get_args(param.type))


def _demands(verb: Verb) -> bool:
    return any(param.required for param in verb.params)


def _endpoint(pool: Pool, verb: Verb, form: Any, default: Any) -> Callable[..., Response]:
    def run(bank: str, given: BaseModel) -> Response:
        values = {param.name: getattr(given, param.name) for param in verb.params}
        for param in verb.params:
            if _is_mapping(param) and isinstance(values[param.name], str) and not param.required:
                values[param.name] = _object(param.name, values[param.name])
        with pool.borrow(bank, make=verb.name in _MAKE) as memory:
            return JSONResponse(verb.call(memory, **values))

    kind = inspect.Parameter.KEYWORD_ONLY
    run.__dict__["__signature__"] = inspect.Signature(
        [
            inspect.Parameter("bank", kind, annotation=str),
            inspect.Parameter(
                "given", kind, annotation=form,
                default=inspect.Parameter.empty if default is None else default,
            ),
        ]
    )  # fmt: skip
    return run


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidKnob(f"{name}={text!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InvalidKnob(f"{name}={text!r} must be a JSON object")
    return found


async def _failed(_: Request, problem: Exception) -> Response:
    status = next(STATUS[kind] for kind in type(problem).__mro__ if kind in STATUS)
    headers = {"retry-after": "5"} if status == 503 else None
    return _problem(status, type(problem).__name__, str(problem), headers)


async def _invalid(_: Request, problem: Exception) -> Response:
    """What the edge refuses, in the words of pydantic but without echoing the values."""
    assert isinstance(problem, RequestValidationError)
    return _problem(422, "InvalidRequest", "; ".join(map(_invalidity, problem.errors())))


def _invalidity(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error['ctx']['error']}, position {error['loc'][-1]})"
    return f"{'.'.join(str(part) for part in error['loc'][1:]) or 'body'}: {error['msg']}"


async def _refused(request: Request, problem: Exception) -> Response:
    """What the router refuses: no such path, no such method, a body that is no JSON."""
    assert isinstance(problem, HTTPException)
    kind = HTTPStatus(problem.status_code).phrase.title().replace(" ", "")
    told = f"{request.method} {request.url.path}: {problem.detail}; /openapi.json lists what works"
    return _problem(problem.status_code, kind, told, problem.headers)


def _problem(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse({"error": kind, "message": message}, status, headers)


def _page() -> Callable[[], Response]:
    html = _PAGE.read_text("utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {_hash('script', html)}; style-src {_hash('style', html)}"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    def page() -> Response:
        return HTMLResponse(html, headers=headers)

    return page


def _hash(tag: str, html: str) -> str:
    """The policy word that lets exactly the page's own inline script or style run."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert found is not None
    return f"'sha256-{b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


def run(
    pool: Pool, host: str, port: int, token: str | None = None, body_bytes: int = BODY_BYTES
) -> None:
    """Serve REST and the page until interrupted.

    Raises:
        InvalidKnob: the address is open to a network without a token, or cannot be had.
    """
    with listen(host, port, token) as listening:
        serve(create_app(pool, token, body_bytes), listening, f"serving {pool.path} at")
