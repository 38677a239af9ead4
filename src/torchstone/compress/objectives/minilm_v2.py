"""MiniLMv2 (Wang et al. 2021, arXiv 2012.15828): a student learns one layer's self-attention relations of a teacher.

    R_ij,a = softmax(A_i,a A_j,a^T / sqrt(d_r)),  A_1 = Q, A_2 = K, A_3 = V      relation head a of A_r (eq. 5 to 7)
    L = sum over pairs ij of 1 / (A_r |x|) sum_a sum_t KL(R^teacher_t || R^student_t)     (eq. 8)

Queries, keys and values of all attention heads stand side by side and are cut anew into `relation_heads`, so that
widths and head counts of student and teacher are free. Padding, other documents and, for decoders, tokens ahead are no
keys.
Queries and keys are those before any rotation. The teacher is frozen; nothing else is learned, and what lies behind the
student's last attention (its output projection, feed-forward and head) keeps its first values until it is tuned.

Shapes: B rows, T tokens, H heads, K of a head, E = H K, A relation heads, D channels of one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.objectives._frozen import WithReference, reference_of

__all__ = ["MiniLMv2", "MiniLMv2Spec", "relation", "relation_kl"]

_NAMES = "qkv"
_PAIRS = tuple(a + b for a in _NAMES for b in _NAMES)


class MiniLMv2Spec(ObjectiveSpec):
    """Learn the self-attention relations of a teacher's layer."""

    paper: ClassVar[str] = "Wang et al. 2021, arXiv 2012.15828"

    teacher: str = Field(min_length=1)
    """Directory of the run that is the teacher."""
    layer: int | None = Field(None, ge=1)
    """The teacher's layer, from 1; None takes the last of up to 12 and the layer at 0.83 of more."""
    relations: tuple[str, ...] = ("qq", "kk", "vv")
    """Pairs of queries, keys and values, as in "qk"; "all" stands for the nine."""
    relation_heads: int = Field(12, ge=1)
    """A_r, into which the channels of both models are cut."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over pairs of relations."""

    @field_validator("relations", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return _PAIRS if value == "all" else (value,) if isinstance(value, str) else value

    @field_validator("relations")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pair in value:
            if pair not in _PAIRS:
                raise ValueError(f"no relation {pair!r}; relations: {', '.join(_PAIRS)}, or all")
        if not value or len(set(value)) < len(value):
            raise ValueError("needs different relations, one at least")
        return value

    def build(self, facts: Facts) -> Objective:
        return MiniLMv2(self, reference_of("minilm_v2", "teacher", self.teacher, facts), self.teacher)


class MiniLMv2(WithReference):
    """Batch: ids (B, T), with `valid` and `start` where rows are padded or hold several documents."""

    def __init__(self, spec: MiniLMv2Spec, teacher: nn.Module, name: str = "teacher") -> None:
        super().__init__("minilm_v2", teacher, name, "teacher")
        self.spec = spec
        depth = len(_layers(teacher, "teacher"))
        usual = depth if depth <= 12 else round(0.83 * depth)
        self.layer = usual if spec.layer is None else spec.layer
        if self.layer > depth:
            raise TorchstoneError(f"objective minilm_v2: layer {self.layer} of the teacher; it has {depth}")

    def check(self, model: nn.Module) -> None:
        super().check(model)
        teacher: Any = self.reference
        if (getattr(model, "decoder", None) is None) != (teacher.decoder is None):
            raise TorchstoneError("objective minilm_v2: one of student and teacher is causal, the other is not")
        A, named = self.spec.relation_heads, set("".join(self.spec.relations))
        widths = {
            "student": _widths(model, len(_layers(model, "student")), "student"),
            "teacher": _widths(teacher, self.layer, "teacher"),
        }
        both = math.gcd(*(width[name] for width in widths.values() for name in named))
        for who, width in widths.items():
            for pair in self.spec.relations:
                first, second = (width[name] for name in pair)
                if first != second:
                    raise TorchstoneError(
                        f"objective minilm_v2: relation {pair}: the {who}'s have {first} and {second} channels"
                    )
                if first % A:
                    divisors = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
                    raise TorchstoneError(
                        f"objective minilm_v2: relation_heads {A} does not divide the {who}'s {first} channels; "
                        f"{divisors} divide both models'"
                    )

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"tokens": batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel())}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        tokens = tokens_of(batch)
        with torch.no_grad():
            theirs = _captured(self.reference, self.layer, tokens, None)[0]
        student: Any = model
        last = len(_layers(student, "student"))
        mine, aux = _captured(student, last, tokens, None if key is None else key.tensor(batch["ids"].device))
        keys_BTT = _keys(tokens, student.decoder is not None, mine["q"].shape[1])
        queries_BT = torch.ones_like(batch["ids"], dtype=torch.bool) if tokens.valid is None else tokens.valid
        scores, total = {}, torch.zeros((), device=batch["ids"].device)
        for pair in self.spec.relations:
            parts = (theirs[pair[0]], theirs[pair[1]], mine[pair[0]], mine[pair[1]], keys_BTT, queries_BT)
            # the maps are made again in the backward pass: one relation's at a time are in memory
            kl = checkpoint(relation_kl, *parts, self.spec.relation_heads, use_reentrant=False)
            scores[f"kl_{pair}"] = kl.detach(), queries_BT.sum()
            total = total + kl
        if self.spec.reduction == "mean":
            total = total / len(self.spec.relations)
        found = Result.of({"loss": Term(total, "tokens")}, aux)
        return Result(found.terms, {**found.metrics, **scores}, scores=scores)


def relation(a_BTE: torch.Tensor, b_BTE: torch.Tensor, keys_BTT: torch.Tensor, heads: int) -> torch.Tensor:
    """Log of the relations of two of queries, keys and values (B, A, T, T), float32 or wider; `keys` says which tokens
    each looks at."""
    a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a_BTE, b_BTE))
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    scores_BATT = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    return scores_BATT.masked_fill(~keys_BTT[:, None], -math.inf).log_softmax(-1)


def relation_kl(
    theirs_a: torch.Tensor,
    theirs_b: torch.Tensor,
    mine_a: torch.Tensor,
    mine_b: torch.Tensor,
    keys_BTT: torch.Tensor,
    queries_BT: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """KL(teacher || student) of one relation, summed over tokens that count, mean over relation heads."""
    with torch.autocast(mine_a.device.type, enabled=False):
        of_teacher, of_student = (
            relation(theirs_a, theirs_b, keys_BTT, heads),
            relation(mine_a, mine_b, keys_BTT, heads),
        )
        p_BATT = of_teacher.exp()
        # where nothing is looked at both logarithms are infinite
        each_BAT = (p_BATT * torch.where(keys_BTT[:, None], of_teacher - of_student, 0.0)).sum(-1)
        return torch.where(queries_BT[:, None], each_BAT, 0.0).sum() / heads


def _layers(model: nn.Module, who: str) -> Any:
    main = getattr(model, "main", None)
    if main is None:
        raise TorchstoneError(f"objective minilm_v2: needs transformers, and the {who} is {type(model).__name__}")
    return main.layers


def _path(model: Any, layer: int) -> str:
    return f"{'encoder' if model.decoder is None else 'decoder'}.layers.{layer - 1}.attention"


def _widths(model: Any, layer: int, who: str) -> dict[str, int]:
    """Channels of a layer's queries, keys and values, all heads together."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = _captured(model, layer, Tokens.of(torch.zeros(1, 1, dtype=torch.int64, device=device)), None, who)[0]
    return {name: value.shape[-1] for name, value in found.items()}


def _captured(
    model: Any, layer: int, tokens: Tokens, key: torch.Tensor | None, who: str = "model"
) -> tuple[dict[str, torch.Tensor], Any]:
    """Queries, keys and values (B, T, E) of a layer, heads side by side, and the forward's sums."""
    path = _path(model, layer)
    taps = Taps([f"{path}.{name}" for name in _NAMES])
    out = model(tokens, outputs="none", taps=taps, key=key)
    if missing := [name for name in _NAMES if f"{path}.{name}" not in taps.seen]:
        raise TorchstoneError(f"objective minilm_v2: layer {layer} of the {who} has no {missing[0]} of its own")
    return {name: taps.seen[f"{path}.{name}"].transpose(1, 2).flatten(-2) for name in _NAMES}, out.aux


def _keys(tokens: Tokens, causal: bool, length: int) -> torch.Tensor:
    """Which tokens each looks at (B|1, T, T). A token that counts nothing looks at itself."""
    at = torch.arange(length, device=tokens.index.device)
    keys = torch.ones(1, length, length, dtype=torch.bool, device=tokens.index.device)
    if causal:
        keys = keys & (at[None] <= at[:, None])
    if tokens.start is not None:
        keys = keys & (tokens.start[:, :, None] == tokens.start[:, None])
    if tokens.valid is not None:
        keys = keys & tokens.valid[:, None] | (at[None] == at[:, None])
    return keys
