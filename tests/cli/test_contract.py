"""What other programs rely on: names, places, formats, statuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import tiny
from torchstone import __version__
from torchstone.cli.app import app
from torchstone.recipe import Recipe, builtin_recipes, load_recipe
from torchstone.spec import FAMILIES, kinds

Cli = Callable[..., Any]


def test_the_command_and_the_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("torchstone")
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in ([script, "--help"], [sys.executable, "-m", "torchstone", "--help"])]  # fmt: skip
    assert said[0] == said[1]
    for verb in ("train", "generate", "inspect", "parts", "recipe", "doctor"):
        assert f"\n  {verb} " in said[0]


def test_help_and_version_load_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys\nfrom torchstone.cli import main\n"
        "try:\n    main(sys.argv[2:])\nexcept SystemExit:\n    pass\n"
        "heavy = set(sys.argv[1].split(',')) & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    heavy = "torch,numpy,matplotlib,tokenizers,scipy,yaml,torchstone.spec"
    # typer itself uses pydantic for the arguments of a verb
    for forbidden, arguments in ((f"{heavy},pydantic", ["--help"]), (f"{heavy},pydantic", ["--version"]),
                                 (heavy, ["train", "--help"])):  # fmt: skip
        command = [sys.executable, "-c", code, forbidden, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_version_and_help_of_every_verb(cli: Cli) -> None:
    assert cli("--version").out == f"torchstone {__version__}\n"
    assert cli().status == 0
    for verb in get_command(app).commands:  # type: ignore[attr-defined]
        said = cli(verb, "--help")
        assert said.status == 0 and "Usage: torchstone" in said.out and said.err == ""


def test_generate_with_drafts_says_how_many_stood(cli: Cli, recipe: Cli, tmp_path: Path) -> None:
    model = {**tiny.MODEL, "stack": {"kind": "multi_token"}}
    path = recipe(model=model, objective={"kind": "multi_token"}, trainer={"steps": 2}, evaluate={"test": False})
    assert cli("train", path, "--out", tmp_path / "run", "--quiet").status == 0
    asked = ("generate", tmp_path / "run", "--prompt", "ab", "--max-new-tokens", "9", "--seed", "3")
    plain, drafted = cli(*asked), cli(*asked, "--draft", "mtp")
    assert drafted.out == plain.out and "draft" not in plain.err
    said = re.search(r"draft mtp: (\d+) of (\d+) tokens accepted \(\d+\.\d%\)\n", drafted.err)
    assert said
    (done,) = json.loads(cli(*asked, "--draft", "mtp", "--json").out)
    assert (done["accepted"], done["drafted"]) == (int(said[1]), int(said[2]))
    assert "accepted" not in json.loads(cli(*asked, "--json").out)[0]
    refused = cli(*asked, "--draft", "ngram")
    assert refused.status == 2 and "draft: is mtp, not 'ngram'" in refused.err


def test_train_takes_a_file_and_overrides_and_prints_the_run(cli: Cli, recipe: Cli, tmp_path: Path) -> None:
    said = cli("train", recipe(), "trainer.steps=3", "model.ffn.hidden=8", "--out", tmp_path / "run")
    assert said.status == 0 and said.out == f"{tmp_path / 'run'}\n"
    assert "step 3/3" in said.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["trainer"]["steps"] == 3 and resolved["model"]["ffn"]["hidden"] == 8
    again = cli("train", recipe(), "trainer.steps=6", "model.ffn.hidden=8", "--out", tmp_path / "run", "--resume")
    assert again.status == 0 and "going on from step 3" in again.err
    quiet = cli("train", recipe(), "--out", tmp_path / "quiet", "--quiet")
    assert quiet.status == 0 and quiet.err == ""


def test_a_change_of_kind_says_what_was_carried_dropped_and_defaulted(cli: Cli, home: Path) -> None:
    said = cli("recipe", "show", home / "recipe.yaml", "optimizer.kind=muon", "model.ffn.kind=swiglu")
    assert "model.ffn: kind mlp -> swiglu; carried hidden" in said.err
    assert "optimizer: kind adamw -> muon" in said.err


def test_generate_prints_text_on_stdout_and_all_else_on_stderr(cli: Cli, home: Path) -> None:
    command = ("generate", home / "run", "--prompt", "abc", "--max-new-tokens", "8", "--device", "cpu")
    first, second, other = cli(*command, "--seed", "1"), cli(*command, "--seed", "1"), cli(*command, "--seed", "2")
    assert first.status == 0 and first.out.endswith("\n") and len(first.out) > 1
    assert first.out == second.out != other.out
    said = cli(*command, "--json")
    (answer,) = json.loads(said.out)
    assert answer["prompt"] == "abc" and {"text", "ids", "finish"} <= set(answer) and len(answer["ids"]) <= 8
    two = json.loads(cli(*command, "--prompt", "xyz", "--json").out)
    assert [entry["prompt"] for entry in two] == ["abc", "xyz"]


KEYS = {
    "parameters", "active_parameters", "active_with_embedding", "buffers", "state_bytes_per_token", "flops_per_token"
}  # fmt: skip


@pytest.mark.parametrize("what", ["quickstart", "recipe.yaml", "run"])
def test_inspect_counts_a_name_a_file_or_a_run(cli: Cli, home: Path, what: str) -> None:
    said = cli("inspect", what if what == "quickstart" else home / what, "--json")
    assert said.status == 0 and said.err == ""
    found = json.loads(said.out)
    assert set(found) >= KEYS
    assert all(isinstance(found[key], int | float) and found[key] >= 0 for key in KEYS)
    if what != "quickstart":
        # embedding 259 x 16 tied, attention 4 x 16 x 16, feed-forward 2 x 16 x 24, norms 3 x 16
        assert found["parameters"] == found["active_parameters"] == 259 * 16 + 4 * 256 + 2 * 16 * 24 + 3 * 16
        half = 2 if found["state_bytes_per_token"] == 2 * 16 * 2 else 4
        assert found["state_bytes_per_token"] == 2 * 16 * half
    peak = found["training_bytes"]
    assert peak["peak"] > 4 * found["parameters"] * 4


def test_inspect_takes_overrides_and_prints_a_table(cli: Cli, home: Path) -> None:
    plain, deeper = (json.loads(cli("inspect", home / "recipe.yaml", f"model.depth={n}", "--json").out) for n in (1, 3))
    assert deeper["parameters"] > plain["parameters"]
    said = cli("inspect", home / "run")
    assert said.status == 0 and "parameters" in said.out and "MiB" in said.out


def test_parts_lists_every_kind_with_fields_defaults_bounds_and_paper(cli: Cli) -> None:
    said = cli("parts", "--json")
    assert said.status == 0 and said.err == ""
    entries = {(entry["family"], entry["kind"]): entry for entry in json.loads(said.out)}
    for family in set(FAMILIES) - {"adapt"}:
        for kind in kinds(family):
            entry = entries[family, kind]
            assert entry["summary"]
            for name, field in entry["fields"].items():
                assert field["description"] and field["type"], f"{family}.{kind}.{name}"
    heads = entries["attention", "softmax"]["fields"]["heads"]
    assert heads["default"] == 8 and ">= 1" in heads["bounds"]
    assert "1706.03762" in entries["attention", "softmax"]["paper"]
    one = cli("parts", "schedule")
    assert "schedule.cosine" in one.out and "attention" not in one.out


def test_recipe_show_is_a_recipe_and_schema_describes_it(cli: Cli, home: Path, tmp_path: Path) -> None:
    for name in builtin_recipes():
        said = cli("recipe", "show", name)
        (tmp_path / "shown.yaml").write_text(said.out)
        assert load_recipe(tmp_path / "shown.yaml") == load_recipe(name)
        assert json.loads(cli("recipe", "show", name, "--json").out) == load_recipe(name).dump()
    schema = json.loads(cli("recipe", "schema").out)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "attention.softmax" in schema["$defs"]


def test_doctor_says_what_is_here_and_what_is_missing(cli: Cli) -> None:
    said = cli("doctor", "--json")
    assert said.status == 0 and said.err == ""
    report = json.loads(said.out)
    assert {"torchstone", "python", "versions", "devices", "threads", "compiler", "extras"} <= set(report)
    assert report["versions"]["torch"] and set(report["extras"]) >= {"hf", "serve", "dist", "track"}
    assert "threads" in cli("doctor").out


def test_debug_shows_the_traceback(home: Path) -> None:
    from torchstone.cli import main
    from torchstone.errors import TorchstoneError

    with pytest.raises(TorchstoneError):
        main(["inspect", "nowhere", "--debug"])


@pytest.mark.slow
def test_a_reader_that_leaves_hears_no_complaint() -> None:
    command = [sys.executable, "-m", "torchstone", "recipe", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() in (0, 1) and err == ""  # 1 is what the parser's library has for it


def test_a_defect_of_ours_is_one_line_and_status_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchstone.cli.doctor.examine", lambda: 1 / 0)
    said = cli("doctor")
    assert said.status == 1 and said.out == "" and said.err.count("\n") == 1 and "ZeroDivisionError" in said.err


def test_a_copied_run_is_self_contained(cli: Cli, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "state")
    assert cli("generate", tmp_path / "moved", "--prompt", "a", "--max-new-tokens", "2").status == 0
    assert cli("inspect", tmp_path / "moved", "--json").status == 0


def test_commands_change_nothing_that_they_only_read(cli: Cli, home: Path) -> None:
    before = tiny.listing(home / "run")
    for command in (["inspect", home / "run"], ["generate", home / "run", "--prompt", "a", "--max-new-tokens", "1"]):
        assert cli(*command).status == 0
    assert tiny.listing(home / "run") == before


@pytest.mark.slow
def test_inspect_takes_the_name_of_a_published_size(cli: Cli) -> None:
    said = cli("inspect", "gpt2", "--json")
    counts = json.loads(said.out)
    assert counts["parameters"] == 124_439_808  # as published
    assert counts["active_parameters"] == 124_439_808 - 1024 * 768  # the tied matrix once, positions not
    assert counts["state_bytes_per_token"] == 2 * 12 * 768 * 4
    assert cli("inspect", "gpt3", "--json").status == 2
