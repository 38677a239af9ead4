"""The engine: cached decoding equals recomputing, rows do not see each other, texts end where they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generate.small import VOCABULARY, build, ids, recomputed
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, History, Sampling, SeededNoise
from torchstone.generate.compiled import CompiledStep
from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Blocks, Window
from torchstone.model.transformer import Transformer

POSITIONS = ["none", "learned", "sinusoidal", "rotary", "xpos", "alibi", "t5"]
ATTENTIONS: dict[str, dict[str, Any]] = {
    "grouped": {"kind": "softmax", "heads": 4, "kv_heads": 2},
    "window": {"kind": "softmax", "heads": 4, "window": 5},
    "softcap": {"kind": "softmax", "heads": 4, "kv_heads": 1, "softcap": 5.0, "qk_norm": True},
    "mla": {"kind": "mla", "heads": 4, "kv_latent": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
}
MODELS: dict[str, dict[str, Any]] = {
    **{position: {"position": position} for position in POSITIONS},
    **{f"{name}-rotary": {"attention": attention} for name, attention in ATTENTIONS.items()},
    "window-alibi": {"attention": ATTENTIONS["window"], "position": "alibi"},
    "grouped-alibi": {"attention": ATTENTIONS["grouped"], "position": "alibi"},
    "one_window_layer": {"layers": [{"at": [0], "attention": ATTENTIONS["window"]}]},
    "parallel-post": {"block": "parallel", "residual": {"kind": "post", "std": 0.3}},
    "encoder_decoder": {"encoder": {"depth": 1}},
    "encoder_decoder-t5": {"encoder": {"depth": 1}, "position": "t5"},
    "gated_retention": {"attention": {"kind": "gated_retention", "heads": 4, "chunk": 4}},
    "yoco": {"depth": 3, "stack": {"kind": "yoco", "self_attention": {"kind": "gated_retention", "heads": 4}}},
    "yoco-window": {
        "stack": {"kind": "yoco", "self_attention": {"kind": "softmax", "heads": 4, "window": 5}},
        "attention": ATTENTIONS["grouped"],
    },
    "tim-t5": {"depth": 3, "stack": {"kind": "tim", "plain_first": 1}, "position": "t5"},
    "untied-softcapped": {"head": {"kind": "lm", "tied": False, "softcap": 20.0}},
}
LENGTHS, NEW = (7, 1, 12, 7, 3), 14
GREEDY = Sampling(temperature=0, max_new_tokens=NEW)


def sources(model: Transformer, rows: int) -> dict[str, Any]:
    """Inputs of the encoder of different lengths, where there is one."""
    return {} if model.encoder is None else {"memory": ids(*range(4, 4 + rows), seed=5)}


def stepped(model: Transformer, backend: str) -> Engine:
    """An engine whose decode step is compiled by `backend`."""
    engine = Engine(model, compile="on")
    engine._compiled = CompiledStep(engine.model, backend)
    return engine


@pytest.mark.parametrize("name", list(MODELS))
def test_cached_greedy_decoding_equals_recomputing(name: str) -> None:
    model, prompts = build(**MODELS[name]), ids(*LENGTHS)
    memory = sources(model, len(prompts))
    done = Engine(model, compile="off").generate(prompts, GREEDY, **memory)
    for row, (one, prompt) in enumerate(zip(done, prompts, strict=True)):
        assert one.ids == recomputed(model, prompt, NEW, memory["memory"][row] if memory else None), f"row {row}"
        assert (one.finish, one.prompt_ids, one.request) == ("length", prompt, row)


WITHIN = {"blocks": CAUSAL & Blocks(4), "window": CAUSAL & Window(6)}


@pytest.mark.parametrize("words", list(WITHIN))
@pytest.mark.parametrize("position", ["rotary", "xpos", "alibi"])
def test_decoding_under_a_mask_equals_recomputing_and_holds_no_more(position: str, words: str) -> None:
    model, prompts, mask = build(position=position), ids(*LENGTHS), WITHIN[words]
    engine = Engine(model, compile="off", attention=mask, chunk=5)
    for one, prompt in zip(engine.generate(prompts, GREEDY), prompts, strict=True):
        assert one.ids == recomputed(model, prompt, NEW, mask=mask)
    assert [one.ids for one in Engine(model, compile="off").generate(prompts, GREEDY)] != [
        one.ids for one in engine.generate(prompts, GREEDY)
    ]
    assert model.state(1, 64, mask=mask).bytes() == model.state(1, 4096, mask=mask).bytes()


@pytest.mark.slow
@pytest.mark.parametrize("words", list(WITHIN))
def test_compiled_decoding_under_a_mask_equals_eager(words: str) -> None:
    model, prompts, mask = build(position="xpos"), ids(*LENGTHS), WITHIN[words]
    eager = Engine(model, compile="off", attention=mask).generate(prompts, GREEDY)
    engine = Engine(model, compile="on", attention=mask)
    engine._compiled = CompiledStep(engine.model, "aot_eager", mask)
    assert engine.generate(prompts, GREEDY) == eager


def test_attention_that_a_layer_cannot_honour_is_refused_at_once() -> None:
    model = build(attention={"kind": "retention", "heads": 4})
    with pytest.raises(TorchstoneError, match="attention retention of layer 0 cannot honour 'window'"):
        Engine(model, attention=CAUSAL & Window(4))
    with pytest.raises(TorchstoneError, match="decoding with a state needs a causal mask"):
        Engine(build(), attention=BIDIRECTIONAL)


def test_compiled_greedy_decoding_equals_eager() -> None:
    model, prompts = build(depth=1), ids(*LENGTHS)
    eager = Engine(model, compile="off").generate(prompts, GREEDY)
    engine = stepped(model, "aot_eager")
    assert engine.generate(prompts, GREEDY) == eager
    # a batch that thins out, and lengths that differ by much
    uneven = [[*prompt, *prompt][: 2 * n + 1] for n, prompt in enumerate(prompts)]
    ends = {eager[0].ids[3], eager[1].ids[5]}
    plain = Engine(model, compile="off", eos=ends)
    engine.eos = frozenset(ends)
    assert engine.generate(uneven, GREEDY) == plain.generate(uneven, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_compiled_greedy_decoding_equals_eager_for_every_part(name: str) -> None:
    model, prompts = build(**MODELS[name]), ids(*LENGTHS)
    memory = sources(model, len(prompts))
    engine = stepped(model, "aot_eager")
    assert engine.generate(prompts, GREEDY, **memory) == Engine(model, compile="off").generate(
        prompts, GREEDY, **memory
    )
    one = {what: value[:1] for what, value in memory.items()}
    assert engine.generate(prompts[:1], GREEDY, **one)[0].ids == recomputed(
        model, prompts[0], NEW, *one.get("memory", ())
    )


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("name", ["rotary", "window-alibi", "encoder_decoder", "yoco", "mla-rotary"])
def test_inductor_greedy_decoding_equals_recomputing(name: str) -> None:
    model, prompts = build(**MODELS[name]), ids(*LENGTHS)
    memory = sources(model, len(prompts))
    engine = Engine(model, compile="on")
    done = engine.generate(prompts, GREEDY, **memory)
    for row, prompt in enumerate(prompts):
        assert done[row].ids == recomputed(model, prompt, NEW, memory["memory"][row] if memory else None)
    # rows that leave, longer texts, another number of rows, equal prompts
    engine.eos = frozenset(one.ids[3] for one in done[:3])
    plain, long = Engine(model, compile="off", eos=engine.eos), Sampling(temperature=0, max_new_tokens=35)
    more = [*prompts, *prompts]
    extra = {what: [*value, *value] for what, value in memory.items()}
    assert engine.generate(more, long, **extra) == plain.generate(more, long, **extra)
    assert engine._compiled is not None


@pytest.mark.parametrize(
    "name",
    ["rotary", pytest.param("one_window_layer", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)],
)
def test_compiled_step_is_compiled_once_for_all_lengths_and_rows(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build(**MODELS[name], depth=2 if name == "one_window_layer" else 1)
    counter = CompileCounterWithBackend("eager")
    engine = stepped(model, counter)  # type: ignore[arg-type]
    for lengths, new in (((7, 9, 2), 3), ((4, 4), 30), ((1, 2, 3, 4, 5), 12), ((20, 3, 3), 40)):
        prompts = ids(*lengths, seed=new)
        done = engine.generate(prompts, Sampling(temperature=0, max_new_tokens=new))
        assert [one.ids for one in done] == [recomputed(model, prompt, new) for prompt in prompts]
    assert counter.frame_count == 1
    for new in (2, 20):
        engine.generate(ids(3), Sampling(temperature=0, max_new_tokens=new))
    assert counter.frame_count == 2, "one row has a graph of its own"


def test_two_engines_never_share_a_compiled_step() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    for fields in ({"depth": 1}, {"depth": 1, "position": "alibi"}):
        model = build(**fields)
        done = stepped(model, counter).generate(ids(4), GREEDY)  # type: ignore[arg-type]
        assert done[0].ids == recomputed(model, ids(4)[0], NEW)
    assert counter.frame_count == 2


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=NEW, top_p=0.9, seed=3)], ids=["greedy", "drawn"])
def test_prompt_alone_gives_the_same_tokens_as_in_a_batch(sampling: Sampling) -> None:
    engine, prompts = Engine(build(), compile="off"), ids(*LENGTHS)
    batch = engine.generate(prompts, sampling)
    for row, prompt in enumerate(prompts):
        assert engine.generate([prompt], sampling, requests=[row]) == [batch[row]]
    backwards = engine.generate(prompts[::-1], sampling, requests=range(len(prompts))[::-1])
    assert backwards[::-1] == batch


def test_equal_prompts_differ_by_request_and_are_read_once() -> None:
    model, prompt = build(), ids(9)[0]
    rows: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    done = Engine(model, compile="off").generate([prompt] * 4, Sampling(max_new_tokens=8))
    hook.remove()
    assert len({tuple(one.ids) for one in done}) == 4
    assert rows[0] == 1 and rows[1] == 4


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("name", ["rotary", "window-rotary", "encoder_decoder"])
def test_prompts_read_in_chunks_equal_prompts_read_at_once(chunk: int, name: str) -> None:
    model, prompts = build(**MODELS[name]), ids(*LENGTHS)
    memory = sources(model, len(prompts))
    whole = Engine(model, compile="off").generate(prompts, GREEDY, **memory)
    assert Engine(model, compile="off", chunk=chunk).generate(prompts, GREEDY, **memory) == whole


def test_a_cache_of_few_bits_is_what_the_engine_decodes_with() -> None:
    model, prompts = build(**MODELS["mla-rotary"]), ids(*LENGTHS)
    full, few = Engine(model, compile="off"), Engine(model, compile="off", cache_bits=4)
    assert few.generate(prompts, GREEDY) != full.generate(prompts, GREEDY)
    for one in few.generate(prompts, Sampling(temperature=0, max_new_tokens=5)):
        state, text, chosen = model.state(1, 64, cache_bits=4), one.prompt_ids, []
        for _ in range(5):
            chosen.append(int(model(torch.tensor([text]), state=state, outputs="last").logits.argmax()))
            text = chosen[-1:]
        assert one.ids == chosen


@pytest.mark.slow
@pytest.mark.compiler
def test_a_cache_of_few_bits_compiles() -> None:
    model, prompts = build(**MODELS["mla-rotary"]), ids(*LENGTHS)
    compiled = Engine(model, compile="on", cache_bits=4)
    eager = Engine(model, compile="off", cache_bits=4)
    assert compiled.generate(prompts, GREEDY) == eager.generate(prompts, GREEDY)
    assert compiled._compiled is not None


def test_cache_that_grows_equals_one_that_is_large_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, long = build(), ids(*LENGTHS), Sampling(temperature=0, max_new_tokens=50)
    large = Engine(model, compile="off").generate(prompts, long)
    monkeypatch.setattr("torchstone.generate.engine._ROOM", 2)
    assert Engine(model, compile="off").generate(prompts, long) == large


def test_rows_end_separately_and_leave_the_batch() -> None:
    model, prompts = build(), ids(*LENGTHS)
    plain = Engine(model, compile="off").generate(prompts, GREEDY)
    end = plain[0].ids[4]
    rows: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    done = Engine(model, compile="off", eos=end).generate(prompts, GREEDY)
    hook.remove()
    assert rows == sorted(rows, reverse=True) and rows[-1] < len(prompts)
    for before, after in zip(plain, done, strict=True):
        cut = before.ids.index(end) + 1 if end in before.ids else NEW
        assert after.ids == before.ids[:cut], "the end token is part of what was sampled"
        assert after.finish == ("eos" if end in before.ids else "length")


def test_model_limit_ends_a_row_where_its_positions_do() -> None:
    model = build(position="learned", context=16)
    done = Engine(model, compile="off").generate(ids(10, 3, 16), Sampling(temperature=0, max_new_tokens=12))
    # the last token of a text is never fed, so it needs no position
    assert [len(one.ids) for one in done] == [7, 12, 1]
    assert {one.finish for one in done} == {"length"}
    for one, prompt in zip(done, ids(10, 3, 16), strict=True):
        assert one.ids == recomputed(model, prompt, len(one.ids))


def test_stream_tells_what_generate_collects(letters: Tokenizer) -> None:
    engine = Engine(build(vocabulary=letters.vocabulary), letters, compile="off")
    sampling = Sampling(max_new_tokens=20, stop=("e", "zz"), logprobs=0, seed=1)
    prompts = ["ab", "c", ""]
    done, events = engine.generate(prompts, sampling), list(engine.stream(prompts, sampling))
    for row, one in enumerate(done):
        mine = [event for event in events if event.row == row]
        assert [event.token for event in mine] == one.ids
        assert "".join(event.text for event in mine) == one.text
        assert [event.logprob for event in mine] == one.logprobs
        assert [event.finish for event in mine] == [None] * (len(mine) - 1) + [one.finish]


def test_recorded_log_probabilities_equal_one_forward_over_the_text() -> None:
    model, prompts = build(), ids(*LENGTHS)
    sampling = Sampling(max_new_tokens=NEW, top_k=5, temperature=0.8, logprobs=2, seed=2)
    for one in Engine(model, compile="off").generate(prompts, sampling):
        text = torch.tensor([one.prompt_ids + one.ids])
        with torch.no_grad():
            own = model(text).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1)
        at = torch.tensor(one.ids)[:, None]
        assert one.logprobs is not None and one.adjusted_logprobs is not None and one.top_logprobs is not None
        torch.testing.assert_close(torch.tensor(one.logprobs), own.gather(1, at)[:, 0], rtol=1e-5, atol=1e-5)
        kept = (own / 0.8).masked_fill(own < own.topk(5).values[:, -1:], float("-inf")).log_softmax(-1)
        adjusted = torch.tensor(one.adjusted_logprobs)
        torch.testing.assert_close(adjusted, kept.gather(1, at)[:, 0], rtol=1e-4, atol=1e-4)
        assert [pair[0][0] for pair in one.top_logprobs] == own.argmax(-1).tolist()


def test_repetition_penalty_sees_prompt_and_text() -> None:
    engine, prompts = Engine(build(), compile="off"), ids(*LENGTHS)
    # a penalty that nothing survives: no token comes twice while others are left
    done = engine.generate(prompts, Sampling(temperature=0, max_new_tokens=30, repetition_penalty=100.0))
    plain = engine.generate(prompts, Sampling(temperature=0, max_new_tokens=30))
    repeats = [sum(len(one.ids) - len(set(one.ids)) for one in some) for some in (done, plain)]
    assert repeats[0] < repeats[1] / 3


def test_guides_and_noise_sources_come_from_outside() -> None:
    engine, prompts = Engine(build(), compile="off"), ids(4, 6)

    def only_even(scores: torch.Tensor, history: History) -> torch.Tensor:
        assert [len(text) for text in history.ids] == [4 + history.step, 6 + history.step]
        return scores.masked_fill(torch.arange(VOCABULARY) % 2 == 1, float("-inf"))

    done = engine.generate(prompts, Sampling(max_new_tokens=20), guides=[only_even])
    assert all(token % 2 == 0 for one in done for token in one.ids)

    class Shared(SeededNoise):
        def gumbel(self, requests: Any, step: int, vocabulary: int, device: Any = "cpu") -> torch.Tensor:
            return super().gumbel([0] * len(requests), step, vocabulary, device)

    same = engine.generate([prompts[0]] * 3, Sampling(max_new_tokens=20), noise=Shared(9))
    assert len({tuple(one.ids) for one in same}) == 1


def test_half_precision_is_a_copy_cast_once() -> None:
    model = build()
    engine = Engine(model, dtype=torch.bfloat16, compile="off")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(engine.generate(ids(5, 3), GREEDY)[1].ids) == NEW
    assert Engine(model).model is model


def test_refresh_takes_the_present_weights() -> None:
    model = build()
    engine, prompt = Engine(model, dtype=torch.float64, compile="off"), ids(5)
    before = engine.generate(prompt, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    assert engine.generate(prompt, GREEDY) == before
    engine.refresh()
    assert engine.generate(prompt, GREEDY) != before


def test_gradients_are_on_again_between_events() -> None:
    for _ in Engine(build(), compile="off").stream(ids(3), Sampling(max_new_tokens=3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_compile_steps_aside_with_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torchstone.generate.engine.compiler_works", lambda: "no C++ compiler at CXX=/nonexistent")
    engine = Engine(build(), compile="on")
    first = engine.generate(ids(4), GREEDY)
    assert first == engine.generate(ids(4), GREEDY) == Engine(build(), compile="off").generate(ids(4), GREEDY)
    assert capfd.readouterr().err == "torch.compile steps aside: no C++ compiler at CXX=/nonexistent\n"


def test_step_that_does_not_compile_steps_aside_in_the_middle(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no such luck")

    model, prompts = build(depth=1), ids(*LENGTHS)
    plain = Engine(model, compile="off").generate(prompts, GREEDY)
    engine = stepped(model, broken)  # type: ignore[arg-type]
    assert engine.generate(prompts, GREEDY) == plain == engine.generate(prompts, GREEDY)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "steps aside" in said and "no such luck" in said


def test_no_prompts_give_no_texts() -> None:
    assert Engine(build()).generate([]) == []


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (ids(17), "prompt of 17 tokens is too long: the model knows 16 positions"),
        (ids(3, 17), "prompt 1 of 17 tokens is too long: the model knows 16 positions"),
        ([[0, VOCABULARY]], f"no token {VOCABULARY} in a vocabulary of {VOCABULARY}"),
        ([[-1]], "no token -1"),
        (["text"], "has no tokenizer"),
        ([[]], "is empty"),
        ("text", "needs a list"),
    ],
)
def test_bad_prompt_is_one_sentence_before_any_work(prompts: Any, says: str) -> None:
    model = build(position="learned", context=16)
    model.decoder.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    engine = Engine(model)
    for call in (engine.generate, engine.stream):
        with pytest.raises(TorchstoneError, match=says) as caught:
            call(prompts)
        assert "\n" not in str(caught.value)


def test_memory_is_asked_for_by_encoder_decoders_alone() -> None:
    with pytest.raises(TorchstoneError, match="needs memory"):
        Engine(build(encoder={"depth": 1})).generate(ids(3))
    with pytest.raises(TorchstoneError, match="has no encoder"):
        Engine(build()).generate(ids(3), memory=ids(3))
    with pytest.raises(TorchstoneError, match="2 inputs for 1 prompts"):
        Engine(build(encoder={"depth": 1})).generate(ids(3), memory=ids(3, 4))


def test_models_that_cannot_generate_are_refused() -> None:
    with pytest.raises(TorchstoneError, match="causal: true"):
        Engine(build(causal=False))
    with pytest.raises(TorchstoneError, match="no logits over the vocabulary"):
        Engine(build(head={"kind": "classification", "classes": 3}))
    with pytest.raises(TorchstoneError, match="auto, on, off"):
        Engine(build(), compile="yes")  # type: ignore[arg-type]
    with pytest.raises(TorchstoneError, match="no tokenizer"):
        Engine(build()).generate(ids(3), Sampling(stop=("a",)))
    with pytest.raises(TorchstoneError, match="1 names for 2 prompts"):
        Engine(build()).generate(ids(3, 4), requests=[1])


def test_a_prefix_stands_before_every_prompt_and_stays_as_it_is() -> None:
    model, (before, *prompts) = build(position="learned"), ids(7, 4, 2)
    state = model.state(1, 7)
    with torch.no_grad():
        model(torch.tensor([before]), state=state)
    engine = Engine(model, compile="off", chunk=3)
    for _ in range(2):
        done = engine.generate(prompts, Sampling(max_new_tokens=9, temperature=0), prefix=state)
        assert [x.ids for x in done] == [recomputed(model, [*before, *prompt], 9) for prompt in prompts]
    assert state.longest == state.extent == 7
    with pytest.raises(TorchstoneError, match="prefix: needs a state of one row, this one has 2"):
        engine.generate(prompts, prefix=state.fork(torch.tensor([0, 0])))
    with pytest.raises(
        TorchstoneError, match="prompt of 58 tokens is too long: the model knows 64 positions, and 7 are taken"
    ):
        engine.generate(ids(58), prefix=state)
