"""Scores that fall with distance, each channel of a head at a rate of its own.

    score of query t and key s = sum over channels c of q_tc k_sc exp(-rate_c (at_t - at_s))

The factor is one of the query times one of the key, but neither alone can be stored: exp(rate_c at_s) leaves the range
of any floating type at some s. Only differences are finite. So keys are kept as they are, and each product of a block
of queries with their keys counts from the block's first query: exp(-rate_c (at_t - first)) <= 1 for queries, and for
keys exp(-rate_c (first - at_s)), which is above 1 only for keys inside the block.

Shapes: B rows, H query heads, G key/value heads, T queries, S keys, K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

__all__ = ["Decay"]


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """The largest factor, as a logarithm: that a block of keys may reach, and that none may exceed.

    float16 ends at 2^16 and is left room for keys of 64; the others have float32's range, and the products of two
    such factors, of pairs that a mask hides, must stay finite too.
    """
    bits = (8, 10) if dtype == torch.float16 else (24, 60)
    return bits[0] * math.log(2), bits[1] * math.log(2)


@dataclass(frozen=True)
class Decay:
    """Rates and the places that distances are measured between.

    Attributes:
        rate_K: how fast each channel falls, 0 or more.
        fastest: the largest of them: known to the host, so that the size of blocks is.
        q_BT, k_BS: integer places of queries and keys, rows may be shared. Distances count within a document, and a
            query may only see keys at its place or before it. Where places within one block of queries jump by more
            than some 40 / fastest (8 / fastest in float16), what lies beyond the jump fades faster than it should.
    """

    rate_K: torch.Tensor
    fastest: float
    q_BT: torch.Tensor
    k_BS: torch.Tensor

    def span(self, dtype: torch.dtype) -> int:
        """Queries, one place apart, that may share a product in this dtype."""
        most = _limits(dtype)[0]
        return max(1, int(most / self.fastest)) if self.fastest * 2**30 > most else 2**30

    def slice(self, a: int, b: int, first: int, last: int) -> Decay:
        """For queries a..b and keys first..last (both exclusive)."""
        return replace(self, q_BT=self.q_BT[:, a:b], k_BS=self.k_BS[:, first:last])

    def rebased(self, q_BHTK: torch.Tensor, k_BGSK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys whose plain products are the scores; their dtypes stay."""
        first_B1 = self.q_BT[:, :1]
        most = _limits(k_BGSK.dtype)[1]
        return self._scaled(q_BHTK, first_B1 - self.q_BT, most), self._scaled(k_BGSK, self.k_BS - first_B1, most)

    def _scaled(self, x: torch.Tensor, ahead_BN: torch.Tensor, most: float) -> torch.Tensor:
        # differences are taken of integers, so that a place of a hundred thousand costs no digits
        exponent_B1NK = (ahead_BN[:, None, :, None].to(self.rate_K.dtype) * self.rate_K).clamp(max=most)
        return (x * exponent_B1NK.exp()).to(x.dtype)
