"""Taps record or replace any named intermediate value, and cost nothing when nobody listens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

IDS = torch.arange(10).view(2, 5)


def model(**fields: Any) -> Transformer:
    body = {"width": 32, "depth": 3, "vocabulary": 61, "context": 64, "attention": {"heads": 4}, **fields}
    built = initialise(validate(TransformerSpec, body).build(), 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(5)
    return built


def test_every_named_value_of_a_layer_can_be_recorded() -> None:
    taps = Taps(record=["*"])
    model()(IDS, taps=taps)
    names = {name.removeprefix("decoder.layers.1.") for name in taps.seen if name.startswith("decoder.layers.1.")}
    assert names == {
        "attention.q", "attention.k", "attention.v", "attention.probs", "attention.mixed", "attention.out",
        "ffn.hidden", "ffn.out", "x",
    }  # fmt: skip
    assert {"decoder.embedding", "decoder.norm", "logits"} <= set(taps.seen)
    assert taps.unmatched() == []


def test_recording_changes_nothing(float64: None) -> None:
    built = model().double()
    taps = Taps(record=["*"])  # probabilities come from the definition, not from the fused kernel
    torch.testing.assert_close(built(IDS, taps=taps).logits, built(IDS).logits, rtol=0, atol=1e-10)


def test_recorded_probabilities_are_causal_and_sum_to_one() -> None:
    taps = Taps(record="decoder.layers.0.attention.probs")
    model()(IDS, taps=taps)
    probs = taps.seen["decoder.layers.0.attention.probs"]
    assert probs.shape == (2, 4, 5, 5) and list(taps.seen) == ["decoder.layers.0.attention.probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 5))
    assert not probs.triu(1).any()


def test_recorded_values_keep_their_graph_unless_detached() -> None:
    built = model()
    for detach in (False, True):
        taps = Taps(record=["decoder.layers.2.x"], detach=detach)
        built(IDS, taps=taps)
        assert taps.seen["decoder.layers.2.x"].requires_grad is not detach


@pytest.mark.parametrize(
    "name", ["embedding", "layers.1.attention.probs", "layers.1.attention.v", "layers.1.ffn.hidden", "layers.2.x"]
)
def test_replaced_value_changes_the_result(name: str) -> None:
    built = model()
    plain = built(IDS).logits
    for replacement in (torch.zeros_like, lambda x: torch.zeros_like(x)):
        taps = Taps(replace={f"decoder.{name}": replacement})
        changed = built(IDS, taps=taps).logits
        assert not torch.allclose(changed, plain) and torch.isfinite(changed).all()
        assert taps.unmatched() == []


def test_a_value_replaced_by_itself_changes_nothing() -> None:
    built = model()
    taps = Taps(record=["*"])
    plain = built(IDS, taps=taps).logits
    again = built(IDS, taps=Taps(replace=dict(taps.seen))).logits
    torch.testing.assert_close(again, plain)


def test_replacement_is_what_gets_recorded() -> None:
    name = "decoder.layers.0.ffn.out"
    taps = Taps(record=[name], replace={name: lambda x: x + 1})
    other = Taps(record=[name])
    built = model()
    built(IDS, taps=taps)
    built(IDS, taps=other)
    torch.testing.assert_close(taps.seen[name], other.seen[name] + 1)


def test_zeroed_head_is_a_head_that_is_not_there() -> None:
    built = model(depth=1)

    def ablate(probs: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(1, 4, 1, 1)
        kept[:, 2] = 0
        return probs * kept

    ablated = built(IDS, taps=Taps(replace={"decoder.layers.0.attention.probs": ablate})).logits
    with torch.no_grad():
        built.decoder.layers[0].attention.out.weight[:, 16:24] = 0
    torch.testing.assert_close(built(IDS).logits, ablated)


def test_replacement_of_another_shape_is_refused_in_a_sentence() -> None:
    with pytest.raises(TorchstoneError) as caught:
        model()(IDS, taps=Taps(replace={"decoder.layers.0.x": torch.zeros(3)}))
    assert str(caught.value) == "tap decoder.layers.0.x: the replacement has shape (3,), the value has (2, 5, 32)"


def test_names_that_match_nothing_are_told() -> None:
    taps = Taps(record=["decoder.layers.9.x", "decoder.layers.*.x"], replace={"encoder.*": torch.zeros_like})
    model()(IDS, taps=taps)
    assert taps.unmatched() == ["decoder.layers.9.x", "encoder.*"]


def test_taps_hear_decoding_and_encoders() -> None:
    built = model(encoder={"depth": 1})
    taps = Taps(record=["*.probs"])
    state = built.state(2, 8)
    built(IDS, memory=IDS, state=state, taps=taps)
    built(IDS[:, :1], state=state, taps=taps)
    assert taps.seen["encoder.layers.0.attention.probs"].shape == (2, 4, 5, 5)
    assert taps.seen["decoder.layers.2.cross.probs"].shape == (2, 4, 1, 5)
    assert taps.seen["decoder.layers.2.attention.probs"].shape == (2, 4, 1, 6)


def test_gradients_flow_through_a_replaced_value() -> None:
    put = torch.zeros(2, 5, 32, requires_grad=True)
    model()(IDS, taps=Taps(replace={"decoder.layers.0.x": put})).logits.sum().backward()
    assert put.grad is not None and put.grad.abs().sum() > 0


def test_taps_work_with_recomputed_activations() -> None:
    seen = []
    for recompute in (False, True):
        built = model()
        built.decoder.recompute = recompute
        taps = Taps(record=["*.probs"], replace={"decoder.layers.1.ffn.out": lambda x: x * 0.5})
        built(Tokens.of(IDS), taps=taps).logits.square().sum().backward()
        seen.append({**taps.seen, **{name: p.grad for name, p in built.named_parameters()}})
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value)


def test_taps_survive_compilation() -> None:
    torch._dynamo.reset()
    name = "decoder.layers.1.attention.probs"
    eager, compiled = model(depth=2), model(depth=2)
    for layer in compiled.decoder.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for taps in (None, Taps(record=[name], replace={name: lambda p: p * 0.5})):
        again = None if taps is None else Taps(taps.record, taps.replace)
        torch.testing.assert_close(compiled(IDS, taps=again).logits, eager(IDS, taps=taps).logits)
        if taps is not None and taps.record:
            torch.testing.assert_close(again.seen[name], taps.seen[name])
    torch._dynamo.reset()


def test_taps_survive_compilation_of_more_layers_than_the_recompile_limit() -> None:
    torch._dynamo.reset()
    eager, compiled = model(depth=9), model(depth=9)
    for layer in compiled.decoder.layers:
        layer.compile(fullgraph=True, backend="eager")
    ours, theirs = Taps(record=["*.ffn.out"]), Taps(record=["*.ffn.out"])
    torch.testing.assert_close(compiled(IDS, taps=ours).logits, eager(IDS, taps=theirs).logits)
    assert ours.seen.keys() == theirs.seen.keys()
    torch._dynamo.reset()
