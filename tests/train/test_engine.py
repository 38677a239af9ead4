"""What one step is made of: precision, recomputation, averages, validation, and the stop at what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tiny
from torchstone import spec
from torchstone.errors import TorchstoneError
from torchstone.model.context import Aux, Context
from torchstone.model.feedforward import FeedForward, FeedForwardSpec
from torchstone.model.site import Site
from torchstone.objectives import tokens_of
from torchstone.train.engine import Trainer
from torchstone.train.run import RunFolder

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]
TRAINER: dict[str, Any] = {"steps": 4, "batch": 2, "device": "cpu", "threads": 1, "compile": "off", "save_every": 2}


def losses(trainer: Trainer, steps: int = 4) -> list[float]:
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("sections", [{}, tiny.MASKED], ids=["causal", "masked"])
def test_recomputed_activations_give_the_same_losses_bit_for_bit(recipe: Recipe, sections: dict[str, Any]) -> None:
    model = {**sections.get("model", tiny.MODEL), "depth": 2, "dropout": 0.2, "drop_path": 0.1}
    kept = tiny.trainer(recipe(**{**sections, "model": model}))
    again = tiny.trainer(recipe(**{**sections, "model": model, "trainer": {"recompute": True}}))
    assert all(stack.recompute for stack in again.model.stacks.values())  # type: ignore[union-attr, operator]
    assert losses(kept) == losses(again)
    for a, b in zip(kept.named, again.named, strict=True):
        assert torch.equal(a.value, b.value), a.name


def test_bf16_follows_fp32_and_keeps_weights_and_state_in_float32(recipe: Recipe) -> None:
    full = losses(tiny.trainer(recipe()), 8)
    half = tiny.trainer(recipe(trainer={"precision": "bf16"}))
    found = losses(half, 8)
    assert found != full
    assert found == pytest.approx(full, rel=0.02)
    assert {p.value.dtype for p in half.named} == {torch.float32}
    floats = [v for state in half.optim.state.values() for v in state.values()]
    assert {value.dtype for value in floats} == {torch.float32}


def test_same_recipe_same_losses_and_another_seed_other_losses(recipe: Recipe) -> None:
    dropping = {"model": {**tiny.MODEL, "dropout": 0.3}}
    first, second = (losses(tiny.trainer(recipe(**dropping))) for _ in range(2))
    assert first == second
    assert losses(tiny.trainer(recipe(**dropping, trainer={"seed": 1}))) != first


def test_accumulated_micro_batches_equal_one_large_batch(recipe: Recipe) -> None:
    one = losses(tiny.trainer(recipe(trainer={"batch": 6}), torch.float64))
    three = losses(tiny.trainer(recipe(trainer={"batch": 2, "accumulate": 3}), torch.float64))
    assert three == pytest.approx(one, rel=1e-9)


def test_gradients_are_clipped_to_the_norm(recipe: Recipe) -> None:
    trainer = tiny.trainer(recipe(trainer={"clip": 0.01}))
    row = trainer.train_step()
    assert row["grad_norm"] > 0.01
    left = torch.nn.utils.get_total_norm([p.value.grad for p in trainer.named if p.value.grad is not None])
    assert left.item() == pytest.approx(0.01, rel=1e-3)


def test_ema_equals_a_hand_computation(recipe: Recipe) -> None:
    trainer = tiny.trainer(recipe(trainer={"ema": 0.7}))
    wanted = {p.name: p.value.detach().clone() for p in trainer.named}
    for _ in range(3):
        trainer.train_step()
        for p in trainer.named:
            wanted[p.name] = 0.7 * wanted[p.name] + 0.3 * p.value.detach()
    assert trainer.ema is not None
    for name, value in wanted.items():
        torch.testing.assert_close(trainer.ema[name], value, rtol=1e-5, atol=1e-7)


def test_validation_looks_at_the_averaged_weights_and_gives_the_others_back(recipe: Recipe) -> None:
    trainer = tiny.trainer(recipe(trainer={"ema": 0.5}, optimizer={"lr": 0.1}))
    losses(trainer)
    weights = {p.name: p.value.detach().clone() for p in trainer.named}
    averaged = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
    for p in trainer.named:
        assert torch.equal(p.value, weights[p.name])
        p.value.data.copy_(trainer.ema[p.name])  # type: ignore[index]
    trainer.ema = None
    assert trainer.measure_split(trainer.source.valid, "valid") == averaged  # type: ignore[arg-type]


def test_bits_per_byte_equal_a_hand_computation(recipe: Recipe, tmp_path: Path) -> None:
    """The whole text of the split, block by block, its nats by torch's cross-entropy over all logits at once."""
    recipe()
    trainer = tiny.trainer(recipe(trainer={"batch": 3}))
    losses(trainer)
    split = trainer.source.test
    assert split is not None
    nats, targets = 0.0, 0
    trainer.model.eval()
    with torch.no_grad():
        for batch in split.evaluation(1):
            logits = trainer.model(tokens_of(batch)).logits[batch["next"] >= 0].double()
            wanted = batch["next"][batch["next"] >= 0]
            nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            targets += len(wanted)
    assert targets == split.tokens - 1
    row = trainer.measure_split(split, "test")
    assert row["test_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert row["test_bits_per_byte"] == pytest.approx(nats / math.log(2) / split.bytes, rel=1e-6)


def test_masked_lm_reports_no_bits_per_byte(recipe: Recipe) -> None:
    trainer = tiny.trainer(recipe(**tiny.MASKED))
    assert set(trainer.measure_split(trainer.source.valid, "valid")) == {"valid_loss"}  # type: ignore[arg-type]


def test_validation_draws_the_same_every_time(recipe: Recipe) -> None:
    sections = {**tiny.MASKED, "model": {**tiny.MASKED["model"], "dropout": 0.5}}
    trainer = tiny.trainer(recipe(**sections))
    first, second = (trainer.measure_split(trainer.source.valid, "valid") for _ in range(2))  # type: ignore[arg-type]
    assert first == second


def test_any_module_and_any_batches_can_be_trained() -> None:
    """No Transformer, no text, no recipe: a line through points."""
    from torchstone.keys import Key
    from torchstone.objectives import Batch, Objective, Result, Term
    from torchstone.recipe import TrainerSpec
    from torchstone.train.engine import Source
    from torchstone.train.optimizers.adamw import AdamWSpec
    from torchstone.train.schedules.constant import ConstantSpec

    class Points:
        bytes = tokens = 0

        def batch(self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0,
                  ranks: int = 1) -> Batch:  # fmt: skip
            x = torch.randn(size, 1, generator=key.fold(step, micro).generator())
            return {"x": x, "y": 3 * x - 1}

        def evaluation(self, size: int, limit: int | None = None) -> Any:
            yield self.batch(Key(5), 0, size)

    class Squares(Objective):
        def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"points": torch.tensor(len(batch["x"]))}

        def forward(self, model: torch.nn.Module, batch: Batch, key: Key | None) -> Result:
            return Result({"loss": Term((model(batch["x"]) - batch["y"]).square().sum(), "points")})

    spec = TrainerSpec(steps=200, batch=8, device="cpu")
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model, Squares(), Source(Points(), Points()), AdamWSpec(lr=0.1, weight_decay=0.0),
                      ConstantSpec(), spec, quiet=True)  # fmt: skip
    trainer.fit()
    assert model.weight.item() == pytest.approx(3, abs=0.05) and model.bias.item() == pytest.approx(-1, abs=0.05)
    assert trainer.rows[-1]["valid_loss"] < 1e-2


def test_a_model_without_trainable_parameters_is_refused(recipe: Recipe) -> None:
    trainer = tiny.trainer(recipe())
    trainer.model.requires_grad_(False)
    with pytest.raises(TorchstoneError, match="nothing to train"):
        Trainer(trainer.model, trainer.objective, trainer.source, trainer.optimizer, trainer.schedule, trainer.spec)


# ----------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def exploding() -> Iterator[str]:
    """A feed-forward kind from outside the package whose output is infinite from the fourth forward in training on."""

    class Exploding(FeedForward):
        def __init__(self, site: Site) -> None:
            super().__init__()
            self.up, self.seen = site.linear(site.width, site.width, "up"), 0

        def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
            self.seen += self.training
            return self.up(x_BTD) * (math.inf if self.seen > 3 else 1.0), {}

    class ExplodingSpec(FeedForwardSpec):
        """Explodes."""

        kind: ClassVar[str] = "exploding"

        def build(self, site: Site) -> FeedForward:
            return Exploding(site)

    yield ExplodingSpec.kind
    spec._KINDS["ffn"].pop("exploding")  # other tests list the kinds that there are


def stopped(run: Run, **sections: Any) -> str:
    with pytest.raises(TorchstoneError) as caught:
        run(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_last_checkpoint_is_good(run: Run, whole: RunFolder, **sections: Any) -> None:
    folder = RunFolder(whole.path.with_name("run"))
    checkpoint = folder.checkpoints().load()
    assert checkpoint is not None and checkpoint.step == 2
    assert all(torch.isfinite(value).all() for value in checkpoint.tensors["model"].values())
    tiny.assert_same_run(run(resume=True, **sections), whole)


def test_nan_in_a_parameter_stops_with_step_batch_and_parameter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    real = Trainer.train_step

    def plant(self: Trainer) -> dict[str, Any]:
        if self.step == 3:
            with torch.no_grad():
                next(p for p in self.named if "ffn.down" in p.name).value[2, 3] = math.nan
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", plant)
        text = stopped(run)
    assert "step 4: loss nan is not finite; batch 3, examples [" in text
    assert "first in the parameter decoder.layers.0.ffn.down.weight" in text
    assert "the last checkpoint is good" in text
    assert_last_checkpoint_is_good(run, whole)


def test_infinity_in_an_activation_stops_with_the_module_that_made_it(run: Run, exploding: str) -> None:
    model = {**tiny.MODEL, "ffn": {"kind": exploding}, "depth": 2}
    text = stopped(run, model=model)
    assert "step 4: loss nan is not finite; batch 3" in text
    assert "first in the output of decoder.layers.0.ffn;" in text


def test_nan_in_a_gradient_alone_stops_with_the_parameter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    real = Trainer.gradients

    def plant(self: Trainer, batches: Any, step: int) -> dict[str, float]:
        row = real(self, batches, step)
        if step == 2:
            grad = next(p for p in self.named if "attention.out" in p.name).value.grad
            assert grad is not None
            grad[0, 0] = math.inf
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", plant)
        text = stopped(run)
    assert "step 3: gradient norm inf is not finite; batch 2, examples [" in text
    assert "first in the gradient of decoder.layers.0.attention.out.weight" in text
    assert_last_checkpoint_is_good(run, whole)


def test_weights_that_the_optimiser_made_infinite_are_never_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole", evaluate={"every": 9})
    real = Trainer.train_step

    def plant(self: Trainer) -> dict[str, Any]:
        row = real(self)
        if self.step == 4:
            with torch.no_grad():
                self.named[0].value[0, 0] = math.inf
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", plant)
        patch.setattr(Trainer, "_validate", lambda self, progress: False)
        text = stopped(run, evaluate={"every": 9})
    assert "step 4: the parameter embedding.weight is not finite after the optimiser's move" in text
    folder = RunFolder(whole.path.with_name("run"))
    assert folder.checkpoints().latest() == "step-00000002"


def test_a_validation_loss_that_is_not_finite_stops_and_is_not_logged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "measure_split", lambda *arguments: {"valid_loss": math.nan})
    assert "step 0: the validation loss nan is not finite" in stopped(run)


def test_a_huge_learning_rate_ends_in_a_sentence_or_a_finished_run(run: Run) -> None:
    try:
        run(optimizer={"lr": 100.0}, trainer={**TRAINER, "clip": None, "steps": 8})
    except TorchstoneError as error:
        assert "finite" in str(error)


# ------------------------------------------------------------------------ said before anything is written

TOO_LATE: dict[str, tuple[dict[str, Any], str]] = {
    "encoder for causal_lm": ({"model": {**tiny.MODEL, "causal": False}}, "causal_lm: needs model.causal: true"),
    "classification head": ({"model": {**tiny.MODEL, "head": "classification"}}, "no logits over the vocabulary"),
    "too few positions": ({"model": {**tiny.MODEL, "position": "learned", "context": 8}}, "learned knows 8 positions"),
    "encoder-decoder without memory": (
        {"model": {**tiny.MODEL, "encoder": {"depth": 1}}},
        "needs the encoder's inputs",
    ),
    "pixels": (
        {"model": {**tiny.MODEL, "embedding": {"kind": "patch"}, "head": {"tied": False}, "vocabulary": 300}},
        "takes pixels of shape",
    ),
    "small vocabulary": ({"model": {**tiny.MODEL, "vocabulary": 100}}, "model.vocabulary: 100 is fewer"),
    "ranks": ({"parallel": {"data": 2}}, r"parallel.data: 2 ranks asked, 1 running"),
    "axes": ({"parallel": {"tensor": 2}}, r"parallel.tensor: 2 asked"),
    "source": ({"init_from": "nowhere"}, "nowhere: no such run"),
    "cuda": ({"trainer": {"device": "cuda:7"}}, "trainer.device: cuda:7 asked"),
}


@pytest.mark.parametrize("what", TOO_LATE)
def test_what_does_not_go_together_is_said_before_a_run_exists(run: Run, tmp_path: Path, what: str) -> None:
    sections, message = TOO_LATE[what]
    assert message in stopped(run, **sections)
    assert not (tmp_path / "run").exists()


def test_training_starts_from_another_runs_weights(run: Run, recipe: Recipe) -> None:
    source = run("source")
    path = str(source.path)
    folder = run("next", init_from=path, trainer={**TRAINER, "steps": 1})
    first = next(row["valid_loss"] for row in folder.metrics() if row["step"] == 0)
    last = [row["valid_loss"] for row in source.metrics() if "valid_loss" in row][-1]
    assert first == last
