"""The linear probe: which features, of which layer; what it finds where there is something to find; its verb."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import torch

import tiny
from torchstone.data.images import ImagesDataSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.train.run import RunFolder
from torchstone.vision import features, probe

pytest.importorskip("sklearn")
PIXELS = torch.rand(3, 1, 8, 8, generator=Key(0).generator())


def test_features_are_means_of_patches_of_a_layer() -> None:
    model = pictures.encoder()
    last = features(model, PIXELS)
    torch.testing.assert_close(last, model(PIXELS).hidden[:, 1:].mean(1))
    plain = pictures.encoder(residual={"kind": "layer_scale", "final": False})
    torch.testing.assert_close(features(plain, PIXELS, -1), features(plain, PIXELS))
    assert torch.equal(features(model, PIXELS, 0), features(model, PIXELS, -2))
    assert not torch.allclose(features(model, PIXELS, 0), features(model, PIXELS, 1))
    with pytest.raises(TorchstoneError, match="no layer 2 among 2"):
        features(model, PIXELS, 2)
    with pytest.raises(TorchstoneError, match="needs an encoder over patches"):
        features(torch.nn.Linear(1, 1), PIXELS)


def test_a_probe_reads_what_the_features_hold_and_no_more(tmp_path: Path) -> None:
    prepared = ImagesDataSpec(path=str(pictures.stripes(tmp_path)), test=0.3).prepare()
    found = probe(pictures.encoder(), prepared)
    assert found.accuracy > 0.9 and found.valid is not None and (found.train, found.test) == (54, 27)
    assert found.width == 16 and found == probe(pictures.encoder(), prepared)
    blind = pictures.encoder()
    with torch.no_grad():
        blind.embedding.project.weight.zero_()  # type: ignore[union-attr, operator]
    assert probe(blind, prepared).accuracy < 0.7
    empty = SimpleNamespace(train=prepared.train, valid=prepared.valid, test=[])
    with pytest.raises(TorchstoneError, match="no test split"):
        probe(pictures.encoder(), empty)


def test_verbs(tmp_path: Path, cli: Callable[..., Any]) -> None:
    data = str(pictures.stripes(tmp_path))
    file = tmp_path / "codes.safetensors"
    said = cli("vision", "k-means", data, "--codes", "5", "--patch", "2", "--out", str(file))
    assert said.status == 0 and "5 codes of 1 x 2 x 2 pixels" in said.out
    again = cli("vision", "k-means", data, "--codes", "5", "--patch", "2", "--out", str(file))
    assert again.status == 2 and "exists" in again.err and again.err.count("\n") == 1
    run = tiny.saved(tmp_path / "run", pictures.recipe(tmp_path))
    assert isinstance(run, RunFolder)
    said = cli("vision", "probe", str(run.path), "--json", "--layer", "-1")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert 0 <= found["accuracy"] <= 1 and found["layer"] == -1
    other = cli("vision", "probe", str(run.path), data)
    assert other.status == 0 and "accuracy" in other.out
    text = tiny.saved(tmp_path / "text", tiny.recipe(tmp_path))
    for more, why in (((), "its data are tokens, not images"), ((data,), "needs an encoder over patches")):
        wrong = cli("vision", "probe", str(text.path), *more)
        assert wrong.status == 2 and why in wrong.err
    wrong = cli("vision", "probe", str(run.path), "nowhere")
    assert wrong.status == 2 and "no such file or folder" in wrong.err


def test_without_scikit_learn_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ImagesDataSpec(path=str(pictures.stripes(tmp_path))).prepare()
    real = builtins.__import__

    def without(name: str, *more: Any, **named: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TorchstoneError, match=r"torchstone\[claims\]"):
        probe(pictures.encoder(), prepared)
