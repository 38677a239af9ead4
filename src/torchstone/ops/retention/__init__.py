"""Retention: sums over the past that decay, with one decay per head or one per head and token."""

from __future__ import annotations

from typing import Literal

import torch

from torchstone.ops import forced_reference
from torchstone.ops.retention.chunkwise import retention_chunkwise
from torchstone.ops.retention.reference import retention_reference

__all__ = ["Form", "retention", "retention_chunkwise", "retention_reference"]

Form = Literal["auto", "parallel", "chunkwise", "recurrent"]


def retention(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    log_decay_BHT: torch.Tensor,
    fresh_BT: torch.Tensor | None = None,
    state_BHKV: torch.Tensor | None = None,
    *,
    form: Form = "auto",
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Retention (B, H, T, V) and the sum after the last token; arguments as in `retention_reference`.

    Forms are equal. "auto" goes by shape: one token takes a step, up to `chunk` tokens one product, more take chunks.
    """
    T = q_BHTK.shape[2]
    if forced_reference() or form == "recurrent" or T <= 1:
        return retention_reference(q_BHTK, k_BHTK, v_BHTV, log_decay_BHT, fresh_BT, state_BHKV)
    size = T if form == "parallel" else chunk
    return retention_chunkwise(q_BHTK, k_BHTK, v_BHTV, log_decay_BHT, fresh_BT, state_BHKV, size)
