"""Comparisons from end to end, on trainings of a second."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
import torchstone
from torchstone.compare import Metric, Options, Result, compare_functions, compare_recipes, from_axes, from_file
from torchstone.compare.cost import Estimate, same_time
from torchstone.compare.match import inner_parameters, match
from torchstone.compare.matrix import locked
from torchstone.compare.options import grid_of, numbers_of, one_of, seconds_of
from torchstone.compare.pool import run_all
from torchstone.compare.variants import split_values
from torchstone.errors import TorchstoneError
from torchstone.train.run import shape_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.recipe(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compared(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("compared") / "out"
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    result = compare_recipes(made, out, Options(seeds=(0, 1, 2)), lambda text: None)
    assert isinstance(result, Result)
    return result, out


# ----------------------------------------------------------------------------------------------------------------- axes


def test_commas_inside_brackets_and_quotes_do_not_separate() -> None:
    assert split_values("a,{kind: b, heads: 4},[1,2],'x,y'") == ["a", "{kind: b, heads: 4}", "[1,2]", "'x,y'"]


def test_axes_multiply_and_single_values_are_for_all(recipe: dict[str, Any]) -> None:
    made = from_axes(recipe, ["model.position=rotary,alibi", "trainer.steps=7", "optimizer.lr=1e-3,1e-2"])
    assert [variant.name for variant in made] == [
        "position=rotary, lr=1e-3",
        "position=rotary, lr=1e-2",
        "position=alibi, lr=1e-3",
        "position=alibi, lr=1e-2",
    ]
    assert {variant.recipe.trainer.steps for variant in made} == {7}
    assert len({variant.folder for variant in made}) == 4
    whole = from_axes(recipe, ["model.attention={kind: softmax, heads: 1},{kind: softmax, heads: 2}"])
    assert [variant.recipe.model.attention.heads for variant in whole] == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.steps=7"], "no axis"),
        (["model.position"], "an axis is field=value,value"),
        (["model.position=rotary,rotary"], "rotary stands twice"),
        (["model.position=rotary,"], "an empty value"),
        (
            ["model.position=rotary,rotry"],
            "variant rotry: model.position: no position kind 'rotry' (did you mean 'rotary'?)",
        ),
        (["model.positio=rotary,alibi"], "variant rotary: model: no field 'positio' (did you mean 'position'?)"),
        (["model.attention.heads=2,3"], "variant 3: "),
    ],
)
def test_what_is_no_axis_or_cannot_be_built_is_said(recipe: dict[str, Any], arguments: list[str], message: str) -> None:
    with pytest.raises(TorchstoneError, match=re.escape(message)):
        from_axes(recipe, arguments)


def test_named_variants_come_from_a_file(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text("plain: {}\nwide: {model: {width: 32}}\nfast: [optimizer.lr=1e-2, trainer.steps=3]\n")
    made = {variant.name: variant.recipe for variant in from_file(recipe, file)}
    assert list(made) == ["plain", "wide", "fast"]
    assert (made["wide"].model.width, made["fast"].optimizer.lr) == (32, 0.01)  # type: ignore[attr-defined]
    file.write_text("one: {}\n")
    with pytest.raises(TorchstoneError, match="two or more names"):
        from_file(recipe, file)


# ---------------------------------------------------------------------------------------------------------- a whole one


def test_every_seed_of_every_variant_is_a_training_and_its_test(compared: tuple[Result, Path], tmp_path: Path) -> None:
    result, out = compared
    assert result.metric.name == "test_bits_per_byte" and [arm.name for arm in result.arms] == ["rotary", "alibi"]
    for arm in result.arms:
        assert list(arm.values(result.metric.name, 1.0)) == [0, 1, 2]
        assert arm.probe["tokens_per_second"] > 0 and arm.probe["peak_bytes"] > 0
    # one cell again by hand: the same number
    from torchstone.recipe import load_recipe
    from torchstone.train import train

    cell = out / "cells" / "alibi" / "steps-4" / "seed-1"
    run = train(load_recipe(cell / "run" / "recipe.yaml"), out=tmp_path / "again", quiet=True)
    found = next(row for row in run.metrics() if "test_bits_per_byte" in row)["test_bits_per_byte"]
    assert found == result.arms[1].values("test_bits_per_byte", 1.0)[1]


def test_documents_add_up_to_the_split(compared: tuple[Result, Path]) -> None:
    result, _ = compared
    for arm in result.arms:
        for cell in arm.cells[1.0].values():
            bits, size = (sum(cell["documents"][name]) for name in ("bits", "bytes"))
            assert math.isclose(bits / size, cell["metrics"]["test_bits_per_byte"], rel_tol=1e-6)


def test_the_result_is_kept_and_read_back(compared: tuple[Result, Path]) -> None:
    result, out = compared
    again = Result.load(out)
    assert again.table == result.table and again.to_dict() == json.loads(json.dumps(result.to_dict()))
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "alibi" in page and 'src="http' not in page
    assert (out / "learning_curves.png").stat().st_size > 1000
    assert "untuned" in result.table and "not varied" in result.table and "smallest shown" in result.table


@pytest.mark.slow
def test_a_finished_comparison_trains_nothing_and_an_interrupted_one_only_the_rest(
    compared: tuple[Result, Path], recipe: dict[str, Any]
) -> None:
    result, out = compared
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    lines: list[str] = []
    again = compare_recipes(made, out, Options(seeds=(0, 1, 2)), lines.append)
    assert isinstance(again, Result) and again.to_dict()["variants"] == result.to_dict()["variants"]
    assert not [line for line in lines if line.startswith("cell")]
    lost = out / "cells" / "rotary" / "steps-4" / "seed-2"
    before = json.loads((lost / "result.json").read_text())
    (lost / "result.json").unlink()
    again = compare_recipes(made, out, Options(seeds=(0, 1, 2)), lines.append)
    assert [line.split(":")[0] for line in lines if line.startswith("cell")] == ["cell 1/1"]
    after = json.loads((lost / "result.json").read_text())
    assert after["metrics"] == before["metrics"] and after["loss_digest"] == before["loss_digest"]


def test_another_comparison_or_a_second_process_is_refused_in_the_same_folder(
    compared: tuple[Result, Path], recipe: dict[str, Any], tmp_path: Path
) -> None:
    _, out = compared
    other = from_axes(recipe, ["model.position=rotary,none"])
    with pytest.raises(TorchstoneError, match="holds another comparison"):
        compare_recipes(other, out, Options(seeds=(0, 1, 2)), lambda text: None)
    with locked(tmp_path / "held"), pytest.raises(TorchstoneError, match="another comparison is at work there"):
        compare_recipes(other, tmp_path / "held", Options(), lambda text: None)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.tex").write_text("")
    with pytest.raises(TorchstoneError, match=r"is no comparison \(it holds thesis.tex\)"):
        compare_recipes(other, tmp_path / "files", Options(), lambda text: None)


@pytest.mark.slow
def test_one_variant_under_two_names_differs_by_exactly_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = torchstone.compare({"a": {}, "b": {}}, 3, recipe=recipe, out=tmp_path / "out", jobs=2, quiet=True)
    verdict = result.verdicts()["b"]
    assert verdict.word == "equivalent" and (verdict.difference.low, verdict.difference.high) == (0.0, 0.0)


@pytest.mark.slow
def test_a_variant_that_diverges_is_a_result_without_a_verdict(recipe: dict[str, Any], tmp_path: Path) -> None:
    patch = {"optimizer": {"lr": 100.0}, "trainer": {"clip": None, "steps": 30}}
    result = torchstone.compare({"calm": {}, "wild": patch}, 3, recipe=recipe, out=tmp_path / "out", quiet=True)
    assert {cell["status"] for cell in result.arms[1].cells[1.0].values()} == {"diverged"}
    assert result.verdicts()["wild"] is None and "wild: seed 0 diverged" in result.table
    assert "not compared" in result.table


# ---------------------------------------------------------------------------------------------------- cost and fairness


@pytest.mark.slow
def test_a_variant_that_does_not_fit_says_what_would_and_the_rest_goes_on(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    made = from_axes(recipe, ["trainer.batch=4,1048576", "model.ffn.hidden=512"])
    result = compare_recipes(made, tmp_path / "out", Options(seeds=(0, 1, 2)), lambda text: None)
    assert isinstance(result, Result)
    fits, large = result.arms
    assert [cell["status"] for cell in fits.cells[1.0].values()] == ["done"] * 3
    (said,) = {cell["reason"] for cell in large.cells[1.0].values()}
    found = re.fullmatch(r"needs about [\d,.]+ GiB of memory, [\d,.]+ are there; batch (\d+) would fit", said)
    assert found is not None and 4 < int(found[1]) < 1048576
    assert result.verdicts()["1048576"] is None and said in result.table


@pytest.mark.slow
def test_equal_time_sets_the_steps_by_the_probes(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = from_axes(recipe, ["model.depth=1,2"])
    steps = made[0].recipe.trainer.steps
    probes = {"1": {"seconds_per_step": 0.02}, "2": {"seconds_per_step": 0.05}}
    first, second = same_time(made, probes)
    assert first.recipe == made[0].recipe and second.recipe.trainer.steps == round(steps * 0.4)
    with pytest.raises(TorchstoneError, match="--match wall needs every variant to run here"):
        same_time(made, {**probes, "2": {"status": "memory"}})
    result = compare_recipes(made, tmp_path / "out", Options(seeds=(0,), match="wall"), lambda text: None)
    assert isinstance(result, Result) and "not repeatable" in result.table


@pytest.mark.slow
def test_a_dry_run_estimates_and_trains_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    found = compare_recipes(made, tmp_path / "out", Options(seeds=(0, 1), dry_run=True), lambda text: None)
    assert isinstance(found, Estimate) and (found.cells, found.tokens) == (4, 4 * 4 * 2 * 16)
    assert found.seconds > 0 and found.disk_bytes > 0 and not (tmp_path / "out" / "cells").exists()


@pytest.mark.slow
def test_a_budget_cuts_steps_and_never_seeds(recipe: dict[str, Any], tmp_path: Path) -> None:
    long = {**recipe, "trainer": {**recipe["trainer"], "steps": 10**7}}
    made = from_axes(long, ["model.position=rotary,alibi"])
    lines: list[str] = []
    options = Options(seeds=(0, 1, 2), dry_run=True, budget=600)
    found = compare_recipes(made, tmp_path / "out", options, lines.append)
    assert isinstance(found, Estimate) and found.cells == 6 and found.seconds <= 600
    assert any(re.match(r"--budget: \d+ steps instead of 10000000", line) for line in lines)
    with pytest.raises(TorchstoneError, match="is too small: 6 cells of 10 steps"):
        compare_recipes(made, tmp_path / "out", Options(seeds=(0, 1, 2), budget=0.01), lines.append)
    with pytest.raises(TorchstoneError, match="never seeds"):
        compare_recipes(made, tmp_path / "out", Options(seeds=(0, 1), budget=600), lines.append)


def test_matching_sets_the_feed_forward_width_alone(recipe: dict[str, Any]) -> None:
    wide = {**recipe, "model": {"width": 64, "depth": 2, "ffn": {"kind": "mlp", "hidden": 256}, "vocabulary": 259}}
    made = from_axes(wide, ["model.ffn.kind=mlp,swiglu"])
    for by in ("parameters", "flops"):
        matched = match(made, by)  # type: ignore[arg-type]
        a, b = (shape_of(variant.recipe.model) for variant in matched)
        assert abs(inner_parameters(b) / inner_parameters(a) - 1) < 0.01
        assert matched[0] is made[0] and matched[1].recipe.model.ffn.hidden == 171  # type: ignore[attr-defined]
        assert "--match" in matched[1].notes[-1]
    with pytest.raises(TorchstoneError, match="which is an axis here"):
        match(from_axes(wide, ["model.ffn.hidden=64,128"]), "parameters")
    small = {
        **wide,
        "model": {**wide["model"], "width": 16, "attention": {"heads": 2}, "ffn": {"kind": "mlp", "hidden": 5}},
    }
    with pytest.raises(TorchstoneError, match=r"--match-tolerance 0\.\d+ would allow it"):
        match(from_axes(small, ["model.depth=2,3"]), "parameters")


@pytest.mark.slow
def test_matching_knows_the_vocabulary_that_the_data_decide(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = {"width": 64, "depth": 1, "ffn": {"kind": "mlp", "hidden": 256}}
    made = from_axes({**recipe, "model": model}, ["model.ffn.kind=mlp,swiglu"])
    options = Options(seeds=(0,), match="flops", dry_run=True)
    found = compare_recipes(made, tmp_path / "out", options, lambda text: None)
    assert isinstance(found, Estimate)
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["swiglu"]["model"]
    assert kept["vocabulary"] == 259 and kept["ffn"]["hidden"] == 171


@pytest.mark.slow
def test_tuning_takes_the_best_of_one_grid_on_seeds_of_its_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = torchstone.compare(
        {"a": {}, "b": {"model": {"position": "alibi"}}},
        3,
        recipe=recipe,
        out=tmp_path / "out",
        tune={"optimizer.lr": [1e-4, 1e-3, 1e-2]},
        jobs=2,
        quiet=True,
    )
    for arm in result.arms:
        tuned = arm.tuned
        best = min(zip(tuned["scores"], tuned["grid"], strict=True))[1]
        assert tuned["choice"] == best and not set(tuned["seeds"]) & set(result.seeds)
        # four steps are so few that the largest rate wins: the grid grew twice, and it is said
        # so few steps want the largest rate: the grid grew beyond it
        assert tuned["grid"][:3] == [1e-4, 1e-3, 1e-2] and 4 <= len(tuned["grid"]) <= 5
        assert tuned["edge"] == (tuned["choice"] == tuned["grid"][-1]) and (
            "(edge)" in result.table or not tuned["edge"]
        )
        recipe_file = (tmp_path / "out" / "cells" / arm.name / "steps-4" / "seed-0" / "run" / "recipe.yaml").read_text()
        assert f"lr: {best!r}" in recipe_file or f"lr: {best:g}" in recipe_file
    assert "tuned: optimizer.lr" in result.table


@pytest.mark.slow
def test_several_budgets_show_the_trend_of_the_gap(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = torchstone.compare(
        ["model.position=rotary,alibi"], 3, recipe=recipe, out=tmp_path / "out", budgets=[1, 2], jobs=2, quiet=True
    )
    trend = result.trends()["alibi"]
    assert list(trend.gaps) == [1.0, 2.0] and trend.per_doubling.n == 3
    assert math.isclose(trend.per_doubling.mean, trend.gaps[2.0].mean - trend.gaps[1.0].mean, rel_tol=1e-9)
    assert "per doubling" in result.table
    assert {cell["steps"] for cell in result.arms[0].cells[2.0].values()} == {8}


@pytest.mark.slow
def test_adaptations_of_one_run_are_compared(recipe: dict[str, Any], tmp_path: Path) -> None:
    from torchstone.train import train

    base = train(recipe, out=tmp_path / "base", quiet=True)
    start = {name: value for name, value in recipe.items() if name != "model"} | {"init_from": str(base.path)}
    arms = ["adapt={kind: lora, rank: 1},{kind: lora, rank: 4}"]
    result = torchstone.compare(arms, 2, recipe=start, out=tmp_path / "out", quiet=True)
    sizes = [arm.probe["parameters"] for arm in result.arms]
    assert sizes[1] == 4 * sizes[0] and all(len(arm.values("test_bits_per_byte", 1.0)) == 2 for arm in result.arms)


# ------------------------------------------------------------------------------------------------------------ functions


def test_functions_of_a_seed_are_compared_by_the_same_rule() -> None:
    noise = [0.0, 0.01, -0.01, 0.005, -0.005]
    result = compare_functions(
        {"mine": lambda seed: {"loss": 2.0 + noise[seed]}, "theirs": lambda seed: {"loss": 2.2 - noise[seed]}}, range(5)
    )
    assert result.verdicts()["theirs"].word == "worse"  # type: ignore[union-attr]
    better = torchstone.compare(
        {"a": lambda seed: {"hits": seed}, "b": lambda seed: {"hits": seed + 1.0}},
        4,
        metric="hits",
        higher_is_better=True,
    )
    assert better.verdicts()["b"].word == "better"
    with pytest.raises(TorchstoneError, match="gave no 'loss', but hits"):
        torchstone.compare({"a": lambda s: {"hits": 1}, "b": lambda s: {"hits": 1}}, 3, metric="loss")
    with pytest.raises(TorchstoneError, match="two variants"):
        torchstone.compare({"a": lambda s: {"hits": 1}}, 3)


# -------------------------------------------------------------------------------------------------------------- workers


WORKER = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request.get("dies") and not (request["dies"] == "once" and os.path.exists(request["mark"])):
        open(request["mark"], "w").close()
        os._exit(3)
    print(json.dumps({"status": "done", "number": request["number"]}), flush=True)
"""


def test_order_of_seeds_does_not_matter_and_directions_of_accuracies_are_known(tmp_path: Path) -> None:
    functions = {"a": lambda seed: {"accuracy": seed / 100}, "b": lambda seed: {"accuracy": 0.5 + seed / 99}}
    result = torchstone.compare(functions, [2, 0, 1], metric="accuracy")
    assert result.verdicts()["b"].word == "better" and result.seeds == (0, 1, 2)
    assert result.plot(tmp_path / "new" / "folder") == []


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (lambda seed: {"x": 1.0}, {"seeds": 0}, "needs seeds, each once"),
        (lambda seed: {"x": 1.0}, {"seeds": [0, 0, 1]}, "needs seeds, each once"),
        (lambda seed: {"x": 1.0}, {"margin": -1}, "margin is a share from 0 to 1"),
        (lambda seed: None, {}, "gave None; a variant gives a mapping of numbers"),
        (lambda seed: {"x": "1"}, {}, "a variant gives a mapping of numbers"),
    ],
)
def test_functions_that_make_no_sense_are_refused(variant: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TorchstoneError, match=message):
        torchstone.compare({"a": variant, "b": variant}, **{"seeds": 3, **fields})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "--jobs and --tuning-seeds are 1 or more"),
        ({"tuning_seeds": 0}, "--jobs and --tuning-seeds are 1 or more"),
        ({"margin": math.nan}, "--margin is a share"),
        ({"budgets": (1.0, 1.01)}, "two of --budgets come to the same number of steps"),
        ({"seeds": (1, 1)}, "each once"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_made(
    recipe: dict[str, Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    with pytest.raises(TorchstoneError, match=message):
        compare_recipes(made, tmp_path / "out", Options(**options), lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_no_cell_has_is_named(compared: tuple[Result, Path], recipe: dict[str, Any]) -> None:
    _, out = compared
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    options = Options(seeds=(0, 1, 2), metric=Metric("test_los"))
    with pytest.raises(TorchstoneError, match=r"no cell measured 'test_los' \(did you mean 'test_loss'\?\)"):
        compare_recipes(made, out, options, lambda text: None)


def test_a_worker_that_dies_is_replaced_once_and_takes_only_its_own_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torchstone.compare.pool._COMMAND", [sys.executable, "-c", WORKER])
    requests = [{"number": number} for number in range(6)]
    requests[1] |= {"dies": "once", "mark": str(tmp_path / "one")}
    requests[4] |= {"dies": "always", "mark": str(tmp_path / "two")}
    found = dict(run_all(requests, jobs=2))
    assert {number for number, answer in found.items() if answer["status"] == "done"} == {0, 1, 2, 3, 5}
    assert found[4]["status"] == "died" and "died twice (status 3)" in found[4]["reason"]


@pytest.mark.slow
def test_cells_on_a_ray_cluster_give_the_same_numbers(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    made = from_axes(recipe, ["model.position=rotary,alibi"])
    found = {}
    for ray in (False, True):
        options = Options(seeds=(0, 1), ray=ray)
        result = compare_recipes(made, tmp_path / str(ray), options, lambda text: None)
        assert isinstance(result, Result)
        found[ray] = [arm.values("test_bits_per_byte", 1.0) for arm in result.arms]
    assert found[True] == found[False] and len(found[True][0]) == 2


def test_leaving_a_comparison_stops_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = (
        "import sys, time, json\nfor line in sys.stdin:\n    time.sleep(json.loads(line)['s']); print('{}', flush=True)"
    )
    monkeypatch.setattr("torchstone.compare.pool._COMMAND", [sys.executable, "-c", slow])
    began = time.monotonic()
    answers = run_all([{"s": 0}, {"s": 300}], jobs=2)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 60


# -------------------------------------------------------------------------------------------------------------- options


def test_options_as_they_are_typed() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "2h", "5")] == [90, 1800, 7200, 5]
    assert numbers_of("--budgets", "1,2,4") == (1, 2, 4)
    assert grid_of("optimizer.lr=1e-2,1e-3,3e-3") == ("optimizer.lr", (1e-3, 3e-3, 1e-2))
    assert one_of("--match", "flops", ("flops", "wall")) == "flops"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seconds_of("soon"), "--budget: needs a time"),
        (lambda: seconds_of("0h"), "--budget: needs a time"),
        (lambda: numbers_of("--budgets", "1,-2"), "--budgets: needs numbers above zero"),
        (lambda: grid_of("optimizer.lr"), "--tune: needs FIELD=A,B,C"),
        (lambda: grid_of("optimizer.lr=1,2"), "--tune: needs FIELD=A,B,C"),
        (lambda: one_of("--match", "flop", ("none", "flops")), "did you mean 'flops'"),
    ],
)
def test_options_that_make_no_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises(TorchstoneError, match=re.escape(message)):
        call()
