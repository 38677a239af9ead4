"""BEiT's published layout: what transformers saves is read with equal outputs; transformers reads what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.interop.exporting import export_run
from torchstone.interop.importing import import_run
from torchstone.keys import Key
from torchstone.model.embedding.patch import Patches

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 3,
    "use_mask_token": True,
}
SCALES = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
PIXELS = torch.rand(3, 3, 8, 8, generator=Key(1).generator())
MASKED = torch.rand(3, 16, generator=Key(2).generator()) < 0.4


def scaled() -> torch.Tensor:
    """Pixels as the reader of preprocessor_config.json gives them to the model."""
    mean, std = (torch.tensor(SCALES[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (PIXELS - mean) / std


def saved(folder: Path, kind: str, shared: bool) -> Any:
    """Their model with random weights, and its files in `folder`."""
    which = {"use_shared_relative_position_bias": shared, "use_relative_position_bias": not shared}
    model = getattr(transformers, kind)(transformers.BeitConfig(**SIZES, **which)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=Key(0).fold(name).generator()))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SCALES))
    return model


KINDS = pytest.mark.parametrize("kind", ["BeitForMaskedImageModeling", "BeitForImageClassification"])
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def logits_of(model: Any, kind: str) -> torch.Tensor:
    """Theirs: (B, classes), or (B, patches, codes)."""
    masked = {} if kind.endswith("Classification") else {"bool_masked_pos": MASKED}
    return model(scaled(), **masked).logits


@KINDS
@SHARED
@torch.no_grad()
def test_outputs_are_theirs_and_what_is_written_is_what_was_read(tmp_path: Path, kind: str, shared: bool) -> None:
    theirs = saved(tmp_path / "theirs", kind, shared)
    run = import_run(tmp_path / "theirs", tmp_path / "run")
    ours = torchstone.load(tmp_path / "run").model().eval()
    logits = ours(PIXELS if kind.endswith("Classification") else Patches(PIXELS, MASKED)).logits
    if not kind.endswith("Classification"):
        logits = logits[:, 1:]
    wanted = logits_of(theirs, kind)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    assert run.recipe.data.kind == "images"
    export_run(run, str(tmp_path / "written"))
    again, info = getattr(transformers, kind).from_pretrained(tmp_path / "written", output_loading_info=True)
    processor = json.loads((tmp_path / "written" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 8, "width": 8} and SCALES.items() <= processor.items()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(again.eval(), kind), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_absolute_position_embeddings": True}, "use_absolute_position_embeddings True is not supported"),
        ({"layer_scale_init_value": 0}, "layer_scale_init_value 0 is not supported"),
        ({"use_shared_relative_position_bias": True}, "shared and of each layer"),
        ({"use_mean_pooling": False}, "use_mean_pooling False is not supported"),
    ],
)
def test_what_has_no_place_is_said_in_a_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path / "theirs", "BeitForImageClassification", False)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(TorchstoneError, match=message):
        import_run(tmp_path / "theirs", tmp_path / "run")
    assert not (tmp_path / "run").exists()
