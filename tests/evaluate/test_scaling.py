"""Scaling laws: planted ones come back, refusals name the budget, and M is what torch's counter counts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from torchstone.compare import sweep as machine
from torchstone.compare.sweep import Grid, Size, point_of, read_points, sizes_of, sweep
from torchstone.errors import TorchstoneError
from torchstone.evaluate.scaling import (
    DEEPSEEK,
    LossLaw,
    Point,
    budgets_of,
    closed_form,
    fit,
    fit_hyperparameters,
    fit_isoflop,
    fit_loss,
    flops_without_embedding,
    predict,
    read_laws,
    shape_near,
    suggest,
)
from torchstone.interop.presets import preset
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train.run import RunFolder, shape_of

Cli = Callable[..., Any]

# L = E + A M^-a + B D^-b has its minimum at M = G C^(b / (a + b)); A is what makes G the paper's coefficient
a, b, E, B, G, EXPONENT = 0.33299, 0.36701, 0.5, 2200.0, 0.1715, 0.5243
A = b * B / a * G ** (a + b)


def planted(noise: float = 0.0, seed: int = 0, budgets: int = 8, sizes: int = 9, shift: float = 0.0) -> list[Point]:
    draw, found = np.random.default_rng(seed), []
    for compute in np.geomspace(1e17, 3e20, budgets):
        for away in np.linspace(-2, 2, sizes) + shift:
            M = G * compute**EXPONENT * math.exp(away)
            loss = E + A * M**-a + B * (compute / M) ** -b
            found.append(Point(M, compute / M, loss * (1 + noise * draw.standard_normal())))
    return found


# ----------------------------------------------------------------------------------------------------------- IsoFLOP


def test_planted_exponents_come_back() -> None:
    found = fit_isoflop(planted())
    assert found.flops_per_token.exponent == pytest.approx(EXPONENT, abs=1e-3)
    assert found.tokens.exponent == pytest.approx(1 - EXPONENT, abs=1e-3)
    for minimum in found.minima:
        assert minimum.flops_per_token == pytest.approx(G * minimum.compute**EXPONENT, rel=0.05)
    assert found.flops_per_token(1e22) * found.tokens(1e22) == pytest.approx(1e22)


def test_sizes_that_lie_off_the_minimum_bend_the_exponent_little() -> None:
    draw, found = np.random.default_rng(0), []
    for compute in np.geomspace(1e17, 3e20, 8):
        for M in G * compute**EXPONENT * np.exp(np.linspace(-2, 2, 9) + draw.uniform(-0.5, 0.5)):
            found.append(Point(M, compute / M, E + A * M**-a + B * (compute / M) ** -b))
    assert fit_isoflop(found).flops_per_token.exponent == pytest.approx(EXPONENT, abs=5e-3)


def test_planted_exponents_come_back_through_noise_and_intervals_cover_them() -> None:
    inside = 0
    for seed in range(8):
        law = fit_isoflop(planted(0.002, seed), bootstrap=40).flops_per_token
        assert law.exponent == pytest.approx(EXPONENT, abs=0.02)
        assert law.low is not None and law.high is not None and law.low < law.exponent < law.high
        inside += law.low <= EXPONENT <= law.high
    assert inside >= 6


def test_a_grid_off_the_minimum_is_refused_by_its_budget() -> None:
    fine, off = planted(), planted(shift=3.0)
    mixed = [point for point in fine if point.compute < 1e20] + [point for point in off if point.compute > 1e20]
    with pytest.raises(
        TorchstoneError, match=r"^budget 3e\+20 FLOPs: its loss has no minimum inside the grid of sizes"
    ):
        fit_isoflop(mixed)


def test_a_budget_of_two_sizes_and_two_budgets_are_refused() -> None:
    few = [point for number, point in enumerate(planted()) if number < 2 or number >= 9]
    with pytest.raises(TorchstoneError, match=r"^budget 1e\+17 FLOPs: has 2 sizes of model"):
        fit_isoflop(few)
    with pytest.raises(TorchstoneError, match=r"needs 3 budgets or more, there are 2 \(1e\+17, 3e\+20 FLOPs\)"):
        fit_isoflop(planted(budgets=2))


def test_three_sizes_give_no_interval() -> None:
    law = fit_isoflop(planted(sizes=3)).flops_per_token
    assert law.low is law.high is None


def test_seeds_are_averaged_and_the_best_of_a_size_counts() -> None:
    one = Point(10.0, 100.0, 2.0, lr=1e-3)
    other, tuned = Point(10.0, 100.0, 4.0, lr=1e-3), Point(10.0, 101.0, 2.5, lr=2e-3)
    (budget,) = budgets_of([one, other, tuned])
    assert [point.loss for point in budget.points] == [3.0, 2.5]
    assert [point.loss for point in budget.sizes] == [2.5]


# -------------------------------------------------------------------------------------------------- batch size and lr


def grids(edge: bool = False) -> list[Point]:
    found = []
    for compute in (1e15, 1e16, 1e17, 1e18):
        best = 0.3118 * compute**-0.125
        for factor in (1.0, 2.0, 4.0) if edge else (0.25, 0.5, 1.0, 2.0, 4.0):
            loss = compute**-0.05 * (1 + 0.01 * math.log(factor) ** 2)
            found.append(Point(1e8, compute / 1e8, loss, lr=best * factor, batch=1000.0 * compute**0.3 * factor))
    return found


def test_planted_laws_of_learning_rate_and_batch_come_back() -> None:
    for name, exponent in (("lr", -0.125), ("batch", 0.3)):
        law, kept = fit_hyperparameters(grids(), name)
        assert law.exponent == pytest.approx(exponent, abs=1e-9) and len(kept) == 4  # at 2 and 1/2 it is 0.48 % more
    wide = [Point(p.flops_per_token, p.tokens, p.loss**0.25, p.lr) for p in grids()]
    law, kept = fit_hyperparameters(wide, "lr")
    assert len(kept) == 12 and law.exponent == pytest.approx(-0.125)
    assert law.low is not None and law.high is not None and law.low < -0.125 < law.high


def test_a_best_value_at_the_edge_and_a_grid_of_one_are_refused_by_their_budget() -> None:
    with pytest.raises(TorchstoneError, match=r"^budget 1e\+15 FLOPs: the best of its learning rates, .* at the edge"):
        fit_hyperparameters(grids(edge=True), "lr")
    with pytest.raises(TorchstoneError, match=r"^budget 1e\+17 FLOPs: has 0 batch sizes"):
        fit_hyperparameters(planted(), "batch")


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(("irreducible", "exponent"), [(0.9, 0.3), (0.0, 0.05), (2.0, 1.0)])
def test_a_planted_law_of_the_loss_comes_back(irreducible: float, exponent: float) -> None:
    pairs = [(compute, irreducible + 3 * (compute / 1e18) ** -exponent) for compute in (1e17, 4e17, 1e19)]
    law = fit_loss(pairs)
    assert law.irreducible == pytest.approx(irreducible, abs=2e-3) and law.exponent == pytest.approx(exponent, rel=5e-3)
    far = irreducible + 3 * (1e21 / 1e18) ** -exponent
    assert predict(law, 1e21).value == pytest.approx(far, rel=2e-3) and predict(law, 1e21).low is None


def test_predictions_have_an_interval_where_the_law_leaves_residuals() -> None:
    draw = np.random.default_rng(0)
    pairs = [(c, 0.9 + 3 * (c / 1e18) ** -0.3 + 0.005 * draw.standard_normal()) for c in np.geomspace(1e17, 1e19, 8)]
    found = predict(fit_loss(pairs, bootstrap=40), 1e20)
    assert found.low is not None and found.high is not None
    assert found.low < 0.9 + 3 * 100**-0.3 < found.high and found.high - found.low < 0.2


def test_a_loss_that_rises_or_two_budgets_are_refused() -> None:
    with pytest.raises(TorchstoneError, match=r"the best loss does not fall from 1 to 4 FLOPs \(2 to 2.2\)"):
        fit_loss([(1.0, 2.0), (2.0, 2.1), (4.0, 2.2)])
    with pytest.raises(TorchstoneError, match="needs 3 budgets or more, there are 2"):
        fit_loss([(1.0, 2.0), (2.0, 1.9)])


def test_the_largest_budget_is_held_out_and_its_error_is_that_of_the_prediction() -> None:
    points = planted(budgets=5)
    largest = max(point.compute for point in points) * 0.99
    worse = [Point(p.flops_per_token, p.tokens, p.loss * (1.1 if p.compute > largest else 1.0)) for p in points]
    for given, error in ((points, 0.0), (worse, 1 / 1.1 - 1)):
        found = fit(given, bootstrap=0)
        assert found.held_out is not None and found.isoflop is not None and len(found.isoflop.minima) == 4
        assert found.held_out.error == pytest.approx(error, abs=2e-3)
    three = fit(planted(budgets=3), bootstrap=0)
    assert three.held_out is None and any("nothing is held out" in note for note in three.notes)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(TorchstoneError, match=r"here: loss is .*, must be above zero and finite"):
        budgets_of([Point(1.0, 1.0, value, name="here")])
    with pytest.raises(TorchstoneError, match="losses in nats and in test bits per byte do not compare"):
        budgets_of([Point(1.0, 1.0, 1.0, unit="nats"), Point(1.0, 1.0, 1.0, unit="test bits per byte")])


# ----------------------------------------------------------------------------------------------------- what is counted


def llama(depth: int, width: int, **fields: Any) -> TransformerSpec:
    body = {"width": width, "depth": depth, "vocabulary": 97, "context": 64, "attention": {"heads": 2}}
    return validate(TransformerSpec, {**body, "ffn": {"kind": "swiglu", "hidden": width * 8 // 3}, **fields})


@pytest.mark.parametrize("tied", [True, False])
def test_model_scale_is_the_closed_form_and_torchs_count(tied: bool) -> None:
    depth, width, block = 2, 48, 32
    spec = llama(depth, width, head={"kind": "lm", "tied": tied})
    model: Any = initialise(spec.build(), 0)
    assert flops_without_embedding(model, block) == closed_form(depth, width, block)
    ids = torch.zeros(1, block, dtype=torch.int64)
    # the counter knows products, not the fused kernel, which a layer leaves where its probabilities are wanted
    with FlopCounterMode(display=False) as counter:
        model(ids, taps=Taps(record=["*.attention.probs"])).logits.sum().backward()
    head = 6 * 97 * width
    assert counter.get_total_flops() / block - head == pytest.approx(closed_form(depth, width, block), rel=0.03)


def test_grouped_keys_and_windows_cost_less_than_the_closed_form_says() -> None:
    plain = flops_without_embedding(shape_of(llama(2, 48)), 32)
    grouped = flops_without_embedding(shape_of(llama(2, 48, attention={"heads": 2, "kv_heads": 1})), 32)
    windowed = flops_without_embedding(shape_of(llama(2, 48, attention={"heads": 2, "window": 8})), 32)
    assert plain - grouped == 6 * 2 * 48 * 48  # keys and values of one head of 24 in each of two layers
    assert plain - windowed == 12 * 2 * 48 * (32 - 8)


def test_published_models_and_suggestions() -> None:
    for name, scale, rate in (("deepseek-llm-7b", 42.28e9, 4.25e-4), ("deepseek-llm-67b", 497.3e9, 3.12e-4)):
        spec = preset(name)
        assert closed_form(spec.depth, spec.width, 4096) == pytest.approx(scale, rel=1e-3)
        found = suggest(closed_form(spec.depth, spec.width, 4096) * 2e12)
        assert found.lr == pytest.approx(rate, rel=3e-3)
    budgets = np.geomspace(1e10, 1e26, 60)
    for one in map(suggest, budgets):
        assert one.flops_per_token * one.tokens == pytest.approx(one.compute, rel=1e-3)  # type: ignore[operator]
    for name in ("lr", "batch", "flops_per_token", "tokens"):
        steps = np.diff([getattr(suggest(compute), name) for compute in budgets])
        assert (steps < 0).all() if name == "lr" else (steps > 0).all()
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TorchstoneError, match="a budget is above zero"):
            suggest(wrong)


@pytest.mark.parametrize("scale", [1e6, 4e7, 42.28e9, 5e11])
def test_the_example_of_a_model_is_of_the_size_asked(scale: float) -> None:
    depth, width = shape_near(scale, 256)
    assert closed_form(depth, width, 256) == pytest.approx(scale, rel=0.2 if scale == 1e6 else 0.03)
    assert depth <= width


# ------------------------------------------------------------------------------------------------------------- sources


def lines(path: Path, points: list[Point], **more: Any) -> Path:
    fields = ("flops_per_token", "tokens", "loss")
    path.write_text("".join(json.dumps({**{f: getattr(p, f) for f in fields}, **more}) + "\n" for p in points))
    return path


def test_a_run_and_a_folder_of_runs_are_read(run: Path, tmp_path: Path) -> None:
    point = point_of(RunFolder(run))
    assert point is not None
    recipe, rows = RunFolder(run).recipe, RunFolder(run).metrics()
    tokens = recipe.trainer.batch * recipe.data.block  # type: ignore[attr-defined]
    assert (point.batch, point.tokens, point.lr) == (tokens, tokens * recipe.trainer.steps, recipe.optimizer.lr)
    test = next(row for row in rows if "test_loss" in row)
    assert (point.loss, point.unit) == (test["test_bits_per_byte"], "test bits per byte")
    # the tiny model: one layer of width 16, feed-forward 2 x 16 x 24, block 16
    assert point.flops_per_token == 6 * (4 * 256 + 2 * 16 * 24) + 12 * 16 * 16
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(run)
    assert read_points([run]) == [point] and point.compute == point.flops_per_token * point.tokens
    assert point_of(RunFolder(tmp_path / "runs" / "one")) is not None


def test_an_unfinished_run_is_left_out_with_a_word(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in RunFolder(run).metrics() if row["step"] < 2]
    monkeypatch.setattr(RunFolder, "metrics", lambda self: rows)
    said: list[str] = []
    assert read_points([run], said.append) == [] and "it has not come to its end" in said[0]


def test_records_give_compute_or_both_of_its_factors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"compute": 6, "tokens": 3, "loss": 1}\n{"flops_per_token": 2, "tokens": 3, "loss": 1, "lr": 0.1}\n'
    )
    one, two = read_points([path])
    assert (one.flops_per_token, one.tokens, one.lr) == (2, 3, None) and (two.compute, two.lr) == (6, 0.1)


BAD = {
    "{}": "has no flops_per_token and no tokens and no loss",
    '{"tokens": 1, "loss": 1}': "has no flops_per_token",
    '{"tokens": "x", "loss": 1, "flops_per_token": 1}': "tokens must be a number above zero, got 'x'",
    '{"tokens": true, "loss": 1, "flops_per_token": 1}': "tokens must be a number above zero, got 'True'",
    '{"tokens": 1, "loss": -1, "flops_per_token": 1}': "loss must be a number above zero, got '-1'",
    "[1]": "a JSON object is needed, not list",
    "": "holds no record",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_one_sentence_and_nothing_is_written(cli: Cli, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    said = cli("scale", "fit", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert said.status == 2 and BAD[line] in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_fit_prints_writes_and_can_be_asked(cli: Cli, tmp_path: Path) -> None:
    path, out = lines(tmp_path / "a.jsonl", planted(budgets=4), unit="nats"), tmp_path / "out"
    said = cli("scale", "fit", path, "--out", out, "--bootstrap", 0)
    assert said.status == 0 and said.err == ""
    assert "error " in said.out and "C^0.5243" in said.out and "lr is not fitted: budget 1e+17 FLOPs: has 0" in said.out
    assert sorted(file.name for file in out.iterdir()) == ["isoflop.png", "loss.png", "scaling.json"]
    whole = json.loads(cli("scale", "fit", path, "--json", "--bootstrap", 0).out)
    assert whole == json.loads((out / "scaling.json").read_text()) and whole["unit"] == "nats"
    assert abs(whole["held_out"]["error"]) < 2e-3
    laws = read_laws(out / "scaling.json")
    asked = json.loads(cli("scale", "suggest", "--flops", "1e21", "--laws", out / "scaling.json", "--json").out)
    for other in ("[]", "{}", json.dumps({**whole, "tokens": {"coefficient": "x", "exponent": 1}})):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(TorchstoneError, match=r"other.json: no scaling.json of `scale fit`"):
            read_laws(tmp_path / "other.json")
    assert asked["tokens"] == laws["tokens"](1e21) and asked["lr"] is None
    assert "no law" in cli("scale", "suggest", "--flops", "1e21", "--laws", out / "scaling.json").out


def test_suggest_says_what_the_paper_says(cli: Cli) -> None:
    asked = json.loads(cli("scale", "suggest", "--flops", "8.456e22", "--json").out)
    assert asked["lr"] == pytest.approx(DEEPSEEK["lr"](8.456e22)) and asked["batch"] == pytest.approx(9.22e6, rel=1e-3)
    assert "learning rate  0.000424" in cli("scale", "suggest", "--flops", "8.456e22").out


SWEEP = ("--recipe", "{recipe}", "--out", "{out}")
REFUSED = {
    ("fit",): "needs runs or files of trainings, or --recipe",
    ("fit", "nowhere"): "cannot read 'nowhere'",
    ("fit", "{here}"): "neither a run nor a folder that holds runs",
    ("fit", "{file}", "--sizes", "1,2,3"): "need --recipe",
    ("fit", "{file}", "--jobs", "0"): "--jobs and --seeds are 1 or more",
    ("fit", "{file}", "--out", "{file}"): "is a file, not a folder",
    ("fit", "--recipe", "{recipe}", "--sizes", "8,16,24", "--budgets", "1e9"): "--recipe needs --out",
    ("fit", *SWEEP, "--sizes", "8,16"): "--budgets: needs numbers above zero",
    ("fit", *SWEEP, "--budgets", "1e9,2e9,4e9,8e9", "--sizes", "8,16"): "three sizes",
    ("fit", *SWEEP, "--budgets", "1e9,2e9,4e9,8e9", "--sizes", "8,x,9"): "got 'x'",
    ("fit", *SWEEP, "--budgets", "1e9,2e9,4e9", "--sizes", "8,16,24"): "4 or more",
    ("fit", *SWEEP, "--budgets", "1e9,1.1e9,4e9,8e9", "--sizes", "8,16,24"): "1.2",
    ("fit", *SWEEP, "--budgets", "1e6,2e9,4e9,8e9", "--sizes", "8,16,24"): "1e+06",
    ("fit", *SWEEP, "--budgets", "1e9,2e9,4e9,8e9", "--sizes", "8,16,25"): "size 25",
    ("fit", *SWEEP[:3], "{here}", "--budgets", "1e9,2e9,4e9,8e9", "--sizes", "8,16,24"): "no sweep",
    ("suggest", "--flops", "0"): "a budget is above zero",
    ("suggest", "--flops", "many"): "--flops",
    ("suggest", "--flops", "1e20", "--block", "0"): "--block is 1 or more",
    ("suggest", "--flops", "1e20", "--laws", "{file}"): "no JSON",
    ("suggest", "--flops", "1e20", "--laws", "nowhere"): "nowhere",
}  # fmt: skip


@pytest.mark.parametrize("command", REFUSED)
def test_refusals(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    from torchstone.recipe import dump_yaml

    file = lines(tmp_path / "a.jsonl", planted(budgets=4, sizes=3))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(tiny.recipe(tmp_path)))
    load_recipe(tmp_path / "recipe.yaml").data.prepare()  # its cache
    before = tiny.listing(tmp_path)
    names = {"here": tmp_path, "file": file, "out": tmp_path / "out", "recipe": tmp_path / "recipe.yaml"}
    said = cli("scale", *(word.format(**names) for word in command))
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1 and REFUSED[command] in said.err
    assert tiny.listing(tmp_path) == before


# --------------------------------------------------------------------------------------------------------------- sweep


def test_sizes_are_widths_and_depths() -> None:
    assert sizes_of("32x2, 48,64x3") == (Size(32, 2), Size(48), Size(64, 3))


def test_a_cell_pays_its_budget_and_scales_the_feed_forward(tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe(tmp_path))
    grid = Grid((2e8, 4e8, 8e8, 16e8), sizes_of("16,32,32x2"), lrs=(1e-3, 2e-3), batches=(2, 4))
    cells = machine._cells(recipe, grid)
    assert len(cells) == 4 * 3 * 2 * 2
    for name, cell in cells.items():
        size, budget = name.split("-")[:2]
        spent = flops_without_embedding(shape_of(cell.model), 16) * cell.trainer.steps * cell.trainer.batch * 16
        assert spent == pytest.approx(float(budget), rel=0.03)
        assert cell.model.ffn.hidden == 24 * cell.model.width // 16  # type: ignore[attr-defined]
        assert str(cell.model.width) == size.partition("x")[0]  # type: ignore[attr-defined]
    assert {cell.optimizer.lr for cell in cells.values()} == {1e-3, 2e-3}
    assert {cell.trainer.batch for cell in cells.values()} == {2, 4}


@pytest.mark.slow
def test_a_sweep_is_trained_once_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe(tmp_path, trainer={"save_every": 1000, "log_every": 20}))
    grid = Grid((1e7, 2e7, 4e7, 8e7), sizes_of("8,12,16"))
    said: list[str] = []
    first = sweep(recipe, grid, tmp_path / "out", say=said.append)
    assert len(first) == 12 and sum("cell " in line for line in said) == 12
    assert [len(budget.sizes) for budget in budgets_of(first)] == [3, 3, 3, 3]
    said.clear()
    wider = Grid((*grid.budgets, 1.6e8), grid.sizes)
    again = sweep(recipe, wider, tmp_path / "out", say=said.append)
    assert sum("cell " in line for line in said) == 3 and {p.name for p in first} < {p.name for p in again}
    assert {(p.name, p.loss) for p in read_points([tmp_path / "out"])} == {(p.name, p.loss) for p in again}
    (tmp_path / "recipe.yaml").write_text(recipe.yaml())
    asked = ("--recipe", tmp_path / "recipe.yaml", "--budgets", "1e7,2e7,4e7,8e7,1.6e8", "--sizes", "8,12,16")
    told = cli("scale", "fit", *asked, "--out", tmp_path / "out")
    assert "cell " not in told.err  # nothing is trained again, whatever so short trainings have to say
    if told.status == 0:
        assert "held out: 1.6" in told.out and (tmp_path / "out" / "scaling.json").is_file()
    else:
        assert told.status == 2 and re.match("torchstone: (budget|scale: the best loss)", told.err)
        assert not (tmp_path / "out" / "scaling.json").exists()
    with pytest.raises(TorchstoneError, match="holds a sweep of another recipe"):
        sweep(recipe.override({"optimizer": {"lr": 0.5}}), grid, tmp_path / "out")


def test_the_loss_law_is_what_its_text_says() -> None:
    law = LossLaw(0.5, 2.0, 0.5, 100.0)
    assert law(400.0) == 1.5 and str(law) == "0.5 + 2 (C / 100)^-0.5000"
