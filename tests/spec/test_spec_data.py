"""Specs as data: merging, the rule for changing a kind, JSON and its schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.stack import LayerSpec
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import dump_yaml, parse_yaml
from torchstone.spec import Changes, Part, Spec, family_root, json_schema, kinds, merge, resolve, validate


class Holder(Spec):
    model: Part[ModelSpec]


# ------------------------------------------------------------------------------------------------------- merging


def test_fields_of_the_same_kind_merge_key_by_key() -> None:
    base = {"attention": {"kind": "softmax", "heads": 4, "window": 5}, "width": 32}
    merged = merge(base, {"attention": {"window": 7}, "depth": 3}, TransformerSpec)
    assert merged == {"attention": {"kind": "softmax", "heads": 4, "window": 7}, "width": 32, "depth": 3}


def test_changing_a_kind_keeps_the_familys_fields_and_drops_the_others() -> None:
    changes = Changes()
    base = {"ffn": {"kind": "mlp", "hidden": 99, "activation": "relu", "bias": True}}
    merged = merge(base, {"ffn": {"kind": "swiglu"}}, TransformerSpec, changes)
    assert merged == {"ffn": {"kind": "swiglu", "hidden": 99}}
    assert changes.lines == [
        "ffn: kind mlp -> swiglu; carried hidden; dropped activation='relu', bias=True; defaults for bias"
    ]


def test_changing_a_kind_by_its_name_alone_is_the_same() -> None:
    for patch in ("alibi", {"kind": "alibi"}):
        changes = Changes()
        merged = merge({"position": {"kind": "rotary", "base": 500.0}}, {"position": patch}, TransformerSpec, changes)
        assert merged == {"position": {"kind": "alibi"}}
        assert changes.lines == [
            "position: kind rotary -> alibi; carried nothing; dropped base=500.0; defaults for nothing"
        ]


def test_what_a_default_holds_counts_as_there() -> None:
    merged = merge({}, {"attention": {"heads": 2}}, TransformerSpec)
    assert validate(TransformerSpec, {**merged, "width": 32}).attention == SoftmaxSpec(heads=2)
    changes = Changes()
    merge({}, {"position": {"kind": "t5", "far": 9}}, TransformerSpec, changes)
    assert len(changes.lines) == 1 and changes.lines[0].startswith("position: kind rotary -> t5; carried nothing;")
    assert "defaults for buckets, std" in changes.lines[0] and "far" not in changes.lines[0].split("defaults")[1]


def test_kind_inside_a_part_changes_by_the_same_rule() -> None:
    base = {"position": {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 4.0, "original": 16}}}
    changes = Changes()
    merged = merge(base, {"position": {"scaling": {"kind": "linear"}}}, TransformerSpec, changes)
    assert merged["position"]["scaling"] == {"kind": "linear", "factor": 4.0}
    assert changes.lines == [
        "position.scaling: kind yarn -> linear; carried factor; dropped original=16; defaults for nothing"
    ]


def test_same_kind_again_changes_nothing_and_says_nothing() -> None:
    changes, base = Changes(), {"attention": {"kind": "softmax", "heads": 4, "window": 5}}
    assert merge(base, {"attention": {"kind": "softmax"}}, TransformerSpec, changes) == base and changes.lines == []


def test_merging_changes_neither_argument() -> None:
    base: dict[str, Any] = {"attention": {"kind": "softmax", "heads": 4}}
    patch: dict[str, Any] = {"attention": {"window": 3}, "ffn": "mlp"}
    before = json.dumps([base, patch])
    merge(base, patch, TransformerSpec)
    assert json.dumps([base, patch]) == before


def test_unknown_kind_in_a_patch_is_left_for_validation_to_name() -> None:
    merged = merge({"ffn": {"kind": "mlp"}}, {"ffn": {"kind": "mlpp"}}, TransformerSpec)
    with pytest.raises(TorchstoneError, match="ffn: no ffn kind 'mlpp'"):
        validate(TransformerSpec, merged)


def test_patch_of_a_layer_changes_that_layer_alone() -> None:
    spec = validate(
        TransformerSpec,
        {"depth": 3, "ffn": {"kind": "mlp", "hidden": 50}, "layers": [{"at": [1, -1], "ffn": {"kind": "swiglu"}}]},
    )
    assert [(layer.ffn.kind, layer.ffn.hidden) for layer in spec.plan("decoder")] == [
        ("mlp", 50), ("swiglu", 50), ("swiglu", 50)
    ]  # fmt: skip


def test_later_patches_stand_over_earlier_ones() -> None:
    layers = [{"at": [0, 1], "attention": {"window": 4}}, {"at": [1], "attention": {"window": 9}}]
    spec = validate(TransformerSpec, {"depth": 2, "layers": layers})
    assert [layer.attention.window for layer in spec.plan("decoder")] == [4, 9]


def test_encoder_is_a_patch_on_the_decoders_parts() -> None:
    spec = validate(
        TransformerSpec,
        {"depth": 2, "attention": {"heads": 4}, "encoder": {"depth": 3, "attention": {"window": 5}, "ffn": "mlp"}},
    )
    assert spec.depths == (3, 2)
    assert {layer.attention.window for layer in spec.plan("encoder")} == {5}
    assert {layer.attention.heads for layer in spec.plan("encoder")} == {4}
    assert {layer.ffn.kind for layer in spec.plan("encoder")} == {"mlp"} != {spec.plan("decoder")[0].ffn.kind}


PATCHES = st.fixed_dictionaries(
    {},
    optional={
        "attention": st.fixed_dictionaries(
            {}, optional={"heads": st.sampled_from([1, 2, 4]), "window": st.integers(1, 9)}
        ),
        "ffn": st.sampled_from(["mlp", "swiglu", "geglu"]).map(lambda kind: {"kind": kind})
        | st.integers(1, 99).map(lambda hidden: {"hidden": hidden}),
        "position": st.sampled_from(["alibi", "none", "t5", {"kind": "rotary", "base": 50.0}]),
        "depth": st.integers(1, 4),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(PATCHES, max_size=4))
def test_any_sequence_of_patches_gives_a_legal_spec_and_the_last_word_stands(patches: list[dict[str, Any]]) -> None:
    data = validate(TransformerSpec, {"width": 32, "attention": {"heads": 4}}).dump()
    data.pop("kind")
    for patch in patches:
        data = merge(data, patch, TransformerSpec)
    spec = validate(TransformerSpec, data)
    for patch in patches[-1:]:
        for name, value in patch.items():
            if isinstance(value, dict):
                assert all(getattr(getattr(spec, name), field) == wanted for field, wanted in value.items())
            else:
                assert getattr(getattr(spec, name), "kind", getattr(spec, name)) == value
    again = merge(data, patches[-1], TransformerSpec) if patches else data
    assert validate(TransformerSpec, again) == spec  # merging the same patch twice is merging it once


# ------------------------------------------------------------------------------------------------------------ data


def test_spec_is_frozen_and_refuses_what_it_does_not_know() -> None:
    spec = TransformerSpec()
    with pytest.raises(ValidationError):
        spec.width = 5
    with pytest.raises(TorchstoneError, match="no field 'x'"):
        validate(TransformerSpec, {"x": 1})
    with pytest.raises(TorchstoneError, match="needs a mapping of fields, got '3'"):
        validate(TransformerSpec, 3)


def test_dump_names_every_kind_and_is_json() -> None:
    data = json.loads(json.dumps(TransformerSpec().dump()))
    assert data["kind"] == "transformer" and data["attention"]["kind"] == "softmax"
    assert data["position"] == {
        "kind": "rotary", "base": 10000.0, "fraction": 1.0, "interleaved": False, "inclusive": False, "scaling": None
    }  # fmt: skip


def test_dump_through_a_part_field_is_an_equal_spec() -> None:
    spec = validate(TransformerSpec, {"encoder": {"depth": 1}, "layers": [{"at": [0], "ffn": "mlp"}], "vocabulary": 7})
    again = validate(Holder, json.loads(json.dumps({"model": spec.dump()})))
    assert again.model == spec and again.dump()["model"] == spec.dump()


def test_dump_validates_by_its_own_class() -> None:
    spec = TransformerSpec()
    assert validate(TransformerSpec, spec.dump()) == spec
    assert validate(SoftmaxSpec, SoftmaxSpec(heads=3).dump()) == SoftmaxSpec(heads=3)


def test_kind_of_another_part_is_refused_by_a_class() -> None:
    with pytest.raises(TorchstoneError, match="kind"):
        validate(SoftmaxSpec, {"kind": "retention", "heads": 3})


def test_kind_in_short_is_the_kind_with_its_defaults() -> None:
    short, long = ({"norm": value} for value in ("layernorm", {"kind": "layernorm"}))
    assert validate(TransformerSpec, short) == validate(TransformerSpec, long)
    assert validate(TransformerSpec, {"attention": {"heads": 2}}).attention.kind == "softmax"


# ---------------------------------------------------------------------------------------------------------- schema


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {node["$ref"]} if "$ref" in node else set().union(*map(references, node.values()), set())
    return set().union(*map(references, node), set()) if isinstance(node, list) else set()


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(TransformerSpec)


def test_schema_is_json_and_every_reference_resolves(schema: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and schema["type"] == "object"
    for reference in references(schema):
        assert reference.startswith("#/$defs/") and reference.removeprefix("#/$defs/") in schema["$defs"], reference


@pytest.mark.parametrize("family", ["attention", "position", "scaling", "ffn", "norm", "residual", "block", "head"])
def test_schema_offers_every_kind_of_every_family_it_reaches(schema: dict[str, Any], family: str) -> None:
    offered = [ref["$ref"].rpartition("/")[2] for ref in schema["$defs"][family]["oneOf"] if "$ref" in ref]
    default = getattr(family_root(family), "default_kind", None)
    assert offered == [f"{family}.{kind}" for kind in kinds(family)]
    for kind in kinds(family):
        body, cls = schema["$defs"][f"{family}.{kind}"], resolve(family, kind)
        assert body["properties"]["kind"] == {"const": kind}
        assert ("kind" in body.get("required", [])) == (kind != default)
        assert set(body["properties"]) == {"kind", *cls.model_fields} and body["additionalProperties"] is False
        for name in cls.model_fields:
            assert body["properties"][name].get("description"), f"{family}.{kind}.{name} has no description"


def test_schema_holds_bounds_and_part_fields(schema: dict[str, Any]) -> None:
    assert schema["properties"]["width"]["minimum"] == 1
    assert schema["properties"]["attention"]["$ref"] == "#/$defs/attention"
    assert schema["$defs"]["attention.softmax"]["properties"]["heads"]["minimum"] == 1
    assert schema["$defs"]["head.classification"]["properties"]["pool"]["enum"] == ["first", "last", "mean", "patches"]


def test_schema_of_an_optional_part_allows_none(schema: dict[str, Any]) -> None:
    field = schema["$defs"]["position.rotary"]["properties"]["scaling"]
    assert {"type": "null"} in field.get("anyOf", [])


def test_schema_allows_what_validation_allows(schema: dict[str, Any]) -> None:
    # `norm: layernorm` and `attention: {heads: 2}` are valid recipes
    attention = json.dumps(schema["$defs"]["attention"])
    assert '"string"' in attention or '"enum"' in attention


def test_layer_spec_is_what_a_patch_may_change() -> None:
    assert set(LayerSpec.model_fields) == {"attention", "position", "ffn", "residual", "norm", "linear", "block"}


@pytest.mark.parametrize(
    "value",
    [
        *("0123456789", "089", "08", "1e3", "1E5", "yes", "on", "no", "true", "1.5", "2026-01-01", "~", "", "0x1f"),
        *("1_000", ".5", "5.", "a: b", "=", "12:30:45", "0o17", 1e-5, 1e20, float("inf"), 5, True, None, 0.1, -3),
    ],
)
def test_what_is_written_as_yaml_is_read_as_it_was(value: object) -> None:
    again = parse_yaml(dump_yaml({"a": [value]}))["a"][0]
    assert type(again) is type(value) and again == value
    old = yaml.safe_load(dump_yaml({"a": value}))["a"]  # and by readers of YAML 1.1
    assert type(old) is type(value) and old == value
