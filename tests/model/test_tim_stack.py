"""The stack TIM: what its card promises beyond the conformance suite."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.block.mechanisms import MechanismsBlock
from torchstone.model.context import Context
from torchstone.model.mask import CAUSAL, Window
from torchstone.model.measure import measure
from torchstone.model.site import Site
from torchstone.model.stack import LayerSpec
from torchstone.model.taps import Taps

pytestmark = pytest.mark.usefixtures("float64")

D, T = 32, 5
ALL: dict[str, Any] = {"kind": "tim", "mechanisms": 2, "plain_first": 0, "plain_last": 0}
SILENT: dict[str, Any] = {**ALL, "communication": None}
BOTH = pytest.mark.parametrize("residual", ["post", "pre"])


def fields(stack: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "width": D,
        "depth": 3,
        "vocabulary": 50,
        "attention": {"heads": 4},
        "residual": "post",
        "stack": stack,
        **more,
    }


def built(stack: dict[str, Any], **more: Any) -> Any:
    """With weights large enough that attention and competition are far from even."""
    model = torchstone.build(fields(stack, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = Key(0).fold("noise", name).generator()
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=Key(1).fold("x", *shape).generator(), dtype=torch.float64)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=Key(2).generator())


def through_layers(model: Any, x_TD: torch.Tensor, fixed: bool = False) -> torch.Tensor:
    """The stream (T, D) after the last layer, before any final norm; `fixed` cuts the competition from the graph."""
    last = f"decoder.layers.{len(model.decoder.layers) - 1}.x"
    taps = Taps(record=[last], replace={"*.competition": torch.Tensor.detach} if fixed else {})
    model(torch.zeros(1, len(x_TD), dtype=torch.int64), embeddings=x_TD[None], taps=taps)
    return taps.seen[last][0]


def influence(model: Any, mechanisms: int = 2, fixed: bool = False) -> torch.Tensor:
    """(T, M, T, M): the largest derivative of a mechanism's output at a position by a mechanism's input at another."""
    x_TD = drawn(T, D)
    jacobian = torch.autograd.functional.jacobian(lambda x: through_layers(model, x, fixed), x_TD)
    cut = jacobian.abs().unflatten(3, (mechanisms, -1)).unflatten(1, (mechanisms, -1))
    return cut.amax(dim=(2, 5))


# ------------------------------------------------------------------------------------------------- 1: competition


@BOTH
def test_shares_of_the_competition_add_up_to_one_at_every_position(residual: str) -> None:
    model, taps = built({**ALL, "mechanisms": 4}, residual=residual), Taps(record=["*.competition"])
    model(ids(3, 9), taps=taps)
    assert len(taps.seen) == 3
    for share_BTM in taps.seen.values():
        assert share_BTM.shape == (3, 9, 4) and (share_BTM >= 0).all() and share_BTM.std() > 0.01
        torch.testing.assert_close(share_BTM.sum(-1), torch.ones(3, 9, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("position", ["rotary", "t5"])
def test_one_mechanism_without_communication_is_the_plain_layer(residual: str, position: str) -> None:
    model = built({**SILENT, "mechanisms": 1, "plain_first": 1}, residual=residual, position=position)
    plain = torchstone.build(fields({"kind": "plain"}, residual=residual, position=position))
    weights = {name.replace("mechanisms.0.", ""): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: value for name, value in weights.items() if ".competition." not in name})
    torch.testing.assert_close(model(ids(2, 9)).logits, plain(ids(2, 9)).logits, rtol=1e-12, atol=1e-12)


def test_competition_multiplies_the_update_from_attention_and_nothing_else() -> None:
    layer: Any = built(ALL, residual="pre", position="none").decoder.layers[0]
    x, taps = drawn(1, T, D), Taps(record=["*"])
    y = layer(x, replace(Context.alone(x), taps=taps))[0]
    seen, after = taps.seen, list(x.chunk(2, -1))
    for m in (0, 1):
        after[m] = after[m] + seen["competition"][..., m : m + 1] * seen[f"mechanisms.{m}.attention.out"]
        after[m] = after[m] + seen[f"mechanisms.{m}.ffn.out"]
    mixed = layer.communication(after, Context.alone(x))
    torch.testing.assert_close(y, torch.cat(mixed, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("competition", "factor"), [("softmax", 0.5), ("scaled", 1.0)])
def test_an_even_competition_of_two_halves_the_update_unless_it_is_scaled(competition: str, factor: float) -> None:
    """`scaled` is 1 on average; a competition that is even everywhere is then none."""
    even = Taps(replace={"*.competition": lambda c: torch.full_like(c, factor / (2 if competition == "scaled" else 1))})
    model = built({**ALL, "competition": competition})
    free = built({**ALL, "competition": "none"})
    if competition == "softmax":
        with torch.no_grad():
            for layer in free.decoder.layers:
                for one in layer.mechanisms:
                    one.attention.out.weight.mul_(factor)
    torch.testing.assert_close(model(ids(2, 7), taps=even).logits, free(ids(2, 7)).logits, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ 2, 3: independence


ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"heads": 4, "kv_heads": 2, "qk_norm": True},
    "retention": {"kind": "retention", "heads": 4},
    "gated_retention": {"kind": "gated_retention", "heads": 4},
    "mla": {"kind": "mla", "heads": 4, "kv_latent": 12, "q_latent": 8, "nope_dim": 6, "rope_dim": 4, "v_dim": 5},
    "dilated": {"kind": "dilated", "heads": 4, "segments": [4, 8], "dilations": [1, 2]},
}


@BOTH
@pytest.mark.parametrize(
    "attention", [pytest.param(name, marks=[pytest.mark.slow] if name != "softmax" else []) for name in ATTENTIONS]
)
def test_without_communication_and_with_competition_fixed_mechanisms_are_independent(
    attention: str, residual: str
) -> None:
    found = influence(built(SILENT, attention=ATTENTIONS[attention], residual=residual), fixed=True)
    for a, b in ((0, 1), (1, 0)):
        assert (found[:, a, :, b] == 0).all()
        assert found[-1, a, 0, a] > 0


def test_low_rank_updates_score_biases_and_biases_leave_them_independent() -> None:
    model = built(
        {**SILENT, "mechanisms": 4, "competition": "none"},
        linear={"kind": "lora", "rank": 2},
        position="t5",
        ffn={"kind": "mlp", "bias": True},
        norm="layernorm",
    )
    found = influence(model, 4)
    for a in range(4):
        others = [b for b in range(4) if b != a]
        assert (found[:, a][:, :, others] == 0).all() and found[-1, a, 0, a] > 0


def test_competition_alone_lets_mechanisms_see_each_other_at_the_same_position_in_one_layer() -> None:
    """What another attended to is seen one layer later; nothing of a later position is ever seen."""
    here = torch.eye(T, dtype=torch.bool)
    for depth, seen in ((1, here), (2, torch.ones(T, T).tril().bool())):
        found = influence(built(SILENT, depth=depth))
        for a, b in ((0, 1), (1, 0)):
            assert torch.equal(found[:, a, :, b] > 0, seen)


@pytest.mark.parametrize("place", ["after_ffn", "before_ffn"])
def test_communication_passes_on_in_the_same_layer_what_was_attended_to(place: str) -> None:
    stack = {**ALL, "competition": "none", "communication": {"place": place}}
    found = influence(built(stack, depth=1))
    for a, b in ((0, 1), (1, 0)):
        assert torch.equal(found[:, a, :, b] > 0, torch.ones(T, T).tril().bool())


def test_a_plain_layer_mixes_all_mechanisms() -> None:
    found = influence(built({**SILENT, "competition": "none", "plain_first": 1}))
    assert (found[-1] > 0).all()


# ------------------------------------------------------------------------------------ 4: block-diagonal, and counts


def side_by_side(pieces: list[torch.Tensor], slices: int) -> torch.Tensor:
    """One matrix whose `slices` slices are each block-diagonal in those of the pieces, or one such vector."""
    join = torch.block_diag if pieces[0].dim() == 2 else lambda *vectors: torch.cat(vectors)
    return torch.cat([join(*blocks) for blocks in zip(*(piece.chunk(slices) for piece in pieces), strict=True)])


def test_mechanisms_side_by_side_are_one_attention_and_one_feed_forward_of_block_diagonal_matrices() -> None:
    parts = {"attention": {"heads": 4, "bias": "all"}, "ffn": {"kind": "mlp", "bias": True}}
    model = built({**SILENT, "mechanisms": 4}, position="none", **parts)
    mechanisms = list(model.decoder.layers[0].mechanisms)
    layer = LayerSpec(**parts)
    x = drawn(2, 6, D)
    for name, whole in (("attention", layer.attention.build(Site(width=D))), ("ffn", layer.ffn.build(Site(width=D)))):
        for path, parameter in whole.named_parameters():
            pieces = [one.get_submodule(name).get_parameter(path) for one in mechanisms]
            with torch.no_grad():
                parameter.copy_(side_by_side(pieces, 3 if "qkv" in path else 1))
        ctx = Context.alone(x)
        apart = [one.get_submodule(name)(h, ctx)[0] for one, h in zip(mechanisms, x.chunk(4, -1), strict=True)]
        torch.testing.assert_close(torch.cat(apart, -1), whole(x, ctx)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mechanisms", [2, 4, 8])
def test_a_layer_has_as_many_times_fewer_matrices_as_mechanisms(mechanisms: int) -> None:
    width, hidden, heads, dim = 64, 256, 3, 10
    stack = {**ALL, "mechanisms": mechanisms, "communication": {"heads": heads, "head_dim": dim}}
    mlp = {"kind": "mlp", "hidden": hidden}
    model = torchstone.build(fields(stack, width=width, attention={"heads": 8}, ffn=mlp))
    layer = model.decoder.layers[0]
    around, matrices = 3 * width, 4 * width**2 + 2 * width * hidden
    communication = 4 * width * mechanisms * heads * dim  # 4 d e over mechanisms, of e = mechanisms * heads * dim
    wanted = (matrices + communication) // mechanisms + width + mechanisms + around
    assert sum(p.numel() for p in layer.parameters()) == wanted


def test_arithmetic_of_a_layer() -> None:
    """Attention over positions costs what a plain layer's does; attention across M mechanisms 4 H K M^2 a token."""
    costs = [
        measure(torchstone.build(fields(stack, depth=1)), context=100)
        for stack in ({"kind": "plain"}, {**ALL, "mechanisms": 4, "communication": {"heads": 3, "head_dim": 5}})
    ]
    plain, ours = (c.decode_flops_per_token for c in costs)
    layer = LayerSpec(attention={"heads": 4})
    hidden = layer.ffn.build(Site(width=8)).down.weight.shape[1]
    of_plain = 4 * D * D + 3 * D * layer.ffn.build(Site(width=D)).down.weight.shape[1]
    of_ours = D * D + 3 * D * hidden + 4 * D * 15 + D
    assert ours - plain == 2 * (of_ours - of_plain) + 4 * 3 * 5 * 4**2


# ----------------------------------------------------------------------------------------------- 5: permutation


@BOTH
@pytest.mark.parametrize("position", ["rotary", "t5"])
def test_permuting_mechanisms_permutes_outputs(residual: str, position: str) -> None:
    order, M = [2, 0, 3, 1], 4
    model = built({**ALL, "mechanisms": M}, residual=residual, position=position)
    other = built({**ALL, "mechanisms": M}, residual=residual, position=position)
    tables = [f"decoder.positions.{'t5' if m == 0 else f't5_{m}'}.weight" for m in range(M)]
    weights, moved = model.state_dict(), {}
    for name, value in weights.items():
        if ".competition." in name:
            moved[name] = value[order]
            continue
        if name in tables:
            moved[name] = weights[tables[order[tables.index(name)]]]
            continue
        found = re.search(r"(mechanisms|communication\.\w+)\.(\d)", name)
        source = name if found is None else name[: found.start(2)] + str(order[int(found[2])]) + name[found.end(2) :]
        moved[name] = weights[source]
    assert (position == "t5") == any(name in tables for name in moved)
    other.load_state_dict(moved)
    x = drawn(T, D)
    y, z = (through_layers(m, v) for m, v in ((model, x), (other, x.view(T, M, -1)[:, order].flatten(1))))
    torch.testing.assert_close(z, y.view(T, M, -1)[:, order].flatten(1), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(z, y)


# --------------------------------------------------------------------------------------- 6: state and positions


def test_each_mechanism_keeps_its_own_state_and_communication_none() -> None:
    model = built({**ALL, "plain_last": 1})
    spec, plain = model.state_spec(), torchstone.build(fields({"kind": "plain"}))
    assert list(spec) == [
        *(f"decoder.layers.{i}.mechanisms.{m}.attention" for i in (0, 1) for m in (0, 1)),
        "decoder.layers.2.attention",
    ]
    assert measure(model).state_bytes_per_token == measure(plain).state_bytes_per_token


def test_under_a_mask_of_bounded_reach_every_mechanism_keeps_a_ring() -> None:
    model, x, mask = built(ALL), ids(2, 12), CAUSAL & Window(3)
    whole = model(x, mask=mask).logits
    state = model.state(2, 12, mask=mask)
    assert all(slot.growth == "ring" for slots in state.slots.values() for slot in slots)
    steps = [model(x[:, t : t + 1], state=state, mask=mask).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole, model(x).logits)


def test_score_biases_are_each_mechanisms_own_and_one_rotation_serves_all() -> None:
    stack = {**ALL, "mechanisms": 4, "plain_last": 1}
    tables = built(stack, position="t5").decoder.positions
    assert [table.weight.shape for table in tables.values()] == [(32, 1)] * 4 + [(32, 4)]
    assert list(built(stack).decoder.positions) == ["rotary", "rotary_1"]  # of mechanisms, and of the plain layer


def test_a_mechanism_attends_to_its_own_slice_of_the_memory() -> None:
    model = built(SILENT, encoder={"depth": 1}, depth=1)
    memory, _ = model.encode(ids(1, 6))
    layer: Any = model.decoder.layers[0]
    assert isinstance(layer, MechanismsBlock) and layer.mechanisms[0].cross.kv.weight.shape == (2 * D // 2, D // 2)

    def stream(x: torch.Tensor) -> torch.Tensor:
        taps = Taps(record=["decoder.layers.0.x"])
        model(ids(1, T), memory=replace(memory, x=x[None]), taps=taps)
        return taps.seen["decoder.layers.0.x"][0]

    assert memory.x is not None
    jacobian = torch.autograd.functional.jacobian(stream, memory.x[0].detach()).abs()
    jacobian = jacobian.unflatten(3, (2, -1)).unflatten(1, (2, -1)).amax(dim=(0, 2, 3, 5))
    assert jacobian[0, 1] == jacobian[1, 0] == 0 and (jacobian.diagonal() > 0).all()


def test_defaults_leave_the_first_two_layers_and_the_last_as_they_are() -> None:
    layers = torchstone.build(fields({"kind": "tim"}, depth=6)).decoder.layers
    assert [isinstance(layer, MechanismsBlock) for layer in layers] == [False, False, True, True, True, False]
    assert layers[2].communication.K == 16  # 32, or the width of a mechanism


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stack": {**ALL, "mechanisms": 3}}, "stack.mechanisms: 3 mechanisms do not divide width, which is 32"),
        (
            {"stack": {**ALL, "mechanisms": 8}},
            "stack.mechanisms: 8 mechanisms do not divide attention.heads, which is 4",
        ),
        (
            {"attention": {"heads": 4, "kv_heads": 1}},
            "stack.mechanisms: 2 mechanisms do not divide attention.kv_heads, which is 1",
        ),
        (
            {"attention": {**ATTENTIONS["mla"], "kv_latent": 11}},
            "stack.mechanisms: 2 mechanisms do not divide attention.kv_latent, which is 11",
        ),
        ({"ffn": {"hidden": 31}}, "stack.mechanisms: 2 mechanisms do not divide ffn.hidden, which is 31"),
        (
            {"stack": {"kind": "tim"}},
            "stack tim: plain_first is 2 and plain_last 1, and of 3 layers that leaves none to mechanisms",
        ),
        (
            {"block": "parallel"},
            "stack tim: a mechanism attends and then feeds forward, which is block sequential and not parallel",
        ),
        ({"stack": "plain", "block": {"kind": "mechanisms"}}, "block mechanisms: only stack tim places it"),
        ({"attention": {"kind": "shared_kv"}}, "attention shared_kv needs keys_values of another layer"),
        (
            {"stack": {**ALL, "communication": {"place": "first"}}},
            "stack.communication.place: input should be 'after_ffn' or 'before_ffn', got 'first'",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=re.escape(sentence)):
        torchstone.build({**fields(ALL), **changes})


def test_plain_layers_may_have_another_block() -> None:
    layers = [{"at": [0], "block": "parallel", "attention": {"kv_heads": 1}}]
    assert torchstone.build(fields({**ALL, "plain_first": 1}, layers=layers))(ids(1, 3)).logits.isfinite().all()
