"""A small network beside a frozen one: it reads the hidden states, and alone is differentiated.

The backbone runs as always, but nothing in it needs a gradient, so autograd keeps nothing of it.
The side network runs over depth, not over time: one step a block, at each token for itself.

Shapes: B tokens (all leading axes), D width of the backbone, S width of the side network, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memwise.errors import InvalidKnob
from memwise.train.engine.adapted import blocks


class Recurrence(nn.Module):
    """h_i = GRU(joiner([phi_i, h_{i-1}]), h_{i-1}), and W_up h_L at the end; W_up starts at zero.

    Args:
        width: D.
        side: S.
        generator: of the initial weights, on the CPU.
        dtype: of the weights.
    """

    def __init__(
        self, width: int, side: int, generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.side = side
        # The joiner's matrix in two parts: its inputs side by side would be a copy to keep.
        self.see = nn.Linear(width, side, bias=False, dtype=dtype)
        self.join = nn.Linear(side, side, dtype=dtype)
        self.cell = nn.GRUCell(side, side, dtype=dtype)
        self.up = nn.Linear(side, width, bias=False, dtype=dtype)
        with torch.no_grad():
            for param in self.parameters():
                if param.ndim == 2:
                    nn.init.normal_(param, std=param.shape[1] ** -0.5, generator=generator)
                else:
                    param.zero_()
            self.up.weight.zero_()

    def forward(self, states: list[Tensor]) -> Tensor:
        """What is added to the last state (..., D), for all states phi_0 ... phi_L."""
        dtype = self.up.weight.dtype
        h = states[0].new_zeros((states[0].shape[:-1].numel(), self.side), dtype=dtype)  # (B, S)
        for state in states:
            flat = state.reshape(-1, state.shape[-1]).to(dtype)
            # States grow with depth; the joiner is shared, so it sees them at one size.
            seen = F.layer_norm(flat, flat.shape[-1:])
            h = self.cell(torch.tanh(self.see(seen) + self.join(h)), h)
        out: Tensor = self.up(h)
        return out.view(states[0].shape).to(states[0].dtype)


class SideNet:
    """A side network on the blocks of a frozen model; the model's own call uses it.

    Args:
        model: frozen until `remove`.
        net: gives what is added to the output of the last block.
    """

    def __init__(self, model: nn.Module, net: nn.Module) -> None:
        self.model, self.net = model, net
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        _, stack = blocks(model)
        self._states: list[Tensor] = []
        self.active = True
        self._hooks: list[RemovableHandle] = [
            stack[0].register_forward_pre_hook(self._start, with_kwargs=True)
        ]
        self._hooks += [block.register_forward_hook(self._note) for block in stack[:-1]]
        self._hooks.append(stack[-1].register_forward_hook(self._end))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the side network: all that is trained."""
        return self.net.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The side network alone; `torch.load(weights_only=True)` reads what is saved of it."""
        return {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a saved side network.

        Raises:
            InvalidKnob: it has other shapes.
        """
        own = {name: value.shape for name, value in self.net.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != own:
            raise InvalidKnob(f"this state does not fit a side network of {own}; check its width")
        self.net.load_state_dict(dict(state))

    def merge(self) -> bool:
        """False: a side network is no change of a weight."""
        return False

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for name, param in self.model.named_parameters():
            param.requires_grad_(self._flags[name])

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        self._states = [first.detach()]

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._states.append(_hidden(output).detach())

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        states, self._states = [*self._states, _hidden(output).detach()], []
        if not self.active:
            return output
        last = states[-1] + self.net(states)
        return (last, *output[1:]) if isinstance(output, tuple) else last


def _hidden(output: Any) -> Tensor:
    """Hidden states (..., D) of what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
