"""A run directory: self-contained, and the only thing that passes between commands.

recipe.yaml            the resolved recipe
config.json            model spec and format version; valid for Hugging Face Auto classes
generation_config.json, tokenizer.json, tokenizer_config.json
model.safetensors      the weights of the newest checkpoint (model_ema.safetensors: their moving average)
metrics.jsonl          one JSON object a row
documents.json         bits and bytes of each document of the test split, as the last weights code it
environment.json       versions, device, threads
names.json             names of what the data number (entities, relations), where they have any
plots/                 learning curve
state/                 what resuming needs
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.files import full_disk, read_json, write_bytes, write_json
from torchstone.model import ModelSpec
from torchstone.model.site import initialise, parameter_name
from torchstone.recipe import Recipe, parse_yaml
from torchstone.spec import Part, Spec, validate
from torchstone.train.checkpoint import Checkpoints, TensorFile
from torchstone.train.migrations import FORMAT_VERSION, migrate

__all__ = ["RunFolder", "build_model", "load_weights", "memory_of", "shape_of"]


_FIXED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "names.json",
    "environment.json",
    "config.json",
    "recipe.yaml",
)
"""What is written when a run begins, in this order."""


class _ModelHolder(Spec):
    model: Part[ModelSpec]


def shape_of(spec: ModelSpec) -> nn.Module:
    """The model on the meta device: all shapes, no memory.

    Raises:
        TorchstoneError: a matrix has more elements than can be counted.
    """
    try:
        with torch.device("meta"):
            return spec.build()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise TorchstoneError("model: its sizes multiply to more bytes than can be counted") from None


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all, where that is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def build_model(
    spec: ModelSpec, seed: int | None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """The model on `device`, every parameter drawn by (seed, name); `seed` None leaves them unset for loading.

    Raises:
        TorchstoneError: the device has less memory than the weights take.
    """
    model = shape_of(spec) if dtype is None else shape_of(spec).to(dtype)
    need, there = sum(p.numel() * p.element_size() for p in model.parameters()), memory_of(torch.device(device))
    if there is not None and need > there:
        raise TorchstoneError(f"model: its weights take {need / 1e9:,.0f} GB, {device} has {there / 1e9:,.0f} GB")
    model = model.to_empty(device=device)
    if seed is not None:
        return initialise(model, seed)
    for buffer in model.buffers():
        buffer.zero_()  # what is there by chance may be no index
    return model


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor] | TensorFile,
    where: Path | str,
    new: Callable[[str], bool] = lambda name: False,
    left: Callable[[str], bool] = lambda name: False,
) -> None:
    """Put named tensors into a model, strictly; those of a file one at a time.

    Args:
        model: gets them.
        tensors: by name.
        where: they are from, for messages.
        new: parameters that may be absent from `tensors`, or of another shape there, and then stay as they are.
        left: tensors that the model need not have.

    Raises:
        TorchstoneError: missing, surplus or mis-shaped tensors, by name; the model is then unchanged.
    """
    own = {parameter_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    if isinstance(tensors, TensorFile):
        given, pairs = tensors.shapes, iter(tensors)
    else:
        given, pairs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, iter(tensors.items())
    missing = sorted(name for name in own if name not in given and not new(name))
    surplus = sorted(name for name in given if name not in own and not left(name))
    shapes = [
        f"{name} is {given[name]}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name] != tuple(own[name].shape) and not new(name)
    ]
    if missing or surplus or shapes:
        said = [
            f"missing {_some(missing)}" if missing else "",
            f"not of this model {_some(surplus)}" if surplus else "",
            _some(shapes) if shapes else "",
        ]
        raise TorchstoneError(f"{where}: {'; '.join(part for part in said if part)}")
    with torch.no_grad():
        for name, tensor in pairs:
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class RunFolder:
    """The files of a run; see the module's docstring."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -- being a run

    def exists(self) -> bool:
        """Whether a training was begun here."""
        return (self.path / "recipe.yaml").is_file() and (self.path / "config.json").is_file()

    def require(self) -> RunFolder:
        """This run.

        Raises:
            TorchstoneError: the folder is missing or no run.
        """
        if not self.path.is_dir():
            raise TorchstoneError(f"{self.path}: no such run")
        if not self.exists():
            lacks = [name for name in ("recipe.yaml", "config.json") if not (self.path / name).is_file()]
            raise TorchstoneError(f"{self.path}: not a run (no {' and no '.join(lacks)})")
        return self

    def check_free(self) -> None:
        """Refuse a folder in which something else lies.

        Raises:
            TorchstoneError: a run is there already (resume it or take another folder), or other files.
        """
        above = next((step for step in (self.path, *self.path.parents) if os.path.lexists(step)), None)
        if above is not None and not above.is_dir():
            raise TorchstoneError(f"{above}: is a file, not a folder for a run")
        if self.exists():
            raise TorchstoneError(
                f"{self.path}: holds a run already; continue it with --resume or choose another --out"
            )
        # what a kill may leave of a run before its recipe was written is not somebody else's
        others = (
            [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
            if self.path.is_dir()
            else []
        )
        foreign = set(others) - set(_FIXED[:-1])
        if foreign:
            raise TorchstoneError(
                f"{self.path}: exists and is not a run (it holds {min(foreign)}); choose another --out"
            )

    # -- reading

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe, migrated to today's format."""
        path = self.path / "recipe.yaml"
        try:
            data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise TorchstoneError(f"{path}: cannot be read ({error})") from None
        return validate(Recipe, migrate("recipe", data, self._version(), path), str(path))

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``, migrated to today's format."""
        path = self.path / "config.json"
        config = read_json(path)
        if not isinstance(config, dict) or config.get("model_type") != "torchstone":
            raise TorchstoneError(
                f"{path}: not torchstone's (model_type is "
                f"{config.get('model_type') if isinstance(config, dict) else None!r})"
            )
        return migrate("config", config, self._version(config), path)

    def _version(self, config: Mapping[str, Any] | None = None) -> int:
        config = read_json(self.path / "config.json") if config is None else config
        version = config.get("format_version") if isinstance(config, Mapping) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise TorchstoneError(f"{self.path / 'config.json'}: has no format_version")
        return version

    @property
    def model_spec(self) -> ModelSpec:
        """The model's spec."""
        return validate(_ModelHolder, {"model": self.config.get("spec")}, str(self.path / "config.json")).model

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.path)

    def generation_settings(self) -> dict[str, Any]:
        """``generation_config.json``; empty if there is none."""
        path = self.path / "generation_config.json"
        settings = read_json(path) if path.is_file() else {}
        if not isinstance(settings, dict):
            raise TorchstoneError(f"{path}: no JSON object")
        return settings

    def start(self) -> dict[str, Any]:
        """What a recipe takes from this run when it starts from it: the model, and the tokenizer of a `text` corpus."""
        self.require()
        body: dict[str, Any] = {"model": self.model_spec.dump()}
        if (self.path / "tokenizer.json").is_file():
            made = getattr(self.recipe.data, "tokenizer", None)
            # bytes need no file, and data that is laid over bytes takes nothing else
            plain = made is not None and made.kind == "bytes"
            body["data"] = {
                "kind": "text",
                "tokenizer": "bytes" if plain else {"kind": "file", "path": str(self.path)},
            }
        return body

    def model(
        self,
        weights: Literal["last", "ema"] = "last",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The trained model, in evaluation mode, its tensors read one at a time.

        Raises:
            TorchstoneError: no weights yet, or a file that is truncated, altered or of another model.
        """
        path = self.path / ("model.safetensors" if weights == "last" else "model_ema.safetensors")
        if not path.is_file():
            what = (
                "no weights yet; it stopped before its first checkpoint" if weights == "last" else "no moving average"
            )
            raise TorchstoneError(f"{self.path}: {what}")
        model = build_model(self.model_spec, None, device, dtype)
        load_weights(model, TensorFile(path), path)
        return model.eval()

    def names(self, what: str) -> list[str]:
        """Names of what the run's data number, ``entities`` or ``relations``, in the order of their numbers.

        Raises:
            TorchstoneError: the run's data have none.
        """
        path = self.path / "names.json"
        found = read_json(path).get(what) if path.is_file() else None
        if found is None:
            raise TorchstoneError(f"{self.path}: its data have no {what}")
        return list(found)

    def documents(self) -> dict[str, list[float]] | None:
        """``bits`` and ``bytes`` of each document of the test split; None where the test split has not been measured,
        or knows no documents."""
        path = self.path / "documents.json"
        found: dict[str, list[float]] | None = read_json(path) if path.is_file() else None
        return found

    def write_documents(self, documents: Mapping[str, list[float]]) -> None:
        """Keep what `documents` gives."""
        with full_disk(self.path):
            write_bytes(self.path / "documents.json", json.dumps(documents).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a last line that a kill cut short is left out."""
        return list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        with open(path, encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError):
                    yield json.loads(line)

    @property
    def state(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "state"

    def checkpoints(self, keep_last: int = 2) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.state, keep_last)

    # -- writing

    def begin(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer | None,
        environment: Mapping[str, Any],
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write what does not change during training; ``recipe.yaml`` last, because its presence makes it a run.

        `names` are those of what the data number, for `names`.

        Raises:
            TorchstoneError: the disk is full or read-only; a run that was not there before is then not there.
        """
        fresh = not self.exists()
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self._begin(recipe, tokenizer, environment, names)
        except Exception:
            if fresh:
                for name in _FIXED:
                    (self.path / name).unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise

    def _begin(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer | None,
        environment: Mapping[str, Any],
        names: Mapping[str, Sequence[str]] | None,
    ) -> None:
        with full_disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.state, self.path / "plots"):
            for stale in folder.glob(".*.tmp"):  # left by a kill
                stale.unlink(missing_ok=True)
        if tokenizer is not None:
            with full_disk(self.path), tempfile.TemporaryDirectory() as made:
                tokenizer.save(made)
                for name in _FIXED[:2]:
                    write_bytes(self.path / name, Path(made, name).read_bytes())
            write_json(
                self.path / "generation_config.json",
                {
                    "bos_token_id": tokenizer.separator,
                    "eos_token_id": tokenizer.separator,
                    "pad_token_id": tokenizer.pad,
                    "do_sample": True,
                    "max_new_tokens": 256,
                },
            )
        if names is not None:
            write_json(self.path / "names.json", names)
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "config.json", config_of(recipe.model, tokenizer))
        write_bytes(self.path / "recipe.yaml", recipe.yaml().encode())

    def publish(self, checkpoint: Path) -> None:
        """Make the weights of a checkpoint the run's weights: a hard link where the file system has them."""
        for source, target in (("model", "model"), ("ema", "model_ema")):
            file = checkpoint / f"{source}.safetensors"
            if not file.exists():
                continue
            final, temporary = self.path / f"{target}.safetensors", self.path / f".{target}.{os.getpid()}.tmp"
            if final.exists() and final.samefile(file):
                continue  # to rename a link over another link to the same file does nothing and leaves both
            temporary.unlink(missing_ok=True)
            with full_disk(self.path):
                try:
                    os.link(file, temporary)
                except OSError:
                    shutil.copyfile(file, temporary)
                os.replace(temporary, final)

    def trim_metrics(self, step: int) -> None:
        """Drop rows after `step`: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            rows = [row for row in self._rows() if row.get("step", 0) <= step]
            write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def config_of(spec: ModelSpec, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """``config.json`` of a model: its spec, and the names that Hugging Face tools look for."""
    body = spec.dump()
    heads = body.get("attention", {}).get("heads") if isinstance(body.get("attention"), dict) else None
    tops = {"lm": "ForCausalLM", "mlm": "ForMaskedLM", "classification": "ForSequenceClassification"}
    head = (body.get("head") or {}).get("kind", "")
    facts = {
        "vocab_size": body.get("vocabulary"),
        "hidden_size": body.get("width"),
        "num_hidden_layers": body.get("depth"),
        "num_attention_heads": heads,
        "max_position_embeddings": body.get("context"),
        "is_encoder_decoder": body.get("encoder") is not None,
        "tie_word_embeddings": (body.get("head") or {}).get("tied"),
    }
    if tokenizer is not None:
        facts |= {
            "bos_token_id": tokenizer.separator,
            "eos_token_id": tokenizer.separator,
            "pad_token_id": tokenizer.pad,
        }
    return {
        "model_type": "torchstone",
        "architectures": [f"Torchstone{tops.get(head, 'Model')}"],
        "format_version": FORMAT_VERSION,
        **{name: value for name, value in facts.items() if value is not None},
        "torch_dtype": "float32",
        "spec": body,
    }
