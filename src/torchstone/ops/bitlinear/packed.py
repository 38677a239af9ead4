"""Products straight from packed bytes, as one operator: a loop over the bytes for few rows on a CPU that has a C++
compiler, and for all else blocks of outputs whose weights are unpacked one after the other.

Both sum codes, which are weights plus one or half of that, times inputs: what to take off is known without the weights.

Shapes: N rows, O outputs, G groups of inputs, J bytes of the weights of a group, P weights in a byte, m = P J.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from torchstone.ops.bitlinear.reference import codes
from torchstone.ops.compiler import compiler_works

_BLOCK = 2**20
"""Weights that are unpacked at once."""
_FEW = 4
"""Rows up to which the loop over the bytes runs; it reads them once for each."""

# Inputs lie as weights do, plane by plane of a byte, so that both are read side by side; compilers make integer dot
# products of the loop where the processor has them.
_SOURCE = r"""
#include <cstdint>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // which torch.compile switches off for its own loops
#endif

template <int BITS>
static void product(const uint8_t* w, const int8_t* q, int32_t* y, int64_t N, int64_t O, int64_t G, int64_t J) {
    constexpr int P = 8 / BITS, MASK = (1 << BITS) - 1;
    #pragma omp parallel for
    for (int64_t row = 0; row < O * G; row++) {
        const uint8_t* code = w + row * J;
        for (int64_t i = 0; i < N; i++) {
            const int8_t* x = q + (i * G + row % G) * P * J;
            int32_t sums[P] = {};  // one for each plane, so that none waits for another
            for (int64_t j = 0; j < J; j++) {
                #pragma GCC unroll 8
                for (int p = 0; p < P; p++)
                    sums[p] += (uint8_t)((code[j] >> (BITS * p)) & MASK) * x[p * J + j];
            }
            int32_t sum = 0;
            for (int p = 0; p < P; p++) sum += sums[p];
            y[i * O * G + row] = sum;
        }
    }
}

extern "C" void bits_1(const uint8_t* w, const int8_t* q, int32_t* y, int64_t N, int64_t O, int64_t G, int64_t J) {
    product<1>(w, q, y, N, O, G, J);
}

extern "C" void bits_2(const uint8_t* w, const int8_t* q, int32_t* y, int64_t N, int64_t O, int64_t G, int64_t J) {
    product<2>(w, q, y, N, O, G, J);
}
"""


@functools.cache
def _loops() -> tuple[Callable[..., None], ...] | None:
    """The loop for 1 and for 2 bits, built as `torch.compile` builds its own and kept where that keeps them; None
    without a compiler."""
    if compiler_works() is not None:
        return None
    from torch._inductor.codecache import CppCodeCache  # here, because importing it takes seconds

    library = CppCodeCache.load(_SOURCE)
    for loop in (library.bits_1, library.bits_2):
        loop.argtypes, loop.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4, None
    return library.bits_1, library.bits_2


def looped_sums(q_NGm: torch.Tensor, packed_OGJ: torch.Tensor, bits: int) -> torch.Tensor | None:
    """As `code_sums`, by the loop over the bytes on a CPU; None without a compiler."""
    loops = _loops()
    if loops is None:
        return None
    N, (outputs, G, J) = q_NGm.shape[0], packed_OGJ.shape
    q_NGm, packed_OGJ = q_NGm.contiguous(), packed_OGJ.contiguous()
    sums_NOG = torch.empty(N, outputs, G, dtype=torch.int32)
    loops[bits - 1](packed_OGJ.data_ptr(), q_NGm.data_ptr(), sums_NOG.data_ptr(), N, outputs, G, J)
    return sums_NOG


def blocked_sums(q_NGm: torch.Tensor, packed_OGJ: torch.Tensor, bits: int) -> torch.Tensor:
    """As `code_sums`, a block of outputs after the other, whose codes alone are unpacked."""
    q_GNm, rows = q_NGm.float().transpose(0, 1), max(1, _BLOCK // q_NGm[0].numel())
    blocks = [q_GNm @ codes(part, bits, torch.float32).permute(1, 2, 0) for part in packed_OGJ.split(rows)]
    return torch.cat(blocks, -1).permute(1, 2, 0).to(torch.int32).contiguous()


@torch.library.custom_op("torchstone::code_sums", mutates_args=())
def code_sums(q_NGm: torch.Tensor, packed_OGJ: torch.Tensor, bits: int) -> torch.Tensor:
    """Sums (N, O, G) in int32 of inputs in int8, in the order of codes, times codes of 1 or 2 bits.

    A compiler takes it as it is, and so never unpacks weights that it holds for constants.
    """
    if q_NGm.device.type == "cpu" and q_NGm.shape[0] <= _FEW:
        sums_NOG = looped_sums(q_NGm, packed_OGJ, bits)
        if sums_NOG is not None:
            return sums_NOG
    return blocked_sums(q_NGm, packed_OGJ, bits)


@code_sums.register_fake
def _(q_NGm, packed_OGJ, bits):
    return q_NGm.new_empty(q_NGm.shape[0], *packed_OGJ.shape[:2], dtype=torch.int32)
