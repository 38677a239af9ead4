"""Drafting with a model's own predictors: the same text, whoever accepts how much."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from generate.small import VOCABULARY, build, ids
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.generate.speculative import Drafter
from torchstone.model.mask import CAUSAL, Blocks
from torchstone.model.stack.multi_token import predict
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer

LENGTHS = (7, 1, 12, 7, 3)
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"position": "learned"},
    "t5": {"position": "t5"},
    "grouped-xpos": {"attention": {"kind": "softmax", "heads": 4, "kv_heads": 2}, "position": "xpos"},
    "mla": {"attention": {"kind": "mla", "heads": 4, "kv_latent": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}},
    "experts": {"ffn": {"kind": "moe", "experts": 4, "hidden": 12, "router": "sigmoid_bias"}},
    "untied-post": {"head": {"kind": "lm", "tied": False}, "residual": {"kind": "post", "std": 0.3}},
    "lazy": {"depth": 4, "main": "lazy"},
}
SAMPLED = Sampling(temperature=1.5, max_new_tokens=14, seed=3)


def drafting(predictors: int, main: str = "plain", **fields: Any) -> Transformer:
    return build(stack={"kind": "multi_token", "predictors": predictors, "main": main}, **fields)


def texts(engine: Engine, sampling: Sampling, *lengths: int) -> list[Any]:
    done = engine.generate(ids(*lengths), sampling)
    return [(each.ids, each.finish, each.text, each.top_logprobs) for each in done]


FAST = ("learned", "mla")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_drafts_change_no_token(name: str) -> None:
    model = drafting(2, **MODELS[name])
    for sampling in (Sampling(temperature=0, max_new_tokens=14), SAMPLED):
        engine = Engine(model, draft="mtp")
        assert texts(engine, sampling, *LENGTHS) == texts(Engine(model), sampling, *LENGTHS)
        assert engine.steps <= 13 and engine.drafted > 0


# logits from weights that small are nearly flat: the noise, which drafts share, decides most tokens and not all
@pytest.mark.parametrize("predictors", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rows_that_accept_different_numbers_of_drafts_keep_their_text(predictors: int) -> None:
    model = drafting(predictors, residual={"kind": "pre", "std": 0.08})
    sampling = Sampling(max_new_tokens=30, top_p=0.95, repetition_penalty=1.3, logprobs=2, seed=1)
    engine = Engine(model, draft="mtp")
    done, plain = engine.generate(ids(*LENGTHS), sampling), Engine(model).generate(ids(*LENGTHS), sampling)
    for ours, theirs in zip(done, plain, strict=True):
        assert ours.ids == theirs.ids and ours.finish == theirs.finish
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.adjusted_logprobs == pytest.approx(theirs.adjusted_logprobs, abs=1e-4)
    shares = [each.accepted / each.drafted for each in done if each.accepted and each.drafted]
    assert len(set(shares)) > 1 and all(0.1 < share < 1 for share in shares)
    assert engine.steps < 25  # of 29 without drafts
    assert (engine.drafted, engine.accepted) == tuple(
        sum(getattr(each, name) for each in done) for name in ("drafted", "accepted")
    )


def test_cached_drafts_are_those_of_one_forward_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th draft is the k-th module's over all tokens and drafts so far, however many drafts stood before."""
    model, seen = drafting(3, residual={"kind": "pre", "std": 0.08}), []
    cached = Drafter.draft

    def spy(self: Drafter, rows: Any, hidden: torch.Tensor, choose: Any) -> Any:
        def chosen(logits_BV: torch.Tensor, drafted: list[list[int]]) -> list[int]:
            seen.append((logits_BV, [list(text) for text in drafted], len(drafted[0]) - len(rows[0])))
            return choose(logits_BV, drafted)

        return cached(self, rows, hidden, chosen)

    monkeypatch.setattr(Drafter, "draft", spy)
    Engine(model, draft="mtp").generate(ids(*LENGTHS), Sampling(max_new_tokens=12))
    lengths = [[len(text) for text in drafted] for _, drafted, already in seen if already == 0]
    grown = {b - a for old, new in itertools.pairwise(lengths) for a, b in zip(old, new, strict=False)}
    assert {1, 2, 3, 4} <= grown  # rows took from one to four tokens of a forward
    for logits_BV, drafted, already in seen:
        for b, text in enumerate(drafted):
            read = len(text) - 1 - already  # the model has read all but the newest token and the drafts
            hidden = model(torch.tensor([text[:read]])).hidden
            for k in range(1, already + 2):
                hidden, _ = predict(model, k, hidden, Tokens.of(torch.tensor([text[k : read + k]])))
            wanted = model.vocabulary_head().product(hidden[:, -1], model.embedding.table()).logits()[0]
            torch.testing.assert_close(logits_BV[b], wanted, rtol=1e-4, atol=1e-4)


def test_noise_that_decides_everything_accepts_every_draft() -> None:
    model = drafting(2, residual={"kind": "pre", "std": 1e-6})
    engine = Engine(model, draft="mtp")
    (done,) = engine.generate(ids(5), Sampling(max_new_tokens=16))
    # one token by the prompt, then three a step
    assert done.accepted == done.drafted == 10 and engine.steps == 5
    assert done.ids == Engine(model).generate(ids(5), Sampling(max_new_tokens=16))[0].ids


@pytest.mark.slow
def test_texts_end_where_they_end_without_drafts(letters: Tokenizer) -> None:
    flat = {"residual": {"kind": "pre", "std": 0.05}, "vocabulary": letters.vocabulary}
    model = drafting(2, **flat)
    for sampling in (Sampling(max_new_tokens=40, stop=("a", "B"), seed=5), Sampling(max_new_tokens=1)):
        for eos in (None, range(0, letters.vocabulary, 9)):
            both = [
                Engine(model, letters, draft=draft, eos=eos).generate(["ab", "", "hello"], sampling)
                for draft in ("mtp", None)
            ]
            ours, theirs = ([(each.ids, each.text, each.finish) for each in done] for done in both)
            assert ours == theirs
    limited = drafting(2, position="learned", context=20, residual={"kind": "pre", "std": 0.05})
    for each, other in zip(
        *(Engine(limited, draft=d).generate(ids(7, 18), SAMPLED) for d in ("mtp", None)), strict=True
    ):
        assert each.ids == other.ids and each.finish == other.finish == "length"


def test_streamed_events_and_chunked_prompts_and_packed_caches() -> None:
    model = drafting(1, residual={"kind": "pre", "std": 0.08})
    for options in ({"chunk": 4}, {"cache_bits": 8}):
        wanted = texts(Engine(model, **options), SAMPLED, *LENGTHS)  # type: ignore[arg-type]
        assert texts(Engine(model, draft="mtp", **options), SAMPLED, *LENGTHS) == wanted  # type: ignore[arg-type]
    events = list(Engine(model, draft="mtp").stream(ids(*LENGTHS), SAMPLED))
    for row, (tokens, finish, _, _) in enumerate(texts(Engine(model), SAMPLED, *LENGTHS)):
        mine = [event for event in events if event.row == row]
        assert [event.token for event in mine] == tokens and mine[-1].finish == finish


def test_guides_see_the_text_before_each_token() -> None:
    def odd(scores_BV: torch.Tensor, history: Any) -> torch.Tensor:
        last = torch.tensor([text[-1] for text in history.ids])
        bonus = 5.0 * (torch.arange(VOCABULARY)[None] == (last[:, None] + history.step) % VOCABULARY)
        return scores_BV + bonus

    model = drafting(2, residual={"kind": "pre", "std": 0.08})
    wanted = Engine(model).generate(ids(*LENGTHS), SAMPLED, guides=[odd])
    engine = Engine(model, draft="mtp")
    found = engine.generate(ids(*LENGTHS), SAMPLED, guides=[odd])
    assert [each.ids for each in found] == [each.ids for each in wanted]
    assert engine.accepted > 0.5 * engine.drafted  # a draft that the guide had not seen would hardly stand


@pytest.mark.parametrize(
    ("fields", "options", "says"),
    [
        ({"stack": "plain"}, {}, r"draft: mtp needs a model with predictors"),
        ({"predictors": 0}, {}, r"draft: mtp needs a model with predictors"),
        ({"attention": {"heads": 4, "window": 5}}, {}, "is ring and cannot take back drafts that fail"),
        (
            {"attention": {"kind": "retention", "heads": 4}},
            {},
            "decoder.layers.0.attention is recurrent and cannot take back drafts that fail",
        ),
        ({}, {"attention": CAUSAL & Blocks(4)}, "under an attention of bounded reach"),
        ({}, {"compile": "on"}, "not with compile on"),
        ({}, {"draft": "ngram"}, "draft: is mtp, not 'ngram'"),
    ],
)
def test_what_cannot_draft_is_refused_in_a_sentence(fields: dict[str, Any], options: dict[str, Any], says: str) -> None:
    fields = dict(fields)
    model = build(**fields) if "stack" in fields else drafting(fields.pop("predictors", 1), **fields)
    with pytest.raises(TorchstoneError, match=says):
        Engine(model, **{"draft": "mtp", **options})


def test_a_prefix_is_refused_with_drafts() -> None:
    model = drafting(1)
    state = model.state(1, 8)
    model(torch.tensor(ids(4)), state=state)
    with pytest.raises(TorchstoneError, match="prefix: has no hidden states of its tokens"):
        Engine(model, draft="mtp").generate(ids(3), SAMPLED, prefix=state)


def test_counts_are_there_with_drafts_alone() -> None:
    model = drafting(1)
    (plain,), (drafted,) = (Engine(model, draft=draft).generate(ids(4), SAMPLED) for draft in (None, "mtp"))
    assert plain.drafted is None and plain.accepted is None and drafted.drafted is not None
    assert replace(drafted, drafted=None, accepted=None).ids == plain.ids
