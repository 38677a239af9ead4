"""Runs inside Hugging Face's tools: importing this registers them with the Auto classes.

    import torchstone.interop.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("runs/notes")
    tokenizer = AutoTokenizer.from_pretrained("runs/notes")

A wrapper's modules are the Transformer's own, so its parameters have the names that they have in a run, and what it
saves can be loaded as a run's weights again. Decode state stands behind their cache interface (`TorchstoneCache`).
"""

from __future__ import annotations

from torchstone.errors import TorchstoneError

try:
    import transformers
except ImportError:
    raise TorchstoneError("torchstone.interop.hf: needs transformers 5; pip install 'torchstone[hf]'") from None

if int(transformers.__version__.partition(".")[0]) < 5:
    raise TorchstoneError(f"torchstone.interop.hf: needs transformers 5, found {transformers.__version__}")

from torchstone.interop.hf.cache import TorchstoneCache
from torchstone.interop.hf.config import TorchstoneConfig
from torchstone.interop.hf.models import (
    TorchstoneForCausalLM,
    TorchstoneForMaskedLM,
    TorchstoneForSequenceClassification,
    TorchstoneModel,
)

__all__ = [
    "TorchstoneCache",
    "TorchstoneConfig",
    "TorchstoneForCausalLM",
    "TorchstoneForMaskedLM",
    "TorchstoneForSequenceClassification",
    "TorchstoneModel",
]

transformers.AutoConfig.register("torchstone", TorchstoneConfig)
transformers.AutoModel.register(TorchstoneConfig, TorchstoneModel)
transformers.AutoModelForCausalLM.register(TorchstoneConfig, TorchstoneForCausalLM)
transformers.AutoModelForMaskedLM.register(TorchstoneConfig, TorchstoneForMaskedLM)
transformers.AutoModelForSequenceClassification.register(TorchstoneConfig, TorchstoneForSequenceClassification)
