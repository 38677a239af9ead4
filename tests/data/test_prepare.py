from __future__ import annotations

import errno
import hashlib
import importlib
import multiprocessing
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from torchstone.data import CorpusSpec, DataSpec, Document, Prepared, TextDataSpec, prepare
from torchstone.data import store as store_module
from torchstone.data.store import Cache
from torchstone.errors import TorchstoneError
from torchstone.spec import Part, Spec, validate

SPLITS = ("train", "valid", "test")


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def text(path: Path) -> dict[str, str]:
    return {"kind": "text", "path": str(path)}


class GeneratedSpec(CorpusSpec):
    """Documents that exist nowhere but in the loop that reads them: a kind from outside the package."""

    kind: ClassVar[str] = "generated_for_tests"
    offered: ClassVar[bool] = False
    count: int = 100

    def documents(self) -> Iterator[Document]:
        for number in range(self.count):
            rows = np.random.Generator(np.random.Philox(number)).integers(0, 10**9, 80)
            yield Document(str(number), "".join(f"{row} lines of nothing\n" for row in rows))

    def fingerprint(self) -> str:
        return f"generated {self.count}"


# ------------------------------------------------------------------------------------------------------- spec


def corpus_of(word: str) -> CorpusSpec:
    return validate(Holder, {"data": word}).data.corpus


class Holder(Spec):
    data: Part[DataSpec]


def test_a_string_is_a_path() -> None:
    assert validate(TextDataSpec, {"block": 9}).block == 9
    assert corpus_of("./files").dump() == {"kind": "text", "path": "./files"}
    assert corpus_of("a/b.jsonl").dump() == {"kind": "jsonl", "path": "a/b.jsonl", "field": "text"}
    assert corpus_of("stdlib").kind == "stdlib"
    spec = TextDataSpec(corpus={"kind": "text", "path": ["a", "b"]})
    assert validate(TextDataSpec, spec.dump()) == spec


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, torchstone.data; torchstone.data.TextDataSpec();"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'scipy', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------ splits


def test_documents_are_split_by_content_and_all_are_there(ready: Callable[..., Prepared], folder: Path) -> None:
    prepared = ready(text(folder))
    sides = {split: {document.name for document in prepared.texts(split)} for split in SPLITS}
    assert sum(map(len, sides.values())) == 60 == len(set().union(*sides.values()))
    assert len(sides["train"]) > 45 and all(sides.values())
    for path in folder.iterdir():  # names decide nothing
        path.rename(folder / f"{hashlib.sha256(path.name.encode()).hexdigest()}{path.name}")
    renamed = ready(text(folder))
    assert {split: {document.name[64:] for document in renamed.texts(split)} for split in SPLITS} == sides
    assert (
        f"60 files, {sum(p.stat().st_size for p in folder.iterdir()):,} bytes, hash {renamed.hash[:16]}"
        in renamed.description
    )
    assert f"train {len(sides['train'])}, valid {len(sides['valid'])}, test {len(sides['test'])}" in renamed.description


def test_near_duplicates_are_on_one_side(
    ready: Callable[..., Prepared], tmp_path: Path, words: Callable[[int, int], str]
) -> None:
    root = tmp_path / "files"
    root.mkdir()
    for number in range(150):
        lines = words(number, 12).splitlines(keepends=True)
        for copy in range(3):
            (root / f"{number}-{copy}").write_text("".join(lines))
            lines[4 + copy * 3] = f"changed {copy}\n"
        (root / f"{number}-short").write_text(" ".join(words(1000 + number, 3).split()))
        (root / f"{number}-short2").write_text(" ".join(words(1000 + number, 3).split()) + " more")
    prepared = ready(text(root))
    side = {document.name: split for split in SPLITS for document in prepared.texts(split)}
    assert len(side) == 750 and set(side.values()) == set(SPLITS)
    for number in range(150):
        assert side[f"{number}-0"] == side[f"{number}-1"] == side[f"{number}-2"]
        assert side[f"{number}-short"] == side[f"{number}-short2"]


def test_one_file_is_cut_at_line_ends(
    ready: Callable[..., Prepared], tmp_path: Path, words: Callable[[int, int], str]
) -> None:
    whole = words(0, 500)
    (tmp_path / "x.txt").write_text(whole)
    prepared = ready(text(tmp_path / "x.txt"))
    parts = [next(prepared.texts(split)).text for split in SPLITS]
    assert "".join(parts) == whole and all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(whole), 2) for part in parts] == [0.9, 0.05, 0.05]
    assert "cut at 90 and 95 %" in prepared.description


def test_a_file_of_one_line_is_cut_between_characters(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    whole = "東京🙂é" * 100
    (tmp_path / "x.txt").write_text(whole, encoding="utf-8")
    prepared = ready(text(tmp_path / "x.txt"))
    assert "".join(next(prepared.texts(split)).text for split in SPLITS) == whole
    assert min(getattr(prepared, split).bytes for split in SPLITS) > 20


def test_two_files_are_laid_end_to_end(
    ready: Callable[..., Prepared], tmp_path: Path, words: Callable[[int, int], str]
) -> None:
    (tmp_path / "files").mkdir()
    for name, lines in (("a", 300), ("b", 20), ("empty", 0)):
        (tmp_path / "files" / name).write_text(words(lines, lines))
    prepared = ready(text(tmp_path / "files"))
    total = sum(getattr(prepared, split).bytes for split in SPLITS)
    assert total == sum(path.stat().st_size for path in (tmp_path / "files").iterdir())
    assert abs(prepared.train.bytes / total - 0.9) < 0.02 and prepared.valid.bytes > 0.03 * total
    assert "2 files" in prepared.description


def test_tinyshakespeare(ready: Callable[..., Prepared]) -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip("the tinyshakespeare file is not beside the repository")
    prepared = ready(str(path) and text(path), tokenizer={"kind": "bpe", "vocabulary": 512}, block=128)
    assert prepared.tokenizer.vocabulary == 512
    total = path.stat().st_size
    assert prepared.train.bytes + prepared.valid.bytes + prepared.test.bytes == total
    assert abs(prepared.train.bytes / total - 0.9) < 0.01
    ids = next(prepared.train.evaluation(1))["ids"][0].tolist()
    assert prepared.tokenizer.decode(ids) == path.read_text()[: len(prepared.tokenizer.decode(ids))]


# ------------------------------------------------------------------------------------------------------- cache


def test_the_second_time_nothing_is_written_and_all_is_equal(
    ready: Callable[..., Prepared], folder: Path, tmp_path: Path
) -> None:
    fields = {"tokenizer": {"kind": "bpe", "vocabulary": 300}}
    first = ready(text(folder), **fields)
    before = tree(tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    second = ready(text(folder), **fields)
    assert tree(tmp_path / "cache") == before
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert (first.hash, first.description, first.tokenizer.hash) == (
        second.hash,
        second.description,
        second.tokenizer.hash,
    )
    ready(text(folder), block=64, separate_documents=False, **fields)  # cut when read: not part of the key
    assert tree(tmp_path / "cache") == before


def test_an_edit_is_seen(ready: Callable[..., Prepared], folder: Path) -> None:
    before = ready(text(folder)).hash
    path = folder / "07.txt"
    path.write_text(path.read_text().swapcase())
    assert ready(text(folder)).hash != before


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "json"])
def test_a_damaged_entry_is_built_anew(ready: Callable[..., Prepared], folder: Path, tmp_path: Path, harm: str) -> None:
    fields = {"tokenizer": {"kind": "bpe", "vocabulary": 300}}
    ready(text(folder), **fields)
    before = tree(tmp_path / "cache")
    for file in [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        if harm == "truncate":
            file.write_bytes(raw[:-1])
        elif harm == "flip":
            file.write_bytes(raw)
        elif harm == "delete":
            file.unlink()
        elif file.name == "entry.json":
            file.write_text("[1, 2]")
        ready(text(folder), **fields)
        assert tree(tmp_path / "cache") == before


def _run(spec: dict, barrier: object, answers: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    prepared = prepare(validate(TextDataSpec, spec))
    answers.put((prepared.hash, prepared.train.tokens, prepared.train._stream[-5:].tolist()))  # type: ignore[attr-defined]


def test_two_processes_at_once(folder: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    spec = {
        "corpus": text(folder),
        "tokenizer": {"kind": "bpe", "vocabulary": 300},
        "block": 32,
        "cache": str(tmp_path / "cache"),
    }
    workers = [spawn.Process(target=_run, args=(spec, barrier, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert results[0] == results[1]
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_whoever_publishes_first_wins(tmp_path: Path) -> None:
    with Cache(tmp_path) as first, Cache(tmp_path) as second:
        (first.stage("tokens", "k") / "x").write_text("same")
        (second.stage("tokens", "k") / "x").write_text("same")
    with Cache(tmp_path) as cache:
        found = cache.find("tokens", "k")
    assert found is not None and (found / "x").read_text() == "same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]


def test_leftovers_of_killed_processes_are_swept_and_living_ones_kept(tmp_path: Path) -> None:
    for name in (".tmp-dead", ".tmp-dead2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
        (tmp_path / f"{name}.lock").touch()
    with Cache(tmp_path) as living:
        folder = living.stage("tokens", "k")
        with Cache(tmp_path) as other:
            other.stage("tokens", "l")
            assert folder.exists()
            assert not list(tmp_path.glob(".tmp-dead*"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(ready: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("torchstone.data.prepare"), "_TOGETHER", 1 << 14)
    monkeypatch.setattr(importlib.import_module("torchstone.data.duplicates"), "_BUFFER", 1 << 10)

    def peak(count: int) -> tuple[int, int]:
        tracemalloc.start()
        prepared = ready({"kind": "generated_for_tests", "count": count}, block=128)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held, prepared.train.bytes

    peak(50)  # imports
    small, large = peak(100), peak(1500)
    assert large[1] > 2.5e6
    assert large[0] - small[0] < 0.15 * (large[1] - small[1])


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
def test_a_corpus_shorter_than_a_block_is_refused_and_leaves_nothing(
    ready: Callable[..., Prepared], tmp_path: Path, tokenizer: object
) -> None:
    (tmp_path / "x.txt").write_text("a few words\n" * 10)
    before = tree(tmp_path)
    with pytest.raises(
        TorchstoneError, match=r"train split of .*x.txt is shorter than one block: [\d,]+ tokens, block 4,096"
    ):
        ready(text(tmp_path / "x.txt"), block=4096, tokenizer=tokenizer)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty corpus: .*x.txt has no text"),
        (b"a\xc3(", "byte 0xc3 at offset 1"),
    ],
)
def test_bad_corpora_are_refused_and_leave_nothing(
    ready: Callable[..., Prepared], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(TorchstoneError, match=message):
        ready(text(tmp_path / "x.txt"))
    assert tree(tmp_path) == before


def test_half_a_surrogate_pair_in_a_document_is_refused(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "ok"}\n{"text": "a\\ud800"}\n')
    with pytest.raises(TorchstoneError, match=r"x\.jsonl:2: the text holds half of a surrogate pair at character 1"):
        ready({"kind": "jsonl", "path": str(tmp_path / "x.jsonl")})


def test_a_bad_tokenizer_file_is_refused_and_leaves_nothing(
    ready: Callable[..., Prepared], folder: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    with pytest.raises(TorchstoneError, match="no tokenizer: cannot read"):
        ready(text(folder), tokenizer={"kind": "file", "path": str(tmp_path / "none")})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "code, message",
    [
        (errno.ENOSPC, r"no disk space for the token cache in '.*cache': about [\d,]+ bytes are needed"),
        (errno.EROFS, r"cannot use the token cache in '.*cache': Read-only file system"),
    ],
)
def test_a_full_or_closed_disk_is_one_sentence_and_leaves_nothing(
    ready: Callable[..., Prepared],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    message: str,
) -> None:
    def fail(path: Path) -> list:
        raise OSError(code, "No space left on device" if code == errno.ENOSPC else "Read-only file system")

    monkeypatch.setattr(store_module, "_checksum", fail)
    before = tree(tmp_path)
    with pytest.raises(TorchstoneError, match=message):
        ready(text(folder))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("cache", ["00.txt/inside", "x" * 300])
def test_a_cache_that_cannot_be_a_folder_is_refused(ready: Callable[..., Prepared], folder: Path, cache: str) -> None:
    with pytest.raises(TorchstoneError, match="cannot use the token cache in"):
        ready(text(folder), cache=str(folder / cache))


def test_a_corpus_that_changes_meanwhile_is_noticed(ready: Callable[..., Prepared], folder: Path) -> None:
    prepared = ready(text(folder))
    (folder / "00.txt").unlink()
    with pytest.raises(TorchstoneError, match="changed while it was read"):
        list(prepared.texts("train"))
