"""Bad input: one line that names the thing, what was found and what is allowed; status 2; nothing changes on disk."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny

Cli = Callable[..., Any]


@pytest.fixture
def refused(cli: Cli, tmp_path: Path, home: Path) -> Callable[..., str]:
    """``refused(command...)``: runs it, checks the contract above, and gives the line."""

    def check(*command: str | Path) -> str:
        before = tiny.listing(tmp_path), tiny.listing(home)
        said = cli(*command)
        assert said.status == 2, said.err
        lines = said.err.splitlines()
        # that a text is being read is said while it is read
        assert len([line for line in lines if not line.startswith("reading ")]) == 1, said.err
        assert said.out == "" and "Traceback" not in said.err
        assert (tiny.listing(tmp_path), tiny.listing(home)) == before
        return lines[-1]

    return check


@pytest.fixture
def train(refused: Callable[..., str], recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """``train(overrides..., **sections)``: the refusal to train a tiny recipe."""

    def check(*overrides: str, **sections: Any) -> str:
        return refused("train", recipe(**sections), *overrides, "--out", tmp_path / "new")

    return check


OVERRIDES = {
    "model.attention.kind=softmx": "no attention kind 'softmx' (did you mean 'softmax'?); kinds: ",
    "optimizer.kind=adagrad": "no optimizer kind 'adagrad'",
    "model.ffn.kind=../mlp": "no ffn kind '../mlp'",
    "model.wdth=4": "model: no field 'wdth' (did you mean 'width'?)",
    "modell.width=4": "no field 'modell' (did you mean 'model'?)",
    "trainer.step=4": "trainer: no field 'step' (did you mean 'steps'?)",
    "trainer.steps": "override 'trainer.steps': needs the form field.sub=value",
    "=4": "needs the form field.sub=value",
    "model..width=4": "needs the form field.sub=value",
    "trainer.steps=[": "override trainer.steps",
    "trainer.steps=many": "trainer.steps",
    "trainer.steps=0": "trainer.steps: input should be greater than or equal to 1, got '0'",
    "trainer.steps=1.5": "trainer.steps",
    "trainer.steps=.nan": "trainer.steps",
    "optimizer.lr=.inf": "optimizer.lr",
    "optimizer.lr=-1": "optimizer.lr: input should be greater than 0, got '-1'",
    "trainer.batch=99999999999999999999": "trainer.batch",
    "trainer.accumulate=1000000000000": "trainer.accumulate",
    "trainer.precision=fp8": "trainer.precision",
    "trainer.device=tpu": "trainer.device",
    "model.attention.heads=3": "attention.heads: 3 heads do not divide width 16",
    "model.attention.kv_heads=3": "attention.kv_heads: 3 does not divide 2 heads",
    "model.attention.head_dim=7": "rotary turns pairs of channels",
    "model.width=15": "heads do not divide width 15",
    "model.layers=[{at: [4], ffn: mlp}]": "no layer 4 among 1 layers",
    "model.encoder={depth: 0}": "encoder.depth",
    "model=tiny": "no model kind 'tiny'",
    "model=3": "model",
    "data.corpus.path=": "data.corpus.path",
    "objective={kind: masked_lm, masked: 0.9, random: 0.9}": "masked + random is 1.8",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_unknown_kind_field_or_value_is_named(train: Callable[..., str], override: str) -> None:
    assert OVERRIDES[override] in train(override)


def test_options_and_verbs_that_do_not_exist(refused: Callable[..., str], home: Path) -> None:
    assert "No such command" in refused("trian")
    assert "No such option" in refused("train", "quickstart", "--outt", "x")
    assert "Missing argument" in refused("train")
    assert "needs --out" in refused("train", home / "recipe.yaml")
    assert "max-new-tokens" in refused("generate", home / "run", "--max-new-tokens", "many")
    assert "no family 'attentoin' (did you mean 'attention'?)" in refused("parts", "attentoin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "recipe.yaml line"),
        (b"- a\n- b\n", "a recipe is a mapping of fields"),
        (b"just words", "a recipe is a mapping of fields"),
        (b"model: {width: 4}\nmodel: {width: 8}\n", "line 2: the key 'model' stands twice"),
        (b"model: {width: \xff}\n", "not UTF-8 at byte 15"),
        (b"a: &a [*a]\n", "recipe.yaml line 1: found unconstructable recursive node"),
        (b"1: 2\n", "1"),
        (b"? [a, b]\n: c\n", "recipe.yaml"),
        (b"!!python/object/apply:os.system ['true']\n", "recipe.yaml line 1"),
        (b"[" * 5000, "recipe.yaml"),
        (b"model: " + b"{ffn: " * 3000 + b"}" * 3000, "recipe.yaml"),
        (b"trainer: {seed: 2026-01-01}\n", "trainer.seed"),
        (b"\x00\x01", "recipe.yaml"),
    ],
)
def test_a_file_that_is_no_recipe(refused: Callable[..., str], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert message in refused("train", tmp_path / "recipe.yaml", "--out", tmp_path / "new")


def test_a_recipe_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    misspelt = "no recipe 'quikstart' (did you mean 'quickstart'?)"
    assert misspelt in refused("train", "quikstart", "--out", tmp_path / "new")
    assert "no recipe, run or preset 'quikstart' (did you mean 'quickstart'?)" in refused("inspect", "quikstart")
    assert "no recipe, run or preset 'retnet'; presets: retnet-13b, " in refused("inspect", "retnet")
    assert "No such file" in refused("inspect", tmp_path / "none.yaml")
    assert "Is a directory" in refused("train", tmp_path, "--out", tmp_path / "new")
    assert "not a run" in refused("inspect", tmp_path)
    assert "too long" in refused("inspect", "x" * 5000 + ".yaml")
    assert "too long" in refused("train", "x" * 5000, "--out", tmp_path / "new")
    assert "too long" in refused("train", "x" * 300, "--out", tmp_path / "new")


# ------------------------------------------------------------------------------------------------------- text


def corpus(path: Path, **fields: Any) -> dict[str, Any]:
    return {"data": {"corpus": {"kind": "text", "path": str(path)}, **fields}}


def test_an_empty_corpus(train: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    assert "empty corpus" in train(**corpus(tmp_path / "empty.txt"))
    assert "empty corpus" in train(**corpus(tmp_path / "folder"))
    assert "no file matches" in train(**corpus(tmp_path / "*.nothing"))
    assert "no such file or folder" in train(**corpus(tmp_path / "nothing"))


def test_a_corpus_shorter_than_a_block(train: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    line = train(**corpus(tmp_path / "short.txt"))
    assert "shorter than one block" in line and "block 16" in line


def test_a_file_that_cannot_be_read_or_decoded(train: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"good text\n" * 50 + b"\xff\xfe")
    line = train(**corpus(tmp_path / "binary.txt"))
    assert "is not UTF-8: byte 0xff at offset 500" in line
    (tmp_path / "docs.jsonl").mkdir()
    assert "docs.jsonl" in train(data={"corpus": {"kind": "jsonl", "path": str(tmp_path / "docs.jsonl")}})
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    assert "bad.jsonl" in train(data={"corpus": {"kind": "jsonl", "path": str(tmp_path / "bad.jsonl")}})
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer" in train(data={"tokenizer": {"kind": "file", "path": str(tmp_path / "tokenizer.json")}})


# -------------------------------------------------------------------------------------------------------- runs


def test_a_run_directory_that_is_none_or_is_taken(refused: Callable[..., str], home: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    recipe = home / "recipe.yaml"
    for options in ([], ["--resume"]):
        line = refused("train", recipe, "--out", tmp_path / "photos", *options)
        assert "exists and is not a run (it holds cat.png)" in line
    assert "holds a run already; continue it with --resume" in refused("train", recipe, "--out", home / "run")
    assert "is a file, not a folder" in refused("train", recipe, "--out", recipe)
    assert "is a file, not a folder" in refused("train", recipe, "--out", recipe / "below")
    assert "not a run (no recipe.yaml and no config.json)" in refused("generate", tmp_path / "photos", "--prompt", "a")
    assert "no such run" in refused("generate", tmp_path / "none", "--prompt", "a")
    assert "too long" in refused("train", recipe, "--out", tmp_path / ("x" * 300))


def test_resuming_with_another_recipe_names_the_fields(refused: Callable[..., str], home: Path) -> None:
    line = refused(
        "train", home / "recipe.yaml", "optimizer.lr=0.5", "model.depth=2", "--out", home / "run", "--resume"
    )
    assert "optimizer.lr (0.5 here, 0.001 there)" in line and "model.depth (2 here, 1 there)" in line


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) * 2 // 3],
    "empty": lambda raw: b"",
    "bit-flipped": lambda raw: raw[:-50] + bytes([raw[-50] ^ 4]) + raw[-49:],
    "header": lambda raw: raw[:3] + b"\xff" + raw[4:],
    "foreign": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_by_resume_and_by_generate(
    refused: Callable[..., str], home: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    for path in (
        tmp_path / "run" / "state" / "step-00000004" / "model.safetensors",
        tmp_path / "run" / "model.safetensors",
    ):
        raw = path.read_bytes()
        path.write_bytes(DAMAGE[damage](raw))
        if damage == "foreign":
            save_file({"gpt.wte": torch.ones(3, 3)}, path)
    line = refused("train", home / "recipe.yaml", "--out", tmp_path / "run", "--resume")
    assert str(tmp_path / "run" / "state" / "step-00000004" / "model.safetensors") in line
    line = refused("generate", tmp_path / "run", "--prompt", "a", "--max-new-tokens", "2")
    assert str(tmp_path / "run" / "model.safetensors") in line


@pytest.mark.slow
def test_any_file_of_a_run_cut_short_or_filled_with_noise_is_a_sentence_or_no_matter(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    names = ["recipe.yaml", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors"]  # fmt: skip
    for name in names:
        for content in (b"", b"{", b"[]", b"null", rng.randbytes(200), None):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(home / "run", tmp_path / "run")
            if content is None:
                (tmp_path / "run" / name).unlink()
            else:
                (tmp_path / "run" / name).write_bytes(content)
            for command in (["inspect", "RUN"], ["generate", "RUN", "--prompt", "a", "--max-new-tokens", "1"]):
                said = cli(*(str(tmp_path / "run") if word == "RUN" else word for word in command))
                assert said.status in (0, 2), (name, content, command, said.err)
                assert said.status == 0 or said.err.count("\n") == 1, said.err


# ----------------------------------------------------------------------------------------------------- machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(refused: Callable[..., str], home: Path, tmp_path: Path) -> None:
    line = refused("train", home / "recipe.yaml", "--out", tmp_path / "new", "--device", "cuda")
    assert "trainer.device: cuda asked, and torch finds no CUDA device here" in line
    assert "cuda" in refused("generate", home / "run", "--prompt", "a", "--device", "cuda")


def test_no_disk_space_when_the_run_begins(
    refused: Callable[..., str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused("train", home / "recipe.yaml", "--out", tmp_path / "new", "--quiet")
    assert f"{tmp_path / 'new'}: no space left on the disk" in line


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written(
    refused: Callable[..., str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **keywords: Any) -> None:
        if self.name == "new":
            raise OSError(reason, "not here")
        real(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "cannot be written" in refused("train", home / "recipe.yaml", "--out", tmp_path / "new", "--quiet")


def test_a_process_of_its_own_says_one_line_and_leaves_with_two(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchstone", "train", str(home / "recipe.yaml"), "model.attention.heads=3",
               "--out", str(tmp_path / "new")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "torchstone: model: attention.heads: 3 heads do not divide width 16\n"
    assert not (tmp_path / "new").exists()
