"""Claims: the gates, what is recorded, what makes it stale, and that a verdict cannot be typed in."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.errors import TorchstoneError
from torchstone.papers import Arms, Claim, Effect, Measured, Number, Paper, Setting, find_paper, search_papers, slugs
from torchstone.papers import _reproduce as machine
from torchstone.papers._claim import decide_claim
from torchstone.papers._pages import describe, page, table, text_of
from torchstone.papers._reproduce import confirm, evidence_of, read_evidence, record, run_claim, stale, status

BETTER = Effect("better", "method", "base", margin=0.1, null="null", sabotage="broken")
NOT_WORSE = Effect("not worse", "method", "base", margin=-0.1, sabotage="broken")


def claim(*gates: Any, **more: Any) -> Claim:
    return Claim(id="c", kind="behaviour", text="A sentence.", figure="2.0", gates=gates, **more)


def values(method: float, broken: float = 2.0, null: float = 2.0) -> dict[str, list[float]]:
    noise = [0.01, -0.01, 0.0, 0.005, -0.005]
    arms = {"base": 2.0, "method": method, "broken": broken, "null": null}
    return {arm: [mean + (0 if arm == "base" else e) for e in noise] for arm, mean in arms.items()}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (values(1.8), "holds"),
        (values(1.95), "does not hold"),
        (values(1.9), "inconclusive"),
        (values(1.8, broken=1.8), "not discriminating"),
        (values(1.8, null=1.8), "not discriminating"),
    ],
)
def test_an_effect_is_judged_with_its_controls(found: dict[str, list[float]], verdict: str) -> None:
    assert decide_claim(claim(BETTER), {}, found)[0] == verdict


def test_not_worse_needs_a_sabotage_that_is_worse() -> None:
    assert decide_claim(claim(NOT_WORSE), {}, values(2.02, broken=2.5))[0] == "holds"
    assert decide_claim(claim(NOT_WORSE), {}, values(2.02, broken=2.0))[0] == "not discriminating"
    with pytest.raises(TypeError, match="needs a null arm"):
        Effect("x", "method", "base", margin=0.0, sabotage="broken")


def test_numbers_lie_within_their_bounds_and_all_gates_count() -> None:
    gates = (Number("bytes", low=10, high=10), Number("share", high=0.5))
    assert decide_claim(claim(*gates), {"bytes": 10, "share": 0.5}, {})[0] == "holds"
    assert decide_claim(claim(*gates), {"bytes": 10, "share": 0.6}, {})[0] == "does not hold"
    assert decide_claim(claim(Number("share", high=0.5), BETTER), {"share": 0.1}, values(1.9))[0] == "inconclusive"


def test_a_diverged_arm_is_no_support() -> None:
    broken = values(1.8)
    broken["method"][2] = math.inf
    assert decide_claim(claim(BETTER), {}, broken)[0] != "holds"


# ---------------------------------------------------------------------------------------------------- evidence


def measured(scale: str, first: int) -> Measured:
    noise = [0.01, -0.01, 0.0, 0.005, -0.005]
    by_seed = {first + i: e for i, e in enumerate(noise)}
    return Measured(
        {"bytes": 12.0},
        {
            "base": {seed: 2.0 for seed in by_seed},
            "method": {seed: 1.8 + e for seed, e in by_seed.items()},
            "broken": {seed: 2.0 + e for seed, e in by_seed.items()},
            "null": {seed: 2.0 - e for seed, e in by_seed.items()},
        },
    )


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paper:
    monkeypatch.setattr(machine, "EVIDENCE", tmp_path / "evidence")
    one = claim(BETTER, Number("bytes", low=12, high=12), run=measured)
    return Paper(
        "p", "Title", "Authors", 2020, "https://arxiv.org/abs/0", ("topic",), ("residual.pre",), "Sum.", (one,)
    )


def test_a_recorded_verdict_is_what_its_numbers_say(paper: Paper) -> None:
    outcome = run_claim(paper.claims[0], "evidence")
    assert outcome.verdict == "holds" and {cell["seed"] for cell in outcome.cells} == set(range(1000, 1005))
    record(paper, [outcome])
    kept = read_evidence("p")["c"]
    assert evidence_of(paper.claims[0], kept)[0] == kept["verdict"] == status(paper.claims[0], kept) == "holds"
    for cell in kept["cells"]:
        if cell["arm"] == "method":
            cell["value"] += 0.2
    assert evidence_of(paper.claims[0], kept)[0] == "does not hold"


def test_a_claim_that_changed_is_stale(paper: Paper) -> None:
    record(paper, [run_claim(paper.claims[0], "evidence")])
    kept = read_evidence("p")["c"]
    assert stale(paper.claims[0], kept) == []
    other = replace(paper.claims[0], gates=(replace(BETTER, margin=0.05),))
    assert stale(other, kept) == ["the claim"] and status(other, kept) == "stale"
    assert status(paper.claims[0], {**kept, "sources": {"torchstone.model.residual.pre": "0"}}) == "stale"


def test_evidence_is_confirmed_for_other_sources(paper: Paper) -> None:
    record(paper, [run_claim(paper.claims[0], "evidence")])
    path = machine.EVIDENCE / "p.json"
    data = json.loads(path.read_text())
    data["claims"]["c"]["sources"] = {"torchstone.model.residual.pre": "0"}
    path.write_text(json.dumps(data))
    assert stale(paper.claims[0], read_evidence("p")["c"])
    confirm("p", paper.claims[0], "20 steps of every arm")
    kept = read_evidence("p")["c"]
    assert stale(paper.claims[0], kept) == [] and kept["sources"] == {"torchstone.model.residual.pre": "0"}
    kept["confirmed"]["sources"] = {}
    other = replace(paper.claims[0], gates=(replace(BETTER, margin=0.05),))
    assert stale(other, kept) == ["the claim"]


def test_a_quick_look_keeps_no_verdict_and_records_nothing(paper: Paper) -> None:
    outcome = run_claim(paper.claims[0], "quick")
    assert outcome.verdict is None and {cell["seed"] for cell in outcome.cells} == set(range(5))
    assert outcome.to_dict()["verdict"] is None
    with pytest.raises(TorchstoneError, match="a quick look is no evidence"):
        record(paper, [outcome])
    assert read_evidence("p") == {}


@pytest.fixture
def evidence_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("evidence_check")


def test_a_function_is_measured_again_and_must_answer_the_same(paper: Paper, evidence_check: Any) -> None:
    record(paper, [run_claim(paper.claims[0], "evidence")])
    kept = read_evidence("p")["c"]
    again = evidence_check.numbers_agree

    def other(bytes_: float, gain: float) -> Claim:
        def run(scale: str, first: int) -> Measured:
            found = measured(scale, first)
            method = {seed: value + gain for seed, value in found.values["method"].items()}
            return Measured({"bytes": bytes_}, {**found.values, "method": method})

        return replace(paper.claims[0], run=run)

    assert again("p", other(12.0, 0.0), kept)
    assert not again("p", other(12.5, 0.0), kept)  # outside its bounds
    assert not again("p", other(12.0, 0.15), kept)  # inconclusive
    wide = replace(paper.claims[0], gates=(Number("bytes", low=10, high=14),))
    kept = {**kept, "gates": kept["gates"][1:]}
    assert again("p", replace(wide, run=other(12.001, 0.0).run), kept)
    assert not again("p", replace(wide, run=other(12.5, 0.0).run), kept)  # within bounds, and another number


def test_evidence_of_few_seeds_is_refused(paper: Paper) -> None:
    outcome = run_claim(paper.claims[0], "evidence")
    few = replace(outcome, cells=[cell for cell in outcome.cells if cell["seed"] < 1004])
    with pytest.raises(TorchstoneError, match="method has 4 seeds; evidence needs 5"):
        record(paper, [few])


@pytest.mark.slow
def test_arms_are_trained_as_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = Arms(
        recipe=tiny.recipe(tmp_path),
        patches={
            "base": {},
            "method": {"optimizer": {"lr": 0.01}},
            "broken": {"optimizer": {"lr": 1e-5}},
            "null": {},
        },
        settings={"quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 2}})},
        shifted=("null",),
    )
    found = run_claim(claim(replace(BETTER, margin=0.0), arms=arms), "quick", jobs=2)
    seeds = {arm: [c["seed"] for c in found.cells if c["arm"] == arm] for arm in arms.patches}
    assert seeds == {"base": [0, 1], "method": [0, 1], "broken": [0], "null": [100_000]}
    assert all(cell["recipe"] and cell["loss_digest"] and cell["corpus"] for cell in found.cells)
    assert found.numbers["method - base"] < 0
    also = Effect("beyond the defect", "method", "broken", margin=-1.0, sabotage="null")  # a reference needs all seeds
    found = run_claim(claim(replace(BETTER, margin=0.0), also, arms=arms), "quick", jobs=2)
    assert [c["seed"] for c in found.cells if c["arm"] == "broken"] == [0, 1]
    with pytest.raises(TorchstoneError, match="has no scale gpu; it has quick"):
        run_claim(claim(BETTER, arms=arms), "gpu")


@pytest.mark.parametrize(
    ("slug", "name"), [("minilm-v2", "other-heads-another-width"), ("child-tuning", "few-noisy-examples")]
)
def test_a_function_says_which_scales_it_has(slug: str, name: str) -> None:
    found = find_paper(slug).claim(name)
    assert found is not None
    with pytest.raises(TorchstoneError, match=f"claim {name}: has no scale gpu; it has quick, evidence"):
        run_claim(found, "gpu")


# ----------------------------------------------------------------------------------------------- every paper


@pytest.mark.parametrize("slug", slugs())
def test_every_recorded_verdict_and_learning_rate_follows_from_its_numbers(slug: str) -> None:
    paper, kept = find_paper(slug), read_evidence(slug)
    assert paper.slug == slug and set(kept) <= {one.id for one in paper.claims}
    for one in paper.claims:
        if one.id in kept and not stale(one, kept[one.id]):
            assert evidence_of(one, kept[one.id])[0] == kept[one.id]["verdict"]
        for cell in kept.get(one.id, {}).get("cells", []):
            if cell.get("tuned"):
                scores = [math.inf if x is None else x for x in cell["tuned"]["scores"]]
                assert cell["tuned"]["choice"] == cell["tuned"]["grid"][scores.index(min(scores))]
            assert cell["seed"] >= 1000


@pytest.mark.parametrize("slug", slugs())
def test_every_page_is_up_to_date(slug: str) -> None:
    docs = Path(__file__).parents[2] / "docs" / "papers" / f"{slug}.md"
    assert docs.read_text(encoding="utf-8") == page(find_paper(slug)), "make pages"


def test_the_readmes_table_says_what_is_true_of_the_papers_that_it_lists() -> None:
    """A paper that is new is added to it by `make pages`, not by whoever adds the paper."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table(re.findall(r"^\| \[([\w-]+)\]\(docs/papers/", readme, re.MULTILINE)) in readme, "make pages"


@pytest.mark.parametrize("slug", slugs())
def test_every_part_of_a_paper_exists(slug: str) -> None:
    from torchstone.spec import resolve

    for part in find_paper(slug).parts:
        family, _, kind = part.partition(".")
        resolve(family, kind)


def test_papers_are_found_by_word() -> None:
    assert [one.slug for one in search_papers("xiong layer 2020")] == ["pre-ln"]
    assert [one.slug for one in search_papers("residual.post")] == ["pre-ln"]
    assert search_papers("no such paper") == []
    with pytest.raises(TorchstoneError, match="no paper 'preln' \\(did you mean 'pre-ln'\\?\\)"):
        find_paper("preln")


def test_descriptions_and_reports_keep_their_contract() -> None:
    body = json.loads(json.dumps(describe(find_paper("pre-ln"))))
    assert {"slug", "title", "year", "parts", "claims"} <= set(body)
    assert all({"id", "kind", "text"} <= set(one) for one in body["claims"])
    outcome = run_claim(claim(Number("bytes", low=1), run=lambda scale, first: Measured({"bytes": 3.0})), "evidence")
    report = {"paper": {"title": "T", "year": 2020}, "scale": "evidence", "claims": [outcome.to_dict()]}
    assert {"id", "verdict", "measured", "margin", "seeds", "seconds"} <= set(report["claims"][0])  # type: ignore[index]
    assert "c (behaviour): holds" in text_of(report) and "bytes = 3" in text_of(report)
