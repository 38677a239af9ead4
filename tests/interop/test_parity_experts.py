"""A layer of experts gives what the same layer of published code gives, with its weights: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.moe import MoESpec
from torchstone.model.site import Site, initialise
from torchstone.spec import validate

transformers = pytest.importorskip("transformers")
D, E, H = 24, 8, 10


def _mixtral() -> tuple[Any, dict[str, Any]]:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.0
    )
    return MixtralSparseMoeBlock(config), {"active": 2, "router": {"kind": "topk", "normalise": True}}


def _deepseek_v2() -> tuple[Any, dict[str, Any]]:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        hidden_size=D,
        moe_intermediate_size=H,
        n_routed_experts=E,
        n_shared_experts=2,
        num_experts_per_tok=3,
        num_attention_heads=4,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
    )
    router = {"kind": "topk", "groups": 4, "keep_groups": 2, "scale": 1.7}
    return DeepseekV2Moe(config), {"active": 3, "shared": 2, "router": router}


def _deepseek_v3() -> tuple[Any, dict[str, Any]]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=H,
        n_routed_experts=E,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = {"kind": "sigmoid_bias", "groups": 4, "keep_groups": 2, "scale": 2.5}
    return DeepseekV3MoE(config), {"active": 3, "shared": 1, "router": router}


MODELS = {"mixtral": _mixtral, "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3}


@pytest.mark.parametrize("name", MODELS)
def test_same_weights_same_values_and_gradients(name: str) -> None:
    theirs, fields = MODELS[name]()
    theirs.experts.config._experts_implementation = "eager"  # a loop over experts
    generator = Key(0).generator()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for buffer in theirs.buffers():
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    ours: Any = validate(MoESpec, {"experts": E, "hidden": H, **fields}).build(Site(width=D))
    initialise(ours, 1)
    pairs = {
        "router.weight": theirs.gate.weight,
        "up.weight": theirs.experts.gate_up_proj.flatten(0, 1),
        "down.weight": theirs.experts.down_proj.flatten(0, 1),
    }
    if "shared" in fields:
        shared = theirs.shared_experts
        pairs["shared.up.weight"] = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        pairs["shared.down.weight"] = shared.down_proj.weight
    if name == "deepseek_v3":
        pairs["router.bias"] = theirs.gate.e_score_correction_bias
    assert set(pairs) == set(ours.state_dict())
    ours.load_state_dict({key: value.detach() for key, value in pairs.items()})
    x, y = (torch.randn(2, 9, D, generator=Key(2).generator()).requires_grad_() for _ in range(2))
    found, wanted = ours(x, Context.alone(x))[0], theirs(y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(wanted.shape, generator=Key(3).generator())
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.up.weight.grad, theirs.experts.gate_up_proj.grad.flatten(0, 1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(ours.down.weight.grad, theirs.experts.down_proj.grad.flatten(0, 1), rtol=1e-4, atol=1e-5)
