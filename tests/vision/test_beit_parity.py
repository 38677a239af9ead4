"""Against transformers' BEiT with random weights: hidden states, logits and the loss, with shared tables and with one a
layer, and the classifier of fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pictures import CLASSIFIER, CODES, ENCODER

from torchstone.keys import Key
from torchstone.model.embedding.patch import Patches
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import Facts
from torchstone.spec import validate
from torchstone.vision.objectives.masked_image import MaskedImage, MaskedImageSpec
from torchstone.vision.tokenizers import KMeansTokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("float64")

DEPTH = 2


def theirs_of(kind: str, shared: bool) -> Any:
    """Their model with random weights."""
    config = transformers.BeitConfig(
        vocab_size=CODES,
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=3,
        num_labels=3,
        use_mask_token=True,
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
        attn_implementation="eager",
    )
    model = getattr(transformers, kind)(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=Key(0).fold(name).generator()))
    return model


def ours_of(theirs: Any, shared: bool, **fields: Any) -> Transformer:
    """Our model with the same weights."""
    given = {name.removeprefix("beit."): value for name, value in theirs.state_dict().items()}
    used: set[str] = set()

    def take(name: str) -> torch.Tensor:
        used.add(name)
        return given[name]

    table = "relative_position_bias.relative_position_bias_table"
    of_all = "shared_position_bias.relative_position_bias_table"
    made = {
        "embedding.project.weight": take("embeddings.patch_embeddings.projection.weight").flatten(1),
        "embedding.project.bias": take("embeddings.patch_embeddings.projection.bias"),
        "embedding.class_token": take("embeddings.cls_token")[0, 0],
        "embedding.mask_token": take("embeddings.mask_token")[0, 0],
    }
    if shared:
        made["encoder.positions.relative_2d.weight"] = take(of_all)
    for i in range(DEPTH):
        at, name = f"layers.{i}", f"encoder.layers.{i}"
        if not shared:
            made[f"encoder.positions.relative_2d{f'_{i}' if i else ''}.weight"] = take(f"{at}.{table}")
        projections = [take(f"{at}.attention.{part}_proj.weight") for part in "qkv"]
        made |= {
            f"{name}.attention.qkv.weight": torch.cat(projections),
            f"{name}.attention.qkv.bias": torch.cat([take(f"{at}.attention.{part}_proj.bias") for part in "qv"]),
            f"{name}.attention_residual.gamma": take(f"{at}.lambda_1"),
            f"{name}.ffn_residual.gamma": take(f"{at}.lambda_2"),
        }
        for one, other in (
            ("attention.out", "attention.o_proj"),
            ("attention_residual.norm", "layernorm_before"),
            ("ffn_residual.norm", "layernorm_after"),
            ("ffn.up", "mlp.fc1"),
            ("ffn.down", "mlp.fc2"),
        ):
            made |= {f"{name}.{one}.{p}": take(f"{at}.{other}.{p}") for p in ("weight", "bias")}
    ends = {
        "lm_head": "head.out",
        "classifier": "head.out",
        "pooler.layernorm": "head.norm",
        "layernorm": "encoder.norm",
    }
    for name in [name for name in given if name not in used]:
        home, _, p = name.rpartition(".")
        if home in ends:
            made[f"{ends[home]}.{p}"] = take(name)
    assert used == set(given), f"not carried over: {sorted(set(given) - used)}"
    body = {**ENCODER, "position": {"kind": "relative_2d", "shared": shared}, **fields}
    body["embedding"] = {**body["embedding"], "channels": 3}
    model = validate(TransformerSpec, body).build()
    model.load_state_dict(made)
    return model.eval()  # type: ignore[return-value]


PIXELS = torch.rand(3, 3, 8, 8, generator=Key(1).generator(), dtype=torch.float64)
MASKED = torch.rand(3, 16, generator=Key(2).generator()) < 0.4


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_masked_image_modelling_is_that_of_transformers(shared: bool) -> None:
    theirs = theirs_of("BeitForMaskedImageModeling", shared)
    ours = ours_of(theirs, shared)
    inner = theirs.beit(PIXELS, bool_masked_pos=MASKED)
    out = ours(Patches(PIXELS, MASKED))
    torch.testing.assert_close(out.hidden, theirs.layernorm(inner.last_hidden_state), rtol=0, atol=1e-6)
    tokenizer = KMeansTokenizer(torch.rand(CODES, 12, generator=Key(3).generator(), dtype=torch.float64), 2, 3)
    codes = tokenizer.tokens(PIXELS).flatten(1)
    wanted = theirs(PIXELS, bool_masked_pos=MASKED, labels=codes[MASKED])
    torch.testing.assert_close(out.logits[:, 1:], wanted.logits, rtol=0, atol=1e-6)
    objective = MaskedImage(MaskedImageSpec(tokenizer="none"), Facts(model=ours.spec), tokenizer)
    batch = {"pixels": PIXELS, "masked": MASKED, "targets": torch.where(MASKED, codes, -100)}
    loss = objective(ours, batch, None).terms["loss"].total / MASKED.sum()
    torch.testing.assert_close(loss, wanted.loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_classifier_of_fine_tuning_is_that_of_transformers(shared: bool) -> None:
    theirs = theirs_of("BeitForImageClassification", shared)
    residual = {"kind": "layer_scale", "final": False}
    ours = ours_of(theirs, shared, residual=residual, head=CLASSIFIER["head"])
    torch.testing.assert_close(ours(PIXELS).logits, theirs(PIXELS).logits, rtol=0, atol=1e-6)
