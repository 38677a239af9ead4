"""LongMem: a backbone that stays as it is, a side network beside it, and a memory that outlives segments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from generate import small
from torchstone.adapt.longmem import LongMem, LongMemAdaptSpec
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.model.site import initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.checkpoint import load_tensors

MEMORY = {"tokens": 64, "chunk": 4, "retrieve": 8}
POSITIONS = ["rotary", "alibi", "t5", "learned", "none"]


def pair(memory: dict[str, Any] | None = None, reduction: int = 2, **fields: Any) -> tuple[Transformer, Transformer]:
    """A backbone and its adaptation, whose side network starts as a copy."""
    attention = {"kind": "softmax", "heads": 4, "kv_heads": 2}
    backbone = small.build(**{"depth": 4, "attention": attention, **fields})
    adapt = LongMemAdaptSpec.model_validate({"reduction": reduction, "memory": {**MEMORY, **(memory or {})}})
    model = initialise(adapt.apply(backbone.spec).build(), 0)
    values = {name: value.detach() for name, value in model.named_parameters()}
    values |= {name: value.detach() for name, value in backbone.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values.get(adapt.starts_from(name) or name, parameter))
    adapt.prepare(model)
    assert isinstance(model, Transformer)
    return backbone, model


def filled(model: Transformer, rows: int = 2, segments: int = 3) -> Any:
    bank = model.decoder.carry(rows, dtype=torch.get_default_dtype())
    for seed in range(segments):
        read(model, bank, torch.tensor(small.ids(*[12] * rows, seed=seed)))
    return bank


@torch.no_grad()
def read(model: Transformer, bank: Any, ids_BT: Any) -> torch.Tensor:
    logits = model(ids_BT, bank=bank).logits
    bank.commit()
    return logits


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("reduction", "residual"), [(2, "pre"), (1, "sandwich"), (4, "pre"), (2, "subln")])
@torch.no_grad()
def test_side_layers_that_add_nothing_leave_the_backbones_logits(
    float64: None, position: str, reduction: int, residual: str
) -> None:
    backbone, model = pair(reduction=reduction, position=position, residual={"kind": residual, "std": 0.3})
    for name, parameter in model.named_parameters():
        if ".side." in name and name.endswith(("out.weight", "down.weight")):
            parameter.zero_()
    ids_BT = torch.randint(61, (2, 9))
    torch.testing.assert_close(model(ids_BT).logits, backbone(ids_BT).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_streams_are_those_of_the_equation(float64: None) -> None:
    _, model = pair()
    stack, ids_BT = model.decoder, torch.randint(61, (2, 9))
    heard: dict[str, torch.Tensor] = {}
    hooks = [layer.register_forward_hook(lambda m, x, y, n=n: heard.__setitem__(n, y[0]))
             for n, layer in enumerate(stack.layers)]  # fmt: skip
    sides = [layer.register_forward_hook(lambda m, x, y, n=n: heard.__setitem__(f"side{n}", (x[0], y[0])))
             for n, layer in enumerate(stack.side)]  # fmt: skip
    logits = model(ids_BT).logits
    for hook in (*hooks, *sides):
        hook.remove()
    h = [F.embedding(ids_BT, model.embedding.table()), *(heard[n] for n in range(4))]
    torch.testing.assert_close(heard["side0"][0], h[0])
    torch.testing.assert_close(heard["side1"][0], heard["side0"][1] + h[2] - h[0])
    last = model.decoder.norm(heard["side1"][1] + h[4] - h[2])
    torch.testing.assert_close(logits, last @ model.embedding.table().T)


@torch.no_grad()
def test_a_closed_gate_is_a_side_network_without_memory_and_gates_start_half_open(float64: None) -> None:
    _, model = pair()
    bank, ids_BT = filled(model), torch.randint(61, (2, 9))
    gate_H = model.decoder.side[1].attention.gate_H
    assert torch.sigmoid(gate_H).tolist() == [0.5] * 4
    without, half = model(ids_BT).logits, model(ids_BT, bank=bank).logits
    gate_H.fill_(-1e9)
    torch.testing.assert_close(model(ids_BT, bank=bank).logits, without, rtol=0, atol=1e-12)
    assert (half - without).abs().max() > 1e-2


@torch.no_grad()
def test_joint_attention_is_local_and_found_weighed_by_the_gate(float64: None) -> None:
    """One head at a time from the stream that the layer reads, keys that the backbone made, and plain products."""
    _, model = pair(position="alibi")
    bank, ids_BT = filled(model), torch.randint(61, (2, 9))
    joint, heard = model.decoder.side[1].attention, {}
    hook = joint.register_forward_hook(lambda m, x, y: heard.update(x=x[0], y=y[0]))
    joint.gate_H.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
    model(ids_BT, bank=bank)
    hook.remove()
    q, k, v = joint.qkv(heard["x"]).split([32, 16, 16], -1)
    q, k, v = q.view(2, 9, 4, 8), k.view(2, 9, 2, 8), v.view(2, 9, 2, 8)
    far = torch.arange(9)[:, None] - torch.arange(9)
    wanted = torch.zeros(2, 9, 4, 8)
    for b in range(2):
        for h in range(4):
            scores = q[b, :, h] @ k[b, :, h // 2].T / 8**0.5 - 2.0 ** -(2 * (h + 1)) * far
            local = scores.masked_fill(far < 0, -torch.inf).softmax(-1) @ v[b, :, h // 2]
            k_NCK, v_NCK = (x[b, h // 2, : bank.size(b)] for x in (bank.k_RGNCK, bank.v_RGNCK))
            for t in range(9):
                best = (k_NCK.mean(1) @ q[b, t, h]).topk(2).indices
                k_SK, v_SK = k_NCK[best].flatten(0, 1), v_NCK[best].flatten(0, 1)
                found = (k_SK @ q[b, t, h] / 8**0.5).softmax(0) @ v_SK
                share = torch.sigmoid(joint.gate_H[h])
                wanted[b, t, h] = (1 - share) * local[t] + share * found
    torch.testing.assert_close(heard["y"], joint.out(wanted.flatten(2)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_is_remembered_are_the_keys_of_the_backbones_layer_before_any_rotation(float64: None) -> None:
    backbone, model = pair(memory={"layer": 3})
    bank, ids_BT = filled(model, segments=0), torch.randint(61, (2, 12))
    attention = backbone.decoder.layers[2].attention
    heard: list[torch.Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda m, x, y: heard.append(y))
    backbone(ids_BT)
    hook.remove()
    read(model, bank, ids_BT)
    k, v = (x.view(2, 12, 2, 8).transpose(1, 2) for x in heard[0].split([32, 16, 16], -1)[1:])
    for held, made in ((bank.k_RGNCK, k), (bank.v_RGNCK, v)):
        torch.testing.assert_close(held[:, :, :3].flatten(2, 3), made, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_segment_does_not_find_itself(float64: None) -> None:
    _, model = pair()
    bank, ids_BT = filled(model, segments=0), torch.randint(61, (2, 12))
    torch.testing.assert_close(read(model, bank, ids_BT), model(ids_BT).logits)
    assert (read(model, bank, ids_BT) - model(ids_BT).logits).abs().max() > 1e-2


def test_training_moves_the_side_network_alone_and_the_memory_does_not_age(float64: None) -> None:
    _, model = pair()
    bank = filled(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    kept = {name: x.clone() for name, x in bank.tensors().items()}
    ids_BT = torch.randint(61, (2, 13))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(ids_BT[:, :-1], bank=bank).logits
        F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
    own = ("decoder.side.", "decoder.norm.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(own)
        assert torch.equal(parameter, before[name]) != name.startswith(own), name
    assert all(torch.equal(x, kept[name]) for name, x in bank.tensors().items())
    fresh = filled(model)  # the same segments under the trained side network
    assert all(torch.equal(x, kept[name]) for name, x in fresh.tensors().items())


def test_recomputed_activations_change_no_gradient(float64: None) -> None:
    found = []
    for recompute in (False, True):
        _, model = pair()
        bank = filled(model)
        model.decoder.recompute = recompute
        model(torch.tensor(small.ids(9, 9, seed=9)), bank=bank).logits.square().mean().backward()
        bank.commit()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_decoding_step_by_step_equals_one_forward_with_a_memory(
    float64: None, position: str, window: int | None
) -> None:
    _, model = pair(position=position, attention={"kind": "softmax", "heads": 4, "kv_heads": 2, "window": window})
    bank, ids_BT = filled(model), torch.randint(61, (2, 9))
    lengths = torch.tensor([[9], [6]])
    whole = model(Tokens.of(ids_BT, valid=torch.arange(9) < lengths), bank=bank).logits
    state = model.state(2, 9)
    state.bank = bank.reader([0, 1])
    pieces = [model(ids_BT[:, a:b], state=state).logits for a, b in ((0, 4), (4, 5), (5, 9))]
    steps = torch.cat(pieces, 1)
    torch.testing.assert_close(steps[0], whole[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(steps[1, :6], whole[1, :6], rtol=0, atol=1e-10)


# -- for users


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("longmem")
    base = train(tiny.recipe(folder, model={"depth": 4}), out=folder / "base", quiet=True)
    recipe = {**tiny.recipe(folder, optimizer={"lr": 0.01}), "init_from": str(base.path)}
    recipe["adapt"] = {"kind": "longmem", "memory": {"tokens": 64, "retrieve": 8}}
    del recipe["model"]
    return base, train(recipe, out=folder / "adapted", quiet=True)


def test_a_recipe_adapts_a_run(adapted: tuple[Any, Any]) -> None:
    base, run = adapted
    before, after = (load_tensors(each.path / "model.safetensors") for each in (base, run))
    assert set(after) - set(before) == {name for name in after if ".side." in name} != set()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder.norm.weight"}
    assert any(not torch.equal(after[name], before[name.replace("side.0", "layers.1").replace("side.1", "layers.3")])
               for name in after if ".side." in name and "gate_H" not in name)  # fmt: skip
    rows = [row for row in run.metrics() if "valid_loss" in row]
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]


def test_side_layers_start_from_the_backbone(tmp_path: Path, adapted: tuple[Any, Any]) -> None:
    base, _ = adapted
    recipe = {**tiny.recipe(tmp_path), "init_from": str(base.path), "adapt": {"kind": "longmem"}}
    recipe["trainer"] = {**recipe["trainer"], "steps": 1}
    recipe["optimizer"] = {"lr": 1e-12, "weight_decay": 0.0}
    del recipe["model"]
    after = load_tensors(train(recipe, out=tmp_path / "run", quiet=True).path / "model.safetensors")
    for side, layer in ((0, 1), (1, 3)):
        for name, value in after.items():
            if name.startswith(f"decoder.side.{side}.") and "gate_H" not in name:
                source = name.replace(f"side.{side}", f"layers.{layer}")
                torch.testing.assert_close(value, after[source], rtol=0, atol=1e-9)


def test_a_run_of_bytes_starts_one_over_data_laid_over_bytes(tmp_path: Path, adapted: tuple[Any, Any]) -> None:
    base, _ = adapted
    recipe = {**tiny.recipe(tmp_path), "init_from": str(base.path), "adapt": {"kind": "longmem"}}
    recipe["data"] = {**recipe["data"], "kind": "facts", "segments": 6, "facts": 2, "nearest": 16, "farthest": 64}
    recipe["trainer"] = {**recipe["trainer"], "steps": 1}
    del recipe["model"], recipe["data"]["tokenizer"]
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert run.recipe.data.tokenizer.kind == "bytes"


def test_memory_is_remembered_saved_loaded_and_forgotten(adapted: tuple[Any, Any]) -> None:
    _, run = adapted
    lm = LongMem.load(run.path)
    greedy = Sampling(max_new_tokens=12, temperature=0)
    text = "the old man and the sea. " * 3
    assert lm.remember(text) == 72 and lm.bank.size(0) == 16  # 75 bytes in segments of 16; 64 tokens of room
    (ids,), before = (lm.engine.tokenizer.encode_batch(["the old"]), lm.bank.tensors()["k_RGNCK"].clone())
    logits = lm.engine.model(torch.tensor([ids]), bank=lm.bank.reader([0])).logits
    assert not torch.equal(logits, lm.engine.model(torch.tensor([ids])).logits)
    first = lm.generate(["the old", "a"], greedy)
    assert torch.equal(lm.bank.tensors()["k_RGNCK"], before)
    lm.save(run.path)
    again = LongMem.load(run.path)
    assert [x.ids for x in again.generate(["the old", "a"], greedy)] == [x.ids for x in first]
    assert torch.equal(again.engine.model(torch.tensor([ids]), bank=again.bank.reader([0])).logits, logits)
    lm.forget()
    assert lm.bank.size(0) == 0
    plain = Engine(lm.engine.model, lm.engine.tokenizer, compile="off").generate(["the old"], greedy)
    assert lm.generate(["the old"], greedy)[0].ids == plain[0].ids
    (run.path / "memory.safetensors").unlink()


# -- refusals


@pytest.mark.parametrize(
    ("fields", "memory", "reduction", "message"),
    [
        ({"depth": 3}, {}, 2, "reduction: 2 does not divide 3 layers"),
        ({}, {"layer": 5}, 2, "memory.layer: is 5, the backbone has layers 1 to 4"),
        ({}, {"retrieve": 10}, 2, "memory.retrieve: 10 tokens are no multiple of chunks of 4"),
        ({}, {"tokens": 66}, 2, "memory.tokens: 66 tokens are no multiple of chunks of 4"),
        (
            {"attention": {"kind": "retention", "heads": 4}},
            {},
            2,
            "a memory needs the keys of attention softmax, not of retention",
        ),
        ({"residual": "post"}, {}, 2, "residual post does not leave the stream a sum; pre, sandwich and subln do"),
        ({"causal": False, "head": "mlm"}, {}, 2, "an encoder has no past to remember; it needs causal: true"),
        (
            {"layers": [{"at": [2], "attention": {"kv_heads": 4}}]},
            {"layer": 3},
            2,
            "its heads differ from those of layer 2 of the side network",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    fields: dict[str, Any], memory: dict[str, Any], reduction: int, message: str
) -> None:
    with pytest.raises(TorchstoneError, match=re.escape(message)):
        pair(memory, reduction, **fields)


def test_other_models_and_a_second_side_network_are_refused() -> None:
    _, model = pair()
    with pytest.raises(TorchstoneError, match="adapt longmem: the model has another side network already"):
        LongMemAdaptSpec().apply(model.spec)
    assert LongMemAdaptSpec(memory=MEMORY).apply(model.spec) == model.spec
    with pytest.raises(TorchstoneError, match="longmem: the model's stack is plain; adapt it first"):
        LongMem(Engine(small.build(), compile="off"))
    spec = validate(TransformerSpec, {"width": 32, "depth": 2, "vocabulary": 61, "context": 2, "stack": "longmem"})
    with pytest.raises(TorchstoneError, match="longmem: segment needs 4 tokens or more, got 2"):
        LongMem(Engine(initialise(spec.build(), 0), compile="off"))
    with pytest.raises(TorchstoneError, match=r"adapt.also: no parameter is named 'hed\.\*'"):
        LongMemAdaptSpec(also=("hed.*",)).prepare(model)
