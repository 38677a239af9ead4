"""Structured prompting: groups encoded apart, at the same positions, seen together and weighed as one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from generate import small
from torchstone.adapt.structured_prompting import Groups, StructuredPrompt, grouped
from torchstone.data import Tokenizer
from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level
from torchstone.errors import TorchstoneError
from torchstone.evaluate.multiple_choice import Question, multiple_choice
from torchstone.generate import Engine, Sampling
from torchstone.interop.layout import find_layout, load_state
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.ops.attention import attention, attention_reference
from torchstone.spec import validate

V, L = small.VOCABULARY, 6
POSITIONS = ["rotary", "alibi", "t5", "none", "learned", "sinusoidal"]


def build(**fields: Any) -> Transformer:
    return small.build(**{"attention": {"kind": "softmax", "heads": 4, "kv_heads": 2}, **fields})


def prompt(model: Transformer, groups: list[list[int]], length: int = L, **options: Any) -> StructuredPrompt:
    """Each of `groups` is one demonstration and fills a group."""
    fields = {"group_length": length, "bos": None, **options}
    made = StructuredPrompt(Engine(model, compile="off"), **fields)
    made.add(groups)
    return made


def ids(*shape: int, seed: int = 0) -> list[Any]:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def after(made: StructuredPrompt, own: list[int], taps: Taps | None = None) -> torch.Tensor:
    """Logits (T, V) of tokens after the groups."""
    state = made.prefix.fork(torch.zeros(1, dtype=torch.int64))
    state.extend(state.longest + len(own))
    return made.engine.model(torch.tensor([own]), state=state, taps=taps).logits[0]


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return byte_level({character: i for i, character in enumerate(BYTE_CHARACTERS)})


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("bos", [None, 3])
@torch.no_grad()
def test_one_group_is_an_ordinary_prompt(float64: None, position: str, bos: int | None) -> None:
    model, (group,), own = build(position=position), ids(1, L), ids(5, seed=1)
    row = [*([] if bos is None else [bos]), *group, *own]
    plain = model(torch.tensor([row])).logits[0, -5:]
    torch.testing.assert_close(after(prompt(model, [group], bos=bos), own), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", [{"bos": None}, {"bos": 3, "scale_bos": True}])
def test_groups_that_are_all_the_same_count_as_one(float64: None, position: str, options: dict[str, Any]) -> None:
    model, (group,), own = build(position=position), ids(1, L), ids(5, seed=1)
    one = after(prompt(model, [group], **options), own)
    torch.testing.assert_close(after(prompt(model, [group] * 5, **options), own), one, rtol=0, atol=1e-10)
    unweighed = after(prompt(model, [group] * 5, weight=1, **options), own)
    assert (unweighed - one).abs().max() > 1e-3


def test_a_start_token_of_weight_one_makes_that_approximate(float64: None) -> None:
    model, (group,), own = build(), ids(1, L), ids(5, seed=1)
    one, five = (after(prompt(model, [group] * m, bos=3), own) for m in (1, 5))
    assert 1e-4 < (five - one).abs().max() < (one - one.mean()).abs().max()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_groups_does_not_matter(float64: None, position: str) -> None:
    model, groups, own = build(position=position), ids(4, L), ids(5, seed=1)
    turned = [groups[i] for i in (2, 0, 3, 1)]
    first, second = (after(prompt(model, some, bos=3), own) for some in (groups, turned))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)
    joined = after(prompt(model, [[*groups[0], *groups[1]]], 2 * L, bos=3), own)
    assert (first - joined).abs().max() > 1e-3


def test_an_offset_repeated_keys_and_merged_halves_are_the_same_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    M, Z, T = 7, 12, 4
    q, k, v = (torch.randn(2, heads, size, 8, generator=generator) for heads, size in ((4, T), (2, Z + T), (2, Z + T)))
    own = torch.ones(T, T, dtype=torch.bool).tril()
    offset = torch.cat([torch.full((T, Z), -math.log(M)), torch.zeros(T, T).masked_fill(~own, -math.inf)], 1)
    ours = attention(q, k, v, scale=0.3, mask_BHTS=offset[None, None])

    seen = torch.cat([torch.ones(T, Z, dtype=torch.bool), own.repeat(1, M)], 1)
    many = [torch.cat([x[:, :, :Z], x[:, :, Z:].repeat(1, 1, M, 1)], 2) for x in (k, v)]
    repeated = attention_reference(q, *many, scale=0.3, mask_BHTS=seen[None, None])[0]
    torch.testing.assert_close(ours, repeated, rtol=0, atol=1e-5)

    y_z, _, lse_z = attention_reference(q, k[:, :, :Z], v[:, :, :Z], scale=0.3)
    y_t, _, lse_t = attention_reference(q, k[:, :, Z:], v[:, :, Z:], scale=0.3, mask_BHTS=own[None, None])
    share = torch.sigmoid(lse_t + math.log(M) - lse_z)[..., None]
    torch.testing.assert_close(ours, (1 - share) * y_z + share * y_t, rtol=0, atol=1e-5)


def test_it_is_the_block_mask_that_transformers_computes_in_one_forward(float64: None) -> None:
    """Groups see themselves alone, own tokens see all and have log M more: one mask, one row, given positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                      attn_implementation="eager", bos_token_id=None, eos_token_id=None)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    layout, state = find_layout("llama"), theirs.state_dict()
    spec = validate(TransformerSpec, layout.to_spec(config.to_dict(), {name: x.shape for name, x in state.items()}))
    ours = spec.build()
    load_state(ours, layout.to_ours(state, spec))
    groups, own, T = ids(3, L), ids(5, seed=1), 5
    label = torch.tensor([0] + [1] * L + [2] * L + [3] * L + [9] * T)  # 0 the start token, 9 own
    causal = torch.ones(len(label), len(label), dtype=torch.bool).tril()
    seen = causal & ((label[:, None] == label) | (label == 0) | (label[:, None] == 9))
    mask = torch.where(seen, torch.where(label == 9, math.log(3), 0.0), -math.inf)
    where = torch.tensor([0, *(list(range(1, L + 1)) * 3), *range(L + 1, L + 1 + T)])
    with torch.no_grad():
        row = torch.tensor([[3, *(token for group in groups for token in group), *own]])
        wanted = theirs(row, attention_mask=mask[None, None], position_ids=where[None]).logits[0, -T:]
    torch.testing.assert_close(
        after(prompt(ours, groups, bos=3), own), wanted, rtol=0, atol=1e-6
    )  # theirs rotates in float32


def test_a_group_does_not_know_of_the_others(float64: None) -> None:
    model, groups = build(), ids(4, L)
    held = prompt(model, groups, bos=3).prefix
    changed = prompt(model, [groups[0], ids(L, seed=7), *groups[2:]], bos=3).prefix
    alone = prompt(model, [groups[2]], bos=3).prefix
    mine, theirs = slice(1 + 2 * L, 1 + 3 * L), slice(1 + L, 1 + 2 * L)
    for path, part in held.parts.items():
        for name, cache in part.tensors.items():
            other = changed.parts[path].tensors[name]
            assert torch.equal(cache[:, mine], other[:, mine]) and torch.equal(cache[:, :1], other[:, :1])
            assert not torch.equal(cache[:, theirs], other[:, theirs])
            torch.testing.assert_close(cache[:, mine], alone.parts[path].tensors[name][:, 1:], rtol=0, atol=1e-12)


def test_groups_added_later_leave_those_before_as_they_are(float64: None) -> None:
    model, groups, own = build(), ids(5, L), ids(5, seed=1)
    made = prompt(model, groups[:2], bos=3)
    before = {path: part.tensors["k"].clone() for path, part in made.prefix.parts.items()}
    after(made, own)
    assert made.add(groups[2:]) == Groups(3, 3 * L, 0) and made.groups == 5
    for path, k in before.items():
        assert torch.equal(made.prefix.parts[path].tensors["k"][:, : 1 + 2 * L], k)
    torch.testing.assert_close(after(made, own), after(prompt(model, groups, bos=3), own), rtol=0, atol=1e-12)


def test_probabilities_add_up_and_own_tokens_keep_their_share(float64: None) -> None:
    model, (group,), own = build(), ids(1, L), ids(5, seed=1)
    shares = []
    for m in (1, 4, 9):
        heard = Taps(record=["*.probs"])
        after(prompt(model, [group] * m), own, heard)
        found = torch.stack([x for name, x in sorted(heard.seen.items())])
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
        shares.append(found[..., m * L :].sum(-1))
    for share in shares[1:]:
        torch.testing.assert_close(share, shares[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_groups_in_half_precision_are_finite(dtype: torch.dtype) -> None:
    model = build(depth=1).to(dtype)
    made = prompt(model, ids(1000, 2), 2, bos=3, batch=500)
    assert made.groups == 1000 and made.prefix.longest == 2001
    for own in (ids(5, seed=1), ids(1, seed=1)):
        assert torch.isfinite(after(made, own)).all()


def test_cost_grows_with_the_number_of_groups_alone() -> None:
    model, read = build(), []
    model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].ids.numel()))
    for m in (2, 4, 8, 16):
        read.clear()
        made = prompt(model, ids(m, L), bos=3, batch=2)
        assert len(read) == m // 2 and sum(read) == m * (L + 1)
        read.clear()
        made.score([ids(3)], [ids(1), ids(1, seed=1)])
        assert len(read) == 1 and sum(read) == 2 * 3  # the groups are not read again
        assert made.prefix.bytes() == (m * L + 1) * 2 * 2 * 2 * 8 * 4  # tokens, layers, k and v, heads, 8 floats


# -- groups


def test_groups_are_filled_in_order() -> None:
    some = [[1, 1], [2, 2, 2], [3, 3], [4, 4, 4, 4], [5], [6, 6]]
    assert grouped(some, 5, "truncate") == ([[1, 1, 2, 2, 2], [3, 4, 4, 4, 4]], [5, 6, 6])
    assert grouped(some, 5, "mask") == ([[1, 1, 2, 2, 2], [3, 3], [4, 4, 4, 4, 5]], [6, 6])


def test_a_demonstration_longer_than_a_group_is_cut_or_refused() -> None:
    assert grouped([[1, 2, 3, 4]], 3, "truncate") == ([[2, 3, 4]], [])
    with pytest.raises(TorchstoneError, match=r"demonstration 0: 4 tokens, group_length is 3; align: truncate cuts it"):
        grouped([[1, 2, 3, 4]], 3, "mask")


def test_a_last_group_that_is_not_full_is_left_out_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    made = StructuredPrompt(Engine(build(), compile="off"), group_length=L, bos=None)
    assert made.add(ids(5, 4)) == Groups(2, 2 * L, 4)
    assert capsys.readouterr().err == f"structured prompt: the last group has 4 of {L} tokens and is left out\n"
    assert made.add([ids(3)]) == Groups(0, 0, 3) and made.groups == 2
    only = StructuredPrompt(Engine(build(), compile="off"), group_length=L, bos=None)
    assert only.add([ids(3)]) == Groups(1, 3, 0) and capsys.readouterr().err.count("\n") == 1


@torch.no_grad()
def test_a_short_group_ends_where_the_others_end(float64: None) -> None:
    model, own = build(position="learned"), ids(5, seed=1)
    made = StructuredPrompt(Engine(model, compile="off"), group_length=L, bos=3, align="mask")
    made.add([ids(4), ids(L, seed=2)])
    assert made.prefix.position_BS.tolist() == [[0, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]]
    assert made.prefix.reach == L + 1
    after(made, own)
    state = made.prefix.fork(torch.zeros(1, dtype=torch.int64))
    state.extend(state.longest + 5)
    for token in own:
        model(torch.tensor([[token]]), state=state)
    assert state.position_BS[0, -5:].tolist() == [7, 8, 9, 10, 11]


def test_blanks_fill_a_group_from_the_left(letters: Tokenizer) -> None:
    engine = Engine(build(vocabulary=letters.vocabulary), letters, compile="off")
    made = StructuredPrompt(engine, group_length=5, align="space", bos=None)
    assert made.add(["abc", "def", "ghijk"]) == Groups(3, 15, 0)
    wanted = StructuredPrompt(engine, group_length=5, bos=None)
    wanted.add(["  abc", "  def", "ghijk"])
    torch.testing.assert_close(after(made, [5, 6]), after(wanted, [5, 6]), rtol=0, atol=0)


# -- scoring and generating


@torch.no_grad()
def test_scores_are_those_of_the_tokens_after_the_groups(float64: None) -> None:
    made = prompt(build(), ids(3, L), bos=3)
    inputs, options = [ids(4), ids(2, seed=2)], [ids(1, seed=3), ids(3, seed=4)]
    scores = made.score(inputs, options)
    for n, text in enumerate(inputs):
        for o, option in enumerate(options):
            logprobs = after(made, [*text, *option]).log_softmax(-1)[len(text) - 1 : -1]
            wanted = logprobs.gather(1, torch.tensor(option)[:, None]).sum()
            torch.testing.assert_close(scores[n, o], wanted, rtol=0, atol=1e-9)
    per_token = scores / torch.tensor([1.0, 3.0])
    torch.testing.assert_close(made.score(inputs, options, per_token=True), per_token)
    assert made.classify(inputs, options) == [options[int(i)] for i in scores.argmax(1)]


def test_texts_are_scored_as_questions_are(letters: Tokenizer) -> None:
    made = StructuredPrompt(Engine(build(vocabulary=letters.vocabulary), letters, compile="off"), group_length=8)
    made.add([f"{word}: {label}\n" for word, label in (("good", "yes"), ("bad", "no"), ("fine", "yes"))])
    labels = made.classify(["great:", "poor:"], [" yes", " no"])
    questions = [Question(text, [" yes", " no"], [" yes", " no"].index(label))
                 for text, label in zip(["great:", "poor:"], labels, strict=True)]  # fmt: skip
    assert multiple_choice(made.scorer(), questions).metrics["accuracy"].value == 1.0


@pytest.mark.parametrize("position", ["rotary", "alibi", "learned"])
@torch.no_grad()
def test_generated_tokens_are_own_tokens(float64: None, position: str) -> None:
    made = prompt(build(position=position), ids(3, L), bos=3)
    prompts, greedy = [ids(4), ids(2, seed=2), ids(4)], Sampling(max_new_tokens=6, temperature=0)
    made.engine.chunk = 3
    for start, done in zip(prompts, made.generate(prompts, greedy), strict=True):
        text = list(start)
        for _ in range(6):
            text.append(int(after(made, text)[-1].argmax()))
        assert done.ids == text[len(start) :]


def test_generation_ends_where_positions_end() -> None:
    made = prompt(build(position="learned", context=16), ids(3, L), bos=3)
    (done,) = made.generate([ids(4)], Sampling(max_new_tokens=50, temperature=0))
    assert len(done.ids) == 16 - (1 + L) - 4 + 1 and done.finish == "length"


# -- refusals


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"attention": {"kind": "softmax", "heads": 4, "window": 8}},
            {},
            "state of decoder.layers.0.attention is ring",
        ),
        ({"attention": {"kind": "retention", "heads": 4}}, {}, "attention retention of layer 0 adds no offsets"),
        ({"encoder": {"depth": 1}}, {}, "is fixed and cannot be joined"),
        ({"position": "learned", "context": 8}, {"group_length": 7}, "group_length: is 7, 1 to 6 is possible"),
        ({}, {"group_length": 63}, "with a window of 64 tokens"),
        ({"context": None}, {"group_length": 30, "window": 20}, "1 to 18 is possible with a window of 20 tokens"),
        ({}, {"align": "left"}, "align: one of truncate, space, mask, not 'left'"),
        ({}, {"weight": 0.0}, "weight: needs a positive number, got 0.0"),
        ({}, {"batch": 0}, "batch: is 0, 1 or more is needed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_encoded(
    fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TorchstoneError, match=message):
        StructuredPrompt(Engine(build(**fields), compile="off"), **{"group_length": L, "bos": 3, **options})


def test_inputs_that_do_not_fit_and_prompts_without_groups_are_refused() -> None:
    made = StructuredPrompt(Engine(build(position="learned", context=16), compile="off"), group_length=L, bos=3)
    with pytest.raises(TorchstoneError, match="structured prompt: holds no demonstrations yet; add some"):
        made.score([[1]], [[2]])
    made.add(ids(2, L))
    with pytest.raises(TorchstoneError, match=r"input 0: 10 tokens do not fit into a window of 16 after 7"):
        made.score([ids(10)], [[2]])
    with pytest.raises(TorchstoneError, match=r"prompt 0: 10 tokens do not fit into a window of 16 after 7"):
        made.generate([ids(10)])
    with pytest.raises(TorchstoneError, match="input 0: input and option need a token each"):
        made.score([[]], [[2]])
    with pytest.raises(TorchstoneError, match=f"demonstration 0: no token {V} in a vocabulary of {V}"):
        made.add([[V]])
    with pytest.raises(TorchstoneError, match="input 0: is a text, and the engine has no tokenizer"):
        made.score(["a"], ["b"])
