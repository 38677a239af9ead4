"""A run directory: exactly the files that the design lists, each what it says it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.errors import TorchstoneError
from torchstone.recipe import load_recipe
from torchstone.train import migrations
from torchstone.train.run import RunFolder
from torchstone.train.training import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with its plot."""
    home = tmp_path_factory.mktemp("home")
    trainer = {"steps": 5, "log_every": 2, "save_every": 2, "keep_last": 2}
    return train(tiny.recipe(home, trainer={**tiny.recipe(home)["trainer"], **trainer}), out=home / "run", quiet=True)


def test_the_files_are_those_that_the_design_lists(folder: RunFolder) -> None:
    steps = {f"state/step-0000000{n}/{file}" for n in (4, 5)
             for file in ("model.safetensors", "optimizer.safetensors", "state.json")}  # fmt: skip
    assert {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()} == {
        "recipe.yaml", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "metrics.jsonl", "documents.json", "environment.json", "plots/learning_curve.png",
        "state/LATEST", *steps,
    }  # fmt: skip


def test_metrics_hold_one_object_a_row_with_step_and_loss(folder: RunFolder) -> None:
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == folder.metrics() and all("step" in row for row in rows)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 4, 5]
    for row in trained:
        assert {"loss", "grad_norm", "lr", "seconds_per_step", "tokens_per_second"} <= set(row)
    validated = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in validated] == [0, 4, 5] and all("valid_bits_per_byte" in row for row in validated)
    assert [row["step"] for row in rows if "test_loss" in row] == [5]


def test_the_learning_curve_is_a_png(folder: RunFolder) -> None:
    raw = (folder.path / "plots" / "learning_curve.png").read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and len(raw) > 5_000


def test_config_says_what_hugging_face_tools_look_for(folder: RunFolder) -> None:
    config = json.loads((folder.path / "config.json").read_text())
    assert config["model_type"] == "torchstone" and config["architectures"] == ["TorchstoneForCausalLM"]
    assert config["format_version"] == migrations.FORMAT_VERSION == 1
    assert config["vocab_size"] == 259 and config["hidden_size"] == 16 and config["num_hidden_layers"] == 1
    assert config["num_attention_heads"] == 2 and config["max_position_embeddings"] == 16
    assert folder.model_spec == folder.recipe.model
    generation = json.loads((folder.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == folder.tokenizer().separator


def test_environment_records_what_decides_bitwise_equality(folder: RunFolder) -> None:
    facts = json.loads((folder.path / "environment.json").read_text())
    assert {"device", "threads", "ranks", "compile", "torch", "cpu", "python", "platform", "versions", "corpus"} <= set(
        facts
    )
    assert facts["threads"] == 1 and facts["compile"] == "off" and facts["torch"] == torch.__version__


def test_the_recipe_is_resolved_and_loads_again(folder: RunFolder) -> None:
    recipe = load_recipe(folder.path / "recipe.yaml")
    assert recipe == folder.recipe
    assert recipe.model.vocabulary == 259 and recipe.model.context == 16 and recipe.trainer.threads == 1  # type: ignore[attr-defined]


def test_the_model_of_a_run_is_that_of_its_newest_checkpoint(folder: RunFolder) -> None:
    checkpoint = folder.checkpoints().load()
    assert checkpoint is not None
    for name, value in folder.model().state_dict().items():
        assert torch.equal(value, checkpoint.tensors["model"][name])
    with pytest.raises(TorchstoneError, match="no moving average"):
        folder.model("ema")


def test_a_run_is_not_trained_over(folder: RunFolder) -> None:
    before = tiny.listing(folder.path)
    with pytest.raises(TorchstoneError, match="holds a run already; continue it with --resume"):
        train(tiny.recipe(folder.path.parent), out=folder.path, quiet=True)
    assert tiny.listing(folder.path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_not_a_run(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("my work")
    recipe = tiny.recipe(tmp_path)
    before = tiny.listing(tmp_path)
    with pytest.raises(TorchstoneError, match=r"exists and is not a run \(it holds thesis\.tex\)"):
        train(recipe, out=tmp_path / "out", resume=resume, quiet=True)
    assert tiny.listing(tmp_path) == before


@pytest.mark.parametrize("out", ["corpus.txt", "corpus.txt/run", "corpus.txt/deep/run"])
def test_a_file_is_no_folder_for_a_run(tmp_path: Path, out: str) -> None:
    recipe = tiny.recipe(tmp_path)
    before = tiny.listing(tmp_path)
    with pytest.raises(TorchstoneError, match=r"corpus\.txt: is a file"):
        train(recipe, out=tmp_path / out, quiet=True)
    assert tiny.listing(tmp_path) == before


def test_an_empty_folder_and_what_a_kill_left_in_one_are_free(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("half")
    (tmp_path / "run" / ".config.json.123.tmp").write_text("half")
    folder = run()
    assert folder.tokenizer().vocabulary == 259
    assert not list(folder.path.rglob(".*"))


# ------------------------------------------------------------------------------------------------- migrations


def rewrite(folder: RunFolder, **fields: Any) -> None:
    path = folder.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("version", "message"),
    [(2, "written in format 2, this torchstone reads up to 1; upgrade it"), (0, "format 0 is unknown"),
     ("1", "has no format_version"), (None, "has no format_version"), (True, "has no format_version")],
)  # fmt: skip
def test_a_format_that_is_newer_or_unknown_is_refused(
    run: Callable[..., RunFolder], version: Any, message: str
) -> None:
    folder = run()
    rewrite(folder, format_version=version)
    before = tiny.listing(folder.path)
    for read in (lambda: folder.recipe, lambda: folder.model_spec, lambda: run(resume=True)):
        with pytest.raises(TorchstoneError, match=message):
            read()
    assert tiny.listing(folder.path) == before


def test_an_old_run_is_migrated_version_by_version(
    run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run()
    recipe, spec = folder.recipe, folder.model_spec
    path = folder.path / "recipe.yaml"
    path.write_text(path.read_text().replace("width: 16", "dim: 16"))
    config = json.loads((folder.path / "config.json").read_text())
    config["spec"]["dim"] = config["spec"].pop("width")
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TorchstoneError, match="no field 'dim'"):
        assert folder.recipe

    def rename(data: dict[str, Any]) -> dict[str, Any]:
        body = {**data, "width": data["dim"]}
        body.pop("dim")
        return body

    monkeypatch.setattr(migrations, "FORMAT_VERSION", 3)
    monkeypatch.setitem(migrations.MIGRATIONS, ("recipe", 1), lambda data: {**data, "model": rename(data["model"])})
    monkeypatch.setitem(migrations.MIGRATIONS, ("config", 2), lambda data: {**data, "spec": rename(data["spec"])})
    assert folder.recipe == recipe and folder.model_spec == spec
    assert all(torch.isfinite(value).all() for value in folder.model().state_dict().values())
