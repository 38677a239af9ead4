"""MiniLMv2: the loss by a naive loop, zero for the teacher itself, MiniLM's two losses as a special case, invariances,
padding, what gets a gradient, a training by a recipe that stops and goes on, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from torchstone.compress.objectives.minilm_v2 import MiniLMv2, MiniLMv2Spec, relation
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.checkpoint import load_tensors

T = 7
IDS = torch.randint(40, (2, T), generator=Key(0).generator())
VALID = torch.arange(T) < torch.tensor([[T], [4]])


def model(seed: int = 0, **fields: Any) -> Transformer:
    spec = {"width": 24, "depth": 2, "vocabulary": 40, "context": 16, "attention": {"heads": 3, "bias": "all"}}
    spec |= {"causal": False, "residual": {"kind": "pre", "std": 0.3}, "position": "learned", **fields}
    return initialise(validate(TransformerSpec, spec).build(), seed).eval()


def objective(teacher: nn.Module, **fields: Any) -> MiniLMv2:
    return MiniLMv2(validate(MiniLMv2Spec, {"teacher": "t", "relation_heads": 4, **fields}), teacher)


def loss(student: nn.Module, teacher: nn.Module, **fields: Any) -> torch.Tensor:
    batch = {"ids": IDS, "valid": VALID}
    made = objective(teacher, **fields)
    return made(student, batch, None).terms["loss"].total / made.counts(batch)["tokens"]


def captured(made: Transformer, layer: int, name: str) -> torch.Tensor:
    """(B, T, E), heads side by side."""
    path = f"encoder.layers.{layer}.attention.{name}"
    taps = Taps([path])
    made(Tokens.of(IDS, valid=VALID), taps=taps)
    x = taps.seen[path]
    return torch.stack([torch.cat(list(row), -1) for row in x])


@pytest.mark.parametrize("pairs", [("qq", "kk", "vv"), ("qk", "vv"), ("kv",)], ids=str)
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_the_loss_is_that_of_a_naive_loop(pairs: tuple[str, ...], heads: int) -> None:
    student, teacher = model(1, width=16, attention={"heads": 2}), model(2, depth=3)
    total = 0.0
    for pair in pairs:
        of = {}
        for who, made, layer in (("t", teacher, 2), ("s", student, 1)):
            a, b = (captured(made, layer, name) for name in pair)
            of[who] = [x.unflatten(-1, (heads, -1)) for x in (a, b)]
        for row in range(2):
            known = int(VALID[row].sum())
            for head in range(heads):
                for t in range(known):
                    p, q = (
                        (of[who][1][row, :known, head] @ of[who][0][row, t, head] / math.sqrt(of[who][0].shape[-1]))
                        .double()
                        .softmax(0)
                        for who in "ts"
                    )
                    total += float((p * (p / q).log()).sum()) / heads
    wanted = total / len(pairs) / int(VALID.sum())
    found = loss(student, teacher, relations=list(pairs), relation_heads=heads)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    summed = loss(student, teacher, relations=list(pairs), relation_heads=heads, reduction="sum")
    assert summed.item() == pytest.approx(wanted * len(pairs), rel=1e-5)


def test_a_teacher_has_nothing_to_learn_from_itself() -> None:
    teacher = model()
    assert abs(loss(teacher, teacher, relations="all").item()) < 1e-7
    assert loss(model(5), teacher, relations="all").item() > 1e-3


def test_with_as_many_relation_heads_as_heads_it_is_minilm() -> None:
    """QK is the attention map and VV the value relation of MiniLM (arXiv 2002.10957, eq. 4 and 5)."""
    student, teacher = model(1), model(2)
    total = torch.zeros(())
    for first, second in ("qk", "vv"):
        maps = []
        for made in (teacher, student):
            a, b = (captured(made, 1, name).unflatten(-1, (3, -1)).transpose(1, 2) for name in (first, second))
            scores = (a @ b.transpose(-1, -2) / 8**0.5).masked_fill(~VALID[:, None, None], -math.inf)
            maps.append(scores.softmax(-1))
        kl = (maps[0] * (maps[0].clamp(min=1e-30).log() - maps[1].clamp(min=1e-30).log())).sum(-1).mean(1)
        total = total + kl[VALID].mean()
    found = loss(student, teacher, relations=["qk", "vv"], relation_heads=3, reduction="sum")
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-7)


def test_relations_do_not_change_when_a_head_of_them_turns() -> None:
    keys, x = torch.ones(1, T, T, dtype=torch.bool), torch.randn(1, T, 8, generator=Key(1).generator())
    turn = torch.linalg.qr(torch.randn(4, 4, generator=Key(2).generator()))[0]
    inside = torch.block_diag(turn, torch.eye(4))
    across = torch.linalg.qr(torch.randn(8, 8, generator=Key(3).generator()))[0]
    plain = relation(x, x, keys, 2)
    torch.testing.assert_close(relation(x @ inside, x @ inside, keys, 2), plain, rtol=1e-5, atol=1e-5)
    assert (relation(x @ across, x @ across, keys, 2) - plain).abs().max() > 1e-2
    torch.testing.assert_close(plain.exp().sum(-1), torch.ones(1, 2, T))


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_which_attention_head_a_channel_belongs_to_changes_nothing(heads: int) -> None:
    student, teacher = model(1, depth=1), model(2, depth=1)
    wanted, hidden = loss(student, teacher), student(Tokens.of(IDS, valid=VALID)).hidden
    for which in (student, teacher):
        other = model(3, depth=1, attention={"heads": heads, "bias": "all"})
        other.load_state_dict(which.state_dict())
        pair = (other, teacher) if which is student else (student, other)
        torch.testing.assert_close(loss(*pair), wanted)
        if which is student:
            assert (other(Tokens.of(IDS, valid=VALID)).hidden - hidden).abs().max() > 1e-3  # attention is another one


def test_more_padding_changes_nothing_and_documents_do_not_meet() -> None:
    student, teacher = model(1), model(2)
    made = objective(teacher)
    plain = made(student, {"ids": IDS, "valid": VALID}, None).terms["loss"].total
    ids, valid = (torch.cat([x, x.new_zeros(2, 5)], 1) for x in (IDS, VALID))
    torch.testing.assert_close(made(student, {"ids": ids, "valid": valid}, None).terms["loss"].total, plain)
    start = torch.tensor([[0, 0, 0, 3, 3, 3, 3]]).expand(2, -1)
    both = made(student, {"ids": IDS, "start": start}, None).terms["loss"].total
    apart = sum(made(student, {"ids": IDS[:, part]}, None).terms["loss"].total for part in (slice(0, 3), slice(3, 7)))
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_what_lies_behind_the_last_projections_gets_no_gradient() -> None:
    student, teacher = model(1).train(), model(2)
    loss(student, teacher).backward()
    got = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    behind = {name for name, _ in student.named_parameters() if name.startswith(("encoder.layers.1.attention.out",
              "encoder.layers.1.ffn", "encoder.norm", "head"))}  # fmt: skip
    assert behind and not got & behind
    assert got == {name for name, _ in student.named_parameters()} - behind - {"encoder.layers.1.inner_norm"}
    qkv = student.main.layers[1].attention.qkv.weight.grad  # type: ignore[union-attr]
    assert all(part.abs().max() > 0 for part in qkv.chunk(3))  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_recipe_distils_a_run_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = tiny.distilled(tmp_path, trainer={"steps": 4, "save_every": 2}, optimizer={"lr": 0.01})
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        train(recipe, out=tmp_path / "cut", quiet=True)
    cut = train(recipe, out=tmp_path / "cut", resume=True, quiet=True)
    one, other = (load_tensors(each.path / "model.safetensors") for each in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = {name: value for row in whole.metrics() for name, value in row.items()}
    assert {"loss", "kl_qq", "kl_kk", "kl_vv", "valid_kl_vv", "test_loss"} <= set(rows)
    assert rows["test_loss"] == pytest.approx(
        (rows["test_kl_qq"] + rows["test_kl_kk"] + rows["test_kl_vv"]) / 3, rel=1e-5
    )


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    recipe = tiny.distilled(tmp_path, trainer={"steps": 120, "save_every": 120}, optimizer={"lr": 0.02})
    rows = train({**recipe, "evaluate": {"every": 120, "blocks": 8}}, out=tmp_path / "run", quiet=True).metrics()
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert valid[-1] < 0.6 * valid[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relation_heads": 5}, "relation_heads 5 does not divide the student's 16 channels; 1, 2, 4, 8 divide both"),
        ({"layer": 9}, "layer 9 of the teacher; it has 3"),
        ({"relations": ["qx"]}, "objective.relations: no relation 'qx'; relations: qq, qk, qv, kq"),
        ({"relations": []}, "needs different relations, one at least"),
        ({"teacher": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TorchstoneError, match=message) as caught:
        train(tiny.distilled(tmp_path, objective=fields), out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = tiny.distilled(tmp_path)
    bpe = {**made["data"], "tokenizer": {"kind": "bpe", "vocabulary": 270}}
    teacher = tiny.saved(tmp_path / "bpe", tiny.recipe(tmp_path, data=bpe)).path

    def refused(teacher: Path, tokenizer: Any) -> None:
        recipe = {
            **made,
            "data": {**made["data"], "tokenizer": tokenizer},
            "objective": {**made["objective"], "teacher": str(teacher)},
        }
        with pytest.raises(TorchstoneError) as caught:
            train(recipe, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
        assert str(caught.value) == (
            f"objective minilm_v2: the teacher {teacher} was trained with another tokenizer; set data.tokenizer: "
            f"{{kind: file, path: {teacher}/tokenizer.json}}"
        )

    refused(teacher, "bytes")
    refused(teacher, {"kind": "bpe", "vocabulary": 265})  # the first ids are the same tokens
    other = {**bpe, "corpus": {"kind": "text", "path": str(tiny.text(tmp_path / "other.txt", seed=1))}}
    refused(tiny.saved(tmp_path / "of-other", tiny.recipe(tmp_path, data=other)).path, bpe["tokenizer"])
    own = {"kind": "file", "path": f"{teacher}/tokenizer.json"}
    recipe = {**made, "data": {**made["data"], "tokenizer": own}, "trainer": {**made["trainer"], "steps": 1}}
    train({**recipe, "objective": {**made["objective"], "teacher": str(teacher)}}, out=tmp_path / "run", quiet=True)


def test_students_and_teachers_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    def said(student: nn.Module, teacher: nn.Module, **fields: Any) -> str:
        with pytest.raises(TorchstoneError) as caught:
            objective(teacher, **fields).check(student)
        return str(caught.value)

    assert "one of student and teacher is causal" in said(model(causal=True), model())
    grouped = model(attention={"heads": 4, "kv_heads": 2})
    assert "relation qk: the student's have 24 and 12 channels" in said(grouped, model(), relations=["qk"])
    objective(model(), relations=["qq", "kk", "vv"], relation_heads=12).check(grouped)
    with pytest.raises(TorchstoneError, match="needs transformers, and the teacher is Linear"):
        objective(nn.Linear(2, 2))
