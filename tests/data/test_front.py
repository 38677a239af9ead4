"""What a row of prompts and answers begins with, in training and when the run is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import tiny
from torchstone.api import load
from torchstone.data.preferences import PreferencesDataSpec
from torchstone.data.responses import ResponsesDataSpec
from torchstone.rl.data.prompts import PromptsDataSpec
from torchstone.spec import validate

ROWS = [{"prompt": f"q{n}", "response": f"a{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(30)]
BOS, EOS = "<s>", "</s>"


@pytest.fixture
def template(tmp_path: Path) -> dict[str, Any]:
    """A tokenizer of characters in Llama's template: <s> text, with </s> for a separator."""
    letters = [BOS, EOS, "<pad>", *"0123456789qacr"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(letters[:3])
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": "<pad>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"kind": "file", "path": str(tmp_path / "tokenizer")}


@pytest.mark.parametrize("spec", [PromptsDataSpec, ResponsesDataSpec, PreferencesDataSpec])
def test_rows_begin_as_the_tokenizers_template_or_with_a_separator(
    spec: Any, template: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for tokenizer in (template, "bytes"):
        usual = {"path": str(tmp_path / "rows.jsonl"), "block": 8, "cache": str(tmp_path / "cache")}
        found = validate(spec, {**usual, "tokenizer": tokenizer}).prepare()
        front = found.tokenizer.front
        assert front == ([0] if tokenizer is template else [found.tokenizer.separator])
        (batch,) = found.train.evaluation(99)
        ids, valid = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("ids", "valid"))
        for row, kept in zip(ids.tolist(), valid.tolist(), strict=True):
            assert row[0] == front[0] and row.count(front[0]) == 1
            assert found.tokenizer.decode(row[: sum(kept)])[0] == "q"
        if "next" in batch:  # the answer and its end, and nothing of the prompt
            targets = batch["next"].reshape(ids.shape)
            assert all(row[row >= 0][-1] == found.tokenizer.separator for row in targets)
            assert all("q" not in found.tokenizer.decode(row[row >= 0].tolist()) for row in targets)


def test_a_full_block_is_kept_and_one_token_more_is_not(template: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "q0", "response": "a" * n} for n in (6, 7, 8)] * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "block": 8, "tokenizer": template, "cache": str(tmp_path / "c")}
    found = validate(ResponsesDataSpec, data).prepare()
    assert "20 prompts cut" not in found.description and "40 prompts cut" in found.description
    assert "left out: 20" in found.description


def test_a_run_is_asked_with_the_front_that_it_was_trained_with(template: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"kind": "responses", "path": str(tmp_path / "rows.jsonl"), "block": 8, "cache": str(tmp_path / "cache")}
    for name, tokenizer, front in (("own", "bytes", 256), ("template", template, 0)):
        recipe = tiny.recipe(tmp_path)
        recipe["data"] = {**data, "tokenizer": tokenizer}
        run = load(tiny.saved(tmp_path / name, recipe).path)
        (done,) = run.generate("q1", max_new_tokens=1)
        assert done.prompt_ids == [front, *run.tokenizer().encode("q1")]
    plain = load(tiny.saved(tmp_path / "text", tiny.recipe(tmp_path)).path)
    assert plain.generate("q1", max_new_tokens=1)[0].prompt_ids == plain.tokenizer().encode("q1")
