"""LazyFormer (Ying et al. 2021, arXiv 2102.12702): layers in blocks, and one attention distribution a block.

    first layer of a block:   A_j = softmax(Q_j K_j^T / sqrt(d_h) + bias + mask),    out = W_O concat_j(A_j (x W_V,j))
    every other layer of it:  out = W_O concat_j(A_j (x W_V,j)),    with the first layer's A_j

So the others have no queries, no keys and no position of their own (`given_probs`), which is 2 D^2 parameters a layer,
and with `reuse: probabilities` no work on scores. When decoding, a block keeps one set of keys and each layer's values.

The paper advises against dropout of probabilities: one that is dropped is dropped for the whole block. With
`attention.dropout` all layers of a block share what is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.attention.given_probs import GivenProbsSpec, Reuse
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.site import Gives
from torchstone.model.stack import LayerPlan, LayerSpec, StackSpec

__all__ = ["LazySpec"]


class LazySpec(StackSpec):
    """Blocks of layers that mix by the attention distribution of their first layer."""

    paper: ClassVar[str] = "Ying et al. 2021, arXiv 2102.12702"

    block_size: int = Field(2, ge=1)
    """Layers in a block; the last block has what is left. 1 is the plain stack."""
    block_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Layers in each block, in the place of `block_size`; together all of them."""
    reuse: Reuse = "probabilities"
    """What is reused. Probabilities spare projections and scores, and hold a matrix of queries by keys a head for each
    block, up to 4,096 tokens; queries_keys, and more tokens than that, spare projections alone and hold none."""

    def first(self, depth: int, causal: bool) -> list[int]:
        """For each layer, the number of the first of its block.

        Raises:
            TorchstoneError: `block_sizes` are not for `depth` layers.
        """
        sizes = self.block_sizes
        if sizes is None:
            return [i - i % self.block_size for i in range(depth)]
        if sum(sizes) != depth:
            raise TorchstoneError(
                f"stack.block_sizes: {list(sizes)} are blocks of {sum(sizes)} layers, and the "
                f"{'decoder' if causal else 'encoder'} has {depth}"
            )
        return [sum(sizes[:n]) for n, size in enumerate(sizes) for _ in range(size)]

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        first = self.first(len(layers), causal)
        gives = Gives(probs=True) if self.reuse == "probabilities" else Gives(queries_keys=True)
        plans = []
        for i, layer in enumerate(layers):
            giver = layers[first[i]]
            if first.count(first[i]) == 1:
                plans.append(LayerPlan(layer))
            elif first[i] == i:
                self._check(layer, i)
                plans.append(LayerPlan(layer, gives))
            elif (layer.attention, layer.position) != (giver.attention, giver.position):
                raise TorchstoneError(
                    f"layer {i}: stack lazy reuses the attention of layer {first[i]} there, and needs the same "
                    "attention and position in both"
                )
            else:
                fields = {name: getattr(layer.attention, name) for name in SoftmaxSpec.model_fields}
                given = GivenProbsSpec(**fields, reuse=self.reuse)
                plans.append(LayerPlan(layer.model_copy(update={"attention": given})))
        return tuple(plans)

    def _check(self, layer: LayerSpec, number: int) -> None:
        wanted, words = (
            ("probs", "probabilities") if self.reuse == "probabilities" else ("queries_keys", "queries and keys")
        )
        attention = layer.attention
        if wanted not in attention.can_give or not isinstance(attention, SoftmaxSpec):
            raise TorchstoneError(
                f"layer {number}: stack lazy needs {words}, which attention {attention.kind} cannot give; softmax can"
            )
