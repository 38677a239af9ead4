"""Direct preference optimisation: the loss of the paper, written here anew, and what a run of it keeps and refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts
from torchstone.objectives._frozen import fingerprint
from torchstone.objectives.dpo import DPO, DPOSpec
from torchstone.recipe import load_recipe
from torchstone.train import training
from torchstone.train.checkpoint import load_tensors, save_tensors
from torchstone.train.memory import training_memory
from torchstone.train.run import RunFolder, build_model
from torchstone.train.training import train

MODEL: dict[str, Any] = {**tiny.MODEL, "vocabulary": 30, "context": 16}
Gradients = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _float64(float64: None) -> Iterator[None]:
    yield


def model_of(seed: int, **fields: Any) -> nn.Module:
    holder = load_recipe({"model": {**MODEL, "residual": {"std": 0.3}, **fields}})
    return build_model(holder.model, seed).double()


def batch_of(count: int = 4, length: int = 9, seed: int = 0) -> Batch:
    """Prompts of three or four tokens and responses of two to five, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (count, 2, length + 1), generator=generator)
    prompt = 3 + torch.arange(count) % 2
    ids[:, 1, :3] = ids[:, 0, :3]
    size = prompt[:, None] + torch.randint(2, 6, (count, 2), generator=generator)
    at = torch.arange(length)
    valid = at < size[..., None]
    target = valid & (at >= prompt[:, None, None] - 1)
    return {"ids": ids[..., :-1].contiguous(), "next": torch.where(target, ids[..., 1:], -100), "valid": valid}


def log_probability(model: Any, batch: Batch) -> torch.Tensor:
    """Of each response, (B, 2), from all logits, row by row without its padding."""
    rows = []
    for ids_2T, next_2T, valid_2T in zip(batch["ids"], batch["next"], batch["valid"], strict=True):
        for ids, after, valid in zip(ids_2T, next_2T, valid_2T, strict=True):
            logp = model(ids[valid][None]).logits[0].log_softmax(-1)
            known = after[valid] >= 0
            rows.append(logp[known].gather(1, after[valid][known][:, None]).sum())
    return torch.stack(rows).view(-1, 2)


def loss_of(objective: DPO, model: nn.Module, batch: Batch) -> tuple[float, Gradients]:
    """Mean loss and its gradient, as the engine takes them."""
    model.zero_grad()
    term = objective(model, batch, Key(0)).terms["loss"]
    loss = term.total / objective.counts(batch)["pairs"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys() and any(value.abs().max() > 1e-4 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def gradient_of(model: nn.Module, total: torch.Tensor) -> Gradients:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", [{}, {"tied": False, "bias": True}, {"softcap": 2.0}], ids=["tied", "bias", "softcap"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_value_and_gradient_are_those_of_the_formula(smoothing: float, head: dict[str, Any]) -> None:
    model, reference, batch = model_of(1, head={"kind": "lm", **head}), model_of(2), batch_of()
    objective = DPO(DPOSpec(beta=0.4, label_smoothing=smoothing), reference)
    found, gradient = loss_of(objective, model, batch)
    ratio = log_probability(model, batch) - log_probability(reference, batch).detach()
    margin = 0.4 * (ratio[:, 0] - ratio[:, 1])
    naive = -((1 - smoothing) * margin.sigmoid().log() + smoothing * (-margin).sigmoid().log()).mean()
    assert found == pytest.approx(naive.item(), rel=1e-12)
    assert_close(gradient, gradient_of(model, naive))


def test_the_reference_itself_has_ln_2_and_half_of_beta_for_a_gradient() -> None:
    model, batch = model_of(1), batch_of()
    objective = DPO(DPOSpec(beta=0.3), model_of(1))
    each = objective(model, batch, Key(0)).terms["loss"].total.item() / len(batch["ids"])
    loss, gradient = loss_of(objective, model, batch)
    assert loss == pytest.approx(math.log(2), abs=1e-15) and each == loss
    logp = log_probability(model, batch)
    assert_close(gradient, gradient_of(model, -0.3 / 2 * (logp[:, 0] - logp[:, 1]).mean()))
    _, swapped = loss_of(objective, model, {name: value.flip(1) for name, value in batch.items()})
    assert_close(swapped, {name: -value for name, value in gradient.items()})
    scores = objective.evaluate(model, batch).scores
    assert (scores["accuracy"][0] / scores["accuracy"][1]).item() == 0.5  # ties count half


def test_swapping_turns_rewards_and_accuracy_round() -> None:
    model, batch, objective = model_of(1), batch_of(8), DPO(DPOSpec(), model_of(2))
    with torch.no_grad():
        here = objective.evaluate(model, batch).scores
        there = objective.evaluate(model, {name: value.flip(1) for name, value in batch.items()}).scores
    for name in ("accuracy", "reference_accuracy"):
        assert (here[name][0] + there[name][0]).item() == here[name][1] == 8
    assert here["reward_margin"][0] == pytest.approx(-there["reward_margin"][0])
    assert here["reward_chosen"][0] == pytest.approx(there["reward_rejected"][0])


def test_metrics_are_those_of_the_definition() -> None:
    model, reference, batch = model_of(1), model_of(2), batch_of(8)
    metrics = DPO(DPOSpec(beta=0.2), reference)(model, batch, Key(0)).metrics
    own, theirs = log_probability(model, batch), log_probability(reference, batch)
    ratio = own - theirs
    wanted = {
        "accuracy": (ratio[:, 0] > ratio[:, 1]).double().mean(),
        "reference_accuracy": (theirs[:, 0] > theirs[:, 1]).double().mean(),
        "reward_margin": 0.2 * (ratio[:, 0] - ratio[:, 1]).mean(),
        "reward_chosen": 0.2 * ratio[:, 0].mean(),
        "reward_rejected": 0.2 * ratio[:, 1].mean(),
        "log_ratio": ratio.sum() / (batch["next"] >= 0).sum(),
    }
    assert {name: (total / count).item() for name, (total, count) in metrics.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}
    )


def test_padding_changes_nothing() -> None:
    model, batch, objective = model_of(1), batch_of(), DPO(DPOSpec(), model_of(2))
    more = {
        "ids": nn.functional.pad(batch["ids"], (0, 4), value=7),
        "next": nn.functional.pad(batch["next"], (0, 4), value=-100),
        "valid": nn.functional.pad(batch["valid"], (0, 4), value=False),
    }
    other = {**batch, "ids": torch.where(batch["valid"], batch["ids"], 11)}
    loss, gradient = loss_of(objective, model, batch)
    for same in (more, other):
        found, theirs = loss_of(objective, model, same)
        assert found == pytest.approx(loss, rel=1e-12)
        assert_close(theirs, gradient)


def test_the_prompts_own_log_probabilities_change_nothing() -> None:
    """Hidden states that predict prompt tokens may be anything, in both models."""
    model, reference, batch = model_of(1), model_of(2), batch_of()
    objective = DPO(DPOSpec(), reference)
    loss, gradient = loss_of(objective, model, batch)
    outside = (batch["next"] < 0).flatten(0, 1)[..., None]
    for each in (model, reference):
        each.register_forward_hook(
            lambda module, inputs, out: replace(out, hidden=torch.where(outside, torch.nan, out.hidden))
        )
    found, theirs = loss_of(objective, model, batch)
    assert found == loss
    assert_close(theirs, gradient)
    batch["next"][0, 0, batch["next"][0, 0].tolist().index(-100)] = 3  # a target more is noticed
    assert not math.isclose(loss_of(objective, model, batch)[0], loss)


@pytest.mark.slow
def test_loss_and_rewards_are_trls_on_the_same_log_probabilities() -> None:
    """`trl.DPOTrainer._compute_loss` itself, of a stand-in for its trainer, on each token's log-probability by our two
    models. Its "sigmoid" loss, which has no label smoothing."""
    trl = pytest.importorskip("trl")
    model, reference, batch = model_of(1), model_of(2), batch_of()
    # theirs: chosen rows first
    ids, after, valid = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("ids", "next", "valid"))

    def tokens(of: Any) -> torch.Tensor:
        logp = of(ids).logits.log_softmax(-1).gather(2, after.clamp(min=0)[..., None])[..., 0]
        return torch.where(after >= 0, logp, 0.0).detach()

    ours, theirs, blank = tokens(model), tokens(reference), torch.zeros_like(after)
    output = SimpleNamespace(log_probs=ours, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model.train(),
        accelerator=same,
        beta=0.3,
        label_smoothing=0.0,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        ld_alpha=None,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = theirs.sum(1).chunk(2)
    inputs = {
        "input_ids": nn.functional.pad(ids, (0, 1)),
        "attention_mask": nn.functional.pad(valid, (1, 0), value=True).long(),
        "completion_mask": nn.functional.pad(after >= 0, (1, 0)).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **inputs: output, inputs, False)
    objective = DPO(DPOSpec(beta=0.3), reference)
    assert loss_of(objective, model, batch)[0] == pytest.approx(loss.item(), rel=1e-9)
    scores = objective.evaluate(model, batch).scores
    pairs = {"margins": "reward_margin", "chosen": "reward_chosen", "rejected": "reward_rejected"}
    for name, own in {**pairs, "accuracies": "accuracy"}.items():
        found = (scores[own][0] / scores[own][1]).item()
        assert found == pytest.approx(trainer._metrics["train"][f"rewards/{name}"][0], rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)

    def make(name: str = "run", resume: bool = False, **sections: Any) -> RunFolder:
        return train(tiny.preferences(tmp_path, **sections), out=tmp_path / name, resume=resume, quiet=True)

    return make


SHORT: dict[str, Any] = {
    "steps": 5,
    "batch": 4,
    "device": "cpu",
    "threads": 1,
    "compile": "off",
    "log_every": 1,
    "save_every": 2,
}


def test_cut_and_resumed_equals_uncut_bit_for_bit(run: Callable[..., RunFolder]) -> None:
    hard: dict[str, Any] = {
        "model": {**tiny.MODEL, "dropout": 0.2},
        "optimizer": {"lr": 0.01},
        "trainer": {**SHORT, "accumulate": 2, "ema": 0.9},
    }
    whole = run("whole", **hard)
    with tiny.cut_after(3):
        run("cut", **hard)
    tiny.assert_same_run(run("cut", resume=True, **hard), whole)
    state = load_tensors(whole.state / (whole.state / "LATEST").read_text().strip() / "objective.safetensors")
    assert {name: value.shape for name, value in state.items()} == {"digest": (32,)}  # no weights of the reference
    assert not any("reference" in name for name in load_tensors(whole.path / "model.safetensors"))
    rows = whole.metrics()
    assert rows[-1]["test_accuracy"] >= 0 and {"valid_accuracy", "valid_reward_margin"} <= rows[0].keys()
    assert {"accuracy", "reward_margin", "reward_chosen", "reward_rejected", "log_ratio"} <= rows[1].keys()


def test_another_reference_is_refused_on_resume(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    with tiny.cut_after(3):
        run(trainer=SHORT)
    before = tiny.listing(tmp_path / "run")
    file = tmp_path / "reference" / "model.safetensors"
    (weights := load_tensors(file))["decoder.norm.weight"][0] += 1e-6
    save_tensors(file, weights)
    with pytest.raises(TorchstoneError, match=r"reference .*reference holds other weights than when this training"):
        run(resume=True, trainer=SHORT)
    assert tiny.listing(tmp_path / "run") == before


def test_init_from_is_the_reference_and_gives_the_tokenizer(tmp_path: Path, run: Callable[..., RunFolder]) -> None:
    """The recipe of the documents: nothing but where to start, pairs and the objective."""
    trained = {"tokenizer": {"kind": "bpe", "vocabulary": 300}}
    tiny.saved(tmp_path / "reference", {**tiny.recipe(tmp_path, data=trained), "trainer": {"seed": 7}})
    made = tiny.preferences(tmp_path, trainer=SHORT)
    recipe = {
        "init_from": str(tmp_path / "reference"),
        "data": {"kind": "preferences", "path": made["data"]["path"], "block": 24},
        "objective": {"kind": "dpo"},
        "trainer": {**SHORT, "steps": 1},
        "evaluate": {"every": 1},
    }
    done = train(recipe, out=tmp_path / "run", quiet=True)
    row = done.metrics()[0]
    assert row["valid_loss"] == pytest.approx(math.log(2), abs=1e-6) and row["valid_accuracy"] == 0.5
    assert done.recipe.data.tokenizer.dump() == {"kind": "file", "path": str(tmp_path / "reference")}  # type: ignore[attr-defined]
    assert done.model_spec == RunFolder(tmp_path / "reference").model_spec


def test_memory_counts_the_reference_and_what_chosen_and_rejected_rows_keep(
    tmp_path: Path, run: Callable[..., RunFolder]
) -> None:
    recipe = load_recipe(tiny.preferences(tmp_path, model={**tiny.MODEL, "vocabulary": 259, "context": 24}))
    found = training_memory(recipe)
    assert found.weights == 2 * found.gradients
    double = training_memory(recipe.override({"trainer": {"batch": 4}})).activations
    assert found.activations is not None and double == pytest.approx(2 * found.activations, rel=0.1)


def test_what_does_not_go_together_is_refused(tmp_path: Path, run: Callable[..., RunFolder]) -> None:
    made = tiny.preferences(tmp_path)
    text = tiny.recipe(tmp_path)

    def refused(match: str, **sections: Any) -> None:
        with pytest.raises(TorchstoneError, match=match):
            train({**made, **sections}, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    refused("objective dpo: needs a reference: the directory of a run, or the recipe's init_from", objective="dpo")
    refused("nowhere: no such run", objective={"kind": "dpo", "reference": str(tmp_path / "nowhere")})
    refused("objective dpo compares pairs, and data text has none", data=text["data"])
    refused("data preferences has pairs, and objective causal_lm compares none", objective="causal_lm")
    refused("objective dpo: needs causal: true; the model is an encoder", model=tiny.MASKED["model"])
    with pytest.raises(TorchstoneError, match="knows 30 tokens, fewer than the tokenizer's 31"):
        DPOSpec().build(Facts(vocabulary=31, init_from="run", load=lambda path: model_of(0)))
    assert fingerprint(model_of(0)) == fingerprint(model_of(0)) != fingerprint(model_of(1))
