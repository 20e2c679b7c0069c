"""A small model trained in fewer bytes: states in 4 bits, blocks recomputed, the peak measured."""

import torch
from torch import nn

from memwise.train import AdamW4bit, Recompute, compress_activations
from memwise.train.measure import bytes_of, peak

draws = torch.Generator().manual_seed(0)
x, y = (torch.randn(64, 256, generator=draws) for _ in range(2))


def net() -> nn.Sequential:
    """Eight blocks."""
    block = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    return nn.Sequential(*nn.TransformerEncoder(block, 8, enable_nested_tensor=False).layers)


for name, make, compressed in (
    ("AdamW", torch.optim.AdamW, False),
    ("4-bit AdamW, blocks recomputed", AdamW4bit(), True),
):
    model = net()
    optimizer = make(model.parameters(), lr=1e-3)

    def step(model: nn.Module = model, compressed: bool = compressed) -> None:
        """Forward and backward."""
        if compressed:
            with compress_activations(model, Recompute()):
                nn.functional.mse_loss(model(x[None])[0], y).backward()
        else:
            nn.functional.mse_loss(model(x[None])[0], y).backward()

    step()
    optimizer.step()
    print(f"{name}: states {bytes_of(optimizer.state)} bytes, peak {peak(step).peak_bytes} bytes")
