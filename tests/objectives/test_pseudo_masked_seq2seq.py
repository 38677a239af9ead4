"""Tuning with pseudo masks: one pass predicts what a pass for each target predicts, from the source and what is before
it alone; a pre-trained run is tuned on responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import Mask, Roles
from torchstone.model.site import initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import Batch, Facts, tokens_of
from torchstone.objectives.pseudo_masked_seq2seq import PseudoMaskedSeq2seq, PseudoMaskedSeq2seqSpec
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train

V, T, PAD = 30, 9, 1
FACTS = Facts(V, 0, PAD, 2)


def model(**fields: Any) -> Transformer:
    spec = {"width": 16, "depth": 2, "vocabulary": V, "context": 64, "causal": False, "attention": {"heads": 2}}
    spec |= {"position": "learned", "residual": {"kind": "pre", "std": 0.4}, "head": "lm", **fields}
    return initialise(validate(TransformerSpec, spec).build(), 0).eval()


def objective(**fields: Any) -> PseudoMaskedSeq2seq:
    return PseudoMaskedSeq2seqSpec(**fields).build(FACTS)  # type: ignore[return-value]


def rows() -> Batch:
    """Rows of 9, 6 and 4 tokens, of which the last 5, 3 and none are predicted."""
    ids = torch.randint(3, V, (3, T + 1), generator=Key(0).generator())
    length, targets = torch.tensor([[9], [6], [4]]), torch.tensor([[5], [3], [0]])
    place = torch.arange(T)
    after = torch.where((place < length) & (place >= length - targets), ids[:, 1:], -100)
    return {"ids": torch.where(place < length, ids[:, :-1], PAD), "next": after, "valid": place < length}


@torch.no_grad()
def test_one_pass_predicts_each_target_from_what_is_before_it() -> None:
    made, plain = model(), rows()
    batch = objective().prepare(plain, Key(0))
    whole = made(tokens_of(batch, batch["pseudo"]), mask=Mask((Roles(),))).logits
    for row, (source, count) in enumerate(((5, 5), (4, 3))):
        for t in range(1, count + 1):
            # the source and the targets before this one, then the stand-in in its place
            ids = torch.cat([plain["ids"][row, : source + t - 1], torch.tensor([PAD])])[None]
            role = torch.tensor([[0] * source + [*range(1, t)] + [-t]])
            alone = made(Tokens.of(ids, role=role), mask=Mask((Roles(),))).logits[0, -1]
            torch.testing.assert_close(whole[row, t - 1], alone, rtol=0, atol=1e-5)
            assert batch["targets"][row, t - 1] == plain["next"][row, source + t - 2]
    assert (batch["targets"][2] < 0).all() and not batch["valid"][2, :5].any()


def test_a_text_is_predicted_whole_and_documents_apart() -> None:
    start = torch.where(torch.arange(T) < 4, 0, 4).expand(2, -1).contiguous()
    ids = torch.randint(3, V, (2, T + 1), generator=Key(1).generator())
    batch = objective().prepare({"ids": ids[:, :-1], "next": ids[:, 1:], "start": start}, Key(0))
    tokens = tokens_of(batch, batch["pseudo"])
    seen = Roles().allow(tokens, tokens) & (tokens.start[:, None] == tokens.start[:, :, None])  # type: ignore[index]
    place = torch.arange(T)
    causal = (place <= place[:, None]) & (start[0] == start[0][:, None])
    # without a target of its own the first token is the source; a stand-in sees what its token's predecessor sees
    assert torch.equal(seen[0, T:, T:], causal) and torch.equal(seen[0, :T, T:], causal)
    assert torch.equal(seen[0, :T, :T], torch.eye(T, dtype=torch.bool)) and not seen[0, T:, :T].any()
    assert batch["position"][0, :T].tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]


def test_smoothing_is_of_training_alone() -> None:
    made, own = model(), objective(smoothing=0.2)
    batch = own.prepare(rows(), Key(0))
    logits = made(tokens_of(batch, batch["pseudo"]), mask=Mask((Roles(),))).logits.flatten(0, 1)
    for key, smoothing in ((None, 0.0), (Key(0), 0.2)):
        wanted = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(own(made, batch, key).terms["loss"].total, wanted)
    assert own.counts(batch) == {"targets": torch.tensor(8), "tokens": torch.tensor(19)}


def test_a_run_that_was_pre_trained_is_tuned_on_responses(tmp_path: Path) -> None:
    once = {"trainer": {"steps": 1, "save_every": 1}, "evaluate": {"every": 1}}
    sections = {**tiny.MASKED, "objective": {"kind": "pseudo_masked"}, **once}
    train(recipe := tiny.recipe(tmp_path, **sections), out=tmp_path / "run", quiet=True)
    pairs = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tune = {
        **{name: recipe[name] for name in ("trainer", "schedule", "evaluate")},
        "init_from": str(tmp_path / "run"),
        "data": {"kind": "responses", "path": str(tmp_path / "pairs.jsonl"), "block": 16},
        "objective": "pseudo_masked_seq2seq",
    }
    tuned = train(tune, out=tmp_path / "tuned", quiet=True)
    assert [row["step"] for row in tuned.metrics() if "valid_loss" in row] == [0, 1]
    assert tuned.recipe.model.causal is False and tuned.recipe.init_from == str(tmp_path / "run")


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(TorchstoneError, match="needs causal: false"):
        objective().check(model(causal=True))
    with pytest.raises(TorchstoneError, match="has no mask token"):
        PseudoMaskedSeq2seqSpec().build(Facts(V))
    with pytest.raises(TorchstoneError, match=r"objective.smoothing: .*less than 1"):
        load_recipe({"objective": {"kind": "pseudo_masked_seq2seq", "smoothing": 1}})
