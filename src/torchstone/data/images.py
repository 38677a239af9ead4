"""Images, with a label each or without: scikit-learn's digits, folders of files, or arrays.

Where files lie in folders ``train``, ``valid`` and ``test``, each of them with a folder a class, these are the splits.
Otherwise, and for what is missing of them, shares are drawn by `seed`. All images are kept in memory, those of files as
bytes: ImageNet's 1.28 million at 224 x 224 x 3 would be about 190 GB, so what fits is a part of it.

N images of all splits, B images of a batch, C channels, I pixels of a side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._examples import Examples
from torchstone.data.blocks import IGNORE
from torchstone.data.corpora._files import walk
from torchstone.data.hashing import digest, permute
from torchstone.data.spec import DataSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key

if TYPE_CHECKING:
    import torch

__all__ = ["Images", "ImagesDataSpec", "PreparedImages", "all_to_test"]

_FORMAT = 1
"""Goes up whenever the same fields and files would give other images."""
_SPLITS = ("train", "valid", "test")
_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImagesDataSpec(DataSpec):
    """Square images, each with the number of its class, or without."""

    example: ClassVar[str] = "images"
    fills: ClassVar[tuple[str, ...]] = ("classes", "channels", "image")

    source: Literal["digits"] | None = None
    """digits: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn (extra `claims`)."""
    path: str | None = Field(None, min_length=1)
    """A folder with a folder of PNG or JPEG files for each class, or with such folders in train, valid and test; or an
    .npz file of `x`, (N, I, I) or (N, C, I, I), bytes or floats from 0 to 1, and `y`, (N,), numbers of classes."""
    image: int | None = Field(None, ge=1, le=2**14)
    """Pixels that the shorter side of each file is resized to (bicubic), of which the central square is cut out: for
    files of several sizes, or not square. None takes files as they are, all of one size."""
    valid: float = Field(0.1, ge=0, lt=1)
    """Share of the images that is for validation, where they do not lie in folders of their own."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share of the images that is for the test, where they do not lie in folders of their own."""
    labels: bool = True
    """Whether images have classes. Without, files may lie in any folders, an .npz file needs no `y`, and what classes
    there are is not looked at."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the split. The trainer's seed only orders the images of train."""

    @model_validator(mode="after")
    def _one_source(self) -> ImagesDataSpec:
        if (self.source is None) == (self.path is None):
            raise ValueError("needs either source or path")
        if self.image is not None and (self.path is None or self.path.endswith(".npz")):
            raise ValueError("image: files alone are resized, and these are arrays")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test is {self.valid + self.test:g}, which leaves nothing to train on")
        return self

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedImages:
        """The splits.

        Raises:
            TorchstoneError: scikit-learn or Pillow is missing; a file that is no image, or of another size; says which.
        """
        name = self.source or str(self.path)
        read = _digits() if self.source is not None else _read(name, self.labels, self.image)
        label = read.label_N if self.labels else np.full_like(read.label_N, IGNORE)
        _check(read.pixels_NCII, label if self.labels else None, name)
        classes = int(label.max()) + 1 if self.labels else None
        prepared = _prepared(name, read.pixels_NCII, label, _split(read.split_N, self), classes)
        if not len(prepared.train):
            raise TorchstoneError(f"data images: {name} leaves no image to train on")
        return prepared


@dataclass(frozen=True)
class PreparedImages:
    """Images, ready to train on.

    Attributes:
        train, valid, test: the splits.
        description: one line: images, of each split too, their size and classes.
        hash: identifies the images and their split; numbers of different hashes do not compare.
        sizes: ``classes``, where there are labels, ``channels`` and ``image``, the pixels of a side.
    """

    train: Images
    valid: Images
    test: Images
    description: str
    hash: str
    sizes: dict[str, int]
    tokenizer: None = None


class Images(Examples):
    """The images of one split; ``len(images)`` counts them.

    A batch holds ``pixels`` float32 (B, C, I, I) from 0 to 1; ``label`` int64 (B,), -100 without labels; ``example``
    int64 (B,), numbers of the images in this split.

    Attributes:
        tokens: the images: there is no smaller unit that is counted.
    """

    def __init__(self, pixels_NCII: np.ndarray, label_N: np.ndarray, number: np.ndarray) -> None:
        self._pixels, self._label, self._number = pixels_NCII, label_N, number
        self.tokens = len(number)

    def __len__(self) -> int:
        return len(self._number)

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        where_B = self._number[number_B]
        pixels = self._pixels[where_B]
        scaled = pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels
        return {
            "pixels": torch.from_numpy(np.ascontiguousarray(scaled)),
            "label": torch.from_numpy(self._label[where_B]),
            "example": torch.from_numpy(np.asarray(number_B, np.int64)),
        }


def all_to_test(path: str, size: int | None = None) -> PreparedImages:
    """Images with labels in a folder or an .npz file, all of them as the test split; `size` as `ImagesDataSpec.image`.
    The number of classes is that of the folders, or one more than the largest label.

    Raises:
        TorchstoneError: as `ImagesDataSpec.prepare`, but for images of one class alone.
    """
    read = _read(path, True, size)
    _check(read.pixels_NCII, read.label_N, path, least=1)
    classes = read.folders or int(read.label_N.max()) + 1
    return _prepared(path, read.pixels_NCII, read.label_N, np.full(len(read.label_N), 2), classes)


def _prepared(
    name: str, pixels_NCII: np.ndarray, label_N: np.ndarray, split_N: np.ndarray, classes: int | None
) -> PreparedImages:
    sizes = {"channels": pixels_NCII.shape[1], "image": pixels_NCII.shape[2]}
    sizes |= {} if classes is None else {"classes": classes}
    splits = {side: Images(pixels_NCII, label_N, np.flatnonzero(split_N == i)) for i, side in enumerate(_SPLITS)}
    content = hashlib.blake2b(digest_size=16)
    for array in (pixels_NCII, label_N, split_N):
        content.update(np.ascontiguousarray(array).tobytes())
    identity = digest(_FORMAT, pixels_NCII.shape, pixels_NCII.dtype, content.hexdigest())
    counts = ", ".join(f"{side} {len(split):,}" for side, split in splits.items())
    kept = f"{' x '.join(map(str, pixels_NCII.shape[1:]))}, {'no' if classes is None else classes} classes"
    description = f"images {name}: {len(label_N):,} of {kept}, hash {identity[:12]}; {counts}"
    return PreparedImages(splits["train"], splits["valid"], splits["test"], description, identity, sizes)


@dataclass(frozen=True)
class _Read:
    """Images as they were found: pixels uint8 or float32 (N, C, I, I), labels int64 (N,), the split of those that lie
    in one, -1 elsewhere, and how many folders of classes there are, 0 where there are none."""

    pixels_NCII: np.ndarray
    label_N: np.ndarray
    split_N: np.ndarray
    folders: int = 0


def _read(name: str, labels: bool, size: int | None) -> _Read:
    plain = os.path.expanduser(name)
    return _folder(Path(plain), labels, size) if os.path.isdir(plain) else _array(Path(plain), labels)


def _digits() -> _Read:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TorchstoneError(
            "data images: source digits needs scikit-learn: pip install 'torchstone[claims]'"
        ) from None
    found = load_digits()
    pixels = (found.images / 16).astype(np.float32)[:, None]  # sixteen and one levels
    return _Read(pixels, found.target.astype(np.int64), np.full(len(pixels), -1))


def _array(path: Path, labels: bool) -> _Read:
    if path.suffix != ".npz":
        there = "is neither a folder nor an .npz file" if path.exists() else "no such file or folder"
        raise TorchstoneError(f"data images: {path}: {there}")
    try:
        with np.load(path, allow_pickle=False) as file:
            needed = ("x", "y") if labels else ("x",)
            missing = [name for name in needed if name not in file.files]
            if missing:
                raise TorchstoneError(
                    f"data images: {path} holds no {missing[0]!r}; it needs arrays {' and '.join(needed)}"
                )
            x = file["x"]
            y = file["y"] if labels else np.zeros(len(x), np.int64)
    except TorchstoneError:
        raise
    except Exception as error:  # numpy says a dozen things of a file that is none
        raise TorchstoneError(f"data images: {path} cannot be read ({error})") from None
    if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y):
        raise TorchstoneError(
            f"data images: {path}: x is {x.shape} and y {y.shape}; x must be (N, I, I) or (N, C, I, I), y (N,)"
        )
    if y.dtype.kind not in "iu" or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        raise TorchstoneError(
            f"data images: {path}: x is {x.dtype} and y {y.dtype}; x must be bytes or floats, y whole numbers"
        )
    pixels = x if x.dtype == np.uint8 else x.astype(np.float32)
    return _Read(pixels[:, None] if x.ndim == 3 else pixels, y.astype(np.int64), np.full(len(y), -1))


def _folder(root: Path, labels: bool, size: int | None) -> _Read:
    own = (root / "train").is_dir()
    homes = [(i, root / side) for i, side in enumerate(_SPLITS) if (root / side).is_dir()] if own else [(-1, root)]
    classes = sorted(
        folder.name for folder in homes[0][1].iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )
    pixels, label, split = [], [], []
    for side, home in homes:
        for file in walk(home):
            name, slash, _ = file.name.partition("/")
            if file.path.suffix.lower() not in _SUFFIXES:
                continue
            if labels and (not slash or name not in classes):
                raise TorchstoneError(f"data images: {file.path} is in no folder of a class of {homes[0][1]}")
            pixels.append(_file(file.path, size))
            label.append(classes.index(name) if labels else 0)
            split.append(side)
            if pixels[-1].shape[1:] != pixels[0].shape[1:]:
                sizes = ["{1} x {0}".format(*one.shape[1:]) for one in (pixels[-1], pixels[0])]
                raise TorchstoneError(
                    f"data images: {file.path} is {sizes[0]} pixels, the first image {sizes[1]}; data.image resizes all"
                )
    if not pixels:
        raise TorchstoneError(f"data images: no PNG or JPEG file in {'folders of ' if labels else ''}{root}")
    channels = max(len(one) for one in pixels)  # grey ones among coloured ones are coloured
    whole = np.stack([np.broadcast_to(one, (channels, *one.shape[1:])) for one in pixels])
    return _Read(whole, np.array(label, np.int64), np.array(split), len(classes))


def _file(path: Path, size: int | None) -> np.ndarray:
    """Bytes (C, I, I) of a file, one channel if it is grey, else red, green and blue; with a size resized to it, and
    the central square of it."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise TorchstoneError("data images: PNG and JPEG files need Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise TorchstoneError(f"data images: {path} has more than 8 bits a channel")
            grey = image.mode in ("1", "L", "LA")
            plain = image.convert("L" if grey else "RGB")
            array = np.asarray(plain if size is None else ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC))
    except TorchstoneError:
        raise
    except Exception as error:  # of a broken file Pillow raises whatever its decoder meets
        raise TorchstoneError(f"data images: {path} cannot be read as an image ({error})") from None
    return array[None] if grey else array.transpose(2, 0, 1)


def _check(pixels_NCII: np.ndarray, label_N: np.ndarray | None, name: str, least: int = 2) -> None:
    """Refuse what no classifier can be trained on, or without labels no model of images. `least` is the fewest classes.

    Raises:
        TorchstoneError: says what is wrong.
    """
    if not len(pixels_NCII):
        raise TorchstoneError(f"data images: {name} has no image")
    height, width = pixels_NCII.shape[2:]
    if height != width or not height:
        found = f"data images: {name} has images of {width} x {height} pixels"
        raise TorchstoneError(f"{found}; they must be square, as data.image makes files")
    if label_N is not None and (label_N.min() < 0 or label_N.max() > 1 << 20):
        raise TorchstoneError(f"data images: {name} has labels from {label_N.min()} to {label_N.max()}")
    if label_N is not None and len(np.unique(label_N)) < least:
        raise TorchstoneError(f"data images: {name} has images of one class alone; two are needed")
    if pixels_NCII.dtype != np.uint8 and not ((pixels_NCII >= 0) & (pixels_NCII <= 1)).all():
        raise TorchstoneError(f"data images: {name} has pixels that are not numbers from 0 to 1")


def _split(own_N: np.ndarray, spec: ImagesDataSpec) -> np.ndarray:
    """0, 1 or 2 for each image: its own split; where it has none, or is of train and there is no other, by share."""
    split_N = np.maximum(own_N, 0)
    free = np.flatnonzero(split_N == 0)
    free = free[permute(np.arange(len(free)), len(free), Key(spec.seed).fold("images"))] if len(free) else free
    first = 0
    for side, share in ((1, spec.valid), (2, spec.test)):
        if not (own_N == side).any():
            count = round(share * len(free))
            split_N[free[first : first + count]] = side
            first += count
    return split_N
