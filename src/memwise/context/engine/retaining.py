"""Retaining heads: a small network a layer that foretells which tokens answers will attend to.

It looks at a token's own queries, keys and values. The model is frozen; only the heads are trained.
A head is two matrices. They travel as tensors by name, `<layer>.up`, `<layer>.up_bias`,
`<layer>.down`, `<layer>.down_bias`, in memory and in a safetensors file.

Shapes: B batch, H key-value heads, G query heads of each, q tokens, F = (G + 2) H D inputs of a
token, U hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memwise.context.engine.host import Host, bounded, bytes_for
from memwise.context.engine.plan import Shape
from memwise.context.engine.policy import CachePolicy
from memwise.context.engine.step import Step
from memwise.errors import InvalidKnob, StoreCorrupt

Tensor: TypeAlias = torch.Tensor
Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """A text that ends in an answer.

    Attributes:
        ids: its tokens.
        n_answer: the last of them, which are the answer.
    """

    ids: tuple[int, ...]
    n_answer: int


@dataclass(frozen=True)
class Seen:
    """What one layer made of a lesson.

    Attributes:
        inputs: (q, F), of each token.
        wanted: (q, H), the greatest logit that any query of the answer gives it.
    """

    inputs: Tensor
    wanted: Tensor


def untrained(shape: Shape, hidden: int, seed: int) -> Weights:
    """Heads as they are before training.

    Args:
        shape: of the model's cache.
        hidden: units of each head.
        seed: of the draws.
    """
    draws = torch.Generator().manual_seed(seed)
    n_inputs = (shape.n_query_heads + 2 * shape.n_heads) * shape.width

    def linear(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        bound = columns**-0.5
        weight, bias = torch.empty(rows, columns), torch.empty(rows)
        weight.uniform_(-bound, bound, generator=draws)
        return weight, bias.uniform_(-bound, bound, generator=draws)

    weights: Weights = {}
    for layer in shape.full_layers:
        weights[f"{layer}.up"], weights[f"{layer}.up_bias"] = linear(hidden, n_inputs)
        weights[f"{layer}.down"], weights[f"{layer}.down_bias"] = linear(shape.n_heads, hidden)
    return weights


def retained(weights: Mapping[str, Tensor], layer: int, inputs: Tensor) -> Tensor:
    """Scores (..., H) of tokens from their inputs (..., F), in float32."""
    up, up_bias, down, down_bias = (
        weights[f"{layer}.{name}"] for name in ("up", "up_bias", "down", "down_bias")
    )
    return F.linear(F.silu(F.linear(inputs.float(), up, up_bias)), down, down_bias)


def save_heads(weights: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Write heads to a safetensors file."""
    save_file(dict(weights), Path(path))


def load_heads(path: str | PathLike[str], shape: Shape) -> Weights:
    """Read heads that were trained for such a model.

    Raises:
        StoreCorrupt: the file holds no tensors.
        InvalidKnob: there is no file, or its heads are those of another model.
    """
    try:
        weights: Weights = load_file(Path(path))
    except FileNotFoundError as error:
        raise InvalidKnob(f"heads={str(path)!r}: no such file; make it with save_heads") from error
    except SafetensorError as error:
        raise StoreCorrupt(f"{path} holds no retaining heads: {error}") from error
    wanted = {name: tuple(t.shape) for name, t in untrained(shape, 1, 0).items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    hidden = len(weights.get(f"{shape.full_layers[0]}.up_bias", ()))
    for name, size in wanted.items():
        own = {"up": (hidden, size[-1]), "up_bias": (hidden,), "down": (size[0], hidden)}
        if found.get(name) != own.get(name.partition(".")[2], size):
            raise InvalidKnob(
                f"heads={str(path)!r} were made for another model: {name} is {found.get(name)} "
                "there; train heads for this one with train_heads"
            )
    return weights


@dataclass(frozen=True)
class _Teacher(CachePolicy):
    """Keep everything, and tell what each layer made of a lesson.

    Attributes:
        n_answer: last tokens, which are the answer.
        seen: by layer; filled as the text goes through the model.
    """

    needs_inputs = True

    n_answer: int = 1
    seen: dict[int, Seen] = field(default_factory=dict, compare=False)

    def observe(self, step: Step) -> None:
        """The inputs of all tokens, and the logits of the answer's queries on them."""
        # The query before a token reads what that token becomes.
        rows = slice(step.n_new - self.n_answer - 1, step.n_new - 1)
        wanted = step.logits(rows).float().amax((2, 3))[0].T  # (q, H)
        inputs = torch.cat(list(step.inputs()), 1)[0].float()
        n_text = rows.start
        self.seen[step.layer] = Seen(inputs[:n_text].clone(), wanted[:n_text].clone())


@torch.no_grad()
def study(model: Any, lesson: Lesson) -> dict[int, Seen]:
    """What each full-attention layer made of a lesson, its answer left out.

    Args:
        model: as for `bounded`.
        lesson: a text and its answer.

    Raises:
        InvalidKnob: an answer of no tokens, or nothing before it.
    """
    n = len(lesson.ids)
    if not 0 < lesson.n_answer < n - 1:
        raise InvalidKnob(
            f"n_answer={lesson.n_answer} of {n} tokens: an answer wants a text before it"
        )
    teacher = _Teacher(n_answer=lesson.n_answer)
    budget = bytes_for(model, teacher, n, chunk=n)
    with bounded(model, teacher, budget, chunk=n) as cache:
        ids = torch.tensor([lesson.ids], device=cache.host.device)
        model.get_decoder()(ids, past_key_values=cache)
    return teacher.seen


def train_heads(
    model: Any, lessons: Sequence[Lesson], *, n_steps: int = 3000, hidden: int = 1024,
    lr: float = 5e-4, warmup: int = 100, smoothing: float = 0.0025, seed: int = 0,
) -> Weights:  # fmt: skip
    """Train a retaining head for each full-attention layer of a frozen model.

    Each lesson goes through the model once, and the inputs of its tokens are held until the end; a
    step takes one lesson, in an order that is drawn.

    Args:
        model: as for `bounded`.
        lessons: texts with questions and answers.
        n_steps: of AdamW.
        hidden: units of each head.
        lr: at its highest.
        warmup: steps in which it rises; it falls to nothing by the last one.
        smoothing: weight of how much the scores of neighbours differ.
        seed: of the first weights and of the order.

    Returns:
        The heads, for `save_heads`.

    Raises:
        InvalidKnob: no lessons, or one that `study` refuses.
    """
    if not lessons:
        raise InvalidKnob("train_heads was given no lessons: heads learn from texts with answers")
    studied = [study(model, lesson) for lesson in lessons]
    host = Host(model)
    weights = {
        name: tensor.to(host.device).requires_grad_()
        for name, tensor in untrained(host.shape, hidden, seed).items()
    }
    optimizer = torch.optim.AdamW(weights.values(), lr, betas=(0.9, 0.95))
    for step, at in enumerate(_order(len(studied), n_steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / max(1, warmup), (n_steps - step) / n_steps)
        losses = (_loss(weights, layer, seen, smoothing) for layer, seen in studied[at].items())
        loss = sum(losses, torch.zeros((), device=host.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


def _loss(weights: Weights, layer: int, seen: Seen, smoothing: float) -> Tensor:
    score = retained(weights, layer, seen.inputs)  # (q, H)
    rough = (score[1:] - score[:-1]).square().mean()
    return F.smooth_l1_loss(score, seen.wanted) + smoothing * rough


def _order(n: int, n_steps: int, seed: int) -> Iterator[int]:
    """Lessons, each once before any comes again."""
    draws = torch.Generator().manual_seed(seed)
    for first in range(0, n_steps, n):
        yield from torch.randperm(n, generator=draws)[: n_steps - first].tolist()
