"""LoRA as a way to adapt a run: the linear kind `lora` in every layer, everything else frozen (Hu et al. 2021, arXiv
2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.model.linear.lora import ROLES, LoraLinear, LoraSpec, Targets
from torchstone.model.site import parameter_name
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import AdaptSpec
from torchstone.spec import validate

__all__ = ["LoraAdaptSpec"]

_UPDATES = ("lora_a", "lora_b")


class LoraAdaptSpec(AdaptSpec):
    """Train a low-rank update of the projections of `init_from`, and nothing else."""

    paper: ClassVar[str] = LoraSpec.paper

    rank: int = Field(8, ge=1)
    """Width between the two matrices of an update."""
    alpha: float = Field(16.0, gt=0)
    """An update is scaled by alpha / rank."""
    targets: Targets = ROLES
    """Roles of the projections that are adapted: q, k, v, out, gate, up, down."""
    also: tuple[str, ...] = ()
    """Patterns of parameters that train in full ("head.*", "*.norm.weight")."""

    def apply(self, spec: ModelSpec) -> ModelSpec:
        if not isinstance(spec, TransformerSpec):
            raise TorchstoneError(f"adapt lora: needs a transformer, not model {spec.kind}")
        own = LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets).dump()

        def adapted(body: dict[str, Any]) -> dict[str, Any]:
            linear = body.get("linear")
            patches = [adapted(dict(patch)) for patch in body.get("layers") or ()]
            body = {**body, **({"layers": patches} if patches else {})}
            if linear is None:
                return body
            before = dict(linear) if isinstance(linear, Mapping) else {"kind": linear}
            if before.get("kind") != "lora":
                return {**body, "linear": {**own, "base": before}}
            if {**before, "base": own["base"]} != own:
                raise TorchstoneError("adapt lora: the model has another LoRA already; export it merged first")
            return body

        body = adapted(spec.dump())
        if body.get("encoder"):
            body["encoder"] = adapted(dict(body["encoder"]))
        return validate(TransformerSpec, {name: value for name, value in body.items() if name != "kind"}, "adapt lora")

    def is_new(self, name: str) -> bool:
        return name.rpartition(".")[2] in _UPDATES

    def prepare(self, model: nn.Module) -> None:
        names = {parameter_name(name): parameter for name, parameter in model.named_parameters()}
        unused = [pattern for pattern in self.also if not any(fnmatchcase(name, pattern) for name in names)]
        if unused:
            raise TorchstoneError(f"adapt.also: no parameter is named {unused[0]!r}")
        if not any(isinstance(module, LoraLinear) for module in model.modules()):
            raise TorchstoneError(f"adapt.targets: the model has no projection of role {', '.join(self.targets)}")
        for name, parameter in names.items():
            parameter.requires_grad_(self.is_new(name) or any(fnmatchcase(name, pattern) for pattern in self.also))
