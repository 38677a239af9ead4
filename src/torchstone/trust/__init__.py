"""Trust: attacks on models, and models that know when not to answer. Importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.trust.rejection import RejectingClassifier

__all__ = ["RejectingClassifier"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchstone.trust import rejection

    return getattr(rejection, name)
