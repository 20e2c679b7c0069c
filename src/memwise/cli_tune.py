"""How `memwise tune` shows a run: the plan, a line or a bar of steps, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memwise import cli_print, models
from memwise.budget import readable
from memwise.train.tune import Settings, tune

_LINES = 10  # of progress, where stderr is no terminal


def run(
    model: str, data: Path, budget: str | None, out: Path, settings: Settings, save_every: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Tune, tell on stderr how far it is, and print the report."""
    if model == "gemma":
        cli_print.note(models.notice)
    cli_print.note(f"loading {model}, and looking for what fits ...")
    console = Console(stderr=True)
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=settings.n_steps, loss=float("nan"), visible=False)

        def told(what: str, numbers: Mapping[str, Any]) -> None:
            if as_json:
                print(json.dumps({"event": what, **numbers}), flush=True)
            elif what == "plan":
                cli_print.note(_plan(numbers))
                bar.update(task, completed=numbers["step"], visible=True)
            elif what == "step":
                bar.update(task, completed=numbers["step"], loss=numbers["loss"])
                step, of = numbers["step"], numbers["of"]
                if not console.is_terminal and step * _LINES // of > (step - 1) * _LINES // of:
                    cli_print.note(f"step {step} of {of}, loss {numbers['loss']:.3f}")

        report = tune(
            model, data, budget, out=out, settings=settings, save_every=save_every, told=told
        )
    if as_json:
        print(json.dumps({"event": "report", **report}))
    else:
        print(_ended(report, out))


def _plan(numbers: Mapping[str, Any]) -> str:
    step = f", going on after step {numbers['step']}" if numbers["step"] else ""
    return f"{numbers['way']}{step}\n{_table(numbers['bytes'])}"


def _table(found: Mapping[str, int]) -> str:
    width = max(map(len, found))
    return "\n".join(f"  {kind:<{width}}  {readable(n):>10}" for kind, n in found.items())


def _ended(report: Mapping[str, Any], out: Path) -> str:
    before, after = report["held-out loss before"], report["held-out loss after"]
    return (
        f"{report['way']}: {readable(report['bytes']['all'])} at the highest moment\n"
        f"held-out loss {before:.4f} before, {after:.4f} after, in nats per token\n"
        f"written to {out / report['written']}"
    )
