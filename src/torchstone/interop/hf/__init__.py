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
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        PreTrainedConfig,  # noqa: F401  (its spelling is that of transformers 5)
    )
except ImportError as error:
    raise TorchstoneError(
        f"torchstone.interop.hf: needs transformers 5 ({error}); pip install 'torchstone[hf]'"
    ) from None

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

AutoConfig.register("torchstone", TorchstoneConfig)
AutoModel.register(TorchstoneConfig, TorchstoneModel)
AutoModelForCausalLM.register(TorchstoneConfig, TorchstoneForCausalLM)
AutoModelForMaskedLM.register(TorchstoneConfig, TorchstoneForMaskedLM)
AutoModelForSequenceClassification.register(TorchstoneConfig, TorchstoneForSequenceClassification)
