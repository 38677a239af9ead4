"""Models that differ in one part agree in everything else; very deep models; parts alone in a stranger's module."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from conformance.cases import Case, axes, usual
from conformance.variants import variants
from torchstone.model.context import Context
from torchstone.model.linear import Linear
from torchstone.model.position import Positions
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.spec import resolve, validate

# Where the parameters of a family lie. A block names sublayers, a stack places attentions, and a residual owns how
# weights start.
HOMES = {
    "attention": r"\.(attention|cross)\.",
    "ffn": r"\.ffn\.",
    "norm": r"norm",
    "position": r"\.positions\.",
    "embedding": r"^embedding\.",
    "head": r"^head\.",
    "block": r"$^",
    "stack": r"\.(attention|keys_values)\.",
    "linear": r"$^",
}


@pytest.mark.parametrize(
    ("family", "value"),
    [(family, value) for family in HOMES for value in axes()[family] if value != usual()[family]],
)
def test_two_models_that_differ_in_one_part_agree_in_every_other_parameter(family: str, value: str) -> None:
    start = {"head": "lm_untied"} if family == "embedding" else {}
    base, other = Case.of(**start), Case.of(**{**start, family: value})
    ours, theirs = (case.model(seed=4, noise=0).state_dict() for case in (base, other))
    common = [name for name in ours if name in theirs and not re.search(HOMES[family], name)]
    assert len(common) >= (2 if family == "stack" else 3)  # a stack may have no layer like those of another
    for name in common:
        # of several ways through a layer the first starts as the only one of another stack
        found = theirs[name][: len(ours[name])] if family == "stack" else theirs[name]
        assert torch.equal(ours[name], found), f"{name} differs between {base} and {other}"
    if family not in ("block", "stack", "linear"):
        elsewhere = {name for names in (ours, theirs) for name in names if not re.search(HOMES[family], name)}
        assert set(common) == elsewhere, "a parameter of another part is there in one model only"


# first values of `layer_scale` are cut at one deviation: no multiple of others
@pytest.mark.parametrize("value", sorted(value for value in axes()["residual"] if "layer_scale" not in value))
def test_residual_owns_only_the_scale_by_which_weights_start(value: str) -> None:
    ours, theirs = Case.of().model(noise=0), Case.of(residual=value).model(noise=0)
    slices = {f"{path}.weight": module.slices for path, module in ours.named_modules() if isinstance(module, Linear)}
    values = theirs.state_dict()
    for name, mine in ours.state_dict().items():
        if "norm" not in name:
            for ratio in (values[name] / mine).split(slices.get(name, len(mine))):
                torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0)


def test_another_seed_gives_other_weights() -> None:
    ours, theirs = (Case.of().model(seed=seed, noise=0).state_dict() for seed in (0, 1))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if "norm" not in name)


def test_layers_and_sides_start_from_different_weights() -> None:
    state = Case.of(form="encoder_decoder").model(noise=0).state_dict()
    values = [value for name, value in state.items() if name.endswith("attention.qkv.weight")]
    assert len(values) == 3
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[i + 1 :])


@pytest.mark.slow
def test_model_of_a_thousand_layers_builds_and_takes_a_step() -> None:
    model = Case.of().model(noise=0, depth=1000)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 61, (1, 9))
    losses = []
    for _ in range(2):
        logits = model(ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


# --------------------------------------------------------------------------------- alone, in a stranger's nn.Module


class Stranger(nn.Module):
    """Somebody else's layer: a part between two projections of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part, self.after = nn.Linear(5, 32), part, nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(self.before(x))
        return self.after(y[0] if isinstance(y, tuple) else y)


def takes_part(part: nn.Module) -> None:
    module = Stranger(initialise(part, 0))
    x = torch.randn(2, 7, 5)
    y = module(x)
    assert y.shape == (2, 7, 3) and torch.isfinite(y).all()
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("family", ["attention", "ffn"])
def test_mixers_work_alone_in_a_strangers_module(family: str) -> None:
    for name, fields in variants(family).items():
        fields = dict(fields)
        spec = validate(resolve(family, fields.pop("kind")), fields, name)
        if not getattr(spec, "reads_ids", False):  # a stranger's module hands on no token ids
            takes_part(spec.build(Site(width=32)))


def test_norms_work_alone_in_a_strangers_module() -> None:
    for name, fields in variants("norm").items():
        fields = dict(fields)
        takes_part(validate(resolve("norm", fields.pop("kind")), fields, name).build(32))


def test_linears_work_alone_in_a_strangers_module() -> None:
    for name, fields in variants("linear").items():
        fields = dict(fields)
        spec = validate(resolve("linear", fields.pop("kind")), fields, name)
        takes_part(Site(width=32, linear_spec=spec).linear(32, 32, "up"))


def test_positions_work_beside_an_attention_in_a_strangers_module() -> None:
    for name, fields in variants("position").items():
        fields = dict(fields)
        spec = validate(resolve("position", fields.pop("kind")), fields, name)
        positions = Positions(64, True)
        attention = resolve("attention", "softmax")(heads=4).build(
            Site(width=32, position_spec=spec, positions=positions)
        )
        initialise(attention, 0)
        initialise(positions, 0)
        x = torch.randn(2, 7, 32)
        y, _, _ = attention(x, Context.alone(x, positions=positions))
        plain, _, _ = initialise(resolve("attention", "softmax")(heads=4).build(Site(width=32)), 0)(x)
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert torch.equal(y, plain) == (spec.gives in ("nothing", "embedding")), name
        added = spec.build(8, 4, 32, 64, True)
        initialise(added, 0)
        where = Tokens.blank(7).where
        embedding = added.embed(where)
        assert (embedding is not None and embedding.shape == (1, 7, 32)) == (spec.gives == "embedding"), name
