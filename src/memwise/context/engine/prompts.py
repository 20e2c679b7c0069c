"""Embeddings in the place of tokens, trained to guess what a frozen model will say later.

Text is run once. Chains of prompts are then put behind many of its places at once, each seeing the
text up to its place and itself, and their outputs are drawn to what the model says further on. Only
the prompts are trained: what the model says does not depend on them.

Shapes: T tokens of a text, J places in it, m prompts of a chain, E embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from memwise.context.engine.plan import SLIDING
from memwise.context.engine.relay import RelayHost
from memwise.errors import InvalidKnob

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Read:
    """A text that the frozen model has read.

    Attributes:
        tokens: (T,).
        hidden: (T, E), from which the model tells the next token.
        pairs: keys and values (1, H, T, D) of each layer.
    """

    tokens: Tensor
    hidden: Tensor
    pairs: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def read(host: RelayHost, tokens: Sequence[int]) -> Read:
    """Let the model read a text."""
    ids = torch.tensor([list(tokens)], device=host.device)
    cache = DynamicCache()  # without the model's settings, so that sliding layers keep all
    out = host.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    pairs = [(layer.keys, layer.values) for layer in layers]
    return Read(ids[0], out.last_hidden_state[0], pairs)


def outputs(host: RelayHost, text: Read, places: Tensor, prompts: Tensor) -> Tensor:
    """Hidden states (J, m, E) of chains of prompts behind tokens of a text.

    Args:
        host: of the model.
        text: what it has read.
        places: (J,), the last token that each chain sees.
        prompts: (m, E).
    """
    n_places, m, n_tokens = len(places), len(prompts), len(text.tokens)
    device = places.device
    at = (places[:, None] + 1 + torch.arange(m, device=device)).flatten()
    chain = torch.arange(n_places, device=device).repeat_interleave(m)
    before = torch.arange(n_tokens, device=device) <= places.repeat_interleave(m)[:, None]
    within = (chain[:, None] == chain) & (at[:, None] >= at)
    seen = torch.cat([before, within], 1)
    masks = {"full_attention": seen}
    if host.shape.window:
        key_at = torch.cat([torch.arange(n_tokens, device=device), at])
        masks[SLIDING] = seen & (at[:, None] - key_at < host.shape.window)
    given: dict[str, Tensor] = {
        kind: torch.zeros_like(mask, dtype=prompts.dtype).masked_fill(
            ~mask, torch.finfo(prompts.dtype).min
        )[None, None]
        for kind, mask in masks.items()
    }
    cache = DynamicCache()
    for i, (keys, values) in enumerate(text.pairs):
        cache.update(keys, values, i)
    out: Any = host.decoder(
        inputs_embeds=prompts.repeat(n_places, 1)[None], position_ids=at[None],
        attention_mask=given if len(given) > 1 else given["full_attention"],
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    hidden: Tensor = out.last_hidden_state[0]
    return hidden.view(n_places, m, -1)


def untrained(host: RelayHost, n_prompts: int, seed: int) -> Tensor:
    """Prompts to begin with (m, E): the mean of some embeddings of tokens each."""
    draws = torch.Generator().manual_seed(seed)
    embed: Any = host.model.get_input_embeddings()
    ids = torch.randint(len(embed.weight), (n_prompts, 64), generator=draws)
    with torch.no_grad():
        mean: Tensor = embed(ids.to(host.device)).mean(1)
    return mean


def trained(
    host: RelayHost, texts: Sequence[Sequence[int]], start: Tensor, *, n_steps: int, n_places: int,
    lr: float, decay: float, seed: int, progress: Callable[[str, float], None] | None = None,
) -> Tensor:  # fmt: skip
    """Prompts (m, E) whose outputs are drawn to what the model says 1 to m tokens later.

    The divergence is taken over the tokens that occur in the texts, as a whole vocabulary costs
    more than all layers.

    Args:
        host: of the model, which stays as it is.
        texts: tokens of each, longer than there are prompts.
        start: (m, E).
        n_steps: steps, each on one text.
        n_places: places in the text at which prompts are put in a step.
        lr: of Adam, beside the size of a number of an embedding; it falls to 0.
        decay: weight of each prompt beside the one before it.
        seed: of texts and places.
        progress: told what is done, and its share.
    """
    if min(map(len, texts), default=0) <= len(start) + 1:
        raise InvalidKnob(f"texts need more than {len(start) + 1} tokens, and there has to be one")
    draws = torch.Generator().manual_seed(seed)
    reads: dict[int, Read] = {}
    head: Any = host.model.get_output_embeddings()
    known = torch.tensor(sorted({token for text in texts for token in text}), device=host.device)
    rows = head.weight.detach()[known]
    prompts = start.clone().requires_grad_()
    weights = decay ** torch.arange(len(start), dtype=start.dtype, device=start.device)
    size = float(host.model.get_input_embeddings()(known[:256]).detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([prompts], lr * size, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, 1.25 * (1 - i / n_steps))
    )
    for step in range(n_steps):
        which = int(torch.randint(len(texts), (), generator=draws))
        if which not in reads:
            reads[which] = read(host, texts[which])
        text = reads[which]
        last = len(text.tokens) - 1 - len(start)
        places = torch.randperm(last, generator=draws)[:n_places].to(host.device)
        hidden = outputs(host, text, places, prompts)
        later = places[:, None] + 1 + torch.arange(len(start), device=host.device)
        with torch.no_grad():
            wanted = F.log_softmax(text.hidden[later] @ rows.T, -1)
        found = F.log_softmax(hidden @ rows.T, -1)
        apart = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean(0)
        loss = (apart * weights).mean()
        (grad,) = torch.autograd.grad(loss, prompts)
        prompts.grad = grad
        optimizer.step()
        schedule.step()
        if progress:
            progress(f"training prompts, loss {loss.item():.3f}", (step + 1) / n_steps)
    return prompts.detach()


@torch.no_grad()
def ranks(host: RelayHost, text: Read, places: Tensor, prompts: Tensor) -> Tensor:
    """Rank (J, m), from 0, of what the model says later among the guesses of each prompt."""
    hidden = outputs(host, text, places, prompts)
    later = places[:, None] + 1 + torch.arange(len(prompts), device=host.device)
    found = torch.empty(later.shape, dtype=torch.long, device=host.device)
    for i in range(len(places)):
        wanted = host.head(text.hidden[later[i]]).argmax(-1, keepdim=True)
        guesses = host.head(hidden[i])
        found[i] = (guesses > guesses.gather(1, wanted)).sum(-1)
    return found


@torch.no_grad()
def hits(
    host: RelayHost, reads: Sequence[Read], prompts: Tensor, n_ranks: int, n_places: int
) -> Tensor:
    """How often each rank of each prompt is right (m, k), where the text is the model's choice.

    A guess is only asked for where the tokens before it are those that the model would have chosen,
    so places at which the text is another one do not count.

    Args:
        host: of the model.
        reads: texts.
        prompts: (m, E).
        n_ranks: k.
        n_places: places of each text.
    """
    right = torch.zeros(len(prompts), n_ranks)
    n = torch.zeros(len(prompts), 1)
    for text in reads:
        last = len(text.tokens) - 1 - len(prompts)
        places = torch.linspace(last // 4, last - 1, n_places, device=host.device).long()
        found = ranks(host, text, places, prompts)
        asked = torch.ones_like(places, dtype=torch.bool)
        for i in range(len(prompts)):
            chosen = host.head(text.hidden[places + i]).argmax(-1)
            asked &= chosen == text.tokens[places + i + 1]
            n[i] += int(asked.sum())
            for rank in range(n_ranks):
                right[i, rank] += int((found[asked, i] == rank).sum())
    return right / n.clamp_min(1)
