"""Quantisation to whole numbers, weights of two and of three values, and their packed form: the definitions.

BitNet (Wang et al. 2023, arXiv 2310.11453, section 2.1) and BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, section 2).

Packed, a byte holds 8 weights of two values or 4 of three. With P of them in a byte, byte j of a row of n weights holds
weights j, j + J, j + 2 J, ... for J = ceil(n / P), the first in its lowest bits: neighbours in memory then meet
neighbours among the inputs. Places beyond n hold what meets a zero.

Shapes: ... any leading axes, N rows, I inputs, O outputs, G groups of inputs, n = I / G, J bytes of n weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchstone.ops import at_least_float32

_EPS = 1e-5
_SHIFT = 2.0**-20
"""Added before rounding. Inputs that are themselves sums of whole numbers fall on halves exactly; two ways to compute
them would round these apart, so all go up. It is of the size of float32's own rounding here, so that no more numbers
than that differ from those of the published code, which rounds halves to even."""


def quantise(x_n: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (..., n) of -Q to Q and their scale (..., 1), ``x = scale * q`` up to half a step, where Q is
    2^(bits - 1) - 1 and ``scale = max|x| / Q`` ("absmax", eqs. 4 and 5 of BitNet). In at least float32."""
    x_n, top = at_least_float32(x_n), 2 ** (bits - 1) - 1
    scale = x_n.abs().amax(-1, keepdim=True).clamp(min=_EPS) / top
    return torch.floor(x_n / scale + (0.5 + _SHIFT)).clamp(-top, top), scale


def binary(w_OGn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-1 and 1 (O, G, n), the signs about the mean of each group, and beta (G,), its mean size (eqs. 1 to 3 and 12 of
    BitNet; the sign of 0 is 1)."""
    w_OGn = at_least_float32(w_OGn)
    above = w_OGn >= w_OGn.mean((0, 2), keepdim=True)
    return torch.where(above, 1.0, -1.0).to(w_OGn.dtype), w_OGn.abs().mean((0, 2))


def ternary(w_OGn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-1, 0 and 1 (O, G, n), each weight over beta rounded, and beta (G,), the mean size of a group (eqs. 1 to 3 of
    b1.58)."""
    w_OGn = at_least_float32(w_OGn)
    beta_G = w_OGn.abs().mean((0, 2)).clamp(min=_EPS)
    return (w_OGn / beta_G[:, None]).round().clamp(-1, 1), beta_G


def rescale(ints_OG: torch.Tensor, scale_G: torch.Tensor, beta_OG: torch.Tensor) -> torch.Tensor:
    """The product (..., O) of what was quantised: sums (..., O, G) times the scale (..., G) of the inputs and that of
    the weights (O, G), added up over the groups."""
    return ((ints_OG * scale_G[..., None, :]) * beta_OG).sum(-1).to(ints_OG.dtype)


def _bits(levels: int) -> int:
    return {2: 1, 3: 2}[levels]


def packed_bytes(n: int, levels: int) -> int:
    """J, the bytes of `n` weights of `levels` values."""
    return -(-n * _bits(levels) // 8)


def pack(w_n: torch.Tensor, levels: int) -> torch.Tensor:
    """Bytes (..., J) of weights (..., n): -1 and 1, or -1, 0 and 1."""
    bits, J = _bits(levels), packed_bytes(w_n.shape[-1], levels)
    code_n = ((w_n + 1) / 2 if levels == 2 else w_n + 1).to(torch.uint8)
    code_PJ = F.pad(code_n, (0, 8 // bits * J - w_n.shape[-1])).unflatten(-1, (-1, J))
    places_P1 = bits * torch.arange(8 // bits, dtype=torch.uint8, device=w_n.device)[:, None]
    return (code_PJ << places_P1).sum(-2, dtype=torch.uint8)


def codes(packed_J: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """What lies in bytes (..., J), in the order of weights and as far as the bytes go: weights plus one, or half of
    that."""
    places_P1 = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed_J.device)[:, None]
    return ((packed_J[..., None, :] >> places_P1) & (2**bits - 1)).flatten(-2).to(dtype)


def unpack(packed_J: torch.Tensor, n: int, levels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights (..., n) from what `pack` made of them."""
    code_n = codes(packed_J, _bits(levels), dtype)[..., :n]
    return 2 * code_n - 1 if levels == 2 else code_n - 1


def bit_product_reference(q_NGn: torch.Tensor, packed_OGJ: torch.Tensor, levels: int) -> torch.Tensor:
    """Sums (N, O, G) of `q` times the weights."""
    w_OGn = unpack(packed_OGJ, q_NGn.shape[-1], levels, q_NGn.dtype)
    return torch.einsum("ngi,ogi->nog", q_NGn, w_OGn)
