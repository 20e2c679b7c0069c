"""A stream that is read on both sides: queries wait for keys that come later."""

from __future__ import annotations

from dataclasses import dataclass

from memwise.catalogue import Card
from memwise.context.engine.waiting import WaitingAttention


@dataclass(frozen=True)
class AttendreLayer:
    """Keep the newest keys, and queries until `delay` later keys are there; both then go.

    Calling it builds a `torch.nn.Module` over streams: it takes tokens and gives those whose turn
    has come, `delay` tokens late, their own input added. With a memory and a delay of the whole
    length it is full bidirectional attention.

    Attributes:
        delay: tokens that come between a query and its turn; 0 = causal attention.
        memory: keys and values that are held, in tokens.
        n_heads: heads that share the width.

    Raises:
        InvalidKnob: a knob is too small, or the memory does not reach back to a query's own key.

    Note:
        Each query attends to all keys that are held, where the paper retrieves the best few, and
        the oldest key goes; the paper's other rules for that are `AttendreOften` and
        `AttendreRecent`. Positions are rotary, where the paper's T5 has learned biases.
    """

    card = Card(
        paper=120,
        claim="waiting queries approach full bidirectional attention in streams; TriviaQA, 2 LLMs",
        check="look_ahead",
        baseline="attendre_layer",
        better="higher",
        margin=0.2,
        requires=("torch",),
    )

    delay: int = 16
    memory: int = 64
    n_heads: int = 4

    def __post_init__(self) -> None:
        WaitingAttention.check(self.n_heads, self.memory, self.delay)

    def __call__(self, width: int) -> WaitingAttention:
        """A layer from (B, T, width) to as many tokens, late.

        Raises:
            InvalidKnob: the heads cannot share the width.
        """
        return WaitingAttention(width, self.n_heads, self.memory, self.delay)
