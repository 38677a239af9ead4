"""BitNet (Wang et al. 2023, arXiv 2310.11453), with the three values of its successor b1.58 (Ma et al. 2024, arXiv
2402.17764)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from torchstone.model.linear import Bias, Linear
from torchstone.model.linear.bitlinear import BitLinear, BitLinearSpec, PackedBitLinear
from torchstone.model.measure import energy, measure
from torchstone.model.site import Initialise, initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]


def _on_meta(fields: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        return validate(TransformerSpec, fields).build()


# ------------------------------------------------------------------------------------------- packed is what was trained


_SMALL: dict[str, Any] = {"width": 64, "depth": 3, "vocabulary": 128, "context": 64, "attention": {"heads": 4}}


def _trained_and_packed(weights: str, groups: int, seed: int) -> tuple[Transformer, Transformer]:
    """A model of random weights, and the same packed."""
    kind = {"kind": "bitlinear", "weights": weights, "groups": groups}
    made: Any = initialise(validate(TransformerSpec, {**_SMALL, "linear": kind}).build(), seed).eval()
    packed: Any = validate(TransformerSpec, {**_SMALL, "linear": {**kind, "packed": True}}).build().eval()
    for path, module in packed.named_modules():
        if isinstance(module, PackedBitLinear):
            module.load_state_dict(module.of(made.get_submodule(path).weight))
    packed.load_state_dict({n: p for n, p in made.named_parameters() if n in packed.state_dict()}, strict=False)
    return made, packed


def _straight_through(seed: int) -> float:
    """Largest difference of the weight's gradient to that of a plain product of the quantised operands, of its size."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for weights in ("ternary", "binary"):
        spec = BitLinearSpec(weights=weights)
        m: Any = initialise(spec.build(64, (32, 16), ("up", "gate"), False, _normal), seed)
        x, back = torch.randn(5, 64, generator=generator), torch.randn(5, 48, generator=generator)
        m(x).backward(back)
        wanted = back.T @ spec.input(x)
        worst = max(worst, float((m.weight.grad - wanted).abs().max() / wanted.abs().max()))
    return worst


def _normal(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
    weight.normal_(generator=generator)


@torch.no_grad()
def _packed(scale: Scale, first: int) -> Measured:
    steps, seeds = (16, 1) if scale == "quick" else (64, 5)
    logits = tokens = 0.0
    values = {"ternary": 0, "binary": 0}
    over: dict[str, float] = {}
    for seed in range(first, first + seeds):
        for weights, groups in (("ternary", 1), ("binary", 1), ("ternary", 4), ("binary", 4)):
            models = _trained_and_packed(weights, groups, seed)
            ids_BT = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(seed))
            written = []
            for model in models:
                state, found = model.state(2, 8 + steps), ids_BT
                for _ in range(steps):
                    out = model(found[:, -1:] if found.shape[1] > 8 else found, state=state, outputs="last").logits
                    assert out is not None
                    found = torch.cat([found, out.argmax(-1)], 1)
                written.append((found, model(ids_BT).logits))
            tokens += float((written[0][0] != written[1][0]).sum())
            logits = max(logits, float((written[0][1] - written[1][1]).abs().max()))
            layer: Any = models[0].main.layers[0]
            w, _ = layer.ffn.down.spec.quantised(layer.ffn.down.weight)
            values[weights] = max(values[weights], len(w.unique()))
            if groups == 1:
                plain = sum(m.weight.numel() for m in models[0].modules() if isinstance(m, Linear))
                small = [m for m in models[1].modules() if isinstance(m, PackedBitLinear)]
                held = sum(m.packed.nbytes + m.beta.nbytes for m in small)
                over[weights] = 2 * plain / held
    with torch.enable_grad():
        gradient = max(_straight_through(seed) for seed in range(first, first + seeds))
    return Measured(
        {
            "tokens that differ between packed and unpacked": tokens,
            "largest difference of their logits": logits,
            "values of a ternary weight": values["ternary"],
            "values of a binary weight": values["binary"],
            "gradient straight through: largest difference, of its size": gradient,
            "bytes in bfloat16 / packed, ternary": over["ternary"],
            "bytes in bfloat16 / packed, binary": over["binary"],
        }
    )


_packed.builds = (  # type: ignore[attr-defined]
    "torchstone.model.linear.bitlinear",
    "torchstone.ops.bitlinear.reference",
    "torchstone.ops.bitlinear.packed",
)

PACKED = Claim(
    id="packed-is-trained",
    kind="identity",
    text="A model's packed weights give its logits to the bit and its tokens, from an eighth of the bytes of bfloat16 "
    "with three values and a sixteenth with two, but for the scales; the gradient goes through both quantisers as if "
    "they were not there.",
    figure="weights of 1 bit, or log2(3) = 1.58; 8-bit activations; straight-through gradients",
    gates=(
        Number("tokens that differ between packed and unpacked", high=0),
        Number("largest difference of their logits", high=0),
        Number("values of a ternary weight", low=3, high=3),
        Number("values of a binary weight", low=2, high=2),
        Number("gradient straight through: largest difference, of its size", high=1e-5),
        Number("bytes in bfloat16 / packed, ternary", low=7.9, high=8),
        Number("bytes in bfloat16 / packed, binary", low=15.6, high=16),
    ),
    run=_packed,
)


# --------------------------------------------------------------------------------------------------------------- energy


_OF_67B: dict[str, Any] = {
    "width": 4096,
    "depth": 32,
    "vocabulary": 32000,
    "attention": {"heads": 32},
    "ffn": {"kind": "mlp", "hidden": 16384},
    "position": "none",
}
_2B4T: dict[str, Any] = {
    "width": 2560,
    "depth": 30,
    "vocabulary": 128_256,
    "attention": {"heads": 20, "kv_heads": 5},
    "ffn": {"kind": "swiglu", "hidden": 6912},
    "linear": {"kind": "bitlinear", "norm": "none"},
    "residual": "subln",
}
_TOKENS = 512


def _energy(scale: Scale, first: int) -> Measured:
    arms = {
        "32-bit": energy(_on_meta(_OF_67B), torch.float32),
        "16-bit": energy(_on_meta(_OF_67B), torch.bfloat16),
        "BitNet": energy(_on_meta({**_OF_67B, "linear": {"kind": "bitlinear", "weights": "binary"}}), torch.bfloat16),
    }
    numbers = {
        f"{name}, {sort} at {process}: J": getattr(found, f"{sort}_{process}") * _TOKENS * 1e-12
        for name, found in arms.items()
        for process in ("7nm", "45nm")
        for sort in ("multiply", "add")
    }
    counted = measure(_on_meta(_2B4T), dtype=torch.bfloat16)
    matrices = sum(p.numel() for p in _on_meta(_2B4T).parameters() if p.dim() == 2)
    table = 128_256 * 2560
    return Measured(
        numbers
        | {
            "weights of the model of 2B parameters": matrices,
            "GB of its projections at log2(3) bits": (matrices - table) * 1.5849625 / 8e9,
            "GB of its projections packed here": (counted.packed_weight_bytes - 2 * table) / 1e9,
        }
    )


_energy.builds = ("torchstone.model.linear.bitlinear", "torchstone.model.measure")  # type: ignore[attr-defined]

_TABLE = {  # multiplications and additions at 7 nm, then at 45 nm
    "32-bit": (4.41, 1.28, 12.46, 3.03),
    "16-bit": (1.14, 0.54, 3.70, 1.35),
    "BitNet": (0.02, 0.04, 0.08, 0.13),
}
_COLUMNS = ("multiply at 7nm", "add at 7nm", "multiply at 45nm", "add at 45nm")

ENERGY = Claim(
    id="energy",
    kind="arithmetic",
    text="By the paper's count of operations, with a head in 16 bits, products of 512 tokens with the weights of a "
    "model of 6.7B parameters take the published joules, to 0.01 J; the projections of the model of 2B parameters take "
    "0.41 GB at log2(3) bits a weight, and 0.52 GB in the 2 bits that they are packed in here.",
    figure="6.7B, 512 tokens: multiplications 4.41, 1.14 and 0.02 J at 7 nm in 32 bits, 16 bits and BitNet; 0.4 GB for "
    "the non-embedding weights of 2B4T",
    gates=(
        *(
            Number(f"{name}, {column}: J", low=figure - 0.01, high=figure + 0.01)
            for name, row in _TABLE.items()
            for column, figure in zip(_COLUMNS, row, strict=True)
        ),
        Number("weights of the model of 2B parameters", low=2_412_380_160, high=2_412_380_160),
        Number("GB of its projections at log2(3) bits", low=0.405, high=0.415),
        Number("GB of its projections packed here", low=0.515, high=0.525),
    ),
    run=_energy,
)


# ------------------------------------------------------------------------------------------------ trained from scratch


class LateSpec(BitLinearSpec):
    """Quantised in evaluation alone: for the claim's arms of a model that is trained in floats and quantised after."""

    kind: ClassVar[str] = "bitlinear_late"
    offered: ClassVar[bool] = False

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        return _Late(d_in, outs, roles, bias, self, init)


class _Late(BitLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        return F.linear(self.spec.normed(x).flatten(-2).to(x.dtype), self.weight, self.bias)


class StuckSpec(BitLinearSpec):
    """Weights with the true derivative of rounding, which is 0: for the claim's sabotage arm."""

    kind: ClassVar[str] = "bitlinear_stuck"
    offered: ClassVar[bool] = False

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        return _Stuck(d_in, outs, roles, bias, self, init)


class _Stuck(BitLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.weight.requires_grad:
            self.weight.register_hook(torch.zeros_like)
        return y


def _arm(kind: str, weights: str) -> dict[str, Any]:
    return {"model": {"linear": {"kind": kind, "weights": weights}}}


_STEPS = 400
_LATE = _arm("bitlinear_late", "ternary")

SCRATCH = Claim(
    id="trained-from-scratch",
    kind="behaviour",
    text="After 400 steps, each at the best of three learning rates, a small byte model of three-valued weights is not "
    "worse than one in floats by 0.08 nats a byte, one of two-valued weights not by 0.12; three values are not worse "
    "than two by 0.01, and better than quantising a model trained in floats.",
    figure="b1.58 at 700M: perplexity 12.87 against 12.33 (0.043 nats), equal from 3B on; b1 follows the same law as "
    "floats, and quantising afterwards at 1 or 2 bits loses most",
    gates=(
        Effect("three values beside floats", "ternary", "dense", margin=-0.08, sabotage="late_ternary"),
        Effect("two values beside floats", "binary", "dense", margin=-0.12, sabotage="late_binary"),
        Effect("three values beside two", "ternary", "binary", margin=-0.01, sabotage="late_ternary"),
        Effect(
            "trained rather than quantised after", "ternary", "late_ternary", 0.0, null="late_again", sabotage="stuck"
        ),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": 128,
                "depth": 3,
                "attention": {"kind": "softmax", "heads": 4},
                "ffn": {"kind": "mlp", "hidden": 512},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
            "optimizer": {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "schedule": {"kind": "linear", "warmup": 20},
            **one_thread(_STEPS, 8, blocks=64, test_blocks=512),
        },
        patches={
            "dense": {},
            "ternary": _arm("bitlinear", "ternary"),
            "binary": _arm("bitlinear", "binary"),
            "late_ternary": _LATE,
            "late_binary": _arm("bitlinear_late", "binary"),
            "late_again": _LATE,
            "stuck": _arm("bitlinear_stuck", "ternary"),
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"model": {"depth": 1}, "trainer": {"steps": 20}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1e-3, 3e-3, 1e-2))),
            "gpu": Setting(
                seeds=3,
                control_seeds=3,
                patch={
                    "model": {"width": 768, "depth": 12, "attention": {"heads": 12}, "ffn": {"hidden": 3072}},
                    "data": {"block": 512},
                    "schedule": {"warmup": 375},
                    "trainer": {"steps": 20_000, "batch": 64, "precision": "bf16", "compile": "auto"},
                },
                tune=("optimizer.lr", (5e-4, 1e-3, 2e-3)),
            ),
        },
        metric="test_loss",
        shifted=("late_again",),
        imports=("torchstone.papers.bitnet",),
    ),
)

PAPER = Paper(
    slug="bitnet",
    title="BitNet: Scaling 1-bit Transformers for Large Language Models",
    authors="Hongyu Wang, Shuming Ma, Li Dong, Shaohan Huang, Huaijie Wang, Lingxiao Ma, Fan Yang, Ruiping Wang, Yi "
    "Wu, Furu Wei",
    year=2023,
    link="https://arxiv.org/abs/2310.11453",
    topics=("quantisation", "memory", "energy", "decoding"),
    parts=("linear.bitlinear",),
    summary="Projections whose weights have two values, or three as in its successor b1.58, and whose inputs have 8 "
    "bits, trained from scratch over weights in full precision; packed, they take 1 or 2 bits.",
    claims=(PACKED, ENERGY, SCRATCH),
)
