"""Knowledge neurons (Dai et al. 2022, arXiv 2104.08696): units inside feed-forwards that a fact's answer hangs on.

    P(v) = p(answer | prompt, hidden units of layer l at the answer's place := v)
    attribution of unit i = a_i * integral over s from 0 to 1 of dP(s a) / da_i        one path a layer (section 3.1)

Kept of a prompt are units with at least `threshold` of the largest attribution in any layer; of a fact those that are
kept in at least `share` of its prompts, and in three (section 3.2). Units are suppressed (0) or amplified (2 a_i) at
the answer's place (section 4), and a fact is rewritten in their columns of the second matrix (section 5):

    w_i <- w_i - l1 |w_i| t_old / |t_old| + l2 |w_i| t_new / |t_new|        t: rows of the output matrix

Units are those of `ffn: mlp` and, our extension, of gated networks, whose unit is the product before the last matrix.
A causal model's place is the prompt's last token.

Shapes: T tokens, M hidden units, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.interpret.integrated_gradients import Rule, integrated_gradients
from torchstone.model.feedforward._gated import Gated
from torchstone.model.feedforward.mlp import MLP
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer

__all__ = ["By", "Edit", "Fact", "KnowledgeNeurons", "Neuron", "drop_shared", "refine", "refine_together"]

Prompt = str | Sequence[int]
Unit = tuple[int, int]
"""Layer and hidden unit."""
By = Literal["attribution", "activation"]
"""What units are found by: their attribution, or, as a baseline, how active they are."""
_LOUD = 0.5
"""Share of a prompt's largest activation that the baseline keeps units from, as published."""
_LEAST, _ROUNDS, _BOUNDS, _STEP = 3, 6, (2.0, 5.0), 0.05


@dataclass(frozen=True)
class Neuron:
    """A hidden unit, with its mean attribution over the prompts that it was found in."""

    layer: int
    unit: int
    score: float = 0.0


_Fact = TypeVar("_Fact")
_Found = TypeVar("_Found", Neuron, Unit)


@dataclass(frozen=True)
class Fact:
    """One fact in several wordings."""

    prompts: tuple[Prompt, ...]
    answer: str | int


@dataclass
class Edit:
    """What an edit changed; `undo` puts it back."""

    units: tuple[Unit, ...]
    _before: list[tuple[torch.Tensor, int, torch.Tensor]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """The weights as they were, to the bit."""
        for weight, unit, column in reversed(self._before):
            weight[:, unit] = column
        self._before.clear()


class KnowledgeNeurons:
    """Finds, suppresses, amplifies and edits the units of a model.

    Args:
        model: a Transformer with a head over the vocabulary; put into evaluation mode.
        tokenizer: of prompts that are texts.
        steps, rule: of the integral.
        threshold: of a prompt's largest attribution.
        share: of a fact's prompts.
        mask: how a masked model's prompts spell the place of the answer; a number is the token itself, for prompts that
            are ids.
        batch: copies along a path at once; None takes all.

    Raises:
        TorchstoneError: no Transformer, one without hidden units or without logits over the vocabulary, a masked one
            whose tokenizer has no mask token, or a threshold or share that is not above 0 and at most 1.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        steps: int = 20,
        rule: Rule = "midpoint",
        threshold: float = 0.2,
        share: float = 0.7,
        mask: str | int = "[MASK]",
        batch: int | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            raise TorchstoneError(f"knowledge neurons: needs a Transformer, got {type(model).__name__}")
        model.vocabulary_head()
        self.steps, self.rule, self.batch = steps, rule, batch
        self.threshold, self.share = _portion("threshold", threshold), _portion("share", share)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.masked, self._marker = model.decoder is None, "[MASK]" if isinstance(mask, int) else mask
        self._mask = mask if isinstance(mask, int) else None if tokenizer is None else tokenizer.mask
        self._side = "encoder" if self.masked else "decoder"
        self._networks = [self._network(number, layer) for number, layer in enumerate(model.main.layers)]
        self._forced: list[dict[int, tuple[torch.Tensor, float]]] = []
        if self.masked and self._mask is None:
            raise TorchstoneError("knowledge neurons: a masked model needs a mask token; give a tokenizer that has one")

    def _network(self, number: int, layer: Any) -> Any:
        network = getattr(layer, "ffn", None)
        if not isinstance(network, MLP | Gated) or not hasattr(network.down, "weight"):
            kind = type(network).__name__
            raise TorchstoneError(
                f"knowledge neurons: layer {number} has no hidden units that are all of one network ({kind})"
            )
        return network

    # -- prompts

    def read(self, prompt: Prompt) -> tuple[list[int], int]:
        """Ids of a prompt, and the place of its answer.

        Raises:
            TorchstoneError: a masked model's prompt has no place or two; a prompt without tokens.
        """
        ids = list(prompt) if not isinstance(prompt, str) else self._encode(prompt)
        if not self.masked:
            if not ids:
                raise TorchstoneError("knowledge neurons: a prompt without tokens")
            return ids, len(ids) - 1
        at = [place for place, token in enumerate(ids) if token == self._mask]
        if len(at) != 1:
            shown = prompt if isinstance(prompt, str) else list(prompt)
            raise TorchstoneError(
                f"knowledge neurons: a prompt needs one {self._marker}, this has {len(at)}: {shown!r:.80}"
            )
        return ids, at[0]

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise TorchstoneError("knowledge neurons: a prompt that is text needs the tokenizer")
        before, after = self.tokenizer.template
        pieces = (
            self.tokenizer.encode_batch(prompt.split(self._marker)) if self.masked else [self.tokenizer.encode(prompt)]
        )
        ids = [*before]
        for number, piece in enumerate(pieces):
            ids += [self._mask or 0, *piece] if number else piece
        return ids + (after if self.masked else [])

    def token(self, answer: str | int) -> int:
        """The id of an answer.

        Raises:
            TorchstoneError: it is no single token, and names its pieces; a word that the tokenizer does not know; an id
                that the model has not.
        """
        if isinstance(answer, int):
            size = self.model.spec.vocabulary
            assert size is not None
            if not 0 <= answer < size:
                raise TorchstoneError(f"knowledge neurons: the answer {answer} is no id of the model's {size:,}")
            return answer
        if self.tokenizer is None:
            raise TorchstoneError("knowledge neurons: an answer that is text needs the tokenizer")
        ids = self.tokenizer.encode(answer)
        if len(ids) != 1:
            pieces = ", ".join(repr(self.tokenizer.backend.id_to_token(token)) for token in ids)
            raise TorchstoneError(f"knowledge neurons: the answer {answer!r} is {len(ids)} tokens, not one: {pieces}")
        if ids[0] == self._unknown:
            raise TorchstoneError(f"knowledge neurons: the tokenizer does not know the answer {answer!r}")
        return ids[0]

    @cached_property
    def _unknown(self) -> int | None:
        """The id that stands for what the tokenizer does not know."""
        if self.tokenizer is None:
            return None
        made = json.loads(self.tokenizer.backend.to_str())["model"]
        name = made.get("unk_token")
        return made.get("unk_id") if name is None else self.tokenizer.backend.token_to_id(name)

    # -- probabilities

    def _probability(self, ids: list[int], at: int, answer: int, taps: Taps, rows: int = 1) -> torch.Tensor:
        """p(answer) of each of `rows` copies of the prompt (rows,)."""
        device = next(self.model.parameters()).device
        out = self.model(torch.tensor([ids], device=device).expand(rows, -1), taps=taps)
        assert out.logits is not None
        return out.logits[:, at].float().softmax(-1)[:, answer]

    def _path(self, layer: int) -> str:
        return f"{self._side}.layers.{layer}.ffn.hidden"

    def _taps(self, at: int, record: Sequence[str] = (), more: Mapping[str, Any] | None = None) -> Taps:
        """Taps that put in force what `suppress` and `amplify` ask for."""

        def scaled(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def change(h_BTM: torch.Tensor) -> torch.Tensor:
                h_BTM = h_BTM.clone()
                for forced in self._forced:
                    if layer in forced:
                        units, factor = forced[layer]
                        h_BTM[:, at, units.to(h_BTM.device)] *= factor
                return h_BTM

            return change

        layers = {layer for forced in self._forced for layer in forced}
        return Taps(record, {self._path(layer): scaled(layer) for layer in layers} | dict(more or {}))

    @torch.no_grad()
    def probability(self, prompt: Prompt, answer: str | int) -> float:
        """p(answer) at the prompt's place, under whatever is suppressed and amplified now."""
        ids, at = self.read(prompt)
        return float(self._probability(ids, at, self.token(answer), self._taps(at)))

    @torch.no_grad()
    def activations(self, prompt: Prompt) -> list[torch.Tensor]:
        """Of each layer the hidden units (M,) at the place of the answer."""
        ids, at = self.read(prompt)
        paths = [self._path(layer) for layer in range(len(self._networks))]
        taps = self._taps(at, paths)
        self._probability(ids, at, 0, taps)
        return [taps.seen[path][0, at] for path in paths]

    def activation(self, neurons: Iterable[Neuron | Unit], prompts: Sequence[Prompt]) -> float:
        """Mean activation of units over prompts. Of a fact's neurons it should be largest in prompts that mention head
        and tail, smaller with the head alone, smallest with neither (section 4).

        Raises:
            TorchstoneError: no prompt or no unit, or a unit that is not there.
        """
        units = _units(neurons)
        if not units or not _several(prompts):
            raise TorchstoneError("knowledge neurons: a mean activation needs a unit and a prompt")
        for layer, unit in units:
            self._check(layer, unit)
        found = [self.activations(prompt) for prompt in prompts]
        return sum(float(each[layer][unit]) for each in found for layer, unit in units) / len(found) / len(units)

    # -- attribution

    def attribute(self, prompt: Prompt, answer: str | int) -> list[torch.Tensor]:
        """Of each layer the attribution of its hidden units (M,) to p(answer)."""
        (ids, at), token = self.read(prompt), self.token(answer)
        found = []
        for layer, a_M in enumerate(self.activations(prompt)):

            def f(v_NM: torch.Tensor, layer: int = layer) -> torch.Tensor:
                def put(h_BTM: torch.Tensor) -> torch.Tensor:
                    before, after = h_BTM[:, :at], h_BTM[:, at + 1 :]
                    return torch.cat([before, v_NM[:, None].to(h_BTM.dtype), after], 1)

                return self._probability(ids, at, token, self._taps(at, more={self._path(layer): put}), len(v_NM))

            found.append(integrated_gradients(f, a_M, 0.0, self.steps, self.rule, self.batch))
        return found

    def coarse(self, scores: Sequence[torch.Tensor], threshold: float | None = None) -> dict[Unit, float]:
        """Units with at least `threshold` of the largest score in any layer, and their scores; none where no score is
        above zero.

        Raises:
            TorchstoneError: a threshold that is not above 0 and at most 1.
        """
        most = max(float(score.max()) for score in scores)
        bound = (self.threshold if threshold is None else _portion("threshold", threshold)) * most
        if most <= 0:
            return {}
        return {
            (layer, int(unit)): float(score[unit])
            for layer, score in enumerate(scores)
            for unit in (score >= bound).nonzero()[:, 0]
        }

    def find(self, prompts: Sequence[Prompt], answer: str | int, by: By = "attribution") -> list[Neuron]:
        """The knowledge neurons of a fact, by layer and unit; by activation, the baseline of the paper.

        Raises:
            TorchstoneError: fewer than three prompts; one without a place for the answer.
        """
        return refine(self._kept(prompts, answer, by), self.share)

    def find_all(self, facts: Mapping[str, Fact], by: By = "attribution") -> dict[str, list[Neuron]]:
        """The knowledge neurons of a relation's facts, the share of prompts moved until facts have two to five each
        (section 4.1)."""
        coarse = {name: self._kept(fact.prompts, fact.answer, by, f"fact {name!r}") for name, fact in facts.items()}
        return refine_together(coarse, self.share)

    def _kept(
        self, prompts: Sequence[Prompt], answer: str | int, by: By, name: str = "knowledge neurons"
    ) -> list[dict[Unit, float]]:
        """The coarse set of each prompt."""
        if by not in get_args(By):
            raise TorchstoneError(f"{name}: by needs {', '.join(get_args(By))}, got {by!r}")
        if len(_several(prompts, name)) < _LEAST:
            raise TorchstoneError(f"{name}: {len(prompts)} prompts; at least {_LEAST} are needed")
        if by == "activation":
            return [self.coarse(self.activations(prompt), _LOUD) for prompt in prompts]
        return [self.coarse(self.attribute(prompt, answer)) for prompt in prompts]

    # -- interventions

    @contextmanager
    def _scaled(self, neurons: Iterable[Neuron | Unit], factor: float) -> Iterator[None]:
        by_layer: dict[int, list[int]] = {}
        for layer, unit in _units(neurons):
            self._check(layer, unit)
            by_layer.setdefault(layer, []).append(unit)
        forced = {layer: (torch.tensor(units), factor) for layer, units in by_layer.items()}
        self._forced.append(forced)
        try:
            yield
        finally:
            # by identity: contexts may end in any order, and equality of tensors is no truth value
            self._forced = [other for other in self._forced if other is not forced]

    def suppress(self, neurons: Iterable[Neuron | Unit]) -> Any:
        """A context in which these units are 0 at the place of the answer."""
        return self._scaled(neurons, 0.0)

    def amplify(self, neurons: Iterable[Neuron | Unit], factor: float = 2.0) -> Any:
        """A context in which these units are `factor` times what they are."""
        return self._scaled(neurons, factor)

    def _check(self, layer: int, unit: int) -> None:
        if not 0 <= layer < len(self._networks) or not 0 <= unit < self._slots(layer).shape[1]:
            raise TorchstoneError(f"knowledge neurons: there is no unit {unit} in layer {layer}")

    # -- edits

    def _slots(self, layer: int) -> torch.Tensor:
        """The second matrix (D, M): column i is what unit i writes."""
        return self._networks[layer].down.weight

    def _rows(self) -> torch.Tensor:
        """Rows (V, D) of the output matrix."""
        head: Any = self.model.vocabulary_head()
        weight = self._slots(0)
        product = head.product(weight.new_zeros(1, weight.shape[0]), self.model.embedding.table())
        rows: torch.Tensor = product.weight
        if rows.shape[1] != weight.shape[0]:
            wide = f"{rows.shape[1]} numbers, the stream {weight.shape[0]}"
            raise TorchstoneError(f"knowledge neurons: rows of the output matrix have {wide}")
        return rows.detach()

    @torch.no_grad()
    def _write(self, neurons: Iterable[Neuron | Unit], change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
        units = tuple(dict.fromkeys(_units(neurons)))
        for layer, unit in units:
            self._check(layer, unit)
        edit = Edit(units)
        for layer, unit in units:
            weight = self._slots(layer)
            edit._before.append((weight, unit, weight[:, unit].clone()))
            weight[:, unit] = change(weight[:, unit])
        return edit

    def update(
        self, neurons: Iterable[Neuron | Unit], old: str | int, new: str | int, lam: tuple[float, float] = (1.0, 8.0)
    ) -> Edit:
        """Rewrite a fact: in each unit's column the direction of the old answer makes way for that of the new one.

        Units that many facts of the relation have in common carry the relation rather than the fact: leave them out
        with `drop_shared` first, as published.
        """
        rows, (less, more) = self._rows(), lam
        away, to = (torch.nn.functional.normalize(rows[self.token(answer)].float(), dim=0) for answer in (old, new))
        return self._write(neurons, lambda w_D: w_D + (w_D.norm() * (more * to - less * away)).to(w_D.dtype))

    def erase(self, neurons: Iterable[Neuron | Unit], fill: Literal["zero", "unk"] | int | str = "zero") -> Edit:
        """Empty the units' columns: zeros, or the output row of a token; "unk" is the token of what the tokenizer does
        not know.

        Raises:
            TorchstoneError: the tokenizer has no such token.
        """
        if fill == "zero":
            return self._write(neurons, torch.zeros_like)
        if fill == "unk":
            if self._unknown is None:
                raise TorchstoneError("knowledge neurons: fill unk needs a tokenizer with a token of the unknown")
            fill = self._unknown
        row = self._rows()[self.token(fill)]
        return self._write(neurons, lambda w_D: row.to(w_D.dtype))


def _portion(name: str, value: float) -> float:
    if not 0 < value <= 1:  # nan neither
        empty = "; above 1 no unit would be kept" if value > 1 else ""
        raise TorchstoneError(f"knowledge neurons: {name} is {value:g}, it must be above 0 and at most 1{empty}")
    return value


def _several(prompts: Sequence[Prompt], name: str = "knowledge neurons") -> Sequence[Prompt]:
    if isinstance(prompts, str):
        raise TorchstoneError(f"{name}: prompts are a list, this is one text: {prompts!r:.80}")
    return prompts


def _units(neurons: Iterable[Neuron | Unit]) -> list[Unit]:
    return [(each.layer, each.unit) if isinstance(each, Neuron) else (int(each[0]), int(each[1])) for each in neurons]


def refine(coarse: Sequence[Mapping[Unit, float]], share: float) -> list[Neuron]:
    """Units in the sets of at least `share` of a fact's prompts and of three, with their mean scores."""
    counts = Counter(unit for units in coarse for unit in units)
    least = max(_LEAST, math.ceil(share * len(coarse) - 1e-9))
    kept = sorted(unit for unit, count in counts.items() if count >= least)
    return [Neuron(*unit, sum(units.get(unit, 0.0) for units in coarse) / counts[unit]) for unit in kept]


def refine_together(coarse: Mapping[str, Sequence[Mapping[Unit, float]]], share: float) -> dict[str, list[Neuron]]:
    """`refine` of a relation's facts: below two units a fact on average the share falls by 0.05, above five it rises,
    at most six times."""
    found = {name: refine(sets, share) for name, sets in coarse.items()}
    for _ in range(_ROUNDS):
        mean = sum(len(units) for units in found.values()) / max(1, len(found))
        if _BOUNDS[0] <= mean <= _BOUNDS[1]:
            break
        share += _STEP if mean > _BOUNDS[1] else -_STEP
        found = {name: refine(sets, share) for name, sets in coarse.items()}
    return found


def drop_shared(found: Mapping[_Fact, Sequence[_Found]], most: float = 0.1) -> dict[_Fact, list[_Found]]:
    """The neurons of a relation's facts without those of more than `most` of the facts, which carry the relation
    (section 5); what only one fact has stays, however few facts there are."""
    counts = Counter(unit for own in found.values() for unit in _units(own))
    bound = max(1, most * len(found))
    return {fact: [each for each in own if counts[_units([each])[0]] <= bound] for fact, own in found.items()}
