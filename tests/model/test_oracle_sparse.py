"""HySparse: what its card promises beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model import mask as masks
from torchstone.model.attention.oracle_sparse import OracleSparse, OracleSparseSpec
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.context import Context, Handoff
from torchstone.model.mask import Window
from torchstone.model.measure import measure
from torchstone.model.position import Positions
from torchstone.model.position.rotary import RotarySpec
from torchstone.model.site import Gives, Site, initialise
from torchstone.model.stack import LayerSpec
from torchstone.model.state import PartState
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.ops import attention as kernels

STACK: dict[str, Any] = {"kind": "hysparse", "sparse_per_full": 2, "block": 4, "top_tokens": 8, "window": 3}
FIELDS: dict[str, Any] = {
    "width": 32, "depth": 4, "vocabulary": 50, "context": 64,
    "attention": {"heads": 4, "kv_heads": 2},
    "stack": STACK,
}  # fmt: skip
T = 21

pytestmark = pytest.mark.usefixtures("float64")


def fields(stack: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {**FIELDS, **more, "stack": {**STACK, **(stack or {})}}


def built(stack: dict[str, Any] | None = None, **more: Any) -> Any:
    """full, sparse, sparse, full, with weights large enough that attention is far from even."""
    return noisy(torchstone.build(fields(stack, **more)))


def noisy(module: Any) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = Key(0).fold("noise", name).generator()
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def ids(rows: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=Key(0).fold("ids").generator())


def seen(model: Any, *names: str, inputs: Any = None) -> dict[str, torch.Tensor]:
    taps = Taps(record=[f"*.attention.{name}" for name in names])
    with torch.no_grad():
        model(ids() if inputs is None else inputs, taps=taps)
    return taps.seen


def pair(length: int = T, **stack: Any) -> tuple[Any, OracleSparse, Context, torch.Tensor]:
    """A full layer that hands on, a sparse one, the context of both, and a stream."""
    sparse_fields = {"block": 4, "top_tokens": 8, "window": 3, **stack}
    positions = Positions(64, True)
    site = Site(width=32, position_spec=RotarySpec(), positions=positions)
    gives = Site(
        width=32, position_spec=RotarySpec(), positions=positions, gives=Gives(True, block_max=sparse_fields["block"])
    )
    full = noisy(initialise(SoftmaxSpec(heads=4, kv_heads=2).build(gives), 0))
    sparse = noisy(initialise(OracleSparseSpec(heads=4, kv_heads=2, **sparse_fields).build(site), 1))
    x = torch.randn(2, length, 32, generator=Key(2).generator())
    return full, sparse, Context.alone(x, positions=positions), x


def gated(module: OracleSparse, x: torch.Tensor, ctx: Context, given: Handoff, sparse: float, window: float) -> Any:
    """The layer's output with both gates forced."""
    taps = Taps(replace={
        "sparse_gate": lambda g: torch.full_like(g, sparse), "window_gate": lambda g: torch.full_like(g, window)
    })  # fmt: skip
    return module(x, Context(ctx.q, ctx.k, positions=ctx.positions, taps=taps), None, given)[0]


# --------------------------------------------------------------------------------------------- the card's identities


def test_with_room_for_all_blocks_the_sparse_branch_is_dense_attention_over_the_shared_keys() -> None:
    full, sparse, ctx, x = pair(top_tokens=64)
    given = full(x, ctx)[1]
    q = sparse.own(x, ctx, None)[0]
    wanted = kernels.attention_reference(q, given.k, given.v, scale=8**-0.5, causal=True)[0]
    found = gated(sparse, x, ctx, given, 1.0, 0.0)
    torch.testing.assert_close(found, sparse.joined(wanted, ctx), rtol=0, atol=1e-10)
    narrow = gated(pair()[1], x, ctx, given, 1.0, 0.0)
    assert not torch.allclose(narrow[:, -1], found[:, -1]) and torch.allclose(narrow[:, :8], found[:, :8])


def test_block_maxima_are_those_of_the_explicit_probabilities() -> None:
    model = built()
    best = seen(model, "block_max")["decoder.layers.0.attention.block_max"]
    probs = seen(model, "probs")["decoder.layers.0.attention.probs"].unflatten(1, (2, 2)).amax(2)
    for n in range(6):
        torch.testing.assert_close(best[..., n], probs[..., 4 * n : 4 * n + 4].amax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(best.amax(-1), probs.amax(-1), rtol=0, atol=1e-12)
    assert (best >= 0).all() and (best <= 1).all()


@pytest.mark.parametrize("selection", ["oracle", "random"])
def test_chosen_blocks_are_of_the_past_as_many_as_fit_and_one_list_a_group(selection: str) -> None:
    taken = seen(built({"selection": selection}), "blocks", "block_max")
    blocks, best = taken["decoder.layers.1.attention.blocks"], taken["decoder.layers.0.attention.block_max"]
    assert blocks.shape == (2, 2, T, 2)
    for t in range(T):
        of_query = blocks[:, :, t, : t // 4 + 1]  # what else is chosen lies in the future, and is masked
        assert (of_query <= t // 4).all() and (t < 4 or (of_query[..., 0] != of_query[..., 1]).all())
    assert torch.equal(blocks, taken["decoder.layers.2.attention.blocks"])
    top = (blocks == best.argmax(-1, keepdim=True)).any(-1)
    assert top.all() if selection == "oracle" else not top.all()
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


def test_forced_gates_leave_one_branch() -> None:
    full, sparse, ctx, x = pair()
    given = full(x, ctx)[1]
    swa = SoftmaxSpec(heads=4, kv_heads=2, window=3).build(
        Site(width=32, position_spec=RotarySpec(), positions=ctx.positions)  # type: ignore[arg-type]
    )
    swa.load_state_dict({name: value for name, value in sparse.state_dict().items() if "gate" not in name})
    torch.testing.assert_close(gated(sparse, x, ctx, given, 0.0, 1.0), swa(x, ctx)[0], rtol=0, atol=1e-12)
    both = gated(sparse, x, ctx, given, 1.0, 1.0)
    one_by_one = gated(sparse, x, ctx, given, 1.0, 0.0) + gated(sparse, x, ctx, given, 0.0, 1.0)
    torch.testing.assert_close(both, one_by_one, rtol=0, atol=1e-10)


def test_only_full_layers_grow_with_the_length() -> None:
    model = built(depth=8)  # full at 0, 3, 6, and the last
    growth = {path: {slot.growth for slot in slots} for path, slots in model.state_spec().items()}
    growing = [path for path, found in growth.items() if found == {"growing"}]
    assert growing == [f"decoder.layers.{i}.attention" for i in (0, 3, 6, 7)]
    assert all(found == {"ring"} for path, found in growth.items() if path not in growing)
    plain = torchstone.build({**FIELDS, "depth": 8, "stack": "plain"})
    assert measure(plain).state_bytes_per_token == 2 * measure(model).state_bytes_per_token == 8 * 2 * 2 * 8 * 4


def test_no_gradient_passes_through_the_selection_and_one_does_into_shared_keys_and_values() -> None:
    full, sparse, ctx, x = pair()
    given = full(x, ctx)[1]
    y = gated(sparse, x.detach(), ctx, given, 1.0, 0.0)
    (grad,) = torch.autograd.grad(y.square().sum(), full.qkv.weight)
    of_q, of_k, of_v = grad.split([32, 16, 16])
    assert (of_q == 0).all() and of_k.abs().max() > 0 and of_v.abs().max() > 0


# -------------------------------------------------------------------------------------------- blocks, ties, documents


def test_ties_go_to_the_earliest_block_when_training_and_when_decoding() -> None:
    model = built()
    model.decoder.layers[0].attention.qkv.weight.data[:32] = 0  # all scores are equal
    blocks = seen(model, "blocks")["decoder.layers.1.attention.blocks"]
    assert blocks[:, :, 7:].unique(dim=2).tolist() == [[[[0, 1]]] * 2] * 2
    nearly = torch.full((1, 1, 1, 5), 0.2, dtype=torch.float32) * (1 + 1e-6 * torch.arange(5))
    module, tokens = model.decoder.layers[1].attention, Tokens(torch.tensor([[T - 1]]))
    assert module.choose(nearly, Context(tokens, tokens)).tolist() == [[[[0, 1]]]]
    apart = torch.tensor([[[[1e-30, 1.02e-30, 0.0, 1.04e-30, 1e-35]]]])  # far below what a fixed step would tell apart
    assert module.choose(apart, Context(tokens, tokens)).tolist() == [[[[3, 1]]]]


def test_a_document_begins_a_block_and_ends_one() -> None:
    model, starts = built(), torch.tensor([[0] * 6 + [6] * 15])
    best = seen(model, "block_max", inputs=Tokens.of(ids(), start=starts))["decoder.layers.0.attention.block_max"]
    assert (best[:, :, 6:10, 1:] == 0).all() and (best[:, :, 10, 1] > 0).all()  # keys 6 to 9 are the first block
    alone = seen(model, "block_max", inputs=ids()[:, 6:])["decoder.layers.0.attention.block_max"]
    torch.testing.assert_close(best[:, :, 6:, :4], alone, rtol=0, atol=1e-12)


def test_a_window_asked_for_at_a_forward_holds_for_shared_keys_too() -> None:
    model = built({"top_tokens": 64, "window": 64})
    x = ids()
    changed = torch.cat([(x[:, :5] + 1) % 50, x[:, 5:]], 1)
    one, other = (model(each, mask=masks.CAUSAL & Window(3)).hidden for each in (x, changed))
    reached = 5 + 4 * (3 - 1)  # four layers
    assert torch.equal(one[:, reached:], other[:, reached:]) and not torch.equal(one[:, 5], other[:, 5])


def test_a_layer_fed_by_none_says_so() -> None:
    _, sparse, ctx, x = pair()
    for given in (None, Handoff(x, x)):
        with pytest.raises(TorchstoneError, match="no layer before it hands on keys, values and block maxima"):
            sparse(x, ctx, None, given)


# ------------------------------------------------------------------------------------------ long, compiled, recomputed


@pytest.mark.parametrize("columns", ["plain", "documents", "padding"])
@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_blocks_of_queries_equal_all_at_once_forwards_and_backwards(
    position: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more = built(position=position), {}
    if columns == "documents":
        more["start"] = torch.tensor([[0] * 6 + [6] * 15, [0] * 21])
    elif columns == "padding":
        more["valid"] = torch.arange(T)[None] >= torch.tensor([[0], [7]])
    results = []
    for largest in (4096, 8):
        monkeypatch.setattr(masks, "_LARGEST", largest)
        monkeypatch.setattr(kernels.blockwise, "__kwdefaults__", {**kernels.blockwise.__kwdefaults__, "block": 7})
        hidden = model(Tokens.of(ids(), **more)).hidden
        valid = more.get("valid", torch.ones(2, T, dtype=torch.bool))[..., None]
        loss = (hidden * valid * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
        results.append([hidden * valid, *torch.autograd.grad(loss, list(model.parameters()))])
    for once, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, once, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


def test_long_sequences_hold_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_LARGEST", 64)
    monkeypatch.setattr(kernels.blockwise, "__kwdefaults__", {**kernels.blockwise.__kwdefaults__, "block": 16})
    monkeypatch.setattr(kernels.block_max, "_ROWS", 16)
    narrow = {"width": 8, "attention": {"heads": 1}, "vocabulary": 8, "ffn": {"kind": "mlp", "hidden": 8}}
    model = built({"block": 8}, context=256, **narrow)
    with Largest() as largest:
        model(ids(1, 256) % 8).hidden.sum().backward()
    assert largest.seen < 256 * 256 / 4


def test_decoding_reads_no_more_of_the_shared_keys_than_the_chosen_blocks() -> None:
    full, sparse, ctx, x = pair(256)
    seen = []
    for length in (64, 256):
        now = Context.alone(x[:, :length], positions=ctx.positions)
        given = full(x[:, :length], now)[1]
        tokens = now.q.slice(length - 1, length)
        one = Context(tokens, now.k, relation="last", positions=ctx.positions)
        handed = Handoff(given.k, given.v, given.tokens, None, given.block_max[:, :, -1:], 4)
        rings = {name: torch.zeros(2, 3 + 1, 2, 8) for name in ("k", "v")}
        columns = {"columns": torch.full((2, 4, 3), -1, dtype=torch.int64)}
        with Largest() as largest, torch.no_grad():
            sparse(x[:, length - 1 : length], one, ring(columns | rings), handed)
        seen.append(largest.seen)
    assert seen[0] == seen[1]


def ring(tensors: dict[str, torch.Tensor]) -> PartState:
    from torchstone.model.state import Ring

    return Ring(tensors)


@pytest.mark.slow
def test_sparse_layers_compile_whole_and_give_the_same() -> None:
    model, x = built(depth=3), ids()
    eager = model(x).hidden
    for layer in model.decoder.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x).hidden, eager, rtol=0, atol=1e-10)
    state, steps = model.state(2, T, static=True), []
    with torch.no_grad():
        for t in range(T):
            steps.append(model(x[:, t : t + 1], state=state).hidden)
    torch.testing.assert_close(torch.cat(steps, 1), eager, rtol=0, atol=1e-10)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (fields({"top_tokens": 10}), "stack.top_tokens: 10 is no multiple of a block of 4 keys"),
        (
            fields(attention={"kind": "retention", "heads": 4}),
            "layer 0: stack hysparse needs keys, values and maxima of blocks, which attention retention cannot give",
        ),
        (
            fields(layers=[{"at": [2], "attention": {"kind": "retention"}}]),
            "layer 2: stack hysparse needs keys, values and maxima of blocks, which attention retention cannot give",
        ),
        (
            fields(attention={"heads": 4, "window": 9}),
            "layer 0: attention.window: full layers of stack hysparse have none, and that of sparse ones is "
            "stack.window; leave 9 out",
        ),
        (fields(causal=False), "stack hysparse: chooses blocks before a query and has no bidirectional form"),
        (fields(encoder={"depth": 1}), "stack hysparse: chooses blocks before a query and has no bidirectional form"),
        (
            fields(layers=[{"at": [2], "attention": {"kv_heads": 4}}]),
            "layer 2: a sparse layer reads the keys of layer 0 and needs its attention.kv_heads",
        ),
        (
            fields(layers=[{"at": [1], "position": "none"}]),
            "layer 1: a sparse layer reads the keys of layer 0 and needs its attention.kv_heads, its size of heads "
            "and its position",
        ),
        (
            {**FIELDS, "stack": "plain", "attention": {"kind": "oracle_sparse", "heads": 4}},
            "attention oracle_sparse needs block_max, keys_values of another layer; only a stack can place it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError) as caught:
        torchstone.build(body)
    assert sentence in str(caught.value)


def test_a_block_that_does_not_divide_the_budget_is_refused_by_the_layer_too() -> None:
    spec = OracleSparseSpec(heads=4, block=4, top_tokens=10)
    assert "top_tokens: 10 is no multiple of a block of 4 keys" in str(spec.illegal(LayerSpec(attention=spec), 32))
    with pytest.raises(TorchstoneError, match="needs block_max, keys_values of another layer; only a stack"):
        torchstone.build(spec, width=32)
