"""Structured Prompting: Scaling In-Context Learning to 1,000 Examples (Hao et al. 2022, arXiv 2212.06713)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchstone.adapt.structured_prompting import StructuredPrompt
from torchstone.generate import Engine
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Claim, Measured, Number, Paper, Scale
from torchstone.spec import validate

__all__ = ["PAPER"]

_GROUP, _OWN, _VOCABULARY = 24, 6, 50


def _logits(prompt: StructuredPrompt, own: list[int]) -> torch.Tensor:
    """Of tokens after the groups, (T, V)."""
    state = prompt.prefix.fork(torch.zeros(1, dtype=torch.int64))
    state.extend(state.longest + len(own))
    with torch.no_grad():
        logits = prompt.engine.model(torch.tensor([own]), state=state).logits
    assert logits is not None
    return logits[0]


def _identities(scale: Scale, first: int) -> Measured:
    """Largest differences over positions and seeds, and what was read."""
    numbers: dict[str, float] = {}

    def worst(name: str, found: torch.Tensor, wanted: torch.Tensor, choose: Callable[..., float] = max) -> None:
        difference = float((found - wanted).abs().max())
        numbers[name] = choose(numbers.get(name, difference), difference)

    for position in ("rotary", "alibi", "none", "learned"):
        for seed in range(first, first + 3):
            fields = {
                "width": 64,
                "depth": 3,
                "vocabulary": _VOCABULARY,
                "context": 64,
                "attention": {"heads": 4, "kv_heads": 2},
                "position": position,
                "residual": {"kind": "pre", "std": 0.3},
            }
            model = initialise(validate(TransformerSpec, fields).build(), seed)
            drawn = torch.Generator().manual_seed(seed)
            groups = torch.randint(_VOCABULARY, (8, _GROUP), generator=drawn).tolist()
            own = torch.randint(_VOCABULARY, (_OWN,), generator=drawn).tolist()

            def prompt(*some: list[int], model: Any = model, **options: Any) -> StructuredPrompt:
                fields = {"group_length": _GROUP, "bos": None, "batch": 1, **options}
                made = StructuredPrompt(Engine(model, compile="off"), **fields)
                made.add(some)
                return made

            one = _logits(prompt(groups[0]), own)
            with torch.no_grad():
                plain = model(torch.tensor([[*groups[0], *own]]), outputs="all").logits[0, -_OWN:]
            worst("one group, from an ordinary prompt", one, plain)
            worst("eight groups alike, from one", _logits(prompt(*[groups[0]] * 8), own), one)
            worst("the same without the weight", _logits(prompt(*[groups[0]] * 8, weight=1), own), one, min)
            read: list[int] = []
            hook = model.register_forward_pre_hook(lambda module, x, read=read: read.append(x[0].ids.numel()))
            eight = prompt(*groups)
            hook.remove()
            numbers["tokens read for eight groups, in groups"] = sum(read) / _GROUP
            numbers["forwards for eight groups"] = len(read)
            worst("groups in another order", _logits(prompt(*groups[::-1]), own), _logits(eight, own))
    return Measured(numbers)


_identities.builds = ("torchstone.adapt.structured_prompting", "torchstone.model.state")  # type: ignore[attr-defined]

IDENTITIES = Claim(
    id="groups-as-one",
    kind="identity",
    text="One group gives the logits of an ordinary prompt; M groups that are all the same give those of one, and do "
    "not without the weight; the order of groups does not matter; every group is read once.",
    figure="rescaled attention, equation 5; encoding costs M L^2 instead of (M L)^2",
    gates=(
        Number("one group, from an ordinary prompt", high=1e-4),
        Number("eight groups alike, from one", high=1e-4),
        Number("the same without the weight", low=1e-2),
        Number("groups in another order", high=1e-4),
        Number("tokens read for eight groups, in groups", low=8, high=8),
        Number("forwards for eight groups", low=8, high=8),
    ),
    run=_identities,
)

PAPER = Paper(
    slug="structured-prompting",
    title="Structured Prompting: Scaling In-Context Learning to 1,000 Examples",
    authors="Yaru Hao, Yutao Sun, Li Dong, Zhixiong Han, Yuxian Gu, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2212.06713",
    topics=("in-context learning", "demonstrations", "long context", "parallel context", "decoding"),
    parts=(),
    summary="How a frozen model can learn from more demonstrations than its window holds: groups encoded apart at the "
    "same positions, seen together by an input whose own tokens weigh as much as there are groups.",
    claims=(IDENTITIES,),
)
