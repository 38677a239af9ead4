"""Data sets of the Hugging Face `datasets` library, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import find, fingerprint, walk
from torchstone.errors import TorchstoneError

__all__ = ["HfSpec"]


class HfSpec(CorpusSpec):
    """A data set of the Hugging Face hub, or one saved on disk: one field of each row is a document.

    `dataset` is an id of the hub (streamed), a folder written by ``save_to_disk``, or the name of a file format
    (``json``, ``csv``, ``parquet``, ``text``) with `files`. Needs the extra `hf`.
    """

    unit = "rows"

    dataset: str = Field(min_length=1)
    """Id on the hub, folder of a saved data set, or the name of a file format."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    split: str = "train"
    """Which split of the data set becomes the corpus; it is split again into train, valid and test."""
    field: str = "text"
    """The column that holds the text."""
    files: str | tuple[str, ...] | None = None
    """Local files of a file format: a file, a folder or a glob, or a list of these."""
    revision: str | None = None
    """Commit, tag or branch on the hub; without it the newest commit."""

    def _saved(self) -> bool:
        folder = os.path.expanduser(self.dataset)
        return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))

    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise TorchstoneError("corpus hf needs the library datasets: pip install 'torchstone[hf]'") from None
        try:
            if self._saved():
                saved = datasets.load_from_disk(os.path.expanduser(self.dataset))
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            files = None if self.files is None else [str(file.path.resolve()) for file in find(self.files)]
            # A file format given files knows one split, which it calls train.
            return datasets.load_dataset(
                self.dataset,
                self.subset,
                split=self.split if files is None else "train",
                data_files=files,
                streaming=True,
                revision=self.revision,
            )
        except TorchstoneError:
            raise
        except Exception as error:  # the library raises dozens of types for a wrong id, split, network or file
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> TorchstoneError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return TorchstoneError(f"corpus hf: cannot read {self.dataset!r} split {self.split!r}: {reason[:300]}")

    def documents(self) -> Iterator[Document]:
        rows = iter(self._rows())
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a broken file or connection, met while streaming
                raise self._refusal(error) from None
            if self.field not in row:
                raise TorchstoneError(
                    f"corpus hf: {self.dataset!r} has no field {self.field!r}; fields: {', '.join(row)}"
                )
            if not isinstance(row[self.field], str):
                got = type(row[self.field]).__name__
                raise TorchstoneError(
                    f"corpus hf: field {self.field!r} of row {number} of {self.dataset!r} is {got}, a string is needed"
                )
            yield Document(f"{self.dataset}/{self.split}:{number}", row[self.field])
            number += 1

    def fingerprint(self) -> str:
        settings = (self.kind, self.dataset, str(self.subset), self.split, self.field)
        if self.files is not None:
            return fingerprint(find(self.files), *settings)
        if self._saved():
            return fingerprint(list(walk(Path(os.path.expanduser(self.dataset)))), *settings)
        try:
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(self.dataset, revision=self.revision).sha
        except ImportError:
            raise TorchstoneError("corpus hf needs the library datasets: pip install 'torchstone[hf]'") from None
        except Exception as error:  # no such data set, no network
            raise self._refusal(error) from None
        return fingerprint([], *settings, str(commit))

    def title(self) -> str:
        return f"{self.dataset} ({self.split})"
