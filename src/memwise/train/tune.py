"""Fine-tune a causal language model on a file of text, inside a byte budget.

Everything about a run follows from its settings and the number of a step: the batch, the learning
rate, the random numbers. A checkpoint holds what was trained, the optimizer's states and that
number, in one file that is replaced as a whole; a run that was killed goes on from the last one and
ends with the same bits.

The budget holds tensors: weights, adapters, gradients, states, activations and what operations
need while they run. Python and its libraries come on top.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch

from memwise import __version__
from memwise.budget import Budget, BudgetLike, readable
from memwise.errors import BudgetExceeded, InvalidKnob, StoreLocked
from memwise.models import LocalModel, local_model, quiet
from memwise.train.engine.deltas import LowRank
from memwise.train.engine.peft import save_peft
from memwise.train.tune_data import Windows, start_of, tokenized
from memwise.train.tune_plan import FULL, Setup, Way, first_that_fits, judged, rate, set_up, ways

Told: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""Called with "plan", "step" or "checkpoint", and the numbers of it."""

_CHECKPOINT, _REPORT = "checkpoint.pt", "report.json"
_CLIP = 1.0  # norm of all gradients at most, where they are there at once
_WARMUP_RATIO = 0.05


@dataclass(frozen=True)
class Settings:
    """What a run is; a checkpoint of other settings is not gone on from.

    Attributes:
        n_steps: of the optimizer.
        context: tokens a window.
        batch: windows a forward pass.
        accumulate: forward passes a step.
        lr: highest learning rate; None = by the way of training.
        seed: of order, adapters and dropout.
        adapter: a method of adapters, or "full"; None = the first that fits.
        optimizer: a method of optimizers; None = the first that fits.
        field: of JSON lines.

    Raises:
        InvalidKnob: a number is out of range.
    """

    n_steps: int = 100
    context: int = 256
    batch: int = 1
    accumulate: int = 1
    lr: float | None = None
    seed: int = 0
    adapter: str | None = None
    optimizer: str | None = None
    field: str = "text"

    def __post_init__(self) -> None:
        for name in ("n_steps", "context", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise InvalidKnob(f"{name}={getattr(self, name)}: give 1 or more")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InvalidKnob(f"lr={self.lr}: give a number above 0")


def tune(
    model: str | Path, data: str | Path, budget: BudgetLike | None = None, *, out: str | Path,
    settings: Settings | None = None, save_every: int = 20, told: Told | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune a model and write what was trained into a folder.

    Args:
        model: "gemma" for Gemma-3-270M, or a Hugging Face folder with a causal model.
        data: a text file, or JSON lines.
        budget: bytes that no moment may exceed; None measures only.
        out: folder of the results; a run that was cut off there goes on.
        settings: of the run.
        save_every: steps between two checkpoints.
        told: hears of the plan, of each step and of each checkpoint.

    Returns:
        What stands in `report.json`: the way of training, bytes by kind, losses before and after.

    Raises:
        BudgetExceeded: no way of training fits; the message holds what each would take.
        InvalidKnob: the data cannot be learned from, or the folder holds another run.
        StoreLocked: another process trains into the folder.
    """
    own = settings or Settings()
    limit = None if budget is None else Budget(budget)
    hear = told or (lambda what, numbers: None)
    candidates = ways(own.adapter, own.optimizer)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InvalidKnob(f"{folder} is a file; give a folder for the results")
    _loads(model, limit)
    loaded = local_model(None if str(model) == "gemma" else model)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        path = tokenized(Path(data), loaded.tokenizer, folder, own.field)
        windows = Windows.of(path, own.context, own.seed, start_of(loaded.tokenizer))
        run = _Run(loaded, windows, own, limit, folder, _identity(loaded, path, own, limit))
        finished = run.finished()
        return finished if finished is not None else run.go(candidates, save_every, hear)


def _loads(model: str | Path, budget: Budget | None) -> None:
    """Refuse a model whose weights alone are over the budget, before they are read."""
    files = list(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    size = sum(file.stat().st_size for file in files)
    if budget is not None and size > budget:
        raise BudgetExceeded(
            f"loading {model} takes {readable(size)}, and the budget is {budget}; raise --budget"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go when its holder dies."""
    with closing(sqlite3.connect(folder / ".lock", timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as problem:
            raise StoreLocked(
                f"another process trains into {folder}; wait for it, or choose another --out"
            ) from problem
        yield


def _identity(
    loaded: LocalModel, tokens: Path, settings: Settings, budget: Budget | None
) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    weights = sha256(repr(sorted(loaded.model.config.to_dict().items(), key=str)).encode())
    for name, param in loaded.model.named_parameters():
        weights.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
        weights.update(param.detach().reshape(-1)[:64].float().numpy().tobytes())
    return {
        "model": weights.hexdigest()[:16],
        "tokens": tokens.stem,
        "budget": None if budget is None else int(budget),
        **asdict(settings),
    }


class _Run:
    """One run, from where its checkpoint stands."""

    def __init__(
        self, loaded: LocalModel, windows: Windows, settings: Settings, budget: Budget | None,
        folder: Path, identity: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.windows, self.settings, self.budget = windows, settings, budget
        self.folder, self.identity = folder, dict(identity)

    def finished(self) -> dict[str, Any] | None:
        """The report of a run that has ended."""
        path = self.folder / _REPORT
        if not path.exists():
            return None
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        self._require_same(report["settings"])
        return report

    def go(self, candidates: list[Way], save_every: int, told: Told) -> dict[str, Any]:
        """Train to the end."""
        if save_every < 1:
            raise InvalidKnob(f"save_every={save_every}: give 1 or more")
        own, saved = self.settings, self._saved()
        if saved is None:
            first = self.windows.batch(0, own.batch)
            made = first_that_fits(self.model, candidates, first, self.budget, own.lr, own.seed)
            step, before, losses = 0, self._judged(made), []
        else:
            made = self._resumed(saved)
            step, before, losses = saved["step"], saved["before"], saved["losses"]
        told("plan", {"way": str(made.way), "bytes": _bytes(made), "step": step, "loss": before})
        made.loss.train()
        while step < own.n_steps:
            losses.append(self._step(made, step))
            step += 1
            told("step", {"step": step, "of": own.n_steps, "loss": losses[-1]})
            if step % save_every == 0 or step == own.n_steps:
                self._save(made, step, before, losses)
                told("checkpoint", {"step": step})
        return self._finish(made, before, losses)

    def _step(self, made: Setup, step: int) -> float:
        own = self.settings
        highest = rate(made.way) if own.lr is None else own.lr
        warmup = max(1, round(_WARMUP_RATIO * own.n_steps))
        now = highest * min((step + 1) / warmup, (own.n_steps - step) / (own.n_steps - warmup + 1))
        for group in made.optimizer.param_groups:
            group["lr"] = now
        batches = [
            self.windows.batch(step * own.accumulate + nth, own.batch)
            for nth in range(own.accumulate)
        ]
        with torch.random.fork_rng():
            # Dropout has no other source of random numbers than the one of the process.
            torch.manual_seed(own.seed * 1_000_003 + step)  # noqa: TID251
            loss = made.backward(batches)
        if not math.isfinite(loss):
            raise InvalidKnob(f"the loss of step {step + 1} is {loss}; choose a smaller --lr")
        if not made.way.in_backward:
            torch.nn.utils.clip_grad_norm_(made.trained, _CLIP)
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        return loss

    def _judged(self, made: Setup) -> float:
        held_out = [self.windows.window(n)[None] for n in self.windows.held_out]
        return judged(made.loss, held_out)

    # --- checkpoints

    def _saved(self) -> dict[str, Any] | None:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return None
        saved: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
        self._require_same(saved["settings"])
        return saved

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        wanted = self.identity
        for name in sorted(wanted):
            if settings.get(name) != wanted[name]:
                raise InvalidKnob(
                    f"{self.folder} holds a run with {name}={settings.get(name)!r}, and this one "
                    f"has {wanted[name]!r}; give the same, or another --out"
                )

    def _save(self, made: Setup, step: int, before: float, losses: list[float]) -> None:
        part = self.folder / f"{_CHECKPOINT}.part"
        with part.open("wb") as file:
            torch.save(
                {
                    "settings": self.identity,
                    "way": [made.way.adapter, made.way.optimizer, made.way.in_backward],
                    "step": step,
                    "before": before,
                    "losses": losses,
                    "trained": [param.detach() for param in made.trained],
                    "optimizer": made.optimizer.state_dict(),
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / _CHECKPOINT)

    def _resumed(self, saved: Mapping[str, Any]) -> Setup:
        way, own = Way(*saved["way"]), self.settings
        lr = rate(way) if own.lr is None else own.lr
        first = self.windows.batch(0, own.batch)
        made = set_up(self.model, way, first, self.budget, lr, own.seed)
        with torch.no_grad():
            for param, value in zip(made.trained, saved["trained"], strict=True):
                param.copy_(value)
        made.optimizer.load_state_dict(saved["optimizer"])
        return made

    # --- the end

    def _finish(self, made: Setup, before: float, losses: list[float]) -> dict[str, Any]:
        after = self._judged(made)
        written = self._write(made)
        report = {
            "memwise": __version__,
            "settings": self.identity,
            "way": str(made.way),
            "bytes": _bytes(made),
            "held-out loss before": before,
            "held-out loss after": after,
            "training losses": losses,
            "written": written,
        }
        path = self.folder / _REPORT
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        part.replace(path)
        return report

    def _write(self, made: Setup) -> str:
        """Write what was trained: a model, PEFT's format for LoRA, or the deltas."""
        if made.way.adapter == FULL:
            where = self.folder / "model"
            with quiet(import_module("transformers")):
                self.model.save_pretrained(where)
            self.tokenizer.save_pretrained(where)
            return where.name
        handle = made.handle
        assert handle is not None
        deltas: list[Any] = [d for site in handle.sites.values() for d in site.deltas.values()]
        if all(type(delta) is LowRank for delta in deltas):
            where = self.folder / "adapter"
            save_peft(handle, where)
        else:
            where = self.folder / "adapter.pt"
            torch.save(handle.state_dict(), where)
        return where.name


def _bytes(made: Setup) -> dict[str, int]:
    """What lay where, as measured: kind -> bytes, and all at the highest moment."""
    lines = {kind: now for _, kind, now, _ in made.ledger if now}
    return {**lines, "all": made.ledger.total()}
