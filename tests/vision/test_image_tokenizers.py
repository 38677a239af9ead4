"""Image tokenizers: k-means by a naive loop, its file; the discrete VAE, its loss, its temperature, its training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.embedding.patch import cut
from torchstone.ops import noise
from torchstone.recipe import load_recipe
from torchstone.spec import resolve, validate
from torchstone.train import train
from torchstone.train.run import RunFolder, build_model
from torchstone.train.training import make_trainer
from torchstone.vision.tokenizers import ImageTokenizer, KMeansTokenizer, fit_k_means

PIXELS = torch.rand(40, 2, 6, 6, generator=Key(0).generator())
VAE = {"kind": "discrete_vae", "codes": 7, "dim": 5, "width": 12, "stages": 1}


def vae(**fields: Any) -> Any:
    body = {**VAE, "channels": 2, "image": 6, **fields}
    return build_model(validate(resolve("model", "discrete_vae"), body), 0)  # type: ignore[arg-type]


def test_means_are_those_of_the_patches_that_are_nearest_to_them() -> None:
    made = fit_k_means([PIXELS[:25], PIXELS[25:]], 5, 3)
    assert isinstance(made, ImageTokenizer) and (made.codes, made.stride, made.channels) == (5, 3, 2)
    tokens = made.tokens(PIXELS)
    assert tokens.shape == (40, 2, 2)
    groups: dict[int, list[torch.Tensor]] = {code: [] for code in range(5)}
    for b in range(40):
        for n, patch in enumerate(cut(PIXELS, 3)[b]):
            distances = [(patch - mean).square().sum().item() for mean in made.means_KP]
            code = min(range(5), key=lambda k: distances[k])
            assert code == tokens[b, n // 2, n % 2]
            groups[code].append(patch)
    for code, group in groups.items():
        torch.testing.assert_close(made.means_KP[code], torch.stack(group).mean(0))


def test_clusters_that_are_there_are_found_and_draws_are_keyed() -> None:
    centres = torch.rand(8, 4, generator=Key(1).generator()) * 10
    of = torch.randint(8, (300,), generator=Key(2).generator())
    points = centres[of] + 0.001 * torch.randn(300, 4, generator=Key(3).generator())
    pixels = points.view(300, 1, 2, 2)
    made = fit_k_means([pixels], 8, 2, seed=4)
    assert torch.cdist(made.means_KP, centres).amin(1).max() < 0.01
    assert torch.equal(fit_k_means([pixels], 8, 2, seed=4).means_KP, made.means_KP)
    some = fit_k_means([pixels], 8, 2, patches=20)
    assert some.codes == 8


def test_a_file_keeps_it_and_others_are_refused(tmp_path: Path) -> None:
    made, file = fit_k_means([PIXELS], 4, 2), tmp_path / "deep" / "k.safetensors"
    made.save(file)
    again = KMeansTokenizer.load(file)
    assert torch.equal(again.means_KP, made.means_KP) and (again.stride, again.channels) == (2, 2)
    with pytest.raises(TorchstoneError, match="exists; choose another"):
        made.save(file)
    (tmp_path / "other").write_text("something")
    with pytest.raises(TorchstoneError, match="holds no k-means tokenizer"):
        KMeansTokenizer.load(tmp_path / "other")
    for codes, stride, said in (
        (1, 2, "2 codes or more"),
        (4, 4, "do not divide pictures of 6"),
        (999, 3, "different"),
    ):
        with pytest.raises(TorchstoneError, match=said):
            fit_k_means([PIXELS], codes, stride)


def test_vae_is_its_definition_and_samples_by_key() -> None:
    model = vae()
    assert isinstance(model, ImageTokenizer) and model.stride == 2
    logits = model.logits(PIXELS)
    assert logits.shape == (40, 7, 3, 3) and torch.equal(model.tokens(PIXELS), logits.argmax(1))
    hard = model.pixels(model.codebook[logits.argmax(1)].permute(0, 3, 1, 2))
    torch.testing.assert_close(model(PIXELS).pixels, hard)
    key = Key(3).tensor()
    soft = model(PIXELS, key=key).pixels
    assert soft.shape == PIXELS.shape
    g = noise.gumbel(key, logits.numel()).view_as(logits)
    weights = torch.exp((logits + g) / model.temperature)
    weights = weights / weights.sum(1, keepdim=True)
    code = sum(weights[:, k, None] * model.codebook[k][:, None, None] for k in range(7))
    torch.testing.assert_close(soft, model.pixels(code.float()), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(PIXELS, key=key).pixels, soft)
    assert not torch.equal(model(PIXELS, key=Key(4).tensor()).pixels, soft)
    with pytest.raises(TorchstoneError, match="whose side 2 divides"):
        model(torch.rand(1, 2, 5, 5))


def test_temperature_goes_down_along_half_a_cosine_and_stays() -> None:
    model = vae(temperature=1.0, coldest=0.0625, anneal=100)
    found = []
    for step in (0, 50, 100, 500):
        model.before_step(step)
        found.append(model.temperature)
    assert found == [pytest.approx(1.0), pytest.approx((1 + 0.0625) / 2), pytest.approx(0.0625), pytest.approx(0.0625)]


def test_loss_is_squared_error_and_divergence_from_uniform() -> None:
    model, of = vae(), resolve("objective", "discrete_vae")(beta=0.3).build(None)  # type: ignore[attr-defined]
    of.check(model)
    batch = {"pixels": PIXELS}
    terms, counts = of(model, batch, None).terms, of.counts(batch)
    assert counts["pixels"] == PIXELS.numel() and counts["tokens"] == 40 * 9
    error = (model(PIXELS).pixels - PIXELS).square().sum()
    torch.testing.assert_close(terms["reconstruction"].total, error)
    q = model.logits(PIXELS).softmax(1)
    kl = sum((q[:, k] * torch.log(q[:, k] * 7)).sum() for k in range(7))
    torch.testing.assert_close(terms["divergence"].total, kl, rtol=1e-4, atol=1e-4)
    assert terms["divergence"].weight == 0.3
    with torch.no_grad():
        model.to_codes.weight.zero_()
    assert of(model, batch, None).terms["divergence"].total.abs() < 1e-3  # all codes alike
    with pytest.raises(TorchstoneError, match=r"model\.kind: discrete_vae"):
        of.check(torch.nn.Linear(1, 1))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TorchstoneError, match="3 halvings do not divide an image of 12 pixels"):
        validate(resolve("model", "discrete_vae"), {"stages": 3, "image": 12})


def vae_recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    body = pictures.recipe(folder, **sections)
    body["model"] = {**VAE, "codes": pictures.CODES, "anneal": 100, **sections.get("model", {})}
    body["objective"] = {"kind": "discrete_vae"}
    body["optimizer"] = {"lr": 3e-3, "weight_decay": 0.0}
    return body


@pytest.mark.slow
def test_a_vae_learns_to_reconstruct(tmp_path: Path) -> None:
    trainer, recipe = make_trainer(load_recipe(vae_recipe(tmp_path, trainer={"steps": 120, "batch": 16})))
    assert recipe.model.channels == 1 and recipe.model.image == 8  # type: ignore[attr-defined]
    before = trainer.measure_split(trainer.source.valid, "valid")["valid_squared_error"]  # type: ignore[arg-type]
    for _ in range(120):
        trainer.train_step()
    after = trainer.measure_split(trainer.source.valid, "valid")["valid_squared_error"]  # type: ignore[arg-type]
    assert after < 0.5 * before
    assert trainer.model.temperature < 0.07  # type: ignore[operator]


def test_codes_of_a_vae_are_what_an_encoder_learns(tmp_path: Path) -> None:
    run = train(vae_recipe(tmp_path), out=tmp_path / "vae", quiet=True)
    cut_short = tmp_path / "cut"
    train(vae_recipe(tmp_path), ["trainer.steps=2"], out=cut_short, quiet=True)
    train(vae_recipe(tmp_path), out=cut_short, resume=True, quiet=True)
    a, b = run.model().state_dict(), RunFolder(cut_short).model().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)

    masked = train(
        pictures.recipe(tmp_path, objective={"tokenizer": str(run.path)}), out=tmp_path / "masked", quiet=True
    )
    assert masked.metrics()[-1]["test_loss"] < 2 * math.log(pictures.CODES)
    with pytest.raises(TorchstoneError, match=r"its model \(transformer\) is no image tokenizer"):
        body = pictures.recipe(tmp_path, objective={"tokenizer": str(masked.path)})
        train(body, out=tmp_path / "third", quiet=True)
