"""Replaced-token detection with a corrective loss: ELECTRA (Clark et al. 2020, arXiv 2003.10555) as METRO-LM (Bajaj et
al. 2022, arXiv 2204.06644) has it.

A shallow generator predicts masked tokens and a token is drawn from each prediction; the model reads the text with
these in the place of the masked tokens, says of every token whether it is the original, and names the original where a
token was masked.

    L = L_generator + weight * L_detection + corrective * L_correction

    L_generator    cross-entropy of masked tokens, over masked tokens            (section 3, "auxiliary model")
    L_detection    binary, over all tokens but padding                           (eq. 2 of ELECTRA)
    L_correction   cross-entropy of the original, over masked tokens, also where the draw was right

The correction knows the vocabulary alone, or copies as COCO-LM does (Meng et al. 2021, arXiv 2102.08473): with x' what
stands there and c the detection's probability that it is the original, through which nothing goes back,

    p(x) = [x = x'] c + (1 - c) softmax(E h + b)_x

The generator has the model's width and looks tokens up in the model's embedding, which its loss trains too; tables of
positions are shared too where both have the same positions and dropout, which the generator of "zero_dropout" has none
of. Nothing goes back through the drawing, nor from the model's losses into the generator. Both networks move in one
step of one optimiser; the generator lies in the objective's checkpoints and is not needed afterwards.

Shapes: B rows, T tokens, D width, V vocabulary, N masked tokens of a batch.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.embedding import Embedding
from torchstone.model.mask import BIDIRECTIONAL
from torchstone.model.position import Position
from torchstone.model.site import initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops import at_least_float32, noise
from torchstone.ops.cross_entropy import linear_cross_entropy, linear_nll_reference
from torchstone.spec import merge, validate

__all__ = ["ReplacedToken", "ReplacedTokenSpec"]

_IGNORE = -100


class ReplacedTokenSpec(ObjectiveSpec):
    """Tell tokens that a generator put in from those of the text, and name what stood there."""

    paper: ClassVar[str] = "Clark et al. 2020, arXiv 2003.10555; Bajaj et al. 2022, arXiv 2204.06644"

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of tokens masked."""
    generator: dict[str, Any] = Field(default_factory=lambda: {"depth": 2})
    """What the generator has otherwise than the model: a patch on the model's fields. Its width is the model's."""
    sampling: Literal["zero_dropout", "train", "eval"] = "zero_dropout"
    """Tokens are drawn from a generator without dropout, from the dropped predictions that it learns by, or from a
    second pass without dropout."""
    corruption: Literal["model", "unigram", "uniform", "oracle"] = "model"
    """Where tokens come from: the generator, the counts of the training split, the vocabulary at random, or the text
    itself."""
    weight: float = Field(50.0, ge=0)
    """Weight of detection."""
    detect: Literal["all", "masked"] = "all"
    """Which tokens are judged: all but padding, or those that were masked."""
    corrective: float = Field(1.0, ge=0)
    """Weight of correction; 0 is ELECTRA."""
    correction: Literal["simplified", "copy"] = "simplified"
    """Whether the original is named from the vocabulary alone, or also by copying what stands there (COCO-LM)."""

    @model_validator(mode="after")
    def _detected(self) -> ReplacedTokenSpec:
        if self.correction == "copy" and not self.weight:
            raise ValueError("correction copy reuses the probability that detection learns, and its weight is 0")
        if not self.weight and not self.corrective:
            raise ValueError("weight and corrective are both 0, and only the generator would learn")
        return self

    def build(self, facts: Facts) -> Objective:
        if facts.mask is None or facts.vocabulary is None:
            raise TorchstoneError("objective replaced_token: the tokenizer has no mask token")
        if not isinstance(facts.model, TransformerSpec):
            raise TorchstoneError("objective replaced_token: needs model transformer, whose shape the generator takes")
        if self.corruption == "unigram" and facts.frequencies is None:
            raise TorchstoneError("objective replaced_token: unigram needs the counts of tokens in the training split")
        return ReplacedToken(self, facts, facts.model)


class ReplacedToken(Objective):
    """Batch: ids (B, T). `prepare` adds `masked` (B, T), `targets` (B, T), -100 elsewhere, and `draw` (B,), the key
    that each row's tokens are drawn by.

    Attributes:
        generator: an encoder with the model's embedding and a head of its own; None where tokens come from elsewhere.
        bias: (V,), of the corrective head, whose matrix is the embedding's.
        below: (V,), share of the training split's tokens up to each id, special ones left out; only for "unigram".
    """

    def __init__(self, spec: ReplacedTokenSpec, facts: Facts, model: TransformerSpec) -> None:
        super().__init__()
        assert facts.vocabulary is not None
        self.spec, self.facts = spec, facts
        self.generator = _generator(spec, model) if spec.corruption == "model" else None
        self.bias = nn.Parameter(torch.zeros(facts.vocabulary)) if spec.corrective else None
        self.below: torch.Tensor | None
        self.register_buffer("below", _shares_below(facts) if spec.corruption == "unigram" else None)

    def check(self, model: nn.Module) -> None:
        spec: Any = getattr(model, "spec", None)
        if getattr(model, "decoder", None) is not None:
            raise TorchstoneError("objective replaced_token: needs causal: false")
        head: Any = getattr(spec, "head", None)
        if getattr(head, "kind", None) != "token_classification" or head.classes != 1:
            raise TorchstoneError(
                "objective replaced_token: needs model.head: {kind: token_classification, classes: 1}, which says of "
                "each token whether it is the original"
            )
        if self.bias is not None and spec.embedding.table_width(spec.width) != spec.width:
            raise TorchstoneError("objective replaced_token: the corrective head needs embedding vectors of the width")

    def prepare(self, batch: Batch, key: Key) -> Batch:
        ids, generator = batch["ids"], key.fold("mask").generator()
        chosen = torch.rand(ids.shape, generator=generator).to(ids.device) < self.spec.rate
        for token in (self.facts.separator, self.facts.pad, self.facts.mask):
            if token is not None:
                chosen &= ids != token
        if "valid" in batch:
            chosen &= batch["valid"]
        draw = torch.randint(-(2**62), 2**62, (len(ids),), generator=generator).to(ids.device)
        masked = torch.where(chosen, self.facts.mask or 0, ids)
        return {**batch, "masked": masked, "targets": torch.where(chosen, ids, _IGNORE), "draw": draw}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        valid = batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel())
        return {"targets": (batch["targets"] >= 0).sum(), "tokens": valid}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key)[0]

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        result, scores = self._result(model, batch, None)
        return Result(result.terms, result.metrics, scores=scores)

    def _result(self, model: Any, batch: Batch, key: Key | None) -> tuple[Result, Any]:
        chosen, device = batch["targets"] >= 0, batch["ids"].device
        terms, drawn_N = self._corrupted(model, batch, key)
        corrupted = batch["ids"].masked_scatter(chosen, drawn_N)
        out = model(tokens_of(batch, corrupted), mask=BIDIRECTIONAL, key=None if key is None else key.tensor(device))
        original, valid = corrupted == batch["ids"], batch.get("valid", torch.ones_like(chosen))
        scores_BT = out.logits[..., 0]
        judged = valid if self.spec.detect == "all" else chosen
        known, label = at_least_float32(scores_BT[judged]), original[judged]
        detection = F.binary_cross_entropy_with_logits(known, label.to(known.dtype), reduction="sum")
        terms["detection"] = Term(detection, "tokens" if self.spec.detect == "all" else "targets", self.spec.weight)
        if self.bias is not None:
            named = out.hidden[chosen], model.embedding.table(), batch["targets"][chosen]
            if self.spec.correction == "simplified":
                nll = linear_cross_entropy(*named, bias_V=self.bias)
            else:
                copy_N = at_least_float32(scores_BT[chosen].detach())
                by_name_N = F.logsigmoid(-copy_N) - linear_nll_reference(*named, bias_V=self.bias)
                by_copy_N = F.logsigmoid(copy_N).masked_fill(~original[chosen], -torch.inf)
                nll = -torch.logaddexp(by_name_N, by_copy_N).sum()
            terms["correction"] = Term(nll, "targets", self.spec.corrective)
        replaced = ~original & valid
        found = Result.of(terms, out.aux)
        scores = {
            "replaced": (replaced.sum(), chosen.sum()),
            "detected": ((scores_BT < 0)[replaced].sum(), replaced.sum()),
            "detection_accuracy": (((known > 0) == label).sum(), judged.sum()),
        }
        return Result(found.terms, {**found.metrics, **scores}), scores

    def _lend(self, model: Any) -> None:
        """The generator looks up the model's embedding, and its positions where they are shared."""
        generator: Any = self.generator
        generator.embedding.lend(model.embedding)
        for name, position in generator.main.positions.items():
            if isinstance(position, _BorrowedPosition):
                position.lend(model.main.positions[name])

    def _corrupted(self, model: Any, batch: Batch, key: Key | None) -> tuple[dict[str, Term], torch.Tensor]:
        """The generator's term, and a token in the place of each masked one (N,)."""
        chosen = batch["targets"] >= 0
        truth_N = batch["targets"][chosen]
        row_N, at_N = chosen.nonzero(as_tuple=True)
        key_N = noise.mix(batch["draw"][row_N], at_N)
        V = self.facts.vocabulary or 1
        if self.spec.corruption == "oracle":
            return {}, truth_N
        if self.generator is None:
            share_N = noise.uniform(key_N, 1)[:, 0]
            drawn_N = (
                (share_N * V).long() if self.below is None else torch.searchsorted(self.below, share_N, right=True)
            )
            return {}, drawn_N.clamp(max=V - 1)
        generator: Any = self.generator
        self._lend(model)
        dropped = None if key is None or self.spec.sampling == "zero_dropout" else key.fold("generator")

        def head(key: Key | None) -> Any:
            out = generator(
                tokens_of(batch, batch["masked"]),
                outputs="none",
                mask=BIDIRECTIONAL,
                key=None if key is None else key.tensor(chosen.device),
            )
            return generator.vocabulary_head().product(out.hidden[chosen], model.embedding.table())

        learned = head(dropped)
        nll = linear_cross_entropy(learned.h, learned.weight, truth_N, bias_V=learned.bias, softcap=learned.softcap)
        with torch.no_grad():
            product = head(None) if dropped is not None and self.spec.sampling == "eval" else learned
            logits_NV = at_least_float32(product.h @ product.weight.T)
            if product.bias is not None:
                logits_NV = logits_NV + product.bias
            drawn_N = (logits_NV + noise.gumbel(key_N, logits_NV.shape[1])).argmax(-1)
        return {"generator": Term(nll, "targets")}, drawn_N


class _Borrowed(Embedding):
    """The embedding of another model, which trains it: without parameters of its own."""

    def lend(self, lender: Embedding) -> None:
        """Look up there from now on."""
        self.__dict__["lender"] = lender

    def table(self) -> torch.Tensor | None:
        found: torch.Tensor | None = self.__dict__["lender"].table()
        return found

    def tokens(self, inputs: Any) -> Tokens:
        found: Tokens = self.__dict__["lender"].tokens(inputs)
        return found

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found: torch.Tensor = self.__dict__["lender"](inputs, tokens, added, ctx, embeddings)
        return found


class _BorrowedPosition(Position):
    """Positions of another model, which trains them: without parameters of its own."""

    def __init__(self, own: Position) -> None:
        super().__init__()
        self.limit = own.limit

    def lend(self, lender: Position) -> None:
        """Ask there from now on."""
        for name in ("rotation", "decay", "bias", "embed"):
            self.__dict__[name] = getattr(lender, name)


def _shares_below(facts: Facts) -> torch.Tensor:
    assert facts.frequencies is not None
    count_V = facts.frequencies().double()
    count_V[[id for id in (facts.mask, facts.pad, facts.separator) if id is not None]] = 0
    return (count_V.cumsum(0) / count_V.sum().clamp(min=1)).float()


def _generator(spec: ReplacedTokenSpec, model: TransformerSpec) -> nn.Module:
    """The generator, drawn from torch's generator as modules of an objective are.

    Raises:
        TorchstoneError: a patch that changes what both share (width, embedding, vocabulary, reading both ways), or that
            fits no model.
    """
    own = {"head": {"kind": "mlm", "tied": True}, **spec.generator}
    if own.get("width", model.width) != model.width:
        raise TorchstoneError(
            f"objective.generator.width: {own['width']}; with the model's embedding it is {model.width}"
        )
    made = validate(TransformerSpec, merge(model.dump(), own, TransformerSpec), "objective.generator")
    for name in ("embedding", "vocabulary", "causal"):
        if getattr(made, name) != getattr(model, name):
            raise TorchstoneError(f"objective.generator.{name}: is the model's, and cannot be another")
    if made.depth > model.depth:
        warnings.warn(
            f"objective.generator.depth: {made.depth} layers, more than the {model.depth} of the model that learns "
            "from it",
            stacklevel=2,
        )
    built: Any = made.build()
    built.embedding = _Borrowed()
    dropout = 0.0 if spec.sampling == "zero_dropout" else made.dropout
    ours = made.position, made.attention, made.layers, dropout
    if ours == (model.position, model.attention, model.layers, model.dropout):
        positions = built.main.positions
        for name, position in list(positions.items()):
            positions[name] = _BorrowedPosition(position)
    generator: nn.Module = initialise(built, int(torch.randint(2**31 - 1, (1,))))
    return generator
