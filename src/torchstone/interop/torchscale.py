"""Models of TorchScale (Ma et al. 2022, arXiv 2211.13184): its config's values and a state dict become a model here.

    model = from_torchscale("decoder", {"vocab_size": 64000, "subln": True}, torchscale_model.state_dict())

`torchstone import weights.pt --layout torchscale-decoder --config values.json --out RUN` makes a run of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from torchstone.interop.layout import find_layout, load_state
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

__all__ = ["Assembly", "from_torchscale"]

Assembly = Literal["encoder", "decoder", "encoder-decoder", "retnet", "beit3"]


def from_torchscale(
    assembly: Assembly, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> Transformer:
    """The model that computes what TorchScale's does.

    Args:
        assembly: which of its classes: `Encoder`, `Decoder`, `EncoderDecoder`, `RetNetDecoder` or `BEiT3`, whose inputs
            are a `torchstone.model.embedding.vision_language.VisionLanguage`; for LongNet's two, `config` names the
            class besides: ``{"architectures": ["LongNetDecoder"], ...}``.
        config: keyword arguments of its config class; what is left out has TorchScale's default.
        state_dict: its tensors by name.

    Raises:
        TorchstoneError: an option that is unknown or has no place, by name; tensors missing, surplus or mis-shaped.
    """
    layout = find_layout(f"torchscale-{assembly}")
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    spec = validate(TransformerSpec, layout.to_spec(dict(config), shapes))
    with torch.device("meta"):
        model = spec.build()
    load_state(model, layout.read(spec, shapes, state_dict.__getitem__))
    return model
