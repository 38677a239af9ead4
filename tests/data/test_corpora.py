from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from torchstone.data import CorpusSpec, TextDataSpec
from torchstone.data.corpora import _files, packages
from torchstone.data.corpora.jsonl import JsonlSpec
from torchstone.data.corpora.packages import PackagesSpec
from torchstone.data.corpora.stdlib import StdlibSpec
from torchstone.data.corpora.text import TextSpec
from torchstone.errors import TorchstoneError
from torchstone.spec import kinds, validate


def test_the_kinds_are_the_files() -> None:
    assert {"hf", "jsonl", "packages", "stdlib", "text"} <= set(kinds("corpus"))


def test_stdlib_holds_the_library_without_tests_and_tables() -> None:
    names = [document.name for document in StdlibSpec().documents()]
    assert names == sorted(names) and {"ast.py", "asyncio/base_events.py", "encodings/utf_8.py"} <= set(names)
    assert "encodings/cp1252.py" not in names
    assert not any(
        step in {"test", "tests", "idlelib", "tkinter", "site-packages", "lib2to3"}
        for n in names
        for step in n.split("/")
    )
    line = StdlibSpec().describe()
    assert f"{len([d for d in StdlibSpec().documents() if d.text]):,} files" in line and "bytes, hash " in line


def test_packages_are_checked_against_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    known = packages.manifest()
    if importlib.metadata.version("sympy") not in known["sympy"]:
        pytest.skip("another sympy is installed than the manifest knows")
    names = [document.name for document in PackagesSpec().documents()]
    assert "networkx/classes/graph.py" in names and "sympy/core/expr.py" in names
    assert not any("/tests/" in name for name in names)

    entry = next(iter(known["networkx"].values()))
    monkeypatch.setattr(packages, "manifest", lambda: {**known, "networkx": {"0.1": entry, "0.2": entry}})
    with pytest.raises(TorchstoneError, match=r"networkx \S+ is installed; versions known: 0.1, 0.2$"):
        list(PackagesSpec().documents())

    version = importlib.metadata.version("networkx")
    monkeypatch.setattr(packages, "manifest", lambda: {**known, "networkx": {version: {**entry, "sha256": "0"}}})
    with pytest.raises(TorchstoneError, match=rf"the files of networkx {version} are not those"):
        PackagesSpec().fingerprint()


def test_text_takes_a_file_a_folder_a_glob_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("1")
    (tmp_path / "a" / "b" / "two.md").write_bytes("zwei\r\nö".encode())
    (tmp_path / "a" / ".git").mkdir()
    (tmp_path / "a" / ".git" / "x").write_bytes(b"\xff")

    def read(path: object) -> dict[str, str]:
        return {document.name: document.text for document in TextSpec(path=path).documents()}

    assert read(str(tmp_path / "a")) == {"one.txt": "1", "b/two.md": "zwei\r\nö"}
    assert read(str(tmp_path / "a" / "one.txt")) == {"one.txt": "1"}
    assert read(str(tmp_path / "**" / "*.md")) == {"a/b/two.md": "zwei\r\nö"}
    assert read([str(tmp_path / "a" / "one.txt"), str(tmp_path / "a")]).keys() == {"one.txt", "b/two.md"}


def test_a_large_file_becomes_documents_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {number} ö\n" for number in range(50)) + "€" * 100 + "end"
    (tmp_path / "x").write_text(text, encoding="utf-8")
    parts = list(_files.pieces(tmp_path / "x", 64))
    assert "".join(parts) == text and len(parts) > 5
    assert all(part.endswith("\n") for part in parts[:5])


def test_an_undecodable_byte_is_named_with_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 3 + b"ab\xffcd")
    with pytest.raises(TorchstoneError, match=r"bad.txt' is not UTF-8: byte 0xff at offset 17"):
        list(TextSpec(path=str(tmp_path / "bad.txt")).documents())
    with pytest.raises(TorchstoneError, match="at offset 17"):
        list(_files.pieces(tmp_path / "bad.txt", 5))


@pytest.mark.parametrize(
    "path, message",
    [
        ("nothing", "no such file or folder"),
        ("*.none", "empty corpus: no file matches"),
        ("empty", "empty corpus: no file in"),
        ("x" * 5000, "no such file or folder"),
        ("a\0b", "no such file or folder"),
    ],
)
def test_paths_that_are_nothing_are_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TorchstoneError, match=message):
        list(TextSpec(path=str(tmp_path / path)).documents())


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(TorchstoneError, match=r"cannot read '.*link': No such file"):
        list(TextSpec(path=str(tmp_path)).documents())


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a JSON object is needed, not list"),
        ('{"txt": ""}', "line 2: no field 'text'; fields: txt"),
        ('{"text": 1}', "line 2: field 'text' is int, a string is needed"),
        ("[" * 100_000, "line 2: not JSON that can be read here"),
    ],
)
def test_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(TorchstoneError, match=f"x.jsonl' {message}"):
        list(JsonlSpec(path=str(tmp_path / "x.jsonl")).documents())


def test_jsonl_reads_one_field_of_each_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "one"}\n\n{"q": "tw\\u00f6"}\n')
    documents = list(JsonlSpec(path=str(tmp_path), field="q").documents())
    assert [(document.name, document.text) for document in documents] == [("x.jsonl:1", "one"), ("x.jsonl:3", "twö")]


@pytest.mark.parametrize("spec", [TextSpec, JsonlSpec])
def test_a_fingerprint_sees_an_edit_of_the_same_size(tmp_path: Path, spec: type[CorpusSpec]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}')
    corpus = spec(path=str(tmp_path))  # type: ignore[call-arg]
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    file.write_text('{"text": "two"}')
    assert corpus.fingerprint() != before


def test_hf_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    corpus = validate(TextDataSpec, {"corpus": {"kind": "hf", "dataset": "x/y"}}).corpus
    with pytest.raises(TorchstoneError, match=r"pip install 'torchstone\[hf\]'"):
        list(corpus.documents())


@pytest.mark.slow
def test_hf_reads_saved_and_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in ("three", "four")))

    def corpus(**fields: object) -> CorpusSpec:
        return validate(TextDataSpec, {"corpus": {"kind": "hf", **fields}}).corpus

    saved = corpus(dataset=str(tmp_path / "saved"))
    local = corpus(dataset="json", files=str(tmp_path / "x.jsonl"), field="q")
    assert [document.text for document in saved.documents()] == ["one", "two"]
    assert [document.text for document in local.documents()] == ["three", "four"]
    assert saved.fingerprint() == saved.fingerprint() != local.fingerprint()
    with pytest.raises(TorchstoneError, match="no field 'text'; fields: q"):
        list(corpus(dataset="json", files=str(tmp_path / "x.jsonl")).documents())
    with pytest.raises(TorchstoneError, match="cannot read 'json'"):
        (tmp_path / "bad.jsonl").write_text("{{{")
        list(corpus(dataset="json", files=str(tmp_path / "bad.jsonl")).documents())
