"""A client for chat models behind an OpenAI-compatible URL; standard library only.

Calls and tokens have hard caps that are counted before a request leaves. A redirect is an error, a
busy server is asked again, and every failure is an `LLMUnavailable` that names the URL.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.message import Message as Headers
from http.client import HTTPException, HTTPResponse
from typing import IO, Any
from urllib.parse import urldefrag, urlsplit

from memwise.errors import BudgetExceeded, InvalidKnob, LLMUnavailable
from memwise.recall.engine.text import n_tokens

_MAX_REPLY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Usage:
    """What a client has spent.

    Attributes:
        calls: requests sent, retries included.
        failures: requests without a usable answer.
        prompt_tokens: as the server reports them; where it does not, ceil(characters / 4).
        answer_tokens: likewise.
    """

    calls: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.answer_tokens


def parse_llm(spec: str) -> tuple[str, str | None]:
    """Split `http://host:port/v1#model` into the URL and the model (None = the server's first).

    Raises:
        InvalidKnob: not an http(s) URL.
    """
    url, model = urldefrag(spec.strip())
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise InvalidKnob(
            f"llm {spec!r} is not a URL; give an OpenAI-compatible one, "
            "for example 'http://localhost:11434/v1#qwen3:4b'"
        )
    return url.rstrip("/"), model or None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: following one would hand the key and the memories to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers,
        newurl: str,
    ) -> None:  # fmt: skip
        return None


@dataclass(eq=False)
class ChatClient:
    """A client for OpenAI-compatible `/chat/completions`, within hard caps; safe between threads.

    The key is read from the environment at each request and never kept. A request is counted
    before it leaves, with the tokens it may use at most; the server's own count replaces that
    estimate, so a cap on tokens can be passed by no more than one misjudged prompt.

    Attributes:
        url: base URL, for example `http://localhost:8000/v1`.
        model: name of the model; None = the first one that the server lists.
        key_env: environment variable that holds the key; unset = no key is sent.
        timeout_s: longest wait for an answer (for each piece of it when streaming), in seconds.
        max_calls: cap on requests over the life of the client.
        max_tokens: cap on prompt and answer tokens over the life of the client.
        answer_tokens: cap on the tokens of one answer.
        retries: further attempts after status 429 or 5xx.
        backoff_s: first pause before a retry, in seconds; doubled each time, at most `timeout_s`.
    """

    url: str
    model: str | None = None
    key_env: str = "MEMWISE_LLM_KEY"
    timeout_s: float = 60.0
    max_calls: int = 1_000
    max_tokens: int = 2_000_000
    answer_tokens: int = 1_024
    retries: int = 3
    backoff_s: float = 0.5
    _usage: Usage = field(default_factory=Usage, init=False, repr=False)
    _schema_refused: bool = field(default=False, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.url, fragment = parse_llm(self.url)
        self.model = self.model or fragment
        if min(self.timeout_s, self.answer_tokens) <= 0 or min(self.retries, self.backoff_s) < 0:
            raise InvalidKnob(
                f"timeout_s={self.timeout_s}, answer_tokens={self.answer_tokens} must be above 0; "
                f"retries={self.retries}, backoff_s={self.backoff_s} must not be below 0"
            )
        opener = urllib.request.build_opener(_NoRedirect)
        self._open: Callable[..., HTTPResponse] = opener.open

    @property
    def usage(self) -> Usage:
        """What was spent so far."""
        return self._usage

    def chat(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> str:
        """Ask for one answer.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            schema: JSON schema that the server shall hold the answer to, if it can.

        Raises:
            BudgetExceeded: a cap is reached; nothing was sent.
            LLMUnavailable: no usable answer within the time and the retries.
        """
        body = self._body(messages)
        if schema is None or self._schema_refused:
            return self._ask(body)
        wanted = {"name": "answer", "schema": schema, "strict": True}
        try:
            return self._ask(
                {**body, "response_format": {"type": "json_schema", "json_schema": wanted}}
            )
        except _Refused:
            self._schema_refused = True
            return self._ask(body)

    def stream(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Ask for one answer and yield it piece by piece as it comes.

        Raises:
            BudgetExceeded: a cap is reached; nothing was sent.
            LLMUnavailable: no answer, or one that broke off.
        """
        body = {**self._body(messages), "stream": True}
        reserved = _reserve(body)
        length, complete, reported = 0, False, None
        with self._send(body, reserved) as response:
            if "event-stream" not in response.headers.get("content-type", ""):
                yield self._read_answer(response, reserved)
                return
            try:
                for event in _events(response):
                    piece, ends = _delta(event)
                    complete = complete or ends
                    reported = event.get("usage") or reported
                    if piece:
                        length += len(piece)
                        yield piece
            except (OSError, HTTPException, ValueError) as error:
                raise self._failed(f"the stream broke off: {error}") from error
            finally:
                spent = replace(reserved, answer_tokens=-(-length // 4))
                self._settle(reserved, _reported(reported, spent))
        if not complete:
            raise self._failed("the stream ended before the answer did")

    def _body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        if self.model is None:
            self.model = self._first_model()
        return {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self.answer_tokens,
            "temperature": 0,
        }

    def _first_model(self) -> str:
        with self._send(None, Usage(calls=1)) as response:
            listed = self._read_json(response)
        try:
            return str(listed["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise self._failed("it lists no model; name one after '#' in the URL") from error

    def _ask(self, body: Mapping[str, Any]) -> str:
        reserved = _reserve(body)
        with self._send(body, reserved) as response:
            return self._read_answer(response, reserved)

    def _read_answer(self, response: HTTPResponse, reserved: Usage) -> str:
        answer = self._read_json(response)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (LookupError, TypeError) as error:
            raise self._failed(f"unexpected answer {json.dumps(answer)[:200]}") from error
        if not isinstance(text, str) or not text.strip():
            raise self._failed("the answer is empty")
        spent = replace(reserved, answer_tokens=n_tokens(text))
        self._settle(reserved, _reported(answer.get("usage"), spent))
        if choice.get("finish_reason") == "length":
            raise self._failed(f"the answer was cut off at answer_tokens={self.answer_tokens}")
        return text

    def _read_json(self, response: HTTPResponse) -> Any:
        try:
            return json.loads(_read_all(response, time.monotonic() + self.timeout_s))
        except (OSError, HTTPException) as error:
            raise self._failed(f"the answer broke off: {error}", Unreachable) from error
        except ValueError as error:
            raise self._failed(f"unreadable answer: {error}") from error

    def _send(self, body: Mapping[str, Any] | None, reserved: Usage) -> HTTPResponse:
        """Send a request, waiting and trying again while the server is busy; None = GET /models."""
        request = self._request(body)
        for attempt in range(self.retries + 1):
            self._reserve_or_raise(reserved)
            try:
                return self._open(request, timeout=self.timeout_s)
            except urllib.error.HTTPError as error:
                self._settle(reserved, Usage(calls=1))  # an error status costs no tokens
                with error:
                    why = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                    pause_s = _pause_s(error.headers, self.backoff_s * 2**attempt)
                failure = self._failed(why, _Refused if error.code in (400, 422) else Unreachable)
                if (error.code != 429 and error.code < 500) or attempt == self.retries:
                    raise failure from error
                time.sleep(min(pause_s, self.timeout_s))
            except (OSError, HTTPException) as error:
                raise self._failed(f"no answer ({error})", Unreachable) from error
        raise AssertionError("the last attempt returns or raises")

    def _request(self, body: Mapping[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "User-Agent": "memwise"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        if body is None:
            return urllib.request.Request(f"{self.url}/models", headers=headers)
        data = json.dumps(body).encode()
        return urllib.request.Request(f"{self.url}/chat/completions", data=data, headers=headers)

    def _reserve_or_raise(self, wanted: Usage) -> None:
        with self._lock:
            spent = self._usage
            if spent.calls + wanted.calls > self.max_calls:
                raise BudgetExceeded(
                    f"{spent.calls} calls to {self.url} are spent, max_calls={self.max_calls}; "
                    "raise max_calls"
                )
            if spent.tokens + wanted.tokens > self.max_tokens:
                raise BudgetExceeded(
                    f"{wanted.tokens} tokens asked of {self.url}, {spent.tokens} of "
                    f"max_tokens={self.max_tokens} are spent; raise max_tokens"
                )
            self._usage = _plus(spent, wanted, 1)

    def _settle(self, reserved: Usage, spent: Usage) -> None:
        with self._lock:
            self._usage = _plus(_plus(self._usage, reserved, -1), spent, 1)

    def _failed(self, why: str, kind: type[LLMUnavailable] = LLMUnavailable) -> LLMUnavailable:
        with self._lock:
            self._usage = replace(self._usage, failures=self._usage.failures + 1)
        return kind(f"{self.url} ({self.model}): {why}")


class Unreachable(LLMUnavailable):
    """The server is not there, busy for good, or wants none of it: the next call would fail too."""


class _Refused(LLMUnavailable):
    """The server does not accept the request as it is written."""


def _reserve(body: Mapping[str, Any]) -> Usage:
    prompt_tokens = sum(n_tokens(message["content"]) for message in body["messages"])
    return Usage(calls=1, prompt_tokens=prompt_tokens, answer_tokens=int(body["max_tokens"]))


def _plus(a: Usage, b: Usage, sign: int) -> Usage:
    return Usage(
        a.calls + sign * b.calls,
        a.failures + sign * b.failures,
        a.prompt_tokens + sign * b.prompt_tokens,
        a.answer_tokens + sign * b.answer_tokens,
    )


def _reported(usage: object, estimate: Usage) -> Usage:
    """The server's count of tokens where it gives one."""
    if not isinstance(usage, Mapping):
        return estimate
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(answer, int):
        return estimate
    return replace(estimate, prompt_tokens=prompt, answer_tokens=answer)


def _pause_s(headers: Headers, planned_s: float) -> float:
    asked = headers.get("Retry-After") or ""
    return max(planned_s, float(asked)) if asked.isdecimal() else planned_s


def _read_all(response: HTTPResponse, deadline: float) -> bytes:
    # The socket's timeout starts anew with every packet; the deadline does not.
    data = bytearray()
    while block := response.read1(1 << 16):
        data += block
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
        if len(data) > _MAX_REPLY_BYTES:
            raise ValueError(f"the answer is longer than {_MAX_REPLY_BYTES} bytes")
    return bytes(data)


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Parse server-sent events into their JSON payloads; the final mark is an event that ends."""
    for line in lines:
        name, _, value = line.decode("utf-8").rstrip("\r\n").partition(":")
        if name != "data":
            continue
        if value.strip() == "[DONE]":
            yield {"choices": [{"finish_reason": "stop"}]}
            return
        event = json.loads(value)
        if not isinstance(event, dict):
            raise ValueError(f"unexpected event {value[:200]}")
        if "error" in event:
            raise ValueError(f"the server reports {json.dumps(event['error'])[:200]}")
        yield event


def _delta(event: Mapping[str, Any]) -> tuple[str, bool]:
    """The text that a streamed event adds, and whether it is the last one."""
    try:
        choice = (event.get("choices") or [{}])[0]
        text = (choice.get("delta") or {}).get("content") or ""
        return str(text), choice.get("finish_reason") is not None
    except (LookupError, AttributeError) as error:
        raise ValueError(f"unexpected event {json.dumps(event)[:200]}") from error
