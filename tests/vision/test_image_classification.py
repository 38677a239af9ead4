"""Classification of pictures that are cropped, mirrored and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pictures import CLASSIFIER, ENCODER, recipe

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts
from torchstone.recipe import load_recipe
from torchstone.spec import merge, validate
from torchstone.train.training import make_trainer
from torchstone.vision.mixing import MixingSpec
from torchstone.vision.objectives.image_classification import ImageClassification, ImageClassificationSpec

LABEL = torch.tensor([0, 1, 2, -100, 1])
PIXELS = torch.stack([torch.full((1, 8, 8), value / 8) for value in range(5)])
PARTNER = torch.tensor([4, 2, 1, 3, 0])
"""The pictures with a label, read from the end."""


def tuning(folder: Path, **objective: Any) -> dict[str, Any]:
    plain = recipe(folder, model=merge(ENCODER, CLASSIFIER, TransformerSpec))
    plain["objective"] = {"kind": "image_classification", **objective}
    return plain


def test_mixup_is_a_weighted_mean_with_the_picture_from_the_end() -> None:
    shares = set()
    for step in range(20):
        pixels, label, second, share = MixingSpec(mixup=0.8).draw(PIXELS, LABEL, Key(step))
        assert share.unique().numel() == 1 and 0.5 <= share[0] <= 1
        turned = label[0] != 0 or (label[1] == 2)
        kept = 1 - share if turned else share
        wanted = kept[:, None, None, None] * PIXELS + (1 - kept)[:, None, None, None] * PIXELS[PARTNER]
        torch.testing.assert_close(pixels, wanted)
        assert {tuple(label.tolist()), tuple(second.tolist())} == {(0, 1, 2, -100, 1), (1, 2, 1, -100, 0)}
        torch.testing.assert_close(pixels[3], PIXELS[3])
        shares.add(round(float(share[0]), 6))
    assert len(shares) == 20


def test_cutmix_puts_in_a_rectangle_whose_area_is_the_share() -> None:
    sizes = set()
    for step in range(30):
        pixels, label, _, share = MixingSpec(cutmix=1.0).draw(PIXELS, LABEL, Key(step))
        from_other = pixels[0, 0] == PIXELS[4, 0]
        assert (pixels[0, 0][~from_other] == 0).all()
        rows, columns = from_other.any(1), from_other.any(0)
        assert torch.equal(from_other, rows[:, None] & columns[None])
        area = float(from_other.float().mean())
        assert share[0] == pytest.approx(max(area, 1 - area))
        assert label[0] == (1 if area > 0.5 else 0)
        sizes.add(area)
    assert len(sizes) > 5


def test_shares_of_mixup_and_of_cutmix_follow_the_spec() -> None:
    both, mixed, cut = MixingSpec(mixup=1.0, cutmix=1.0, chance=0.8, switch=0.25), 0, 0
    big = PIXELS.repeat_interleave(8, -1).repeat_interleave(8, -2)
    for step in range(400):
        pixels, *_ = both.draw(big, LABEL, Key(step))
        if not torch.equal(pixels, big):
            mixed += 1
            cut += bool(torch.isin(pixels[0], torch.tensor([0.0, 0.5])).all())
    assert abs(mixed / 400 - 0.8) < 0.07
    assert abs(cut / mixed - 0.25) < 0.08
    assert all(torch.equal(value, other) for value, other in
               zip(MixingSpec().draw(PIXELS, LABEL, Key(0))[:2], (PIXELS, LABEL), strict=True))  # fmt: skip


def test_loss_is_cross_entropy_with_mixed_smoothed_targets() -> None:
    spec = validate(ImageClassificationSpec, {"smoothing": 0.1, "mixing": {"mixup": 0.8}})
    objective = ImageClassification(spec, 3)
    model: Any = lambda pixels, key: type("Out", (), {"logits": LOGITS, "aux": {}})  # noqa: E731
    LOGITS = torch.randn(5, 3, generator=Key(0).generator())
    batch = objective.prepare({"pixels": PIXELS, "label": LABEL}, Key(3))
    assert not torch.equal(batch["pixels"], PIXELS)
    known = LABEL >= 0
    smooth = {name: F.one_hot(batch[name][known], 3) * 0.9 + 0.1 / 3 for name in ("label", "second")}
    share = batch["share"][known, None]
    target = share * smooth["label"] + (1 - share) * smooth["second"]
    wanted = F.cross_entropy(LOGITS[known], target, reduction="sum")
    torch.testing.assert_close(objective(model, batch, None).terms["loss"].total, wanted)
    objective.eval()
    plain = objective.prepare({"pixels": PIXELS, "label": LABEL}, Key(3))
    assert set(plain) == {"pixels", "label"} and torch.equal(plain["pixels"], PIXELS)


def test_pieces_of_a_mixed_batch_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    plain = tuning(tmp_path, views={"flip": True}, mixing={"mixup": 0.8, "cutmix": 1.0})
    trainer = tiny.trainer(plain, torch.float64)
    batch = trainer.objective.prepare(trainer.source.train.batch(Key(3), 0, 6), Key(4))
    batch["pixels"] = batch["pixels"].double()
    found = []
    for sizes in ((6,), (1, 3, 2)):
        split = {name: value.split(sizes) for name, value in batch.items()}
        trainer.optim.zero_grad()
        trainer.gradients([{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))], 0)
        found.append([p.value.grad.clone() for p in trainer.named if p.value.grad is not None])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_recipe_trains_with_crops_mirrors_and_mixtures_and_says_its_accuracy(tmp_path: Path) -> None:
    mixed = tuning(tmp_path, views={"crop": 0.5, "flip": True}, mixing={"mixup": 0.8, "cutmix": 1.0}, smoothing=0.1)
    rows = list(make_trainer(load_recipe(mixed))[0].fit())
    assert any(0 <= row.get("accuracy", -1) <= 1 for row in rows) and any("valid_accuracy" in row for row in rows)


@pytest.mark.parametrize("image", [4, 12])
def test_a_folder_is_tuned_at_another_resolution(tmp_path: Path, image: int) -> None:
    plain = tuning(tmp_path, views={"crop": 0.5, "flip": True})
    plain["model"] = {**plain["model"], "embedding": {**plain["model"]["embedding"], "image": image}}
    trainer = make_trainer(load_recipe(plain))[0]
    batch = trainer.source.train.batch(Key(0), 0, 3)
    assert batch["pixels"].shape[-1] == 8
    assert trainer.objective.train().prepare(batch, Key(1))["pixels"].shape == (3, 1, image, image)
    whole = trainer.objective.eval().prepare(batch, Key(1))["pixels"]
    wanted = F.interpolate(batch["pixels"], (image, image), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(whole, wanted)
    assert any("valid_accuracy" in row for row in trainer.fit())


def test_what_has_no_pictures_with_labels_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="needs pictures with labels"):
        ImageClassificationSpec().build(Facts())
    with pytest.raises(TorchstoneError, match="mixup"):
        validate(ImageClassificationSpec, {"mixing": {"mixup": -1}})
