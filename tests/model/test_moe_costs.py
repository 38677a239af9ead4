"""What a model of experts costs, as `inspect` says it."""

from __future__ import annotations

from typing import Any

import pytest

from torchstone.api import inspect
from torchstone.model.measure import measure
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train.memory import training_memory
from torchstone.train.run import shape_of

EXPERTS: dict[str, Any] = {"kind": "moe", "experts": 8, "active": 2, "shared": 1, "hidden": 24}
BASE: dict[str, Any] = {
    "model": {"width": 32, "depth": 3, "vocabulary": 100, "context": 64, "attention": {"heads": 4}, "ffn": EXPERTS},
    "data": {"tokenizer": "bytes", "block": 64},
    "trainer": {"batch": 4},
}


def counts(**fields: Any) -> Any:
    return measure(shape_of(validate(TransformerSpec, fields)), fields["context"])


def test_published_sizes_of_deepseek_v3_and_deepseekmoe_are_counted() -> None:
    v3 = counts(
        width=7168,
        depth=61,
        vocabulary=129280,
        context=4096,
        attention={
            "kind": "mla",
            "heads": 128,
            "q_latent": 1536,
            "kv_latent": 512,
            "nope_dim": 128,
            "rope_dim": 64,
            "v_dim": 128,
        },
        head={"tied": False},
        ffn={
            "kind": "moe",
            "experts": 256,
            "active": 8,
            "shared": 1,
            "hidden": 2048,
            "router": {"kind": "sigmoid_bias", "groups": 8, "keep_groups": 4, "scale": 2.5},
        },
        layers=[{"at": [0, 1, 2], "ffn": {"kind": "swiglu", "hidden": 18432}}],
    )
    assert v3.parameters == 671_026_404_352 and v3.buffers == 14_848
    assert v3.active_parameters == pytest.approx(36.63e9, rel=1e-3)
    assert v3.active_with_embedding == pytest.approx(37.55e9, rel=1e-3)
    moe16 = counts(
        width=2048,
        depth=28,
        vocabulary=102400,
        context=4096,
        attention={"heads": 16},
        head={"tied": False},
        ffn={"kind": "moe", "experts": 64, "active": 6, "shared": 2, "hidden": 1408},
        layers=[{"at": [0], "ffn": {"kind": "swiglu", "hidden": 10944}}],
    )
    assert moe16.parameters == pytest.approx(16.376e9, rel=1e-3)
    assert moe16.active_with_embedding == pytest.approx(2.829e9, rel=1e-3)


def test_inspect_counts_what_a_token_meets() -> None:
    found = inspect(BASE)
    one = 3 * 32 * 24
    assert found["parameters"] - found["active_with_embedding"] == 3 * 6 * one
    stable = inspect(BASE, [{"model": {"ffn": {"active": 1, "router": {"kind": "stable", "dim": 5}}}}])
    assert stable["parameters"] - stable["active_with_embedding"] == 3 * (7 * one + 99 * 5)
    assert stable["buffers"] == 3 * (100 + 1)


@pytest.mark.parametrize(
    "router",
    ["topk", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigmoid_bias", "cosine", "hash", "stable"))],
)
def test_memory_of_a_training_is_estimated_with_experts(router: str) -> None:
    active = 1 if router == "stable" else 2
    fields = {"ffn": {**EXPERTS, "active": active, "router": router}}
    plain = training_memory(load_recipe(BASE, [{"model": fields}]))
    assert plain.activations is not None
    more = training_memory(load_recipe(BASE, [{"model": fields, "trainer": {"batch": 8}}])).activations
    assert more == pytest.approx(2 * plain.activations, rel=0.05)
    dense = training_memory(load_recipe(BASE, [{"model": {"ffn": {"kind": "swiglu", "hidden": 24 * (active + 1)}}}]))
    assert dense.activations is not None and dense.activations < plain.activations < 3 * dense.activations
