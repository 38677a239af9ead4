"""Knowledge neurons: completeness, gradients by hand, sets that shrink, interventions at one place, edits undone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

import tiny
from torchstone.data import Tokenizer
from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level
from torchstone.errors import TorchstoneError
from torchstone.interpret.integrated_gradients import integrated_gradients
from torchstone.interpret.knowledge_neurons import (
    Fact,
    KnowledgeNeurons,
    Neuron,
    drop_shared,
    refine,
    refine_together,
)
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.train.run import RunFolder

BYTES: Tokenizer = byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)})


def model(**fields: Any) -> Transformer:
    spec = {
        "width": 16,
        "depth": 2,
        "vocabulary": 259,
        "context": 32,
        "attention": {"heads": 2},
        "ffn": {"kind": "mlp"},
    }
    spec |= {"residual": {"kind": "pre", "std": 0.4}, "position": "learned", **fields}
    return initialise(validate(TransformerSpec, spec).build(), 1).eval()


def encoder(**fields: Any) -> Transformer:
    return model(causal=False, head="mlm", **fields)


def finder(made: Transformer, **options: Any) -> KnowledgeNeurons:
    return KnowledgeNeurons(made, BYTES, **options)


def test_the_integral_of_a_polynomial() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = integrated_gradients(lambda v: v[:, 0] ** 2 * v[:, 1], x, steps=2000)
    torch.testing.assert_close(found, torch.tensor([4 / 3, 2 / 3], dtype=torch.float64), rtol=1e-5, atol=0)
    at = {"left": [0.0, 0.5], "midpoint": [0.25, 0.75], "right": [0.5, 1.0]}
    for rule, shares in at.items():
        wanted = 3.0 * sum(2 * 3.0 * share for share in shares) / 2
        assert integrated_gradients(lambda v: v**2, torch.tensor(3.0), 0.0, 2, rule).item() == pytest.approx(wanted)  # type: ignore[arg-type]
    # from another baseline, and copy by copy
    found = integrated_gradients(
        lambda v: (v**3).sum(-1), x, torch.tensor([1.0, 1.0], dtype=torch.float64), 400, batch=7
    )
    torch.testing.assert_close(found, torch.tensor([0.0, 7.0], dtype=torch.float64), rtol=1e-5, atol=1e-9)
    with pytest.raises(TorchstoneError, match="steps: needs 1 or more"):
        integrated_gradients(lambda v: v.sum(-1), x, steps=0)
    for batch in (0, -1):
        with pytest.raises(TorchstoneError, match=f"batch: needs 1 or more, got {batch}"):
            integrated_gradients(lambda v: v.sum(-1), x, batch=batch)


@pytest.mark.parametrize(
    "made", [encoder(), model(), model(ffn={"kind": "swiglu", "hidden": 24})], ids=["mlm", "lm", "gated"]
)
def test_attributions_of_a_layer_add_up_to_what_its_units_bring(made: Transformer) -> None:
    kn = finder(made, steps=400)
    prompt, answer = ("ab[MASK]d" if kn.masked else "abcd"), "x"
    before = kn.probability(prompt, answer)
    for layer, scores in enumerate(kn.attribute(prompt, answer)):
        units = [(layer, unit) for unit in range(len(scores))]
        with kn.suppress(units):
            without = kn.probability(prompt, answer)
        assert float(scores.sum()) == pytest.approx(before - without, rel=1e-3, abs=1e-7)
        assert scores[kn.activations(prompt)[layer] == 0].abs().sum() == 0


def test_an_attribution_is_the_activation_times_the_mean_gradient() -> None:
    """One unit by itself, by the network's own weights and finite differences."""
    made = encoder(depth=1).double()
    kn = finder(made, steps=3, rule="left")
    ids, at = kn.read("q[MASK]")
    (scores,), (a_M,) = kn.attribute("q[MASK]", "z"), kn.activations("q[MASK]")

    @torch.no_grad()
    def p(v_M: torch.Tensor) -> float:
        from torchstone.model.taps import Taps

        def put(h: torch.Tensor) -> torch.Tensor:
            h = h.clone()
            h[0, at] = v_M
            return h

        logits = made(torch.tensor([ids]), taps=Taps(replace={"encoder.layers.0.ffn.hidden": put})).logits
        return float(logits[0, at].softmax(-1)[ord("z")])

    for unit in (0, 7, 30):
        total, eps = 0.0, 1e-6
        for k in range(3):
            up, down = (k / 3 * a_M for _ in range(2))
            up[unit] += eps
            down[unit] -= eps
            total += (p(up) - p(down)) / (2 * eps)
        assert float(scores[unit]) == pytest.approx(float(a_M[unit]) * total / 3, rel=1e-4, abs=1e-12)


def test_interventions_are_at_the_place_of_the_answer_alone() -> None:
    made = model()
    kn, ids = finder(made), torch.tensor([list(b"abcdef")])
    plain = made(ids).logits
    with kn.suppress([(0, 3), (1, 5)]), kn.amplify([Neuron(0, 4)], 3.0):
        changed = made(ids, taps=kn._taps(at=5)).logits
        assert torch.equal(changed[:, :5], plain[:, :5]) and not torch.equal(changed[:, 5], plain[:, 5])
        within = kn.activations("abcdef")
    after = kn.activations("abcdef")
    assert within[0][3] == 0 and within[0][4] == pytest.approx(3 * after[0][4].item()) and after[0][3] != 0
    assert torch.equal(made(ids).logits, plain)


def test_nested_interventions_on_one_layer_are_gone_after_their_contexts() -> None:
    made = model()
    kn, ids = finder(made), torch.tensor([list(b"abcdef")])

    def logits() -> torch.Tensor:
        return made(ids, taps=kn._taps(at=5)).logits

    plain = logits()
    with kn.suppress([(0, 3), (0, 4)]):
        outer = logits()
        with kn.amplify([(0, 5), (0, 6)]):
            both = kn.activations("abcdef")[0]
            assert not torch.equal(logits(), outer)
        assert torch.equal(logits(), outer)
    assert torch.equal(logits(), plain) and not torch.equal(outer, plain)
    alone = kn.activations("abcdef")[0]
    assert not both[3:5].any() and alone[3:5].all() and torch.equal(both[5:7], 2 * alone[5:7])
    # the first to begin may be the first to end
    first, second = kn.suppress([(0, 3), (0, 4)]), kn.suppress([(0, 3), (0, 4)])
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert torch.equal(logits(), outer)
    second.__exit__(None, None, None)
    assert torch.equal(logits(), plain)


def test_sets_only_shrink_with_higher_bounds() -> None:
    kn = finder(encoder())
    prompts = ["a[MASK]b", "c[MASK]", "dd[MASK]e", "[MASK]fg"]
    scores = [kn.attribute(prompt, "x") for prompt in prompts]
    sets = [set(kn.coarse(scores[0], t)) for t in (0.1, 0.3, 0.9, 1.0)]
    assert all(large >= small for large, small in itertools.pairwise(sets)) and len(sets[-1]) == 1
    coarse = [kn.coarse(each, 0.05) for each in scores]
    by_share = [{(n.layer, n.unit) for n in refine(coarse, share)} for share in (0.5, 0.75, 1.0)]
    assert by_share[0] >= by_share[1] >= by_share[2]
    found = kn.find(prompts, "x")
    assert all(isinstance(each, Neuron) for each in found)
    assert refine([{(0, 1): 2.0}, {(0, 1): 4.0}, {(0, 1): 3.0, (1, 1): 1.0}], 0.7) == [Neuron(0, 1, 3.0)]


def test_the_baseline_takes_what_is_most_active() -> None:
    kn, prompts = finder(encoder()), ["a[MASK]b", "c[MASK]", "dd[MASK]e", "[MASK]fg"]
    counts: dict[tuple[int, int], int] = {}
    for prompt in prompts:
        seen = kn.activations(prompt)
        most = max(float(a_M.max()) for a_M in seen)
        for layer, a_M in enumerate(seen):
            for unit in (a_M >= 0.5 * most).nonzero()[:, 0].tolist():
                counts[layer, unit] = counts.get((layer, unit), 0) + 1
    found = kn.find(prompts, "x", by="activation")
    assert {(each.layer, each.unit) for each in found} == {unit for unit, count in counts.items() if count >= 3}
    assert found and found == kn.find(prompts, "y", by="activation") != kn.find(prompts, "x")
    units = [(0, 3), (1, 5), (1, 6)]
    by_hand = [float(kn.activations(prompt)[layer][unit]) for prompt in prompts for layer, unit in units]
    assert kn.activation(units, prompts) == pytest.approx(sum(by_hand) / 12)


def test_the_share_moves_until_facts_have_two_to_five() -> None:
    units = [(0, n) for n in range(9)]
    many = [dict.fromkeys(units[: 9 - k], 1.0) for k in range(8)]  # unit n is in the sets of 9 - n prompts at most
    plain = refine(many, 0.5)
    together = refine_together({"f": many}, 0.5)["f"]
    assert len(plain) == 6 and len(together) == 5
    few = [dict.fromkeys(units[:1] if k < 5 else units[:2], 1.0) for k in range(8)]
    assert len(refine(few, 0.5)) == 1 and len(refine_together({"f": few}, 0.5)["f"]) == 2


def test_neurons_that_many_facts_share_are_left_out() -> None:
    # of 20 facts all have unit 0, three unit 1, two unit 2, and each one of its own
    found = {n: [(0, 0), *[(0, 1)] * (n < 3), *[(0, 2)] * (n < 2), (1, n)] for n in range(20)}
    assert drop_shared(found) == {n: [*[(0, 2)] * (n < 2), (1, n)] for n in range(20)}
    assert drop_shared(found, 0.15)[0] == [(0, 1), (0, 2), (1, 0)] and drop_shared(found, 1.0) == found
    few = {"a": [Neuron(0, 1, 2.0), Neuron(0, 2, 3.0)], "b": [Neuron(0, 1, 5.0)]}  # one score a fact, one unit
    assert drop_shared(few) == {"a": [Neuron(0, 2, 3.0)], "b": []}


def test_an_edit_moves_columns_along_rows_of_the_output_and_is_undone_to_the_bit() -> None:
    made = encoder()
    kn = finder(made)
    weight = made.main.layers[1].ffn.down.weight  # type: ignore[union-attr]
    before, rows = weight.detach().clone(), made.embedding.table().detach()  # type: ignore[operator]
    edit = kn.update([(1, 4), (1, 6)], "a", "b", lam=(1.0, 8.0))
    old, new = (rows[ord(c)] / rows[ord(c)].norm() for c in "ab")
    for unit in (4, 6):
        column = before[:, unit]
        torch.testing.assert_close(weight[:, unit], column + column.norm() * (8 * new - old), rtol=1e-5, atol=1e-6)
    others = [unit for unit in range(weight.shape[1]) if unit not in (4, 6)]
    assert torch.equal(weight[:, others], before[:, others])
    edit.undo()
    assert torch.equal(weight, before)
    erased = kn.erase([(1, 4)])
    assert weight[:, 4].abs().max() == 0
    again = kn.erase([(1, 4)], fill="q")
    torch.testing.assert_close(weight[:, 4], rows[ord("q")])
    again.undo(), erased.undo()
    assert torch.equal(weight, before)


def test_a_planted_unit_is_found() -> None:
    """A unit whose column is the answer's row, and that fires whatever the prompt, is the fact's neuron."""
    made = model(ffn={"kind": "mlp", "bias": True})
    network = made.main.layers[1].ffn  # type: ignore[union-attr]
    with torch.no_grad():
        network.up.weight[9], network.up.bias[9] = 0, 2.0
        network.down.weight[:, 9] = 4 * made.embedding.table()[ord("x")]  # type: ignore[operator, index]
    kn = finder(made, share=0.7)
    prompts = ["ab", "c", "dde", "fg", "hij", "klmn"]
    found = {(each.layer, each.unit) for each in kn.find(prompts, "x")}
    assert (1, 9) in found
    best = max(kn.find(prompts, "x"), key=lambda each: each.score)
    assert (best.layer, best.unit) == (1, 9)
    facts = {"one": Fact(tuple(prompts), "x")}
    assert (1, 9) in {(each.layer, each.unit) for each in kn.find_all(facts)["one"]}


def test_prompts_that_cannot_be_read_are_one_sentence() -> None:
    kn, causal = finder(encoder()), finder(model())

    def said(work: Any) -> str:
        with pytest.raises(TorchstoneError) as caught:
            work()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "a prompt needs one [MASK], this has 0: 'abc'" in said(lambda: kn.probability("abc", "x"))
    assert "this has 2" in said(lambda: kn.probability("[MASK]a[MASK]", "x"))
    assert "the answer 'xy' is 2 tokens, not one: 'x', 'y'" in said(lambda: kn.probability("a[MASK]", "xy"))
    assert "2 prompts; at least 3 are needed" in said(lambda: kn.find(["a[MASK]", "b[MASK]"], "x"))
    assert "fact 'f': 1 prompts" in said(lambda: kn.find_all({"f": Fact(("a[MASK]",), "x")}))
    assert "a prompt without tokens" in said(lambda: causal.probability("", "x"))
    assert "there is no unit 99 in layer 0" in said(lambda: kn.erase([(0, 99)]))
    for name, value in itertools.product(("threshold", "share"), (0.0, -0.2, 1.5, float("nan"), float("inf"))):
        message = said(lambda name=name, value=value: finder(encoder(), **{name: value}))
        assert f"{name} is {value:g}, it must be above 0 and at most 1" in message
        assert ("above 1 no unit would be kept" in message) == (value > 1)
    assert "threshold is 1.01, it must be" in said(lambda: kn.coarse([torch.ones(3)], 1.01))
    assert "threshold is nan, it must be" in said(lambda: kn.coarse([torch.ones(3)], float("nan")))
    assert "prompts are a list, this is one text: 'a[MASK]'" in said(lambda: kn.find("a[MASK]", "x"))
    assert "fact 'f': prompts are a list" in said(lambda: kn.find_all({"f": Fact("a[MASK]", "x")}))  # type: ignore[arg-type]
    assert "by needs attribution, activation, got 'size'" in said(lambda: kn.find(["[MASK]"] * 3, "x", "size"))  # type: ignore[arg-type]
    assert "needs a unit and a prompt" in said(lambda: kn.activation([], ["[MASK]"]))
    assert "there is no unit 99 in layer 0" in said(lambda: kn.activation([(0, 99)], ["[MASK]"]))
    assert "fill unk needs a tokenizer with a token of the unknown" in said(lambda: kn.erase([(0, 1)], "unk"))
    assert "needs a Transformer, got Linear" in said(lambda: KnowledgeNeurons(torch.nn.Linear(1, 1)))  # type: ignore[arg-type]
    pooled = {"kind": "classification", "classes": 2}
    assert "gives no logits over the vocabulary" in said(lambda: finder(model(causal=False, head=pooled)))
    for answer in (-1, 259):
        assert f"the answer {answer} is no id of the model's 259" in said(lambda a=answer: kn.probability("[MASK]", a))
    assert "give a tokenizer that has one" in said(lambda: KnowledgeNeurons(encoder()))
    assert KnowledgeNeurons(encoder(), mask=2).probability([1, 2], 3) > 0
    assert "needs the tokenizer" in said(lambda: KnowledgeNeurons(model()).probability("a", 3))
    moe = {"kind": "moe", "experts": 2, "active": 1}
    assert "layer 0 has no hidden units that are all of one network (MoE)" in said(lambda: finder(model(ffn=moe)))
    assert KnowledgeNeurons(model()).probability([97, 98], 99) > 0


def test_an_answer_that_the_tokenizer_does_not_know_is_refused() -> None:
    words = {"[UNK]": 0, "[MASK]": 1, "known": 2, "word": 3, "k": 4, "##z": 5}
    pieces = [("[UNK]", 0.0), ("known", -1.0), ("\u2581", -2.0), ("word", -1.0)]
    backends = [
        tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]")),
        tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)),
    ]
    for backend in backends:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens(["[UNK]", "[MASK]"])
        kn = KnowledgeNeurons(encoder(vocabulary=16), Tokenizer(backend, {"mask_token": "[MASK]"}))
        assert kn.token("known") == backend.token_to_id("known")
        with pytest.raises(TorchstoneError, match=r"the tokenizer does not know the answer 'qqq'$"):
            kn.token("qqq")
        with pytest.raises(TorchstoneError, match=r"'known qqq' is 2 tokens, not one: 'known', '\[UNK\]'$"):
            kn.token("known qqq")
    made = encoder(vocabulary=16)
    kn = KnowledgeNeurons(made, Tokenizer(backends[0], {"mask_token": "[MASK]"}))
    kn.erase([(1, 3)], "unk")
    network: Any = made.main.layers[1].ffn
    assert torch.equal(network.down.weight[:, 3], made.embedding.table()[0])  # type: ignore[operator]
    with pytest.raises(TorchstoneError, match=r"'kz' is 2 tokens, not one: 'k', '##z'$"):
        KnowledgeNeurons(encoder(vocabulary=16), Tokenizer(backends[1], {"mask_token": "[MASK]"})).token("kz")


def test_a_run_without_a_tokenizer_is_one_sentence(tmp_path: Path, cli: Callable[..., Any]) -> None:
    data = {"kind": "copying", "symbols": 8, "length": 3}
    made = {**tiny.recipe(tmp_path), "data": data}
    tiny.saved(tmp_path / "run", made)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    said = cli("interpret", "knowledge-neurons", tmp_path / "run", "--facts", tmp_path / "facts.json")
    assert said.status == 2 and "no tokenizer" in said.err and said.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- from a file


FACTS = {
    "first": {"f1": [["ab", "x", "first"], ["b", "x", "first"], ["cc", "x", "first"]],
              "f2": [["de", "y", "first"], ["e", "y", "first"], ["ff", "y", "first"]]},
    "second": {"f3": [["gh", "z", "second"], ["h", "z", "second"], ["ii", "z", "second"]]},
}  # fmt: skip


def test_a_file_of_facts_is_examined_and_a_relation_erased_in_a_copy(tmp_path: Path, cli: Callable[..., Any]) -> None:
    recipe = tiny.recipe(tmp_path, model={**tiny.MODEL, "ffn": "mlp", "residual": {"kind": "pre", "std": 0.4}})
    run = tiny.saved(tmp_path / "run", recipe)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    before = tiny.listing(tmp_path / "run")
    ask = ("interpret", "knowledge-neurons", tmp_path / "run", "--facts", tmp_path / "facts.json")
    said = cli(*ask, "--erase", "first", "--out", tmp_path / "erased", "--json")
    assert said.status == 0, said.err
    report = json.loads(said.out)
    assert set(report["relations"]) == {"first", "second"} and set(report["relations"]["first"]) == {"f1", "f2"}
    row = report["relations"]["second"]["f3"]
    assert row["answer"] == "z" and 0 < row["probability"] < 1 and row["neurons"]
    kn = KnowledgeNeurons(run.model(), run.tokenizer())  # type: ignore[arg-type]
    assert kn.probability("gh", "z") + kn.probability("h", "z") + kn.probability("ii", "z") == pytest.approx(
        3 * row["probability"]
    )
    assert tiny.listing(tmp_path / "run") == before
    erased = RunFolder(tmp_path / "erased").model().state_dict()
    plain = run.model().state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], erased[name])}
    layers = {layer for layer, _ in report["erased"]["neurons"]}
    assert changed == {f"decoder.layers.{layer}.ffn.down.weight" for layer in layers}
    for layer, unit in report["erased"]["neurons"]:
        assert not erased[f"decoder.layers.{layer}.ffn.down.weight"][:, unit].any()
    first = report["relations"]["first"]["f1"]
    assert first["other"]["relation"] == "second" and first["other"]["probability"] == row["probability"]
    with kn.suppress([(layer, unit) for layer, unit, _ in first["neurons"]]):
        without = [kn.probability(prompt, "z") for prompt in ("gh", "h", "ii")]
    assert first["other"]["suppressed"] == pytest.approx(sum(without) / 3)
    lines = cli(*ask, "--erase", "first", "--by", "activation", "--rule", "left").out.splitlines()
    assert "another fact" in lines[0] and len(lines[1].split()) == 8 and "erased" in lines[-1]
    alone = json.loads(cli(*ask, "--relation", "second", "--json").out)
    assert "other" not in alone["relations"]["second"]["f3"]


@pytest.mark.parametrize(
    ("facts", "arguments", "message"),
    [
        ([], [], "needs an object of relations"),
        ({"r": []}, [], "r: needs an object of facts, of one at least"),
        ({"r": {}}, ["--erase", "r", "--out", "erased"], "r: needs an object of facts, of one at least"),
        (FACTS, ["--erase", "first", "--out", "erased", "--limit", "0"], "limit is 0, it must be 1 or more"),
        (FACTS, ["--erase", "first", "--out", "erased", "--threshold", "1.5"], "above 1 no unit would be kept"),
        (FACTS, ["--erase", "first", "--out", "erased", "--share", "nan"], "share is nan, it must be above 0"),
        (FACTS, ["--limit", "-1"], "limit is -1, it must be 1 or more"),
        ({"r": {"f": [["a"]]}}, [], r"r: f: needs a list of [prompt, answer, relation]"),
        ({"r": {"f": [["a", "x"], ["b", "y"], ["c", "x"]]}}, [], "r: f: has several answers, x, y"),
        ({"r": {"f": [["a", "x"]]}}, [], "fact 'f': 1 prompts; at least 3 are needed"),
        (FACTS, ["--relation", "third"], "no relation 'third'; relations: first, second"),
        (FACTS, ["--out", "somewhere"], "--out goes with --erase"),
        (FACTS, ["--fill", "unk"], "--fill goes with --erase"),
        (FACTS, ["--erase", "first", "--fill", "one"], "fill needs zero or unk, got 'one'"),
        (FACTS, ["--erase", "first", "--fill", "unk", "--out", "erased"], "fill unk needs a tokenizer with"),
        (FACTS, ["--rule", "middle"], "rule: needs left, right, midpoint, got 'middle'"),
        (FACTS, ["--by", "size"], "by needs attribution, activation, got 'size'"),
    ],
)
def test_facts_that_are_none_are_one_line(
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    facts: Any,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path))
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    said = cli("interpret", "knowledge-neurons", tmp_path / "run", "--facts", tmp_path / "facts.json", *arguments)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "erased").exists()
