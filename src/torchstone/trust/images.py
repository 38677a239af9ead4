"""Images that a trained classifier is measured on, where they are others than those of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchstone.data.images import PreparedImages, all_to_test
from torchstone.errors import TorchstoneError
from torchstone.trust.model._classifier import ClassifierSpec

__all__ = ["images_for"]


def images_for(spec: Any, path: str | Path, size: int | None = None) -> PreparedImages:
    """All images of a folder or an .npz file, as the test split of a classifier with this spec; `size` is what the
    run's own images were resized to, if they were.

    Folders of classes are numbered by their names, so that there must be as many as the classifier has classes; numbers
    in an .npz file must be some of its classes.

    Raises:
        TorchstoneError: no such images, or of another shape or other classes.
    """
    prepared = all_to_test(str(path), size)
    own = isinstance(spec, ClassifierSpec)
    body: Any = spec if own else spec.embedding
    head: Any = spec if own else spec.head
    found, classes = prepared.sizes, head.classes
    if (found["channels"], found["image"]) != (body.channels, body.image):
        raise TorchstoneError(
            f"{path}: images of {found['channels']} x {found['image']} x {found['image']}, and the model takes "
            f"{body.channels} x {body.image} x {body.image}"
        )
    if found["classes"] > classes or (found["classes"] < classes and Path(path).expanduser().is_dir()):
        raise TorchstoneError(f"{path}: images of {found['classes']} classes, and the model has {classes}")
    return prepared
