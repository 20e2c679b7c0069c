"""How `memwise run` shows its work: progress on stderr, the answer on stdout, then the bytes."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from memwise import cli_print, models
from memwise.budget import readable
from memwise.context.run import answer
from memwise.errors import InvalidKnob


def run(
    model: str, file: Path, budget: str, question: str, policy: str | None, n_tokens: int,
    chunk: int, codec: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Read the file or stdin, write on, and say what the cache held."""
    text = _text(file)
    if model == "gemma":
        cli_print.note(models.notice)
    with cli_print.working(f"loading {model}"):
        lm = models.local_model(None if model == "gemma" else model)
    with ExitStack() as bar:
        draw = bar.enter_context(cli_print.counting("reading"))

        def told(piece: str) -> None:
            bar.close()  # reading is over
            if not as_json:
                print(cli_print.clean(piece), end="", flush=True)

        found = answer(
            lm, text, budget, question=question, policy=policy, n_tokens=n_tokens, chunk=chunk,
            codec=codec, read=draw, told=told,
        )  # fmt: skip
    report = found.report
    if as_json:
        made = {"text": found.text, "tokens": found.n_tokens, "policy": repr(found.policy)}
        return cli_print.as_json({**made, **report.as_dict()})
    print(flush=True)
    held = sum(report.held_bytes.values())
    cli_print.note(
        f"{found.n_tokens} tokens read; the cache holds {readable(held)} of its "
        f"{readable(report.budget)}, and without a budget {readable(report.full_bytes)}\n{report}"
    )


def _text(file: Path) -> str:
    if str(file) != "-" and not file.is_file():
        raise InvalidKnob(f"{str(file)!r} is no file; give a text, or - for standard input")
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidKnob(f"{file} is no text in UTF-8: {error}") from error
