"""Image classifiers: the network by its definition, statistics of whole steps, the auxiliary head, taps, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.measure import measure
from torchstone.model.taps import Taps
from torchstone.recipe import load_recipe
from torchstone.spec import resolve, validate
from torchstone.train.run import build_model, shape_of
from torchstone.trust.model._classifier import BatchNorm, ClassifierSpec, Passing

SMALL: dict[str, Any] = {"classes": 4, "channels": 2, "image": 9}


def spec_of(kind: str, **fields: Any) -> ClassifierSpec:
    return validate(resolve("model", kind), {**SMALL, **fields})  # type: ignore[return-value]


def built(kind: str, **fields: Any) -> Any:
    return build_model(spec_of(kind, **fields), 0)


def by_definition(state: dict[str, torch.Tensor], pixels: torch.Tensor, blocks: tuple[int, ...], training: bool) -> Any:
    """A PreActResNet's features from named weights, written out with functions of torch."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        kept = [state[f"{name}.{which}"].clone() for which in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *kept, training=training))

    x = F.conv2d(pixels, state["backbone.stem.weight"], padding=1)
    number = 0
    for stage, count in enumerate(blocks):
        for first in range(count):
            stride, at = 2 if stage and not first else 1, f"backbone.blocks.{number}"
            h = norm(x, f"{at}.norm1")
            kept = x
            if f"{at}.shortcut.weight" in state:
                kept = F.conv2d(h, state[f"{at}.shortcut.weight"], stride=stride)
            h = F.conv2d(h, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            x = kept + F.conv2d(norm(h, f"{at}.norm2"), state[f"{at}.conv2.weight"], padding=1)
            number += 1
    return F.avg_pool2d(norm(x, "backbone.norm"), x.shape[-1])[:, :, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_preact_resnet_is_its_definition(training: bool) -> None:
    model = built("preact_resnet", width=3, blocks=[1, 2, 1]).double().train(training)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    pixels = torch.rand(5, 2, 9, 9).double()
    out = model(pixels)
    torch.testing.assert_close(out.features, by_definition(model.state_dict(), pixels, (1, 2, 1), training))
    torch.testing.assert_close(out.logits, F.linear(out.features, model.head.weight, model.head.bias))
    assert out.auxiliary is None


def test_preact_resnet_18_has_the_published_parameters() -> None:
    model = shape_of(validate(resolve("model", "preact_resnet"), {"classes": 10, "channels": 3, "image": 32}))
    # 11,171,146 in kuangliu/pytorch-cifar, and there no normalisation behind the last block
    assert sum(p.numel() for p in model.parameters()) == 11_171_146 + 2 * 512
    # 0.56 billion multiplications and additions an image, forward and backward three times two of them
    assert measure(model).flops_per_token == pytest.approx(6 * 0.5557e9, rel=0.01)


def test_mlp_is_its_definition() -> None:
    model = built("mlp", hidden=[7, 5])
    pixels = torch.rand(3, 2, 9, 9)
    h = pixels.flatten(1)
    for layer in model.backbone.layers:
        h = F.relu(F.linear(h, layer.weight, layer.bias))
    out = model(pixels)
    torch.testing.assert_close(out.features, h)
    torch.testing.assert_close(out.logits, F.linear(h, model.head.weight, model.head.bias))


@pytest.mark.parametrize("kind", ["mlp", "preact_resnet"])
def test_pixels_are_standardised_inside_the_model(kind: str) -> None:
    small = {"width": 2, "blocks": [1]} if kind == "preact_resnet" else {}
    plain, inside = built(kind, **small).eval(), built(kind, mean=[0.4, 0.5], std=[0.2, 0.3], **small).eval()
    assert plain.state_dict().keys() == inside.state_dict().keys()
    pixels = torch.rand(3, 2, 9, 9)
    by_hand = torch.stack([(pixels[:, 0] - 0.4) / 0.2, (pixels[:, 1] - 0.5) / 0.3], 1)
    torch.testing.assert_close(inside(pixels).logits, plain(by_hand).logits)
    shifted = built(kind, mean=[0.4, 0.5], **small).eval()
    torch.testing.assert_close(shifted(pixels).logits, plain(pixels - torch.tensor([0.4, 0.5])[:, None, None]).logits)


@pytest.mark.parametrize("form", ["linear_mlp", "mlp"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_auxiliary_head_is_its_definition(form: str, norm: str) -> None:
    model = built("mlp", hidden=[6], rejection={"form": form, "norm": norm})
    head, out = model.rejection, model(torch.rand(8, 2, 9, 9))
    phi = out.features
    h = F.linear(phi, head.up.weight, head.up.bias)
    assert h.shape == (8, 3)  # half of the features
    if norm == "batch":
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    logit = F.linear(F.relu(h), head.down.weight, head.down.bias)
    if form == "linear_mlp":
        logit = logit + F.linear(phi, head.linear.weight, head.linear.bias)
    torch.testing.assert_close(out.auxiliary, torch.sigmoid(logit[:, 0]))
    assert ("rejection.linear.weight" in model.state_dict()) == (form == "linear_mlp")


def test_a_head_changes_no_first_value_of_the_classifier() -> None:
    plain, headed = built("mlp"), built("mlp", rejection={})
    assert all(torch.equal(headed.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_running_statistics_are_those_of_the_whole_step_however_it_is_divided() -> None:
    x = torch.randn(12, 3, 4, 4).double() * 2 + 5
    found = []
    for sizes in ((12,), (5, 3, 4)):
        norm = BatchNorm(3).double()
        norm.initialise("weight", norm.weight.data, torch.Generator())
        norm.initialise_buffers()
        norm.layer, norm.name = "backbone", "norm"
        total: Any = 0
        for part in x.split(sizes):
            passing = Passing(None)
            norm(part, passing)
            total = total + passing.aux["backbone:norm"][0]
        assert (norm.running_mean == 0).all()  # a forward alone moves nothing
        norm.after_step(0, {"norm": total, "another": torch.zeros(7)})
        found.append(norm)
    torchs = nn.BatchNorm2d(3).double()
    torchs(x)
    for norm in found:
        torch.testing.assert_close(norm.running_mean, torchs.running_mean)
        torch.testing.assert_close(norm.running_var, torchs.running_var)
    before = found[0].running_mean.clone()
    found[0].after_step(1, {})
    assert torch.equal(found[0].running_mean, before)


def test_taps_record_and_replace() -> None:
    model = built("preact_resnet", width=2, blocks=[1, 1], rejection={}).eval()
    pixels, taps = torch.rand(2, 2, 9, 9), Taps(record=["*"])
    out = model(pixels, taps)
    assert set(taps.seen) == {"blocks.0", "blocks.1", "features", "logits", "auxiliary"}
    assert taps.seen["blocks.1"].shape == (2, 4, 5, 5) and torch.equal(taps.seen["logits"], out.logits)
    silenced = model(pixels, Taps(replace={"features": torch.zeros_like})).logits
    torch.testing.assert_close(silenced, model.head.bias.expand(2, -1))


@pytest.mark.parametrize("kind", ["mlp", "preact_resnet"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = built(kind, rejection={}, **({"width": 4, "blocks": [1, 1]} if kind == "preact_resnet" else {}))
    out = model(torch.rand(9, 2, 9, 9))
    (out.logits.logsumexp(1).sum() + out.auxiliary.log().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_wrong_sizes_are_one_sentence() -> None:
    model = built("mlp")
    with pytest.raises(TorchstoneError, match="takes images of 2 x 9 x 9, got 1 x 9 x 9"):
        model(torch.rand(2, 1, 9, 9))
    with pytest.raises(TorchstoneError, match=r"model\.channels: is not known before the data are"):
        resolve("model", "mlp")().build()  # type: ignore[attr-defined]
    for fields, said in (({"mean": [0.5]}, "mean: has 1 values, and a pixel 2 channels"), ({"std": [1, 0]}, "std")):
        with pytest.raises(TorchstoneError, match=said):
            spec_of("mlp", **fields)
    with pytest.raises(TorchstoneError, match="two examples or more"):
        built("mlp", rejection={})(torch.rand(1, 2, 9, 9))
    with pytest.raises(TorchstoneError, match="rejection"):
        load_recipe({"model": {"kind": "mlp", "rejection": {"form": "linear"}}})


def test_the_spec_survives_json() -> None:
    spec = spec_of("preact_resnet", rejection={"form": "mlp"}, blocks=[2, 1])
    assert validate(type(spec), spec.dump()) == spec
