"""Modules that predict further tokens: what they see, what they leave alone, how they are trained and counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone import api
from torchstone.errors import TorchstoneError
from torchstone.interop.presets import preset
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.stack.multi_token import predict, predictors_of
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import Batch, tokens_of
from torchstone.objectives.causal_lm import CausalLM
from torchstone.objectives.multi_token import MultiToken, MultiTokenSpec, further_targets
from torchstone.spec import validate

V, T = 31, 12
EXPERTS = {"kind": "moe", "experts": 4, "hidden": 8, "router": {"kind": "sigmoid_bias", "update_rate": 0.1}}


def model_of(predictors: int | None, std: float = 0.3, **fields: Any) -> Transformer:
    stack: Any = "plain" if predictors is None else {"kind": "multi_token", "predictors": predictors}
    body = {
        "width": 16,
        "depth": 2,
        "vocabulary": V,
        "context": 32,
        "attention": {"heads": 2},
        "residual": {"kind": "pre", "std": std},
        "stack": stack,
        **fields,
    }
    return initialise(validate(TransformerSpec, body).build(), 0)  # type: ignore[return-value]


def batch_of(rows: int = 2, seed: int = 0, start: list[int] | None = None) -> Batch:
    drawn = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    batch = {"ids": drawn[:, :-1], "next": drawn[:, 1:].clone()}
    return batch if start is None else {**batch, "start": torch.tensor([start]).expand(rows, -1)}


def predictions(model: Transformer, tokens: Tokens) -> list[torch.Tensor]:
    """Logits (B, T - k, V) of every module."""
    assert tokens.ids is not None
    hidden, found = model(tokens, outputs="none").hidden, []
    for k in range(1, len(predictors_of(model) or ()) + 1):
        here = replace(tokens.slice(0, T - k), ids=tokens.ids[:, k:])
        hidden, _ = predict(model, k, hidden[:, : T - k], here)
        found.append(model.vocabulary_head()(hidden, here, model.embedding.table()))
    return found


def gradients(objective: CausalLM, model: Transformer, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    result = objective(model, batch, Key(1))
    loss = sum(term.weight * term.total for term in result.terms.values())
    loss.backward()  # type: ignore[union-attr]
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[arg-type]


def test_without_modules_it_is_the_plain_model_bit_for_bit() -> None:
    plain, none, two = model_of(None), model_of(0), model_of(2)
    batch = batch_of(start=[0] * 5 + [5] * 7)
    wanted, found = gradients(CausalLM(), plain, batch), gradients(MultiToken(MultiTokenSpec()), none, batch)
    assert found[0] == wanted[0] and found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in wanted[1].items())
    # modules change neither first values nor outputs of the main model, nor its decode state
    theirs = dict(two.named_parameters())
    assert all(torch.equal(theirs[name], value) for name, value in plain.named_parameters())
    assert torch.equal(two(batch["ids"]).logits, plain(batch["ids"]).logits)
    assert two.state_spec().keys() == plain.state_spec().keys()


@pytest.mark.parametrize("position", ["rotary", "learned", "t5"])
def test_a_module_sees_its_tokens_and_none_after_them(position: str) -> None:
    model, ids = model_of(3, position=position), batch_of()["ids"]
    before = predictions(model, Tokens.of(ids))
    for changed in (1, 4, T - 1):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % V
        for k, (a, b) in enumerate(zip(before, predictions(model, Tokens.of(other)), strict=True), 1):
            first = max(0, changed - k)  # p_i has seen t_{i+k}
            assert torch.equal(a[:, :first], b[:, :first])
            assert (a[:, first:] != b[:, first:]).any(-1).all(), f"module {k} does not see t_{changed}"


def test_packed_documents_predict_as_separate_ones() -> None:
    model, ids = model_of(2), batch_of()["ids"]
    packed = predictions(model, Tokens.of(ids, start=torch.tensor([[0] * 5 + [5] * 7])))
    hidden = model(ids[:, 5:]).hidden
    for k in (1, 2):
        alone, _ = predict(model, k, hidden[:, : 7 - k], Tokens.of(ids[:, 5 + k :]))
        logits = model.vocabulary_head()(alone, Tokens.of(ids[:, 5 + k :]), model.embedding.table())
        torch.testing.assert_close(packed[k - 1][:, 5:], logits, rtol=1e-5, atol=1e-5)
        hidden = alone


def test_targets_are_of_the_document_of_the_token_that_was_read() -> None:
    batch = batch_of(1, start=[0, 0, 0, 3, 3, 3, 3, 7, 8, 8, 8, 8])
    batch["next"][0, -1] = -100  # the stream ends
    ids = batch["ids"][0].tolist()
    for k in (1, 2, 3):
        start = batch["start"][0].tolist()
        wanted = [
            ids[i + k + 1] if start[i + k] == start[i] and i + k + 1 < T else -100  # by hand, from ids alone
            for i in range(T - k)
        ]
        assert further_targets(batch, k)[0].tolist() == wanted
    valid = torch.arange(T)[None] < 9
    assert (further_targets({**batch, "valid": valid}, 2)[0, 7:] == -100).all()


def test_the_loss_is_the_mean_cross_entropy_of_further_tokens_and_near_ln_v_at_first() -> None:
    model, batch = model_of(2, std=0.02), batch_of(8)
    result = MultiToken(MultiTokenSpec(weight=0.4))(model, batch, None)
    assert list(result.terms) == ["loss", "mtp_1", "mtp_2"]
    for k, logits in enumerate(predictions(model, tokens_of(batch)), 1):
        term, targets = result.terms[f"mtp_{k}"], batch["next"][:, k:]
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        assert term.weight == pytest.approx(0.2) and term.over == "targets"
        assert float(term.total.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
        assert float(term.total.detach()) / targets.numel() == pytest.approx(math.log(V), abs=0.1)


def test_evaluation_is_that_of_the_main_model() -> None:
    model, batch = model_of(1), batch_of()
    found, wanted = (objective.evaluate(model, batch) for objective in (MultiToken(MultiTokenSpec()), CausalLM()))
    assert found.terms.keys() == wanted.terms.keys() and torch.equal(found.nll_BT, wanted.nll_BT)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_module_of_experts_balances_by_its_own_loads(recompute: bool, tmp_path: Path) -> None:
    fields = {**tiny.MODEL, "ffn": EXPERTS, "stack": {"kind": "multi_token"}}
    recipe = tiny.recipe(tmp_path, model=fields, objective={"kind": "multi_token"}, trainer={"recompute": recompute})
    trainer = tiny.trainer(recipe)
    trainer.train_step()
    main, own = (
        trainer.model.get_submodule(f"decoder.{path}.ffn.router").bias for path in ("layers.0", "predictors.0.block")
    )
    assert main.abs().max() == own.abs().max() == pytest.approx(0.1) and not torch.equal(main, own)


def test_modules_are_counted_apart() -> None:
    recipe: dict[str, Any] = {"model": {**tiny.MODEL, "vocabulary": V, "context": 32}}
    plain = api.inspect(recipe)
    recipe["model"]["stack"] = {"kind": "multi_token", "predictors": 2}
    found = api.inspect(recipe | {"objective": {"kind": "multi_token"}})
    apart = sum(p.numel() for p in predictors_of(api.build({**recipe["model"]})).parameters())  # type: ignore[union-attr]
    assert found["predictor_parameters"] == apart > 0 == plain["predictor_parameters"]
    for name in ("parameters", "active_parameters", "state_bytes_per_token", "flops_per_token", "weight_bytes"):
        assert found[name] == plain[name], name
    assert found["training_bytes"]["weights"] == plain["training_bytes"]["weights"] + 4 * apart
    assert found["training_bytes"]["activations"] > plain["training_bytes"]["activations"]


def test_deepseek_v3_has_a_module_of_the_published_size() -> None:
    body = preset("deepseek-v3").dump() | {"stack": {"kind": "multi_token", "main": "plain"}}
    with torch.device("meta"):
        model: Any = validate(TransformerSpec, body).build()
    layer, D = sum(p.numel() for p in model.decoder.layers[-1].parameters()), 7168
    apart = sum(p.numel() for p in predictors_of(model).parameters())  # type: ignore[union-attr]
    assert apart == layer + 2 * D * D + 2 * D  # a layer, M_1, two norms
    assert round(apart / 1e9, 1) == 11.6 and round(layer / 1e9, 1) == 11.5  # the README's 11.5B are the layer's


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"causal": False, "head": "mlm"}, "no encoder, alone or beside a decoder"),
        ({"encoder": {"depth": 1}}, "no encoder, alone or beside a decoder"),
        ({"stack": {"kind": "multi_token", "main": "multi_token"}}, "main is another kind of stack"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TorchstoneError, match=says):
        model_of(1, **fields)


def test_the_objective_needs_the_modules() -> None:
    with pytest.raises(TorchstoneError, match=r"needs the modules of model.stack: \{kind: multi_token\}"):
        MultiToken(MultiTokenSpec()).check(model_of(None))
    MultiToken(MultiTokenSpec()).check(model_of(0))
