"""Every property on every legal pair of variants, in tiny models, in float64 at 1e-8."""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from conformance.cases import (
    IMPOSSIBLE,
    Case,
    all_pairs,
    axes,
    cover,
    covering,
    first_cases,
    impossible,
    pairs_of,
    singles,
    written,
)
from conformance.checks import CHECKS

pytestmark = pytest.mark.usefixtures("float64")

EXEMPTIONS: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "exemptions.toml").read_text())["exempt"]


def exempt(case: Case, check: str) -> bool:
    return any(
        entry["check"] == check and all(case.chosen[axis] in values for axis, values in entry["where"].items())
        for entry in EXEMPTIONS
    )


def applicable(check: str) -> list[Any]:
    cases = [case for case in covering()[0] if CHECKS[check][1](case) and not exempt(case, check)]
    return [pytest.param(case, id=str(case), marks=() if case in first_cases() else pytest.mark.slow) for case in cases]


def claim(check: str) -> Any:
    """A test of one check on every case of the covering array to which it applies."""
    return pytest.mark.parametrize("case", applicable(check))


@claim("causality")
def test_later_tokens_change_nothing_earlier(case: Case) -> None:
    CHECKS["causality"][0](case)


@claim("documents")
def test_packed_documents_equal_separate_ones(case: Case) -> None:
    CHECKS["documents"][0](case)


@claim("padding")
def test_padding_left_and_right_changes_nothing(case: Case) -> None:
    CHECKS["padding"][0](case)


@claim("memory_padding")
def test_padding_of_the_memory_changes_nothing(case: Case) -> None:
    CHECKS["memory_padding"][0](case)


@claim("decoding")
def test_decoding_step_by_step_equals_one_forward(case: Case) -> None:
    CHECKS["decoding"][0](case)


@claim("decoding_alike")
def test_decoding_rows_of_one_length_equals_one_forward(case: Case) -> None:
    CHECKS["decoding_alike"][0](case)


@claim("chunks")
def test_prefill_in_chunks_equals_prefill_at_once(case: Case) -> None:
    CHECKS["chunks"][0](case)


@claim("batch")
def test_row_alone_equals_the_row_in_a_batch(case: Case) -> None:
    CHECKS["batch"][0](case)


@claim("gradients")
def test_gradients_reach_every_parameter(case: Case) -> None:
    CHECKS["gradients"][0](case)


@claim("bfloat16")
def test_outputs_and_gradients_are_finite_in_bfloat16(case: Case) -> None:
    CHECKS["bfloat16"][0](case)


@claim("meta")
def test_meta_construction_equals_direct_construction(case: Case) -> None:
    CHECKS["meta"][0](case)


@claim("count")
def test_parameters_are_as_many_as_the_formulas_say(case: Case) -> None:
    CHECKS["count"][0](case)


@claim("saving")
def test_saved_and_loaded_model_gives_the_same_outputs(case: Case) -> None:
    CHECKS["saving"][0](case)


@claim("round_trip")
def test_spec_through_json_is_the_same_spec(case: Case) -> None:
    CHECKS["round_trip"][0](case)


@claim("recomputation")
def test_recomputed_activations_change_nothing_bit_for_bit(case: Case) -> None:
    CHECKS["recomputation"][0](case)


@claim("copies")
def test_snapshot_fork_and_truncation_of_a_state_go_on_as_before(case: Case) -> None:
    CHECKS["copies"][0](case)


@claim("last")
def test_last_position_alone_equals_it_among_all(case: Case) -> None:
    CHECKS["last"][0](case)


@claim("encoded")
def test_memory_encoded_beforehand_equals_the_inputs_of_the_encoder(case: Case) -> None:
    CHECKS["encoded"][0](case)


# -------------------------------------------------------------------------------------------------- the suite itself


def test_every_check_has_a_test() -> None:
    source = Path(__file__).read_text()
    assert [name for name in CHECKS if f'@claim("{name}")' not in source] == []


def test_every_legal_pair_of_a_variant_and_a_kind_is_in_some_model() -> None:
    cases, illegal = covering()
    covered = set().union(*(pairs_of(case.chosen) for case in cases))
    for pair in all_pairs():
        assert pair in covered or illegal.get(pair), f"{pair} is in no model and nothing forbids it"
    assert not covered & set(illegal), "impossible.json names pairs that are in models: make golden"


@pytest.mark.slow
def test_pairs_said_to_be_impossible_are_in_no_model_that_a_search_finds() -> None:
    found = cover(all_pairs())[1]
    if os.environ.get("TORCHSTONE_GOLDEN") == "write":
        sentences: dict[str, list[str]] = {}
        for pair, why in found.items():
            sentences.setdefault(why, []).append(written(pair))
        IMPOSSIBLE.write_text(json.dumps(sentences, indent=1) + "\n")
        impossible.cache_clear()
    assert [pair for pair in impossible() if pair not in found] == []


def test_every_variant_is_in_a_model_that_runs_at_every_change() -> None:
    def met(cases: Any) -> set[Any]:
        return {item for case in cases for item in case.chosen.items()}

    assert met(first_cases()) == met(covering()[0]) and len(first_cases()) < len(covering()[0]) / 4


def test_every_variant_of_every_kind_is_in_some_model() -> None:
    for axis, values in axes().items():
        assert set(values) == {case.chosen[axis] for case in covering()[0]} == {c.chosen[axis] for c in singles()}


def exempted() -> list[Any]:
    return [
        pytest.param(entry, dict(zip(entry["where"], values, strict=True)), id=f"{entry['check']}-{'-'.join(values)}")
        for entry in EXEMPTIONS
        for values in itertools.product(*entry["where"].values())
    ]


@pytest.mark.parametrize(("entry", "chosen"), exempted())
def test_exempted_check_really_fails(entry: dict[str, Any], chosen: dict[str, str]) -> None:
    check, applies = CHECKS[entry["check"]]
    case = Case.of(**chosen)
    assert entry["reason"] and case.why_illegal() is None and applies(case)
    with pytest.raises(AssertionError):
        check(case)
