"""`TorchstoneConfig`: a run's config.json as transformers reads it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import Part, Spec, validate
from torchstone.train.migrations import migrate
from torchstone.train.run import config_of

__all__ = ["TorchstoneConfig"]

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Holder(Spec):
    model: Part[ModelSpec]


class TorchstoneConfig(PreTrainedConfig):
    """A model's spec, and beside it the numbers that other tools look for, derived from it.

    Args:
        spec: fields of the model, as under ``model:`` in a recipe, with a vocabulary.
        format_version: of `spec`; None is today's.
        kwargs: fields of every config of transformers.

    Raises:
        TorchstoneError: an invalid spec, a format that this torchstone does not know, a model that is no Transformer
            over token ids.
    """

    model_type: ClassVar[str] = "torchstone"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, spec: dict[str, Any] | None = None, format_version: int | None = None, **kwargs: Any) -> None:
        name = kwargs.get("name_or_path") or kwargs.get("_name_or_path")
        where = f"{name}/config.json" if name else "config.json"
        facts: dict[str, Any] = {}
        if spec is not None:  # transformers itself makes one without arguments, to compare with
            old = {"spec": spec, "format_version": format_version}
            data = old if format_version is None else migrate("config", old, format_version, where)  # type: ignore[arg-type]
            facts = self._facts(validate(_Holder, {"model": data["spec"]}, where).model, kwargs)
        self.spec, self.format_version = facts.pop("spec", None), facts.pop("format_version", None)
        # what stands in the file wins over what follows from the spec, except for what the spec decides
        super().__init__(**{**dict.fromkeys(_SPECIAL), **kwargs, **facts})

    @staticmethod
    def _facts(spec: ModelSpec, given: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(spec, TransformerSpec) or not spec.embedding.of_tokens:
            kind = f"embedding {spec.embedding.kind}" if isinstance(spec, TransformerSpec) else f"model {spec.kind}"
            raise TorchstoneError(f"{kind}: its inputs are no token ids; the Hugging Face classes take token ids")
        if spec.encoder is not None:
            raise TorchstoneError(
                "model.encoder: an encoder-decoder has no Hugging Face class here; use torchstone.load"
            )
        if spec.vocabulary is None:
            raise TorchstoneError("model.vocabulary: is required")
        facts = {
            name: value for name, value in config_of(spec, None).items() if name not in ("model_type", "torch_dtype")
        }
        if given.get("architectures"):
            del facts["architectures"]
        if given.get("dtype") is None and given.get("torch_dtype") is None:
            facts["dtype"] = "float32"
        head: Any = spec.head
        if head.kind == "lm":  # names by which tools that multiply with the head themselves know these
            facts["final_logit_softcapping"] = head.softcap
            facts["logit_scale"] = spec.width**-0.5 if head.scale else None
        if head.kind == "classification":
            labels = given.get("id2label")
            if labels is not None and len(labels) != head.classes:
                raise TorchstoneError(f"id2label: {len(labels)} labels for a head of {head.classes} classes")
            facts |= {} if labels is not None else {"num_labels": head.classes}
        return facts

    @property
    def model_spec(self) -> TransformerSpec:
        """The spec.

        Raises:
            TorchstoneError: the config has none.
        """
        if self.spec is None:
            raise TorchstoneError("TorchstoneConfig: needs spec, the fields of a model")
        spec = validate(_Holder, {"model": self.spec}, "spec").model
        assert isinstance(spec, TransformerSpec)
        return spec
