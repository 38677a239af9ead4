"""Masked image modelling: the loss by its definition, what the encoder must not see, positions and their tables,
fine-tuning from a run, resuming, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from pictures import CLASSIFIER, CODES, ENCODER

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.embedding.patch import Patches, cut
from torchstone.model.position.relative_2d import resized
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.run import RunFolder, shape_of
from torchstone.train.training import make_trainer
from torchstone.vision.objectives.masked_image import MaskedImage, MaskedImageSpec
from torchstone.vision.tokenizers import KMeansTokenizer

PIXELS = torch.rand(5, 1, 8, 8, generator=Key(0).generator())
MASK = {"ratio": 0.45, "min_patches": 1}


def objective(vision_folder: Path, **fields: Any) -> MaskedImage:
    tokenizer = KMeansTokenizer.load(pictures.k_means(vision_folder))
    spec = validate(MaskedImageSpec, {"tokenizer": "k-means", "mask": MASK, **fields})
    return MaskedImage(spec, Facts(model=validate(TransformerSpec, ENCODER)), tokenizer)


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def pretrained(vision_folder: Path) -> RunFolder:
    """A run whose shared table is not zero any more."""
    return train(pictures.recipe(vision_folder, optimizer={"lr": 0.02}), out=vision_folder / "pretrained", quiet=True)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_loss_is_the_mean_over_hidden_patches_of_their_codes_cross_entropy(vision_folder: Path) -> None:
    model, of = pictures.encoder(), objective(vision_folder)
    of.check(model)
    batch = of.prepare({"pixels": PIXELS}, Key(1))
    loss = of(model, batch, None).terms["loss"].total / of.counts(batch)["targets"]
    logits = model(Patches(PIXELS, batch["masked"])).logits
    codes = of.reference.tokens(PIXELS)  # type: ignore[union-attr, operator]
    total, count = 0.0, 0
    for b in range(len(PIXELS)):
        for row in range(4):
            for column in range(4):
                if batch["masked"][b, 4 * row + column]:
                    scores = logits[b, 1 + 4 * row + column].double()
                    total -= (scores - scores.logsumexp(0))[codes[b, row, column]].item()
                    count += 1
    assert count == len(PIXELS) * 7
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("codes", [CODES, 8192])
def test_a_fresh_model_gives_all_codes_alike(codes: int) -> None:
    model = initialise(validate(TransformerSpec, {**ENCODER, "vocabulary": codes}).build(), 0)
    tokenizer = KMeansTokenizer(torch.rand(codes, 4, generator=Key(2).generator()), 2, 1)
    of = MaskedImage(MaskedImageSpec(tokenizer="-", mask=MASK), Facts(model=model.spec), tokenizer)  # type: ignore[arg-type]
    batch = of.prepare({"pixels": PIXELS}, Key(1))
    loss = of(model, batch, None).terms["loss"].total / of.counts(batch)["targets"]
    assert loss.item() == pytest.approx(math.log(codes), rel=0.05)


def test_codes_of_patches_in_sight_play_no_part(vision_folder: Path) -> None:
    found = []
    for shift in (0, 1):
        model, of = pictures.encoder(), objective(vision_folder)
        tokens = of.reference.tokens  # type: ignore[union-attr]
        masked = of.masks({"pixels": PIXELS}, Key(1))

        def changed(pixels: torch.Tensor, tokens: Any = tokens, shift: int = shift, seen: Any = ~masked) -> Any:
            codes = tokens(pixels)
            return torch.where(seen.view_as(codes), (codes + shift) % CODES, codes)

        of.reference.tokens = changed  # type: ignore[union-attr, assignment]
        result = of(model, of.prepare({"pixels": PIXELS}, Key(1)), None)
        result.terms["loss"].total.backward()
        found.append([result.terms["loss"].total.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pixels_of_hidden_patches_play_no_part() -> None:
    model = pictures.encoder()
    masked = torch.zeros(5, 16, dtype=torch.bool)
    masked[:, [1, 6, 7]] = True
    other = PIXELS.clone()
    for at in (1, 6, 7):
        row, column = divmod(at, 4)
        other[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 7.0
    a, b = model(Patches(PIXELS, masked)), model(Patches(other, masked))
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.logits, b.logits)
    other[:, :, 0, 0] = 0.5
    assert not torch.equal(a.hidden, model(Patches(other, masked)).hidden)


def test_micro_batches_make_the_gradient_of_the_whole(vision_folder: Path) -> None:
    trainer, _ = make_trainer(load_recipe(pictures.recipe(vision_folder)))
    batch = trainer.objective.prepare(trainer.source.train.batch(Key(3), 0, 6), Key(4))
    batch["targets"][0] = -100  # a picture without a target
    batch["targets"][1, 3:] = -100

    def gradients(*sizes: int) -> list[torch.Tensor]:
        trainer.optim.zero_grad()
        split = {name: value.split(sizes) for name, value in batch.items()}
        trainer.gradients([{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))], 0)
        return [p.value.grad.clone() for p in trainer.named if p.value.grad is not None]

    for whole, parts in zip(gradients(6), gradients(1, 2, 3), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_pixels_are_predicted_by_squared_error(vision_folder: Path) -> None:
    head = {"kind": "token_classification", "classes": 4}
    body = pictures.recipe(vision_folder, model={"head": head})
    body["objective"] = {"kind": "masked_image", "target": "pixels", "mask": MASK}
    trainer, _ = make_trainer(load_recipe(body))
    batch = trainer.objective.prepare({"pixels": PIXELS}, Key(1))
    total = trainer.objective(trainer.model, batch, None).terms["loss"].total
    made = trainer.model(Patches(PIXELS, batch["masked"])).logits[:, 1:]
    squared = (made - cut(PIXELS, 2)).square().mean(-1)
    assert total.item() == pytest.approx(squared[batch["masked"]].sum().item(), rel=1e-5)
    first = trainer.train_step()["loss"]
    assert [trainer.train_step()["loss"] for _ in range(30)][-1] < first


# ------------------------------------------------------------------------------------------------------------ the views


def test_views_are_of_one_crop_and_drawn_by_key(vision_folder: Path) -> None:
    """A picture whose pixels tell where they are: what patch i and token i are of, agrees."""
    side = 32
    place = torch.linspace(0, 1, side)
    picture = torch.stack([place.expand(side, side), place[:, None].expand(side, side)])[None].expand(6, -1, -1, -1)
    spec = validate(MaskedImageSpec, {"tokenizer": "-", "views": {"crop": 0.3, "flip": True, "jitter": 0.3}})
    a, b = spec.views.draw(picture, (16, 8), Key(0))
    assert a.shape[-1] == 16 and b.shape[-1] == 8
    pooled = torch.nn.functional.avg_pool2d(a, 2)
    # bicubic sampling of a slope is the slope, but for colours that were cut off at 0 and 1 and borders of crops
    assert (pooled - b)[..., 1:-1, 1:-1].abs().mean() < 0.01
    assert (pooled[0] - pooled[1]).abs().mean() > 0.05  # pictures of one batch are drawn apart
    again = spec.views.draw(picture, (16, 8), Key(0))
    assert torch.equal(again[0], a) and not torch.equal(spec.views.draw(picture, (16, 8), Key(1))[0], a)
    flips = spec.views.model_copy(update={"crop": None, "jitter": 0.0})
    mirrored = flips.draw(picture, (side,), Key(0))[0]
    kinds = {bool(torch.equal(one, picture[0])): bool(torch.equal(one, picture[0].flip(-1))) for one in mirrored}
    assert kinds == {True: False, False: True}
    of = objective(vision_folder, views={"flip": True})
    trained = of.train().prepare({"pixels": PIXELS}, Key(0))
    measured = of.eval().prepare({"pixels": PIXELS}, Key(0))
    assert torch.equal(measured["pixels"], PIXELS) and not torch.equal(trained["pixels"], PIXELS)
    codes = of.reference.tokens(trained["pixels"]).flatten(1)  # type: ignore[union-attr, operator]
    assert torch.equal(trained["targets"], torch.where(trained["masked"], codes, -100))


# -------------------------------------------------------------------------------------------- the encoder and its table


def test_bias_of_positions_goes_by_offset_and_the_class_token_has_rows_of_its_own() -> None:
    model = pictures.encoder()
    position = model.encoder.positions["relative_2d"]  # type: ignore[union-attr, index]
    tokens = model.embedding.tokens(PIXELS)
    bias = position.bias(tokens, tokens)[0]
    by_offset: dict[Any, torch.Tensor] = {}
    for i in range(17):
        for j in range(17):
            a, b = divmod(i - 1, 4), divmod(j - 1, 4)
            what: Any = (a[0] - b[0], a[1] - b[1])
            if not i or not j:
                what = "class to patch" if j else "patch to class" if i else "class to class"
            assert torch.equal(bias[:, i, j], by_offset.setdefault(what, bias[:, i, j])), (i, j)
    assert len(by_offset) == 49 + 3 == len(position.weight)
    assert len({tuple(value.tolist()) for value in by_offset.values()}) == 52


def test_keys_have_no_bias_and_weights_start_as_published() -> None:
    body = {**ENCODER, "width": 192, "attention": {"heads": 3, "bias": "qvo"}, "depth": 4}
    model = initialise(validate(TransformerSpec, body).build(), 0)
    D = 192
    for number, layer in enumerate(model.encoder.layers, 1):  # type: ignore[union-attr]
        assert sum(p.numel() for p in layer.attention.parameters()) == 4 * D * D + 3 * D
        # a normal cut at one deviation has 0.54 of it
        for weight, cut_at in (
            (layer.attention.qkv.weight, 0.02),
            (layer.ffn.up.weight, 0.02),
            (layer.attention.out.weight, 0.02 / math.sqrt(2 * number)),
            (layer.ffn.down.weight, 0.02 / math.sqrt(2 * number)),
        ):
            assert 0.99 * cut_at < weight.abs().max() <= cut_at
            assert weight.std().item() == pytest.approx(0.53956 * cut_at, rel=0.02)
        assert layer.attention_residual.gamma.unique().tolist() == [pytest.approx(0.1)]
        assert not layer.attention.qkv.bias.any()
    assert not model.encoder.positions["relative_2d"].weight.any()  # type: ignore[union-attr, index]


@pytest.mark.parametrize(("size", "heads", "wanted"), [(768, 12, 85.7e6), (1024, 16, 303.4e6)])
def test_published_sizes(size: int, heads: int, wanted: float) -> None:
    """86M and 304M, without heads, with one table for all layers."""
    body = {
        **ENCODER,
        "width": size,
        "depth": 12 if size == 768 else 24,
        "attention": {"heads": heads, "bias": "qvo"},
        "embedding": {"kind": "patch", "image": 224, "patch": 16, "channels": 3, "mask_token": True},
        "vocabulary": 8192,
    }
    with torch.device("meta"):
        model = validate(TransformerSpec, body).build()
    assert model.encoder.positions["relative_2d"].weight.shape == (732, heads)  # type: ignore[union-attr, index]
    every = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    assert every - head == pytest.approx(wanted, rel=0.002)
    assert size != 768 or every == pytest.approx(91.97e6, rel=0.001)


def test_the_recipe_is_the_published_pre_training() -> None:
    recipe: Any = load_recipe("beit")
    model: Any = shape_of(recipe.model)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 91.97
    assert recipe.objective.mask.target(recipe.model.embedding.side) == 75
    epoch = 1_281_167 // recipe.trainer.batch
    assert (recipe.trainer.steps, recipe.schedule.warmup) == (800 * epoch, 10 * epoch)
    assert recipe.optimizer.lr * recipe.schedule.end == pytest.approx(1e-5, rel=1e-3)
    assert (recipe.model.drop_path, recipe.trainer.clip, recipe.optimizer.weight_decay) == (0.1, 3.0, 0.05)
    assert recipe.objective.views.dump() == {"crop": 0.08, "flip": True, "jitter": 0.4}


def test_a_table_of_another_side_goes_through_the_old_values() -> None:
    table = torch.randn(7 * 7 + 3, 2, generator=Key(0).generator())
    assert torch.equal(resized(table, 4, 4)[49:], table[49:])
    wide = resized(table, 4, 7)  # offsets of -6 .. 6: every second is an old one
    old, new = table[:49].view(7, 7, 2), wide[:169].view(13, 13, 2)
    torch.testing.assert_close(new[::2, ::2], old, rtol=0, atol=1e-5)
    assert torch.equal(wide[169:], table[49:])


# -------------------------------------------------------------------------------------------------------- fine-tuning


def tuning(run: RunFolder, folder: Path, **sections: Any) -> dict[str, Any]:
    body = pictures.recipe(folder)
    base = {"init_from": str(run.path), "model": {**CLASSIFIER}, "objective": {"kind": "classification"}}
    return {**body, **base, **sections}


def test_one_table_for_each_layer_starts_from_the_shared_one(vision_folder: Path, pretrained: RunFolder) -> None:
    body = pictures.recipe(vision_folder, model={"position": {"shared": False}})
    start = lambda run: RunFolder(run).start()  # noqa: E731
    made = load_recipe(
        {**body, "model": {"position": {"shared": False}}, "init_from": str(pretrained.path)}, start=start
    )
    model, before = make_trainer(made)[0].model.eval(), pretrained.model()
    tables = [p for name, p in model.named_parameters() if ".positions." in name]
    assert len(tables) == 2 and tables[0].abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(PIXELS).hidden, before(PIXELS).hidden, rtol=0, atol=1e-6)


def test_fine_tuning_takes_the_encoder_and_a_rate_for_each_layer(vision_folder: Path, pretrained: RunFolder) -> None:
    body = tuning(pretrained, vision_folder, optimizer={"lr": 0.01, "layer_decay": 0.5, "weight_decay": 0.05})
    recipe = load_recipe(body, start=lambda run: RunFolder(run).start())
    trainer, _ = make_trainer(recipe)
    before = pretrained.model().state_dict()
    for name, value in trainer.model.state_dict().items():
        if not name.startswith(("head.", "encoder.positions.relative_2d_1")):
            assert torch.equal(value, before[name]), name
    assert isinstance(trainer.model.encoder.norm, torch.nn.Identity)
    rates = {p.name: p.rate for p in trainer.named}
    assert rates["head.out.weight"] == rates["head.norm.weight"] == 1
    assert {rates[f"encoder.layers.1.{name}"] for name in ("ffn.up.weight", "attention_residual.gamma")} == {0.5}
    assert rates["encoder.layers.0.ffn.up.weight"] == rates["encoder.positions.relative_2d.weight"] == 0.25
    assert rates["encoder.positions.relative_2d_1.weight"] == 0.5
    assert rates["embedding.project.weight"] == rates["embedding.class_token"] == 0.125
    by_parameter = {id(p): group["peak"] for group in trainer.optim.param_groups for p in group["params"]}
    assert all(by_parameter[id(p.value)] == pytest.approx(0.01 * p.rate) for p in trainer.named)
    assert trainer.train_step()["lr"] == pytest.approx(0.01)
    for _ in range(40):
        row = trainer.train_step()
    assert row["accuracy"] > 0.8


def test_fine_tuning_at_another_resolution(vision_folder: Path, pretrained: RunFolder) -> None:
    embedding = {"kind": "patch", "image": 12}
    body = tuning(pretrained, vision_folder, model={**CLASSIFIER, "embedding": embedding})
    body["data"] = {"kind": "images", "path": str(pictures.stripes(vision_folder, 12)), "valid": 0.2}
    run = train(body, out=vision_folder / "wider", quiet=True)
    assert run.metrics()[-1]["test_loss"] > 0
    tables = [value for name, value in run.model().state_dict().items() if ".positions." in name]
    assert [tuple(table.shape) for table in tables] == [(11 * 11 + 3, 2)] * 2


def test_a_run_cut_short_goes_on_bit_for_bit(vision_folder: Path, tmp_path: Path) -> None:
    body = pictures.recipe(
        vision_folder, model={"drop_path": 0.2, "dropout": 0.1}, objective={"views": {"crop": 0.5, "flip": True}}
    )
    whole = train(body, out=tmp_path / "whole", quiet=True)
    train(body, ["trainer.steps=2"], out=tmp_path / "cut", quiet=True)
    cut_short = train(body, out=tmp_path / "cut", resume=True, quiet=True)
    a, b = whole.model().state_dict(), cut_short.model().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.metrics()[-1]["test_loss"] == cut_short.metrics()[-1]["test_loss"]


def test_a_tokenizer_that_changed_cannot_be_gone_on_with(vision_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "k-means.safetensors"
    KMeansTokenizer.load(pictures.k_means(vision_folder)).save(file)
    body = pictures.recipe(vision_folder, objective={"tokenizer": str(file)})
    train(body, ["trainer.steps=2"], out=tmp_path / "run", quiet=True)
    file.unlink()
    KMeansTokenizer(torch.rand(CODES, 4), 2, 1).save(file)
    with pytest.raises(TorchstoneError, match=r"tokenizer .* holds other weights"):
        train(body, out=tmp_path / "run", resume=True, quiet=True)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"embedding": {"patch": 3}}}, "3 does not divide an image of 8 pixels"),
        ({"objective": {"mask": {"ratio": 0.45, "min_patches": 8}}}, "min_patches: 8 are more than the 7 patches"),
        ({"objective": {"mask": {"ratio": 0.05, "min_patches": 1}}}, "mask.ratio: 0.05 of 4 x 4 patches is none"),
        ({"objective": {"mask": {"aspect": [3, 0.3]}}}, "aspect: 3 to 0.3 is no range"),
        ({"objective": {"view": 16}}, "the tokenizer yields 8x8 tokens, the encoder 4x4 patches"),
        ({"objective": {"tokenizer": None}}, "target tokens needs one"),
        ({"objective": {"target": "pixels"}}, "target pixels takes none"),
        ({"objective": {"tokenizer": "nowhere"}}, "nowhere: no such run"),
        ({"model": {"vocabulary": 9}}, "the tokenizer has 6 codes, and model.vocabulary is 9"),
        ({"model": {"embedding": {"mask_token": False}}}, "set embedding.mask_token"),
        ({"model": {"causal": True}}, "needs an encoder"),
        ({"model": {"head": {"kind": "classification"}}}, "no logits over the vocabulary"),
        ({"model": {"position": {"side": 5}}}, "a grid of 5 x 5 patches and a class token is not the embedding's 17"),
        ({"model": {"position": {"class_token": False}}}, "a grid of 4 x 4 patches is not the embedding's 17 tokens"),
        ({"model": {"embedding": {"mean": [0.5, 0.5]}}}, "mean: 2 numbers for 1 channels"),
        (
            {"data": {"kind": "text", "corpus": "stdlib"}},
            "data text is of tokens, and objective masked_image of images",
        ),
        ({"model": {"embedding": {"channels": 3}}}, "channels"),
    ],
)
def test_bad_input_is_one_sentence(vision_folder: Path, tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(TorchstoneError, match=said) as caught:
        base = pictures.recipe(vision_folder)
        if "data" in sections:
            base["data"] = {}
        train(base, [sections], out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_fine_tuning_with_other_heads_is_refused(vision_folder: Path, pretrained: RunFolder, tmp_path: Path) -> None:
    body = tuning(pretrained, vision_folder, model={**CLASSIFIER, "attention": {"heads": 4}})
    with pytest.raises(TorchstoneError, match="no table for 4 heads"):
        train(body, out=tmp_path / "run", quiet=True)


def test_masked_patches_of_another_number_are_refused() -> None:
    model = pictures.encoder()
    with pytest.raises(TorchstoneError, match="masked: needs shape"):
        model(Patches(PIXELS, torch.zeros(5, 9, dtype=torch.bool)))
    with pytest.raises(TorchstoneError, match="no vector for masked patches"):
        plain = pictures.encoder(embedding={**ENCODER["embedding"], "mask_token": False})
        plain(Patches(PIXELS, torch.zeros(5, 16, dtype=torch.bool)))


def test_colours_are_normalised_by_channel() -> None:
    fields = {"kind": "patch", "image": 8, "patch": 2, "channels": 3, "mask_token": True}
    plain = pictures.encoder(embedding=fields)
    scaled = pictures.encoder(embedding={**fields, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    pixels = torch.rand(2, 3, 8, 8)
    by_hand = (pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(scaled(pixels).hidden, plain(by_hand).hidden)


def test_recipe_by_the_command_line(vision_folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe(pictures.recipe(vision_folder)).yaml())
    said = cli("train", str(file), "--out", str(tmp_path / "run"))
    assert said.status == 0, said.err
    row = RunFolder(tmp_path / "run").metrics()[-1]
    assert 0 <= row["test_accuracy"] <= 1 and np.isfinite(row["test_loss"])
