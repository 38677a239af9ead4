"""HySparse (Gao et al. 2026, arXiv 2602.03560): a full attention layer, then sparse layers that live on its keys.

    full, sparse, ..., sparse, full, sparse, ..., sparse, ..., full

A full layer is the model's own attention. It hands on its keys and values, and for every query the largest probability
in each block of keys; the sparse layers up to the next full one attend to the blocks where that is largest, and to a
window of their own (`oracle_sparse`). Only the full layers' caches grow with the length: 49 layers of which 5 are full
keep 49 / 5 = 9.8 times fewer keys and values than 49 full ones, and a window each.

The same stack without the sparse branches, a hybrid of full and sliding-window layers, is the plain stack with
``layers: [{at: [...], attention: {window: ...}}]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.attention.oracle_sparse import OracleSparseSpec
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.site import Gives
from torchstone.model.stack import LayerPlan, LayerSpec, StackSpec

__all__ = ["HysparseSpec"]


class HysparseSpec(StackSpec):
    """Full attention layers, each followed by sparse ones that read its cache where it found something."""

    paper: ClassVar[str] = "Gao et al. 2026, arXiv 2602.03560"

    sparse_per_full: int = Field(3, ge=1)
    """Sparse layers after each full one."""
    final_full: bool = True
    """Whether the last layer is full, wherever it falls."""
    block: int = Field(64, ge=1)
    """Keys in a block."""
    top_tokens: int = Field(1024, ge=1)
    """Keys of the full layer that a sparse one sees, a multiple of `block`."""
    window: int = Field(128, ge=1)
    """Tokens of the sparse layers' own window."""
    gate: Literal["element", "head"] = "element"
    """A gate for each channel of a branch, or one for each head."""
    selection: Literal["oracle", "random"] = "oracle"
    """Whose blocks: the full layer's most probable ones, or random ones, which is a control."""

    def full(self, depth: int) -> list[bool]:
        """Which of `depth` layers are full."""
        last = depth - 1 if self.final_full else None
        return [i % (1 + self.sparse_per_full) == 0 or i == last for i in range(depth)]

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        if not causal:
            raise TorchstoneError("stack hysparse: chooses blocks before a query and has no bidirectional form")
        if self.top_tokens % self.block:
            raise TorchstoneError(f"stack.top_tokens: {self.top_tokens} is no multiple of a block of {self.block} keys")
        full = self.full(len(layers))
        plans: list[LayerPlan] = []
        for i, layer in enumerate(layers):
            self._check(layer, i)
            if full[i]:
                giver, number = layer, i
                read = i + 1 < len(layers) and not full[i + 1]
                plans.append(LayerPlan(layer, Gives(keys_values=True, block_max=self.block) if read else Gives()))
            else:
                if _shape(layer, width) != _shape(giver, width):
                    raise TorchstoneError(
                        f"layer {i}: a sparse layer reads the keys of layer {number} and needs its attention.kv_heads, "
                        "its size of heads and its position"
                    )
                sparse = layer.model_copy(update={"attention": self._sparse(layer)})
                if why := sparse.illegal(width):
                    raise TorchstoneError(f"layer {i}: stack hysparse: {why}")
                plans.append(LayerPlan(sparse))
        return tuple(plans)

    def _check(self, layer: LayerSpec, number: int) -> None:
        attention = layer.attention
        if not attention.can_give >= {"keys_values", "block_max"} or not isinstance(attention, SoftmaxSpec):
            raise TorchstoneError(
                f"layer {number}: stack hysparse needs keys, values and maxima of blocks, which attention "
                f"{attention.kind} cannot give; softmax can"
            )
        if attention.window is not None:
            raise TorchstoneError(
                f"layer {number}: attention.window: full layers of stack hysparse have none, and that of sparse ones "
                f"is stack.window; leave {attention.window} out"
            )

    def _sparse(self, layer: LayerSpec) -> OracleSparseSpec:
        """The layer's attention as a sparse one: its heads, norms and scores, and this stack's blocks."""
        alike = {name: getattr(layer.attention, name) for name in SoftmaxSpec.model_fields if name != "window"}
        mine = ("block", "top_tokens", "window", "gate", "selection")
        return OracleSparseSpec(**alike, **{name: getattr(self, name) for name in mine})


def _shape(layer: LayerSpec, width: int) -> tuple[object, ...]:
    """What a layer's keys are like."""
    attention = layer.attention
    assert isinstance(attention, SoftmaxSpec)
    return attention.kv_heads or attention.heads, attention.head_size(width), layer.position
