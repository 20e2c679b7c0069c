"""Masked clips of moving digits: bytes, and what an encoder still learns from a quarter of a clip.

Clips show a digit that drifts in one direction and then in another; a caption names the digit and
both directions in their order. A clip is matched with all captions there are.

- primary: bytes kept by the forward pass with masking, as a part of those without
- retrieval at equal frames, and the order of the two events beside short clips of equal bytes
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memwise.bench.checks.sliced_video import digits
from memwise.bench.engine import Row, paired_interval
from memwise.train.engine.reversible import seeded
from memwise.train.measure import peak
from memwise.train.policies.video_first_masking import VideoFirstMasking

FRAMES, SHORT, CANVAS, PATCH, WIDTH, N_LAYERS = 16, 4, 24, 8, 64, 2
N_STEPS, N_ADAPTING, BATCH, N_JUDGED = 700, 70, 32, 480
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
CAPTIONS = torch.tensor([(d, *ab) for d, ab in product(range(10), permutations(range(4), 2))])


def run(method: VideoFirstMasking, data: Path | None, seed: int) -> list[Row]:
    """Rows of bytes, of retrieval and of order."""
    return [_bytes(method, seed), *_learned(method, data, seed)]


class ClipEncoder(nn.Module):
    """A joint space-time transformer over tubelets of two frames.

    Args:
        n_frames: of the longest clip.
        seed: of the initial weights.
    """

    def __init__(self, n_frames: int, seed: int) -> None:
        super().__init__()
        n_tokens = n_frames // 2 * (CANVAS // PATCH) ** 2
        self.patch = nn.Linear(2 * PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.zeros(n_tokens, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(N_LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        seeded(self, seed)

    def tubelets(self, video: Tensor) -> Tensor:  # (B, F, S, S) -> (B, T, P)
        """The pixels of each tubelet."""
        x = video.unfold(1, 2, 2).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        return x.flatten(1, 3).flatten(2)

    def encode(self, tubelets: Tensor, places: Tensor) -> Tensor:  # (B, T, P), (B, T) -> (B, D)
        """The mean of all tokens after the last layer."""
        x = self.patch(tubelets) + self.place[places]
        for layer in self.layers:
            x = layer(x)
        pooled: Tensor = self.head(self.norm(x).mean(1))
        return F.normalize(pooled, dim=-1)

    def forward(self, video: Tensor) -> Tensor:
        """The embedding of each clip."""
        x = self.tubelets(video)
        return self.encode(x, torch.arange(x.shape[1]).expand(x.shape[:2]))


class _Zeroed(nn.Module):
    """Masking that only sets tokens to zero: a control that must not save a byte."""

    def __init__(self, encoder: ClipEncoder, mask_ratio: float) -> None:
        super().__init__()
        self.encoder, self.mask_ratio = encoder, mask_ratio

    def forward(self, video: Tensor) -> Tensor:
        x = self.encoder.tubelets(video)
        draws = torch.Generator().manual_seed(0)
        hidden = torch.rand(x.shape[:2], generator=draws) < self.mask_ratio
        places = torch.arange(x.shape[1]).expand(x.shape[:2])
        return self.encoder.encode(x.masked_fill(hidden[..., None], 0), places)


def _bytes(method: VideoFirstMasking, seed: int) -> Row:
    """Items: frames x clips in a batch."""
    shares, zeroed, short, sizes = [], [], [], []
    same = True
    for n_frames, batch in ((16, 16), (32, 8), (64, 4), (64, 8), (128, 4)):
        encoder = ClipEncoder(n_frames, seed).train()
        masked = method(encoder, seed)
        draws = torch.Generator().manual_seed(seed)
        x = torch.rand((batch, n_frames, CANVAS, CANVAS), generator=draws)
        whole, mine = _kept(encoder, x), _kept(masked, x)
        shares.append(mine / whole)
        zeroed.append(_kept(_Zeroed(encoder, method.mask_ratio), x) / whole)
        short.append(_kept(encoder, x[:, : n_frames // 4]) / whole)
        same &= torch.equal(masked.eval()(x), encoder.eval()(x))
        sizes.append((mine, whole))
    values = np.array(shares)
    return Row(
        "bytes kept, masked / all tokens", float(values.mean()), 1.0,
        paired_interval(values, np.ones_like(values), seed), len(values),
        {
            "tokens set to zero": float(np.mean(zeroed)),
            "a quarter of the frames": float(np.mean(short)),
        },
        {
            "at most 0.3": bool((values <= 0.3).all()),
            "setting tokens to zero saves nothing": min(zeroed) >= 0.99,
            "all tokens are used in eval": same,
        },
        bytes=sizes[-1][0], baseline_bytes=sizes[-1][1], data="clips of 16 to 128 frames",
    )  # fmt: skip


def _kept(encoder: nn.Module, x: Tensor) -> int:
    encoder(x)
    return peak(partial(encoder, x)).kept_bytes


# --- what is learned


@dataclass(frozen=True)
class _Clips:
    """Clips drawn from images.

    Attributes:
        images: (n, 14, 14).
        labels: (n,).
    """

    images: Tensor
    labels: Tensor

    def draw(self, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips (n, F, S, S) and the number of the caption of each."""
        image = torch.randint(len(self.images), (n,), generator=draws)
        pair = torch.randint(12, (n,), generator=draws)
        caption = self.labels[image] * 12 + pair
        first, second = MOVES[CAPTIONS[caption, 1]], MOVES[CAPTIONS[caption, 2]]
        half, room = FRAMES // 2, CANVAS - 14
        t = torch.arange(FRAMES)[None, :, None]
        path = 0.5 * (first[:, None] * t.clamp(max=half) + second[:, None] * (t - half).clamp(0))
        low, high = -path.amin(1), room - path.amax(1)
        start = low + (high - low) * torch.rand((n, 2), generator=draws)
        place = (start[:, None] + path).round().long().clamp(0, room)  # (n, F, 2)
        video = torch.zeros(n, FRAMES, CANVAS, CANVAS)
        span = torch.arange(14)
        rows, columns = place[..., :1] + span, place[..., 1:] + span  # (n, F, 14)
        clip, frame = torch.arange(n)[:, None, None, None], torch.arange(FRAMES)[:, None, None]
        shown = self.images[image][:, None].expand(n, FRAMES, 14, 14)
        video[clip, frame, rows[..., None], columns[:, :, None]] = shown
        return video, caption


class _Captions(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(n, WIDTH) for n in (10, 4, 4))
        self.head = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        seeded(self, seed)

    def forward(self) -> Tensor:  # (captions, D)
        said = [word(CAPTIONS[:, i]) for i, word in enumerate(self.words)]
        return F.normalize(self.head(torch.cat(said, -1)), dim=-1)


def _window(video: Tensor, n_frames: int, draws: torch.Generator) -> Tensor:
    """As many frames in a row of each clip, from a random start."""
    start = torch.randint(FRAMES - n_frames + 1, (len(video), 1), generator=draws)
    return video[torch.arange(len(video))[:, None], start + torch.arange(n_frames)]


@dataclass(frozen=True)
class _Result:
    """Of each judged clip: whether its caption comes first, and before the one of other order."""

    found: NDArray[np.float64]
    order: NDArray[np.float64]
    seconds: float


def _fit(
    method: VideoFirstMasking | None, clips: _Clips, held_out: _Clips, n_frames: int, seed: int
) -> _Result:
    """Train a pair of encoders; masked until the last steps, which see all tokens."""
    encoder, texts = ClipEncoder(n_frames, seed), _Captions(seed)
    model = encoder if method is None else method(encoder, seed)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *texts.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, N_STEPS)
    criterion = nn.CrossEntropyLoss()
    began = time.process_time()
    for step in range(N_STEPS):
        video, caption = clips.draw(BATCH, draws)
        seen = encoder if step >= N_STEPS - N_ADAPTING else model
        scores = 15 * seen(_window(video, n_frames, draws)) @ texts().T
        optimizer.zero_grad()
        criterion(scores, caption).backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    draws = torch.Generator().manual_seed(seed + 7)
    video, caption = held_out.draw(N_JUDGED, draws)
    with torch.no_grad():
        scores = model.eval()(_window(video, n_frames, draws)) @ texts().T
    swapped = [CAPTIONS.tolist().index([d, b, a]) for d, a, b in CAPTIONS[caption].tolist()]
    right = scores.gather(1, caption[:, None])[:, 0]
    wrong = scores.gather(1, torch.tensor(swapped)[:, None])[:, 0]
    found = (scores.argmax(1) == caption).double().numpy()
    return _Result(100 * found, 100 * (right > wrong).double().numpy(), seconds)


def _learned(method: VideoFirstMasking, data: Path | None, seed: int) -> list[Row]:
    """Items: clips of digits that were not trained on, the same for all."""
    images, labels = digits(data)
    small = F.avg_pool2d(images[:, None], 2)[:, 0]
    train, held_out = _Clips(small[:6000], labels[:6000]), _Clips(small[6000:], labels[6000:])
    masked = _fit(method, train, held_out, FRAMES, seed)
    whole = _fit(None, train, held_out, FRAMES, seed)
    short = _fit(None, train, held_out, SHORT, seed)
    equal = paired_interval(masked.found, whole.found, seed)
    longer = paired_interval(masked.order, short.order, seed)
    return [
        Row(
            "caption found at equal frames, %", float(masked.found.mean()),
            float(whole.found.mean()), equal, N_JUDGED,
            {"short clips": float(short.found.mean()), "chance": 100 / len(CAPTIONS),
             "time / all tokens": masked.seconds / whole.seconds},
            {"within 3 points of all tokens": equal[0] > -3},
            primary=False, seconds=masked.seconds, data="moving digits",
        ),
        Row(
            "order of events, % (beside short clips)", float(masked.order.mean()),
            float(short.order.mean()), longer, N_JUDGED,
            {"all tokens of the long clips": float(whole.order.mean()), "chance": 50.0},
            {"4 times the frames of equal bytes tell the order better": longer[0] > 0},
            primary=False, data="moving digits",
        ),
    ]  # fmt: skip
