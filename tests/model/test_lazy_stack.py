"""LazyFormer: what its card promises beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model import mask as masks
from torchstone.model.attention.given_probs import GivenProbs, GivenProbsSpec
from torchstone.model.attention.softmax import CrossAttention
from torchstone.model.context import Context, Handoff
from torchstone.model.mask import CAUSAL, Window
from torchstone.model.site import Gives, Site
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.ops import attention as kernels

T = 13
pytestmark = pytest.mark.usefixtures("float64")
BOTH = pytest.mark.parametrize("reuse", ["probabilities", "queries_keys"])


def fields(stack: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "width": 32,
        "depth": 4,
        "vocabulary": 50,
        "context": 64,
        "attention": {"heads": 4, "kv_heads": 2},
        **more,
        "stack": {"kind": "lazy", **(stack or {})},
    }


def built(stack: dict[str, Any] | None = None, **more: Any) -> Any:
    """With weights large enough that attention is far from even."""
    return noisy(torchstone.build(fields(stack, **more)))


def noisy(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = Key(0).fold("noise", name).generator()
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def ids(rows: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=Key(0).fold("ids").generator())


def outcome(model: Any, inputs: Any, **arguments: Any) -> list[torch.Tensor]:
    """Hidden states, and the gradient of every parameter."""
    hidden = model(inputs, **arguments).hidden
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
    return [hidden, *torch.autograd.grad(loss, list(model.parameters()))]


def alike(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- the card's identities


@pytest.mark.parametrize("form", [{}, {"causal": False}, {"attention": {"kind": "retention", "heads": 4}}], ids=str)
def test_blocks_of_one_layer_are_the_plain_stack_bit_for_bit(form: dict[str, Any]) -> None:
    plain = noisy(torchstone.build({**fields(), **form, "stack": "plain"}))
    for stack in ({"block_size": 1}, {"block_sizes": [1, 1, 1, 1], "reuse": "queries_keys"}):
        lazy = built(stack, **form)
        assert list(lazy.state_dict()) == list(plain.state_dict())
        for a, b in zip(outcome(lazy, ids()), outcome(plain, ids()), strict=True):
            assert torch.equal(a, b)


def test_probabilities_of_a_block_are_one_object_whose_rows_sum_to_one() -> None:
    taps = Taps(record=["*.attention.probs"])
    built({"block_sizes": [3, 1]})(ids(), taps=taps)
    first, second, third, own = (taps.seen[f"decoder.layers.{i}.attention.probs"] for i in range(4))
    assert first.data_ptr() == second.data_ptr() == third.data_ptr() != own.data_ptr()
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 4, T))
    assert not torch.allclose(own, first)


@BOTH
@pytest.mark.parametrize(
    "attention", [{}, {"window": 4, "qk_norm": True, "bias": "all"}, {"softcap": 2.0, "scale": 1.0}], ids=str
)
def test_a_reusing_layer_is_a_full_one_whose_scores_are_of_the_first_layer(
    attention: dict[str, Any], reuse: str
) -> None:
    """Queries, keys and what they see are the first layer's; values and the output projection are its own."""
    attention = {"heads": 4, "kv_heads": 2, **attention}
    model = built({"reuse": reuse}, attention=attention, depth=2)
    taps = Taps(record=["*.attention.v", "*.attention.out", "embedding.out"])
    first, second = (layer.attention for layer in model.decoder.layers)
    inputs: list[torch.Tensor] = []
    for layer in (first, second):
        layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    model(ids(), taps=taps)
    plain = torchstone.build({**fields(attention=attention, depth=2), "stack": "plain"})
    full: Any = plain.decoder.layers[1].attention
    of_qk = first.H * first.K + first.G * first.K
    state = {name: value for name, value in first.state_dict().items() if "norm" in name}
    for name in ("weight", *(["bias"] if first.qkv.bias is not None else [])):
        whole, values = first.state_dict()[f"qkv.{name}"], second.state_dict()[f"v.{name}"]
        state[f"qkv.{name}"] = torch.cat([whole[:of_qk], values])
        state[f"out.{name}"] = second.state_dict()[f"out.{name}"]
    full.load_state_dict(state)
    tokens, v = Tokens.blank(T), taps.seen["decoder.layers.1.attention.v"]
    ctx = Context(tokens, tokens, positions=plain.decoder.positions, taps=Taps(replace={"v": lambda _: v}))
    found = taps.seen["decoder.layers.1.attention.out"]
    torch.testing.assert_close(full(inputs[0], ctx)[0], found, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(full(inputs[1], ctx)[0], found)


@BOTH
def test_the_gradient_of_queries_is_that_of_all_layers_of_the_block(reuse: str) -> None:
    model = built({"block_size": 3, "reuse": reuse}, depth=3)
    weight = model.decoder.layers[0].attention.qkv.weight
    loss = lambda: model(ids()).hidden.mul(torch.linspace(-1, 1, 32)).sum()  # noqa: E731
    (grad,) = torch.autograd.grad(loss(), weight)
    for row, column in ((0, 0), (17, 5), (40, 31)):  # two of queries, one of keys
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[row, column] += step
                ends.append(loss())
                weight[row, column] -= step
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(grad[row, column], slope, rtol=1e-6, atol=1e-7)


def test_each_reusing_layer_has_its_part_in_that_gradient() -> None:
    model, grads = built({"block_size": 3}, depth=3), []
    for cut in ([], [1], [2], [1, 2]):
        taps = Taps(replace={f"decoder.layers.{i}.attention.probs": torch.Tensor.detach for i in cut})
        hidden = model(ids(), taps=taps if cut else None).hidden.mul(torch.linspace(-1, 1, 32)).sum()
        grads.append(torch.autograd.grad(hidden, model.decoder.layers[0].attention.qkv.weight)[0])
    whole, without_1, without_2, of_first = grads
    torch.testing.assert_close(whole, without_1 + without_2 - of_first, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(without_1, whole) and not torch.allclose(without_2, whole)


FORMS: dict[str, dict[str, Any]] = {
    "window": {"attention": {"heads": 4, "window": 5}},
    "softcap": {"attention": {"heads": 4, "kv_heads": 1, "softcap": 2.0}},
    "norms": {"attention": {"heads": 4, "qk_norm": True, "bias": "all", "head_dim": 6}},
    "xpos": {"position": {"kind": "xpos", "scale_base": 8.0}},
    "xpos_fast": {"position": {"kind": "xpos", "scale_base": 0.2, "gamma": 0.3}},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "encoder": {"causal": False, "position": "t5"},
    "encoder_decoder": {"encoder": {"depth": 3}, "attention": {"heads": 4, "softcap": 2.0, "qk_norm": True}},
}


def with_memory(form: str) -> dict[str, Any]:
    return {"memory": ids(2, 7)} if form == "encoder_decoder" else {}


@pytest.mark.parametrize("form", FORMS)
def test_both_ways_of_reuse_give_the_same_values_and_gradients(form: str) -> None:
    made = [
        outcome(built({"reuse": reuse}, **FORMS[form]), ids(), **with_memory(form))
        for reuse in ("probabilities", "queries_keys")
    ]
    alike(*made)


def test_what_is_dropped_is_dropped_for_the_whole_block() -> None:
    attention, key, handed = {"heads": 4, "dropout": 0.4}, Key(3).tensor(), []
    models = [built({"reuse": reuse}, attention=attention) for reuse in ("probabilities", "queries_keys")]
    alike(*(outcome(model, ids(), key=key) for model in models))
    assert not torch.allclose(models[0](ids(), key=key).hidden, models[0](ids()).hidden)
    for layer in models[0].decoder.layers[::2]:
        layer.attention.register_forward_hook(lambda module, inputs, out: handed.append(out[1].probs))
    models[0](ids(), key=key)
    first, second = (probs == 0 for probs in handed)
    share = first[..., torch.ones(T, T, dtype=torch.bool).tril()].double().mean()
    assert 0.35 < share < 0.45 and not torch.equal(first, second)


def test_an_intervention_on_the_first_layers_probabilities_reaches_the_block() -> None:
    model, uniform = built(), torch.ones(T, T).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(2, 4, T, T)
    taps = Taps(record=["decoder.layers.1.attention.probs"], replace={"decoder.layers.0.attention.probs": uniform})
    model(ids(), taps=taps)
    assert torch.equal(taps.seen["decoder.layers.1.attention.probs"], uniform)


# --------------------------------------------------------------------------------------------------- parts and state


@BOTH
def test_a_reusing_layer_has_values_and_an_output_projection_and_caches_values(reuse: str) -> None:
    model, D = built({"reuse": reuse, "block_sizes": [3, 1]}, attention={"heads": 4}), 32
    sizes = [sum(p.numel() for p in layer.attention.parameters()) for layer in model.decoder.layers]
    assert sizes == [4 * D * D, 2 * D * D, 2 * D * D, 4 * D * D]
    slots = {path: [slot.name for slot in found] for path, found in model.state_spec().items()}
    assert [slots[f"decoder.layers.{i}.attention"] for i in range(4)] == [["k", "v"], ["v"], ["v"], ["k", "v"]]


@BOTH
def test_under_a_mask_of_bounded_reach_rings_give_what_a_forward_gives(reuse: str) -> None:
    model, mask = built({"reuse": reuse}), CAUSAL & Window(4)
    whole, state = model(ids(), mask=mask).hidden, model.state(2, T, mask=mask)
    assert state.bytes() == 6 * 2 * 5 * 2 * 8 * 8 + 4 * 2 * 5 * 3 * 8  # 2 keys and 4 values, and 4 rings' tokens
    steps = [model(ids()[:, :5], state=state, mask=mask).hidden]
    steps += [model(ids()[:, t : t + 1], state=state, mask=mask).hidden for t in range(5, T)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)


def test_the_cross_attention_of_a_reusing_layer_is_its_own_and_hands_on_nothing() -> None:
    model = built(**FORMS["encoder_decoder"])
    crosses = [layer.cross for layer in model.decoder.layers]
    assert all(isinstance(cross, CrossAttention) and cross.gives == Gives() for cross in crosses)
    assert all(cross.q_norm is not None and cross.k_norm is not None for cross in crosses)
    lazy = [isinstance(layer.attention, GivenProbs) for layer in model.decoder.layers]
    assert lazy == [False, True, False, True]
    assert [isinstance(layer.attention, GivenProbs) for layer in model.encoder.layers] == [False, True, False]
    changed = model(ids(), memory=(ids(2, 7) + 1) % 50).hidden
    assert not torch.allclose(changed, model(ids(), memory=ids(2, 7)).hidden)


# ------------------------------------------------------------------------------------------------------ long sequences


class Largest(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


NARROW: dict[str, Any] = {"width": 8, "vocabulary": 50, "ffn": {"kind": "mlp", "hidden": 8}, "depth": 2, "context": 128}


@BOTH
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"position": {"kind": "xpos", "scale_base": 8.0}},
        {"position": "alibi"},
        {"attention": {"heads": 1, "window": 40}},
        {"attention": {"heads": 1, "softcap": 2.0}},
        {"causal": False},
    ],
    ids=str,
)
def test_no_square_matrix_is_held_beyond_the_limit_and_the_result_is_the_same(
    form: dict[str, Any], reuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built({"reuse": reuse}, **{"attention": {"heads": 1}, **NARROW, **form})
    inputs = ids(1, 128)
    if form:  # a causal flag alone is SDPA's, which has blocks of its own
        inputs = Tokens.of(inputs, valid=torch.ones(1, 128, dtype=torch.bool))
    once = outcome(model, inputs)
    monkeypatch.setattr(masks, "_LARGEST", 32)
    monkeypatch.setattr(kernels.blockwise, "__kwdefaults__", {**kernels.blockwise.__kwdefaults__, "block": 16})
    with Largest() as largest:
        blocks = outcome(model, inputs)
    assert largest.seen < 128 * 128 / 2
    alike(blocks, once)


def test_a_chunk_of_a_long_prompt_equals_the_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some chunks are handed probabilities and others, of as many keys as are too many, queries and keys."""
    model, state, parts = built(), None, []
    whole, state = model(ids(2, 20)).hidden, model.state(2, 20)
    monkeypatch.setattr(masks, "_LARGEST", 8)
    for a, b in ((0, 6), (6, 12), (12, 13), (13, 20)):
        parts.append(model(ids(2, 20)[:, a:b], state=state).hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            fields(attention={"kind": "retention", "heads": 4}),
            "layer 0: stack lazy needs probabilities, which attention retention cannot give; softmax can",
        ),
        (
            fields({"reuse": "queries_keys"}, attention={"kind": "retention", "heads": 4}),
            "layer 0: stack lazy needs queries and keys, which attention retention cannot give; softmax can",
        ),
        (
            fields(attention={"kind": "mla", "heads": 4, "kv_latent": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}),
            "layer 0: stack lazy needs probabilities, which attention mla cannot give; softmax can",
        ),
        (
            fields(attention={"kind": "dilated", "heads": 4}),
            "layer 0: stack lazy needs probabilities, which attention dilated cannot give; softmax can",
        ),
        (
            fields({"block_sizes": [2, 1]}),
            "stack.block_sizes: [2, 1] are blocks of 3 layers, and the decoder has 4",
        ),
        (
            fields({"block_sizes": [2, 2]}, encoder={"depth": 3}),
            "stack.block_sizes: [2, 2] are blocks of 4 layers, and the encoder has 3",
        ),
        (fields({"block_sizes": [0, 4]}), "stack.block_sizes.0: input should be greater than or equal to 1"),
        (
            fields(layers=[{"at": [3], "attention": {"heads": 2, "kv_heads": 1}}]),
            "layer 3: stack lazy reuses the attention of layer 2",
        ),
        (
            fields(layers=[{"at": [1], "position": "none"}]),
            "layer 1: stack lazy reuses the attention of layer 0",
        ),
        (
            {**fields(), "stack": "plain", "attention": {"kind": "given_probs", "heads": 4}},
            "attention given_probs needs probs of another layer; only a stack can place it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError) as caught:
        torchstone.build(body)
    assert sentence in str(caught.value)


def test_a_layer_fed_by_none_says_so() -> None:
    module, x = GivenProbsSpec(heads=4).build(Site(width=32)), torch.randn(2, T, 32)
    for given in (None, Handoff(x, x)):
        with pytest.raises(TorchstoneError, match="no layer before it hands on probabilities, or queries and keys"):
            module(x, None, None, given)


def test_blocks_may_differ_in_their_attention_and_the_last_has_what_is_left() -> None:
    model = built(depth=5, layers=[{"at": [2, 3], "attention": {"window": 3}, "position": "none"}])
    heads = [type(layer.attention).__name__ for layer in model.decoder.layers]
    assert heads == ["SoftmaxAttention", "GivenProbs", "SoftmaxAttention", "GivenProbs", "SoftmaxAttention"]
    assert [layer.attention.spec.window for layer in model.decoder.layers] == [None, None, 3, 3, None]
