"""Images: what a batch holds, whose splits are whose, which files are refused and how."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from torchstone.data.images import ImagesDataSpec, PreparedImages
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.recipe import load_recipe


def saved(path: Path, x: Any, y: Any, **more: Any) -> PreparedImages:
    np.savez(path / "some.npz", x=x, y=y)
    return ImagesDataSpec(path=str(path / "some.npz"), **more).prepare()


def every(split: Any, size: int = 7) -> dict[str, torch.Tensor]:
    rows = list(split.evaluation(size))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images each of which tells its number: all pixels are it over 255."""
    x = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 3, 3))
    return x, np.arange(count) % 4


def test_splits_are_shares_and_hold_every_image_once(tmp_path: Path) -> None:
    data = saved(tmp_path, *numbered(50), valid=0.2, test=0.3)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [25, 10, 15]
    assert data.sizes == {"classes": 4, "channels": 1, "image": 3} and data.tokenizer is None
    seen = torch.cat([every(split)["pixels"][:, 0, 0, 0] for split in (data.train, data.valid, data.test)])
    assert sorted((seen * 255).round().int().tolist()) == list(range(50))
    other = saved(tmp_path, *numbered(50), valid=0.2, test=0.3, seed=1)
    assert other.hash != data.hash
    assert not torch.equal(every(other.test)["pixels"], every(data.test)["pixels"])
    assert saved(tmp_path, *numbered(50), valid=0.2, test=0.3).hash == data.hash


def test_a_batch_is_a_function_of_its_arguments_and_keeps_labels_with_images(tmp_path: Path) -> None:
    train = saved(tmp_path, *numbered(40)).train
    batch = train.batch(Key(3), 5, 8)
    assert batch["pixels"].dtype == torch.float32 and batch["pixels"].shape == (8, 1, 3, 3)
    number = (batch["pixels"][:, 0, 0, 0] * 255).round().long()
    assert torch.equal(batch["label"], number % 4)
    assert all(torch.equal(train.batch(Key(3), 5, 8)[name], value) for name, value in batch.items())
    parts = [train.batch(Key(3), 5, 4, rank=rank, ranks=2)["example"] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), batch["example"])
    epoch = torch.cat([train.batch(Key(3), step, 4)["example"] for step in range(len(train) // 4)])
    assert sorted(epoch.tolist()) == list(range(len(train)))


def test_a_limit_is_spread_evenly(tmp_path: Path) -> None:
    train = saved(tmp_path, *numbered(40), valid=0, test=0).train
    assert torch.cat([row["example"] for row in train.evaluation(3, 4)]).tolist() == [0, 10, 20, 30]


def test_floats_stay_and_bytes_are_scaled(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((9, 2, 4, 4))
    found = every(saved(tmp_path, x, np.arange(9) % 2, valid=0, test=0).train)
    assert np.allclose(found["pixels"].numpy(), x.astype(np.float32))
    bytes_ = every(saved(tmp_path, (x * 255).astype(np.uint8), np.arange(9) % 2, valid=0, test=0).train)
    assert bytes_["pixels"].max() <= 1 and np.allclose(bytes_["pixels"].numpy(), x, atol=1 / 255)


def picture(path: Path, colour: Any, mode: str = "RGB", side: int = 5) -> None:
    Image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), colour).save(path)


def test_folders_are_classes_and_own_splits_stay(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            picture(tmp_path / split / "cat" / f"{number}.png", (255, 0, number))
            picture(tmp_path / split / "dog" / f"{number}.jpg", number, "L")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = ImagesDataSpec(path=str(tmp_path), valid=0.25, test=0.9 - 0.25).prepare()
    assert [len(split) for split in (data.train, data.valid, data.test)] == [6, 2, 4]
    assert data.sizes == {"classes": 2, "channels": 3, "image": 5}
    test = every(data.test)
    assert test["label"].tolist() == [0, 0, 1, 1]
    assert torch.equal(test["pixels"][1], torch.tensor([1.0, 0.0, 1 / 255]).view(3, 1, 1).expand(3, 5, 5))
    assert (test["pixels"][2] == 0).all()


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(TorchstoneError) as caught:
            ImagesDataSpec(path=str(tmp_path)).prepare()
        return str(caught.value)

    assert "no PNG or JPEG file" in refusal()
    picture(tmp_path / "a" / "0.png", 3, "L")
    assert "one class alone" in refusal()
    picture(tmp_path / "b" / "1.png", 3, "L", side=6)
    assert "1.png is 6 x 6 pixels, the first image 5 x 5" in refusal()
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    assert "1.png cannot be read as an image" in refusal()
    picture(tmp_path / "b" / "1.png", 3, "I;16")
    assert "more than 8 bits" in refusal()
    (tmp_path / "b" / "1.png").unlink()
    picture(tmp_path / "b.png", 3, "L")
    assert "b.png is in no folder of a class" in refusal()


def test_files_of_several_sizes_are_made_squares_of_one(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (6, 6), dtype=np.uint8)
    for name, array in (("a/0", noise), ("b/1", noise.swapaxes(0, 1)), ("b/2", small)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    spec = ImagesDataSpec(path=str(tmp_path), image=6, valid=0, test=0)
    data = spec.prepare()
    assert data.sizes == {"classes": 2, "channels": 3, "image": 6} and data.train._pixels.dtype == np.uint8
    found = every(data.train)["pixels"]
    resized = np.asarray(Image.fromarray(noise).resize((10, 6), Image.Resampling.BICUBIC))[:, 2:8]
    wanted = torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255
    assert torch.allclose(found[0], wanted, atol=1.01 / 255)
    assert torch.allclose(found[1], wanted.mT, atol=1.01 / 255)
    assert torch.equal(found[2], (torch.from_numpy(small) / 255).expand(3, 6, 6))  # it has that size already
    assert spec.model_copy(update={"image": 4}).prepare().hash != data.hash
    with pytest.raises(TorchstoneError, match=r"the first image 20 x 12; data.image resizes all"):
        ImagesDataSpec(path=str(tmp_path)).prepare()
    for fields in ({"source": "digits"}, {"path": "x.npz"}):
        with pytest.raises(TorchstoneError, match="image: files alone are resized"):
            load_recipe({"data": {"kind": "images", "image": 8, **fields}})


def test_without_labels_no_class_is_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", x=np.zeros((9, 4, 4)))
    data = ImagesDataSpec(path=str(tmp_path / "some.npz"), labels=False).prepare()
    assert data.sizes == {"channels": 1, "image": 4} and "no classes" in data.description
    assert (every(data.train)["label"] == -100).all()
    for number in range(6):
        picture(tmp_path / "files" / f"{number}.png", number, "L")
    picture(tmp_path / "files" / "deep" / "down" / "6.png", 6, "L")
    assert len(ImagesDataSpec(path=str(tmp_path / "files"), labels=False, valid=0, test=0).prepare().train) == 7
    recipe = {"data": {"kind": "images", "path": str(tmp_path / "some.npz"), "labels": False}}
    with pytest.raises(TorchstoneError, match="needs data with labels"):
        tiny.trainer({"model": {"kind": "mlp", "classes": 2}, "objective": {"kind": "classification"}, **recipe})


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.zeros((4, 3, 5)), np.arange(4) % 2, "must be square"),
        (np.zeros((4, 3, 3)), np.zeros(4, int), "one class alone"),
        (np.zeros((4, 3, 3)), np.arange(3), "x must be"),
        (np.full((4, 3, 3), 1.5), np.arange(4) % 2, "not numbers from 0 to 1"),
        (np.full((4, 3, 3), np.nan), np.arange(4) % 2, "not numbers from 0 to 1"),
        (np.zeros((4, 3, 3), int), np.arange(4) % 2, "x must be bytes or floats"),
        (np.zeros((4, 3, 3)), np.linspace(0, 1, 4), "y whole numbers"),
        (np.zeros((4, 3, 3)), np.arange(4) - 1, "labels from -1"),
        (np.zeros((0, 3, 3)), np.zeros(0, int), "has no image"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, x: np.ndarray, y: np.ndarray, said: str) -> None:
    with pytest.raises(TorchstoneError, match=said):
        saved(tmp_path, x, y)


def test_other_mistakes_are_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "half.npz", x=np.zeros((2, 2, 2)))
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    for name, said in (("half.npz", "holds no 'y'"), ("broken.npz", "cannot be read"), ("none", "no such file")):
        with pytest.raises(TorchstoneError, match=said):
            ImagesDataSpec(path=str(tmp_path / name)).prepare()
    for fields, said in (({}, "source or path"), ({"source": "digits", "valid": 0.6, "test": 0.4}, "nothing to train")):
        with pytest.raises(TorchstoneError, match=said):
            load_recipe({"data": {"kind": "images", **fields}})


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **named: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TorchstoneError, match=r"needs scikit-learn: pip install 'torchstone\[claims\]'"):
        ImagesDataSpec(source="digits").prepare()


@pytest.mark.slow
def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = ImagesDataSpec(source="digits", valid=0, test=0).prepare()
    found, wanted = every(data.train), datasets.load_digits()
    assert data.sizes == {"classes": 10, "channels": 1, "image": 8}
    assert np.array_equal(found["pixels"][:, 0].numpy() * 16, wanted.images) and (
        found["label"].tolist() == wanted.target.tolist()
    )
