"""A decoder of 1,000 layers, which are 2,000 sublayers, trains for 100 steps on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate

WIDTH, STEPS = 16, 100
XAVIER = {"std": WIDTH**-0.5}
RESIDUALS = {
    "deepnorm": {"kind": "deepnorm", **XAVIER},
    "pre": {"kind": "pre", "scale_outputs": False, **XAVIER},
    "post": {"kind": "post", **XAVIER},
}


def losses(residual: dict[str, Any]) -> list[float]:
    """Of every step, on rows that count upwards from a drawn token."""
    fields = {
        "width": WIDTH,
        "depth": 1000,
        "vocabulary": 16,
        "attention": {"heads": 2},
        "ffn": {"kind": "mlp", "hidden": 32},
        "position": "none",
        "norm": "layernorm",
        "residual": residual,
        "head": {"kind": "lm", "tied": False},
    }
    model: Any = initialise(validate(TransformerSpec, fields).build(), 0)
    assert len(model.decoder.layers) == 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        ids = (torch.randint(16, (4, 1), generator=generator) + torch.arange(9)) % 16
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_thousand_layers_train_for_a_hundred_steps(kind: str, record_property: Any) -> None:
    """What DeepNorm must do. Pre-LN and Post-LN run beside it; what they do is printed and not required."""
    found = losses(RESIDUALS[kind])
    first, last = (sum(part) / 10 for part in (found[:10], found[-10:]))
    print(f"{kind}: loss {first:.3f} in the first ten steps, {last:.3f} in the last ten")
    record_property("loss", last)
    if kind != "deepnorm":
        return
    assert all(map(math.isfinite, found))
    assert last < 0.5 * first, "the next token is a function of the last one, and is not learned"
