"""Checkpoints are whole or absent; whatever is wrong with one is said in a sentence that names the file."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
import torchstone
from torchstone.errors import TorchstoneError
from torchstone.train import checkpoint, training
from torchstone.train.checkpoint import Checkpoints, load_tensors, save_tensors
from torchstone.train.run import RunFolder

Run = Callable[..., RunFolder]


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"a.weight": torch.full((3, 4), float(step)), "b": torch.arange(5) + step},
        "optimizer": {"optimizer.step.a.weight": torch.tensor(float(step))},
    }


def assert_holds(keep: Checkpoints, step: int) -> None:
    found = keep.load()
    assert found is not None and found.step == step
    for file, tensors in content(step).items():
        for name, value in tensors.items():
            assert torch.equal(found.tensors[file][name], value)


OPERATIONS = [(checkpoint, "save_file"), (os, "fsync"), (os, "replace"), (os, "rename"), (Path, "write_bytes"),
              (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")]  # fmt: skip


@contextmanager
def failing_at(number: int, error: Callable[[], BaseException], dead: bool) -> Iterator[list[int]]:
    """The number-th operation on files fails, a write after half of its bytes; `dead` means that all later ones do."""
    count = [0]

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            count[0] += 1
            if count[0] == number or (dead and count[0] > number):
                if name in ("save_file", "write_bytes") and count[0] == number:
                    real(*arguments, **keywords)
                    path = arguments[1] if name == "save_file" else arguments[0]
                    os.truncate(path, os.path.getsize(path) // 2)
                raise error()
            return real(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrap(getattr(owner, name), name))
        yield count


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("death", [True, False], ids=["kill", "no-space"])
@pytest.mark.parametrize("best", [False, True], ids=["plain", "best"])
def test_a_failure_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, death: bool, best: bool) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        keep = Checkpoints(folder, keep_last=1)
        keep.save(1, content(1), {})
        with failing_at(number, tiny.Cut if death else no_space, death) as count:
            try:
                keep.save(2, content(2), {"best": 1.0}, best)
            except (tiny.Cut, TorchstoneError) as error:
                failed: BaseException | None = error
            else:
                failed = None
        if count[0] < number:
            assert failed is None and number > 10
            assert_holds(keep, 2)
            return
        if isinstance(failed, TorchstoneError):
            assert "no space left on the disk; the checkpoint step-0000000" in str(failed)
            assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert_holds(keep, keep.load().step)  # type: ignore[union-attr]
        keep.save(3, content(3), {}, best)
        assert_holds(keep, 3)
        assert {path.name for path in folder.iterdir() if "tmp" not in path.name} >= {"LATEST", "step-00000003"}
    raise AssertionError("a save takes more than a hundred operations")


def test_the_step_that_latest_names_is_never_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Checkpoints(tmp_path)
    keep.save(1, content(1), {})
    monkeypatch.setattr(checkpoint, "save_file", lambda *a, **k: pytest.fail("written again"))
    keep.save(1, content(1), {}, best=True)
    assert_holds(keep, 1)
    assert (tmp_path / "BEST").read_text() == "step-00000001"


def test_a_step_that_a_kill_left_behind_latest_is_replaced(tmp_path: Path) -> None:
    keep = Checkpoints(tmp_path)
    keep.save(1, content(1), {})
    keep.save(2, content(2), {})
    (tmp_path / "LATEST").write_text("step-00000001")
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"rubbish")
    keep.save(2, content(2), {})
    assert_holds(keep, 2)


def test_keep_last_n_and_the_best(tmp_path: Path) -> None:
    keep = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        keep.save(step, content(step), {}, best=step == 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{n:08d}" for n in (2, 5, 6)]
    assert keep.load("step-00000002").step == 2  # type: ignore[union-attr]


def test_keep_best_keeps_the_lowest_validation_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.3])
    monkeypatch.setattr(
        "torchstone.train.engine.Trainer.measure_split",
        lambda self, split, prefix, limit=None: {f"{prefix}_loss": next(losses)},
    )
    folder = run(
        trainer={
            "steps": 6,
            "batch": 2,
            "device": "cpu",
            "threads": 1,
            "save_every": 4,
            "keep_last": 1,
            "keep_best": True,
        },
        evaluate={"every": 1, "test": False},
    )
    assert (folder.state / "BEST").read_text() == "step-00000002"
    assert sorted(path.name for path in folder.state.glob("step-*")) == ["step-00000002", "step-00000006"]
    assert folder.checkpoints().load().facts["best"] == 3.0  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ broken files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a finished run, its text and its cache."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        training.train(tiny.recipe(folder, trainer=EMA), out=folder / "run", quiet=True)
    return folder


EMA: dict[str, Any] = {"steps": 2, "batch": 2, "device": "cpu", "threads": 1, "save_every": 2, "ema": 0.5}


@pytest.fixture
def broken(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to break."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def resume(finished: Path, folder: RunFolder) -> None:
    training.train(tiny.recipe(finished, trainer=EMA), out=folder.path, resume=True, quiet=True)


FILES = ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "foreign", "folder"])
def test_resuming_from_a_broken_file_names_it_and_changes_nothing(
    finished: Path, broken: RunFolder, file: str, damage: str
) -> None:
    path = broken.state / "step-00000002" / file
    raw = path.read_bytes()
    path.unlink()
    if damage == "foreign":
        if file == "state.json":
            path.write_text('{"global_step": 2, "trainer": "another"}')
        else:
            save_file({"bert.pooler.weight": torch.zeros(2, 2)}, path)
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": raw[: len(raw) // 2], "longer": raw + b"\0"}[damage])
    before = tiny.listing(broken.path)
    with pytest.raises(TorchstoneError, match=re.escape(str(path))) as caught:
        resume(finished, broken)
    assert "\n" not in str(caught.value)
    assert tiny.listing(broken.path) == before


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(finished: Path, broken: RunFolder, file: str) -> None:
    path, rng = broken.state / "step-00000002" / file, random.Random(0)
    raw = path.read_bytes()
    for _ in range(40):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(TorchstoneError, match=re.escape(str(path))):
            broken.checkpoints().load()
    path.write_bytes(raw)
    assert broken.checkpoints().load() is not None


@pytest.mark.parametrize("pointer", ["", "step-2", "../../etc", "step-00000099", "\udcff"])
def test_a_pointer_that_names_no_checkpoint_is_refused(broken: RunFolder, pointer: str) -> None:
    (broken.state / "LATEST").write_bytes(pointer.encode("utf-8", "surrogateescape"))
    with pytest.raises(TorchstoneError, match="LATEST"):
        broken.checkpoints().load()


@pytest.mark.parametrize("weights", ["last", "ema"])
def test_published_weights_are_checked_without_the_state_folder(broken: RunFolder, weights: Any) -> None:
    shutil.rmtree(broken.state)
    path = broken.path / ("model.safetensors" if weights == "last" else "model_ema.safetensors")
    good = {name: value.clone() for name, value in broken.model(weights).state_dict().items()}
    raw, rng, noticed = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            found = broken.model(weights).state_dict()
        except TorchstoneError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
        else:  # the flip hit nothing that is read: the name of the checksum, a blank
            assert all(torch.equal(found[name], value) for name, value in good.items())
    assert noticed > 50
    path.write_bytes(raw[:-10])
    with pytest.raises(TorchstoneError, match=re.escape(str(path))):
        broken.model(weights)
    path.unlink()
    with pytest.raises(TorchstoneError, match="no weights yet" if weights == "last" else "no moving average"):
        broken.model(weights)


def test_foreign_weights_are_refused_by_name_and_shape(broken: RunFolder) -> None:
    path = broken.path / "model.safetensors"
    tensors = load_tensors(path)
    path.unlink()
    save_tensors(path, {**tensors, "lm_head.weight": torch.zeros(3)})
    with pytest.raises(TorchstoneError, match=r"not of this model lm_head\.weight"):
        broken.model()
    path.unlink()
    save_tensors(path, {name: value for name, value in tensors.items() if "qkv" not in name})
    with pytest.raises(TorchstoneError, match=r"missing decoder\.layers\.0\.attention\.qkv\.weight"):
        broken.model()
    path.unlink()
    save_tensors(path, {**tensors, "embedding.weight": torch.zeros(7, 16)})
    with pytest.raises(TorchstoneError, match=r"embedding\.weight is \(7, 16\), the model has \(259, 16\)"):
        broken.model()


def test_safetensors_of_other_libraries_have_no_checksum_and_load(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["x"], torch.ones(2))


@pytest.mark.parametrize("file", ["config.json", "recipe.yaml"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"3", b"{}", b'{"format_version": "1"}'])
def test_a_broken_document_of_a_run_is_one_sentence(broken: RunFolder, file: str, damage: bytes) -> None:
    (broken.path / file).write_bytes(damage)
    with pytest.raises(TorchstoneError) as caught:
        assert broken.recipe and broken.model_spec  # type: ignore[truthy-bool]
        if file == "recipe.yaml" and damage == b"{}":
            raise TorchstoneError(f"{file}: an empty recipe is the default one")
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_that_a_kill_cut_short_is_left_out(broken: RunFolder) -> None:
    path = broken.path / "metrics.jsonl"
    rows = broken.metrics()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert broken.metrics() == rows


# ------------------------------------------------------------------------------------------------------ no space


def test_no_space_for_a_checkpoint_leaves_the_last_one_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")
    real, calls = save_file, []

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second file of the second checkpoint
            Path(path).write_bytes(b"half")
            raise no_space()
        real(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(TorchstoneError, match="no space left on the disk; the checkpoint step-00000002 is good"):
            run("cut")
    tiny.assert_same_run(run("cut", resume=True), whole)


def test_no_space_for_the_metrics_or_the_first_files_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = open

    def full(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if str(path).endswith("metrics.jsonl") and "a" in mode:
            raise no_space()
        return real(path, mode, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(TorchstoneError, match="no space left"):
            run("metrics")
    for number in range(1, 9):
        with failing_at(number, no_space, dead=False), pytest.raises(TorchstoneError, match="no space left"):
            run(f"deep/first{number}")
        assert not (tmp_path / "deep").exists()


def test_nothing_in_the_source_writes_or_reads_pickle() -> None:
    root = Path(torchstone.__file__).parent
    pattern = re.compile(r"torch\.(save|load)\(|\bpickle\b(?! is)|np\.load\(|joblib|dill")
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
        and not line.lstrip().startswith(("#", "Pickle"))
        and 'torch.load(self.path, map_location="cpu", weights_only=True' not in line  # tensors alone, of TorchScale
        and "np.load(path, allow_pickle=False)" not in line  # arrays of images that a user brings
    ]
    assert found == []


def test_state_json_is_plain_and_complete(broken: RunFolder) -> None:
    state = json.loads((broken.state / "step-00000002" / "state.json").read_text())
    assert state["format"] == "torchstone.state" and state["step"] == 2 and state["format_version"] == 1
    assert set(state["files"]) == {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}
    names = load_tensors(broken.state / "step-00000002" / "optimizer.safetensors")
    assert "optimizer.exp_avg.embedding.weight" in names
