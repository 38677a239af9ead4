"""Thousands of broken recipes: each gives one sentence or a working model, never another exception."""

from __future__ import annotations

import copy
import datetime
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchstone.api import _recipe_of
from torchstone.errors import TorchstoneError
from torchstone.model.transformer import Transformer
from torchstone.recipe import Recipe, load_recipe, parse_override, parse_yaml
from torchstone.spec import FAMILIES, kinds, merge
from torchstone.train.run import build_model, shape_of

TINY: dict[str, Any] = {"width": 16, "depth": 2, "vocabulary": 19, "context": 32}
BASES: list[dict[str, Any]] = [
    {"model": TINY},
    {"model": {**TINY, "attention": {"heads": 4, "kv_heads": 2, "window": 3, "qk_norm": True, "softcap": 5.0},
               "position": {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 4.0, "original": 8}},
               "ffn": {"kind": "mlp", "hidden": 24, "activation": "relu2", "bias": True}}},
    {"model": {**TINY, "attention": {"heads": 2}, "position": "t5", "residual": "sandwich", "norm": "layernorm",
               "layers": [{"at": [0], "ffn": {"kind": "geglu"}}, {"at": [-1], "attention": {"heads": 4}}]}},
    {"model": {**TINY, "attention": {"heads": 2}, "encoder": {"depth": 1, "ffn": "mlp", "layers": []},
               "position": "alibi", "dropout": 0.1}},
    {"model": {**TINY, "attention": {"heads": 2}, "causal": False, "head": {"kind": "mlm"}, "position": "learned",
               "embedding": {"kind": "token", "types": 2, "norm": "layernorm"}},
     "objective": {"kind": "masked_lm", "rate": 0.2}},
    {"model": {**TINY, "attention": {"heads": 2}, "causal": False, "position": "sinusoidal", "block": "parallel",
               "embedding": {"kind": "patch", "image": 8, "patch": 2, "channels": 1},
               "head": {"kind": "classification", "classes": 3, "pool": "mean"}}},
    {"model": {**TINY, "attention": {"heads": 2}, "stack": {"kind": "yoco", "self_attention": {"kind": "retention",
               "heads": 2, "chunk": 3}}, "position": {"kind": "rotary", "inclusive": True}}},
    {"model": {**TINY, "depth": 3, "attention": {"heads": 2}, "position": "xpos",
               "stack": {"kind": "lazy", "block_sizes": [1, 2]}}},
    {"model": {**TINY, "attention": {"heads": 2}}, "optimizer": {"kind": "muon", "betas": [0.9, 0.99]},
     "schedule": {"kind": "multi_step", "at": [0.5, 0.9], "to": [0.3, 0.1], "warmup": 5},
     "trainer": {"steps": 7, "ema": 0.9, "precision": "bf16", "clip": None},
     "data": {"corpus": {"kind": "text", "path": "x"}, "tokenizer": {"kind": "bpe", "vocabulary": 300}, "block": 8},
     "parallel": {"data": 2}, "evaluate": {"every": 3, "blocks": None}},
]  # fmt: skip

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-300, 1e308, -1e308, math.inf, -math.inf, math.nan, 10**4, 10**6,
    2**31, -(2**31), 2**63, 10**30, "", " ", "x", "nan", "1", "none", "None", "kind", "softmax", "é" * 90, "a\nb", "\0",
    "../x", "\ud800", [], [1], [None], [[]], {}, {"kind": "mlp"}, {"kind": None}, {"kind": 3}, {"kind": ["softmax"]},
    {"kind": {}}, {"kind": ""}, {"kind": "_gated"}, {"kind": "__init__"}, {1: 2}, {None: 1}, {"*": 3}, {"*": "mlp"},
    {"at": [0]}, [{"at": [0], "at ": 1}], [{"at": [True]}], [{"at": "0"}], [0.9, 0.5], [0.5, 2], ["0.9", "0.99"],
    (1, 2), {1, 2}, b"bytes", datetime.date(2020, 1, 1), object, 1j, {"depth": 10**9}, {"depth": 2, "layers": 3},
]  # fmt: skip


def deep(rng: random.Random) -> Any:
    """A value nested some levels deep, or too many."""
    value: Any = rng.choice([1, "x", {}])
    for _ in range(rng.choice([3, 20, 40, 300])):
        value = {rng.choice(["kind", "model", "ffn", "x"]): value} if rng.random() < 0.5 else [value]
    return value


def words() -> list[str]:
    """Every kind, field and family: wrong ones that look right."""
    found = set(FAMILIES) | set(Recipe.model_fields)
    for family in set(FAMILIES) - {"adapt"}:
        found.update(kinds(family))
    return sorted(found | {"width", "depth", "heads", "kv_heads", "hidden", "context", "vocabulary", "steps", "at"})


WORDS = words()


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of plain data."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from places(data[key])


def mutate(data: dict[str, Any], rng: random.Random) -> None:
    data.setdefault("trainer", {})
    holder, key = rng.choice(list(places(data)))
    old = holder[key]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    what = rng.randrange(8)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice([*WORDS, "", "x y", "\n", 5, None, "model.width"])] = copy.deepcopy(rng.choice(JUNK))
    elif what == 2 and number:
        holder[key] = rng.choice([-old, old * 10**3, old + 1, old / 3, old * 1e30, str(old), [old], float(old), 0])
    elif what == 3:
        holder[key] = rng.choice(WORDS)
    elif what == 4:
        holder[key] = {"kind": rng.choice(WORDS)}
    elif what == 5 and rng.random() < 0.2:
        holder[key] = deep(rng)
    elif what == 6:
        other, name = rng.choice(list(places(data)))
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = copy.deepcopy(rng.choice(JUNK))


def full_base(rng: random.Random) -> dict[str, Any]:
    """A base as it was written, or with all its defaults filled in."""
    base = rng.choice(BASES)
    return load_recipe(base).dump() if rng.random() < 0.5 else copy.deepcopy(base)


def assert_sentence(error: TorchstoneError, data: Any) -> None:
    text = str(error)
    assert text and len(text) < 2000 and "\n" not in text, (len(text), text[:300])
    assert "Traceback" not in text and "pydantic" not in text, text


def try_recipe(data: Any, rng: random.Random, forward: bool) -> str:
    """What became of it: "refused", "built" or "ran"."""
    try:
        recipe = load_recipe(data)
        assert load_recipe(recipe.dump()) == recipe
        resolved = _recipe_of(recipe, ())
        spec: Any = resolved.model
        if sum(spec.depths) > 64:
            return "built"
        model = shape_of(spec)
    except TorchstoneError as error:
        assert_sentence(error, data)
        return "refused"
    size = sum(parameter.numel() for parameter in model.parameters())
    pixels = getattr(spec.embedding, "image", 0)
    if not forward or size > 10**6 or (spec.context or 0) > 10**4 or pixels > 64:
        return "built"
    try:
        run_forward(build_model(spec, 0), spec)
    except TorchstoneError as error:
        assert_sentence(error, data)
    return "ran"


def run_forward(model: torch.nn.Module, spec: Any) -> None:
    assert isinstance(model, Transformer)
    if spec.embedding.kind == "patch":
        inputs = torch.randn(2, spec.embedding.channels, spec.embedding.image, spec.embedding.image)
    else:
        inputs = torch.arange(12).reshape(2, 6) % spec.vocabulary
    memory = inputs if spec.encoder is not None else None
    with torch.no_grad():
        out = model(inputs, memory=memory)
    assert out.logits is not None and out.logits.shape[0] == 2


def fuzz(count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    found = {"refused": 0, "built": 0, "ran": 0}
    for number in range(count):
        data = full_base(rng)
        for _ in range(rng.choice([1, 1, 2, 3])):
            mutate(data, rng)
        try:
            found[try_recipe(data, rng, forward=number % 3 == 0)] += 1
        except Exception as error:
            shown = repr(data)
            raise AssertionError(f"number {number}: {type(error).__name__}: {error}; from {shown[:1500]}") from error
    return found


def test_fifteen_hundred_mutated_recipes_give_a_sentence_or_a_model() -> None:
    found = fuzz(1500, seed=0)
    assert found["refused"] > 500 and found["built"] > 100 and found["ran"] > 30, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_mutated_recipes_give_a_sentence_or_a_model(seed: int) -> None:
    fuzz(2000, seed)


def test_the_bases_are_models_that_run() -> None:
    for base in BASES:
        assert try_recipe(base, random.Random(0), forward=True) == "ran"


def test_mutated_overrides_give_a_sentence_or_a_recipe() -> None:
    rng = random.Random(0)
    paths = [".".join(path) for path in walk(load_recipe(BASES[1]).dump(), ())]
    values = ["", "1", "-1", "1e3", ".nan", ".inf", "[", "{", "{}", "[]", "null", "~", "mlp", "{kind: mlp}", "a: b",
              "&a *a",
              "!!python/none", "0x10", "1_000", "'x", "\t", "2020-01-01", "9" * 40, "{a: {b: {c: 1}}}"]  # fmt: skip
    for _ in range(600):
        overrides = []
        for _ in range(rng.choice([1, 1, 2])):
            path = rng.choice(
                [*paths, "", ".", "model", "x", "model.x", "model.width.x", "model..x", "*", "model.ffn.*"]
            )
            equals, value = rng.choice(["=", "=", "=", "", "=="]), rng.choice([*values, rng.choice(WORDS)])
            overrides.append(f"{path}{equals}{value}")
        try:
            load_recipe(BASES[1], overrides)
        except TorchstoneError as error:
            assert_sentence(error, overrides)
        except Exception as error:
            raise AssertionError(f"{overrides}: {type(error).__name__}: {error}") from error


def walk(data: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, value in data.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from walk(value, (*path, name))


def test_random_text_is_no_recipe_or_one() -> None:
    rng = random.Random(0)
    pieces = ["model", "width", ": ", "\n", "  ", "- ", "{", "}", "[", "]", ",", "1", "a", "'", '"', "#", "&x ", "*x",
              "!!", "|", ">", "?", "%", "---", "\t", "~", "\x00", "é", "0x", "1e5", "<<"]  # fmt: skip
    for _ in range(800):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 20)))
        try:
            data = parse_yaml(text, "text")
            if isinstance(data, dict):
                load_recipe(data)
            parse_override(f"model={text}")
        except TorchstoneError:
            pass
        except Exception as error:
            raise AssertionError(f"{text!r}: {type(error).__name__}: {error}") from error


def test_merging_never_changes_its_arguments() -> None:
    rng = random.Random(3)
    for _ in range(200):
        base, patch = full_base(rng), full_base(rng)
        before = repr(base), repr(patch)
        merge(base, patch, Recipe)
        assert (repr(base), repr(patch)) == before
