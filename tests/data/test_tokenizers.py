from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from torchstone.data import Tokenizer, TokenizerSpec
from torchstone.data import tokenizer as module
from torchstone.data.infilling import with_sentinels
from torchstone.data.store import Cache
from torchstone.data.tokenizers.bpe import BpeSpec
from torchstone.data.tokenizers.bytes import BytesSpec
from torchstone.data.tokenizers.file import FileSpec
from torchstone.errors import TorchstoneError
from torchstone.spec import kinds

TEXTS = [
    "the cat sat on the mat, the cats sat\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "naïve café 東京 🙂\n" * 20,
]


def load(spec: TokenizerSpec, cache: Path, texts: list[str] = TEXTS) -> Tokenizer:
    with Cache(cache) as transaction:
        return spec.load(lambda: iter(texts), f"hash of {len(texts)}", transaction)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(BpeSpec(vocabulary=300), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(BytesSpec(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["bpe", "plain"])
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


ANY = (
    st.text()
    | st.text(alphabet=" \n\t\r\x0b\x1c\x85\u2028aé東🙂'<|endoft>", max_size=60)
    | st.sampled_from(["<|endoftext|>", "a<|mask|>b<|pad|>", "\ufeffx", "\u0301", "\x00"])
)


def test_the_kinds_are_the_files() -> None:
    assert {"bpe", "bytes", "file"} <= set(kinds("tokenizer"))


@given(text=ANY)
def test_bytes_come_back_exactly(plain: Tokenizer, text: str) -> None:
    assert plain.encode(text) == list(text.encode())
    assert plain.decode(plain.encode(text)) == text
    assert plain.backend.encode(text, add_special_tokens=False).ids == plain.encode(text)


@given(text=ANY)
def test_bpe_comes_back_exactly_and_counts_its_bytes(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not bpe.specials.intersection(ids)
    assert bpe.token_bytes()[ids].sum() == len(text.encode())


@given(st.data())
def test_a_stream_shows_complete_text_only_and_in_the_end_all_of_it(bpe: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(ANY)
    stream = bpe.stream()
    shown = [stream.add(token) for token in bpe.encode(text)]
    assert "".join(shown) == text and stream.end() == ""

    ids = data.draw(st.lists(st.integers(0, bpe.vocabulary - 1), max_size=12))
    stream = bpe.stream()
    assert "".join([stream.add(token) for token in ids]) + stream.end() == bpe.decode(ids)


def test_a_split_character_is_held_back(plain: Tokenizer) -> None:
    stream = plain.stream()
    assert [stream.add(token) for token in plain.encode("a🙂")] == ["a", "", "", "", "🙂"]
    stream = plain.stream()
    assert [stream.add(0xF0), stream.end()] == ["", "\ufffd"]


def test_special_tokens_have_ids_and_no_bytes(ours: Tokenizer) -> None:
    special = [ours.separator, ours.mask, ours.pad]
    assert len(set(special)) == 3 and ours.specials == set(special)
    assert ours.token_bytes().dtype == np.int32 and ours.token_bytes().shape == (ours.vocabulary,)
    assert ours.token_bytes()[special].tolist() == [0, 0, 0]
    assert ours.decode(special) == ""


def test_vocabulary_is_the_size_asked_for(bpe: Tokenizer, plain: Tokenizer) -> None:
    assert (bpe.vocabulary, plain.vocabulary) == (300, 259)
    assert [bpe.separator, bpe.mask, bpe.pad] == [0, 1, 2]


def test_half_a_surrogate_pair_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(TorchstoneError, match="surrogate pair at character 2"):
        ours.encode("ab\ud800")


def test_long_texts_are_cut_without_changing_a_token(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS) + "x \n  \n\n y\n1\n\t2\nend"
    whole = bpe.encode_batch([text, "b"])
    monkeypatch.setattr(module, "_PIECE", 7)
    assert len(bpe._pieces(text)) > 20
    assert bpe.encode_batch([text, "b"]) == whole


def test_bpe_is_kept_by_content_and_settings(tmp_path: Path) -> None:
    def once() -> Iterator[str]:
        nonlocal runs
        runs += 1
        yield from TEXTS

    runs, seen = 0, []
    for vocabulary, content in [(300, "a"), (300, "a"), (301, "a"), (300, "b")]:
        with Cache(tmp_path) as cache:
            seen.append(BpeSpec(vocabulary=vocabulary).load(once, content, cache))
    assert runs == 3
    assert seen[0].hash == seen[1].hash == seen[3].hash != seen[2].hash


def test_a_saved_tokenizer_is_the_same_and_loads_in_transformers(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == ours.hash and again.encode(TEXTS[2]) == ours.encode(TEXTS[2])
    assert Tokenizer.load(tmp_path / "tokenizer.json").separator == ours.separator

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for loaded in (
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert len(loaded) == ours.vocabulary
        assert (loaded.eos_token_id, loaded.mask_token_id, loaded.pad_token_id) == (ours.separator, ours.mask, ours.pad)
        for text in [*TEXTS, " a b", "x ' y ."]:
            assert loaded.encode(text, add_special_tokens=False) == ours.encode(text)
            assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


def wordpiece(folder: Path, *special: str) -> tokenizers.Tokenizer:
    words = [*special, "[UNK]", "hello", "world", "##s"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(special))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    return backend


def test_any_tokenizer_file_loads(tmp_path: Path) -> None:
    wordpiece(tmp_path, "[SEP]", "[MASK]", "[PAD]")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load(FileSpec(path=str(path)), tmp_path)
        assert (
            tokenizer.decode(tokenizer.encode("Hello worlds hello")) == "hello worlds hello"
        )  # neither cut nor padded
        assert (tokenizer.separator, tokenizer.mask, tokenizer.pad) == (0, 1, 2)
        stream = tokenizer.stream()
        assert "".join(stream.add(token) for token in tokenizer.encode("hello worlds hello")) == "hello worlds hello"
        with pytest.raises(TorchstoneError, match="not byte-level"):
            tokenizer.token_bytes()


def test_tokenizers_agree_whose_ids_are_the_same_tokens(ours: Tokenizer, tmp_path: Path) -> None:
    more = with_sentinels(ours)
    ours.save(tmp_path)
    assert ours.agrees(Tokenizer.load(tmp_path)) and ours.agrees(more)
    assert not more.agrees(ours)  # there is nothing for its last ids
    word = Tokenizer(wordpiece(tmp_path), {})
    assert word.agrees(word) and not ours.agrees(word) and not word.agrees(ours)


def test_the_configuration_beside_a_file_names_the_separator(tmp_path: Path) -> None:
    wordpiece(tmp_path, "<end>", "[SEP]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}, "pad_token": None}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.separator == tokenizer.pad == 0 and tokenizer.mask is None


def test_bad_tokenizer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=r"no tokenizer: cannot read '.*tokenizer.json': No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TorchstoneError, match=r"tokenizer.json' is not a valid tokenizer.json"):
        Tokenizer.load(tmp_path)
    wordpiece(tmp_path)
    with pytest.raises(TorchstoneError, match="no token that separates documents"):
        _ = Tokenizer.load(tmp_path).separator
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(TorchstoneError, match=r"tokenizer_config.json' is not a JSON object"):
        Tokenizer.load(tmp_path)
