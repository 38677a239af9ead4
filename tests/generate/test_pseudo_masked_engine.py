"""Writing with pseudo masks: what is filled in and gone on with is what one pass over all of it would choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from torchstone.api import Run, load
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.generate.pseudo_masked import PseudoMaskedEngine
from torchstone.keys import Key
from torchstone.model.mask import Mask, Roles
from torchstone.model.tokens import Tokens
from torchstone.objectives import Facts, tokens_of
from torchstone.objectives.pseudo_masked_seq2seq import PseudoMaskedSeq2seqSpec

SEPARATOR, MASK, PAD = 256, 257, 258
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, made = tmp_path_factory.mktemp("pseudo"), {}
    std = {"position": "t5", "residual": {"kind": "pre", "std": 0.4}}
    for kind, model in (
        ("pseudo_masked", std),
        ("pseudo_masked_seq2seq", std),
        ("masked_lm", {}),
        ("short", {"position": "learned", "context": 12}),
    ):
        objective = {"kind": "pseudo_masked" if kind == "short" else kind}
        recipe = tiny.recipe(folder, model={**tiny.MASKED["model"], **model}, objective=objective)
        made[kind] = load(tiny.saved(folder / kind, recipe).path)
    return made


def engine_of(run: Run, **more: Any) -> PseudoMaskedEngine:
    return PseudoMaskedEngine(run.model(), run.tokenizer(), PAD, eos=(), **more)


@torch.no_grad()
def test_what_is_filled_in_is_what_one_pass_chooses(runs: dict[str, Run]) -> None:
    engine = engine_of(run := runs["pseudo_masked"])
    prompts = [[SEPARATOR, *b"ab", MASK, MASK, *b"yz"], [MASK, *b"c", MASK, MASK]]
    for prompt, done in zip(prompts, engine.generate(prompts, Sampling(**GREEDY)), strict=True):
        places, n = [place for place, token in enumerate(prompt) if token == MASK], len(prompt)
        assert len(done.ids) == len(places) and done.finish == "length"
        steps = list(range(1, len(places) + 1))
        tokens = Tokens.of(
            torch.tensor([[*prompt, *done.ids, *[PAD] * len(places)]]),
            role=torch.tensor([[*[0] * n, *steps, *[-t for t in steps]]]),
            position=torch.tensor([[*range(n), *places, *places]]),
        )
        logits = run.model()(tokens, mask=Mask((Roles(),))).logits[0]
        assert logits[-len(places) :].argmax(-1).tolist() == done.ids


@torch.no_grad()
def test_what_is_gone_on_with_is_what_training_predicts(runs: dict[str, Run]) -> None:
    run = runs["pseudo_masked_seq2seq"]
    engine = engine_of(run)
    for done in engine.generate([[SEPARATOR, *b"ab"], [*b"c"]], Sampling(**GREEDY)):
        whole = torch.tensor([[*done.prompt_ids, *done.ids]])
        after = whole[:, 1:].clone()
        after[:, : len(done.prompt_ids) - 1] = -100
        objective = PseudoMaskedSeq2seqSpec().build(Facts(259, MASK, PAD, SEPARATOR))
        batch = objective.prepare({"ids": whole[:, :-1], "next": after}, Key(0))
        logits = run.model()(tokens_of(batch, batch["pseudo"]), mask=Mask((Roles(),))).logits[0]
        assert logits[: len(done.ids)].argmax(-1).tolist() == done.ids and len(done.ids) == 4


def test_a_row_is_written_alike_alone_and_with_others(runs: dict[str, Run]) -> None:
    engine, how = engine_of(runs["pseudo_masked"]), Sampling(seed=3, max_new_tokens=3, repetition_penalty=1.5)
    prompts = [[SEPARATOR, *b"ab", MASK, *b"yz"], [*b"c"]]
    both = engine.generate(prompts, how)
    for number, prompt in enumerate(prompts):
        (alone,) = engine.generate([prompt], how, requests=[number])
        assert alone.ids == both[number].ids


def test_the_command_fills_in_and_goes_on(runs: dict[str, Run], cli: Callable[..., Any]) -> None:
    run = runs["pseudo_masked"]
    (done,) = run.generate("ab", suffix="yz", **GREEDY)
    assert done.prompt_ids == [SEPARATOR, *b"ab", MASK, MASK, MASK, MASK, *b"yz"]
    options = ("--temperature", "0", "--max-new-tokens", "4", "--device", "cpu")
    assert cli("generate", run.path, "--prompt", "ab", "--suffix", "yz", *options).out == done.text + "\n"
    (done,) = runs["pseudo_masked_seq2seq"].generate("ab", **GREEDY)
    assert done.prompt_ids == [SEPARATOR, *b"ab"] and 1 <= len(done.ids) <= 4
    assert isinstance(Engine.of_run(run), PseudoMaskedEngine)


def test_evaluation_tells_how_long_a_middle_is(
    runs: dict[str, Run], tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file, rows = runs["short"], tmp_path / "holes.jsonl", []
    holes = [("a", "b", "c"), ("abcdefgh", "bc", "i"), ("a", "bcdefgh", "i"), ("", "", "")]
    written = [run.generate(a, suffix=c, temperature=0.0, max_new_tokens=1)[0].text for a, b, c in holes[:1]]
    holes.append(("a", written[0], "c"))
    file.write_text(
        "".join(json.dumps(dict(zip(("prefix", "middle", "suffix"), h, strict=True))) + "\n" for h in holes)
    )

    generate = PseudoMaskedEngine.generate

    def seen(self: Any, prompts: Any, sampling: Sampling, **options: Any) -> Any:
        rows.extend(list(prompt) for prompt in prompts)
        return generate(self, prompts, sampling, **options)

    monkeypatch.setattr(PseudoMaskedEngine, "generate", seen)
    (result,) = json.loads(cli("evaluate", run.path, "--infilling", file, "--json", "--device", "cpu").out)["results"]
    # 12 positions: 3 for the middle, one for the separator in front
    assert (result["mode"], result["max_new_tokens"], result["cut"]) == ("pseudo_masks", 3, 1)
    assert rows[0] == [SEPARATOR, *b"a", MASK, *b"c"] and rows[-1] == rows[0]
    assert rows[1] == [SEPARATOR, *b"bcdefgh", MASK, MASK, *b"i"]
    assert rows[2] == [SEPARATOR, *b"a", MASK, MASK, MASK, *b"i"] and rows[3] == [SEPARATOR, MASK]
    assert result["metrics"]["exact"]["value"] >= 0.2
    with pytest.raises(TorchstoneError, match="has no sentinel tokens"):
        runs["masked_lm"].evaluate(infilling=file)


def test_what_cannot_be_written_is_one_sentence(runs: dict[str, Run]) -> None:
    run = runs["pseudo_masked"]
    for options in ({"attention": "window:4"}, {"cache_bits": 8}, {"draft": "mtp"}):
        with pytest.raises(TorchstoneError, match="are for a decoder; this is an encoder with pseudo masks"):
            run.generate("ab", suffix="c", **options)
    with pytest.raises(TorchstoneError, match="1 suffixes for 2 prompts; one each is needed"):
        run.generate(["a", "b"], suffix="c")
    assert len(runs["short"].generate("abcd", suffix="efg", **GREEDY)[0].ids) == 4  # stand-ins have the holes' places
    with pytest.raises(TorchstoneError, match="prompt of 13 tokens is too long: the model knows 12 positions"):
        runs["short"].generate("abcd", suffix="efgh", **GREEDY)
    with pytest.raises(TorchstoneError, match="12 tokens and one to write are more than the model's 12 positions"):
        engine_of(runs["short"]).generate([[*b"abcdefghijkl"]])
    assert len(engine_of(runs["short"]).generate([[*b"abcdefghij"]], Sampling(**GREEDY))[0].ids) == 2
    with pytest.raises(TorchstoneError, match="is no decoder; generation needs causal: true"):
        runs["masked_lm"].generate("ab", suffix="c")
    with pytest.raises(TorchstoneError, match="prefix and routes are for a decoder"):
        engine_of(run).generate([[1]], prefix=SimpleNamespace(rows=1, reach=0))  # type: ignore[arg-type]
