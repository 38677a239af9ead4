"""Models of random weights that `transformers` builds and ours reads, and a run in a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

import tiny
from torchstone.data.tokenizer import BYTE_CHARACTERS, SPECIAL, Tokenizer, byte_level
from torchstone.interop.layout import find_layout, load_state
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.train import training

VOCABULARY = 320
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 2}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 14,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2,
      "feed_forward_proj": "relu", "tie_word_embeddings": False}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One model, theirs and ours."""

    theirs: Any
    ours: Transformer


def made(cls: str, config: dict[str, Any]) -> Pair:
    """A model of theirs with random weights, and the same in ours."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, cls)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    settings = kind.config_class(**copy.deepcopy(config), **tokens, attn_implementation="eager")
    theirs = kind(settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            one = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(one + 0.3 * torch.randn(parameter.shape, generator=generator))
    values = {**json.loads(settings.to_json_string()), "architectures": [cls]}
    layout = find_layout(values["model_type"])
    state = theirs.state_dict()
    spec = validate(TransformerSpec, layout.to_spec(values, {name: x.shape for name, x in state.items()}))
    ours = spec.build()
    load_state(ours, layout.to_ours(state, spec))
    return Pair(theirs, ours.eval())


@pytest.fixture(scope="session")
def gpt2() -> Pair:
    return made("GPT2LMHeadModel", GPT2)


@pytest.fixture(scope="session")
def bert() -> Pair:
    return made("BertForMaskedLM", BERT)


@pytest.fixture(scope="session")
def t5() -> Pair:
    return made("T5ForConditionalGeneration", T5)


@pytest.fixture(scope="session")
def classifier() -> Pair:
    return made("BertForSequenceClassification", {**BERT, "num_labels": 3})


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """Bytes and three special tokens, without a template."""
    return byte_level({character: i for i, character in enumerate(BYTE_CHARACTERS)})


@pytest.fixture(scope="session")
def merging() -> Tokenizer:
    """Byte-level BPE whose words begin with a blank, and which also merges across "ab"."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cab and the cabin", " the cab sat on the mat ab ab ab ab"] * 9, trainer)
    return Tokenizer(backend, {"eos_token": SPECIAL["separator"], "mask_token": SPECIAL["mask"]})


@pytest.fixture(scope="session")
def framed() -> Tokenizer:
    """Bytes, and a single merge, in BERT's template: [CLS] text [SEP]."""
    vocabulary = {character: i for i, character in enumerate([*BYTE_CHARACTERS, "zz"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("z", "z")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL.values(), "[CLS]", "[SEP]"])
    numbers = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=numbers)
    return Tokenizer(backend, {"sep_token": "[SEP]", "mask_token": SPECIAL["mask"]})


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """``jsonl(record, ...)``: the path of a new file with these records, one a line; strings stand as they are."""

    def write(*records: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.glob('*.jsonl')))}.jsonl"
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
        return str(path)

    return write


def _run(folder: Path, **sections: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        training.train(tiny.recipe(folder, **sections), out=folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny causal language model over bytes."""
    return _run(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny masked language model over bytes."""
    return _run(tmp_path_factory.mktemp("masked"), **tiny.MASKED)
