"""Routing replay: what is recorded is what is replayed, gates stay live, and bad records are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policies import Letters, transformer

from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.keys import Key
from torchstone.model.routed import routed_layers
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.objectives import Batch, Facts
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec
from torchstone.rl.routes import Replay
from torchstone.rl.trajectory import batch_of
from torchstone.spec import validate

ROWS: dict[int, dict[str, Any]] = {n: {} for n in range(9)}
PROMPTS: Batch = {
    "ids": torch.tensor([[0, 3, 4, 9], [0, 5, 1, 1]]),
    "valid": torch.tensor([[True] * 4, [True, True, False, False]]),
    "example": torch.tensor([3, 4]),
}
ROUTERS = [{"kind": "topk", "normalise": True}, {"kind": "sigmoid_bias"}, {"kind": "hash"}]


@pytest.fixture(autouse=True)
def _float64(float64: None) -> Iterator[None]:
    yield


def experts(seed: int = 0, router: Any = "topk", **fields: Any) -> Any:
    ffn = {"kind": "moe", "experts": 6, "active": 2, "hidden": 16, "router": router}
    layers = [{"at": [1], "ffn": {"kind": "mlp", "hidden": 24}}]
    return transformer(seed, depth=3, ffn=ffn, layers=layers, **fields).double()


def objective(**fields: Any) -> PolicyGradient:
    usual = {"rewards": [{"kind": "language", "alphabet": "abcdefghijkl"}], "sampling": {"max_new_tokens": 6}}
    spec = validate(PolicyGradientSpec, {**usual, "group": 3, "truncated": "keep", "replay": "rollout", **fields})
    return PolicyGradient(spec, Facts(30, tokenizer=Letters(), rows=ROWS))


def collected(made: PolicyGradient, model: Any) -> Batch:
    with torch.no_grad():
        return made.collect(model.eval(), PROMPTS, Key(1))


def gradient(made: PolicyGradient, model: Any, *batches: Batch) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    counts = [made.counts(batch)["targets"] for batch in batches]
    for batch in batches:
        (made(model, batch, Key(0)).terms["loss"].total / sum(counts)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def other(batch: Batch, E: int = 6) -> Batch:
    """Records that the live routers would not make: two neighbouring experts."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, E, batch["routes"].shape[:-1], generator=generator)
    routes = torch.stack([first, (first + 1) % E], -1).to(torch.int16)
    return {**batch, "routes": torch.where(batch["valid"][..., None, None], routes, -1)}


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r["kind"])
def test_the_engine_records_what_one_forward_chooses(router: dict[str, Any]) -> None:
    """Of every token that it read, dense layers left out, whatever stands beside it and however prompts are cut."""
    model = experts(router=router).eval()
    prompts = [[0, 3, 4, 9, 2], [0, 5], [0, 3, 4, 9, 2]]
    for chunk in (512, 2):
        done = Engine(model, compile="off", eos=0, chunk=chunk).generate(
            prompts, Sampling(max_new_tokens=6), routes=True
        )
        for each in done:
            taps = Taps(record=["*.router.experts"])
            with torch.no_grad():
                model(Tokens.of(torch.tensor([[*each.prompt_ids, *each.ids[:-1]]])), taps=taps)
            wanted = torch.stack([*taps.seen.values()], 2)[0].sort(-1).values
            assert each.routes is not None and each.routes.dtype == np.uint8
            assert each.routes.shape == (len(each.prompt_ids) + len(each.ids) - 1, 2, 2)
            assert np.array_equal(each.routes, wanted.numpy())
    plain = Engine(model, compile="off", eos=0).generate(prompts, Sampling(max_new_tokens=6))
    assert [each.ids for each in plain] == [each.ids for each in done] and plain[0].routes is None
    with pytest.raises(TorchstoneError, match="routes: no layer of this model has a router"):
        Engine(transformer(), compile="off", eos=0).generate([[0]], routes=True)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r["kind"])
@pytest.mark.parametrize("replay", ["trainer", "rollout"])
def test_replaying_ones_own_choices_changes_nothing_to_the_bit(replay: str, router: dict[str, Any]) -> None:
    model, made = experts(router=router), objective(replay=replay)
    batch = collected(made, model)
    plain = {name: value for name, value in batch.items() if name != "routes"}
    found, wanted = gradient(made, model, batch), gradient(made, model, plain)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    metrics = made(model, batch, Key(0)).metrics
    assert metrics["routes_changed"][0] == 0 and metrics["routes_missing"][0] == 0 and metrics["sampler_gap"][0] < 1e-9


@pytest.mark.parametrize("recompute", [False, True])
def test_installed_sets_are_used_in_every_layer_with_micro_batches_and_recomputation(recompute: bool) -> None:
    model, made = experts(), objective()
    model.decoder.recompute = recompute
    batch = other(collected(made, model))
    seen: dict[str, list[torch.Tensor]] = {}
    inside = {path: router.gate for path, router in routed_layers(model).items()}
    for path, router in routed_layers(model).items():

        def gate(scores: torch.Tensor, chosen: torch.Tensor, path: str = path) -> torch.Tensor:
            seen.setdefault(path, []).append(chosen.detach().clone())
            return inside[path](scores, chosen)

        router.gate = gate  # type: ignore[method-assign]
    whole = gradient(made, model, batch)
    assert [len(calls) for calls in seen.values()] == [2 if recompute else 1] * 2
    for number, calls in enumerate(seen.values()):
        for chosen in calls:
            there = batch["valid"]
            assert torch.equal(
                chosen.sort(-1).values[there], batch["routes"][:, :, number].long().sort(-1).values[there]
            )
    pieces = [{name: value[a:b] for name, value in batch.items()} for a, b in ((0, 1), (1, 6))]
    parts = gradient(made, model, *pieces)  # and so each row alone
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)
    metrics = made(model, batch, Key(0)).metrics
    changed, tokens = metrics["routes_changed"][0], batch["valid"].sum()
    assert changed > 0 and metrics["routes_changed"][1] == 2 * tokens
    assert changed / 2 <= metrics["tokens_rerouted"][0] <= min(changed, tokens)
    assert metrics["tokens_rerouted"][1] == tokens


def test_gates_are_live_and_only_recorded_experts_get_a_gradient() -> None:
    """In a softmax whose gates are divided by their sum, logits of other experts have none; a recorded expert that the
    router thinks nothing of has a gate all the same; the order of a record is of no account."""
    model = experts(router={"kind": "topk", "normalise": True, "balance": 0.0})
    batch = other(collected(objective(), model))
    router = routed_layers(model)["decoder.layers.0.ffn.router"]
    seen: dict[str, torch.Tensor] = {}
    own, whole = router.score, router.gate

    def score(x: torch.Tensor, ctx: Any) -> torch.Tensor:
        logits = torch.nn.functional.linear(x, router.weight)  # type: ignore[arg-type]
        logits = logits - 30 * torch.nn.functional.one_hot(torch.tensor(3), 6)  # expert 3 is out of favour
        seen["logits"] = logits
        logits.retain_grad()
        return logits.softmax(-1)

    def gate(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        seen["chosen"], seen["gates"] = chosen, whole(scores, chosen)
        return seen["gates"]

    router.score, router.gate = score, gate  # type: ignore[method-assign]
    first = gradient(objective(), model, batch)
    there, chosen = batch["valid"], seen["chosen"]
    used = torch.zeros_like(seen["logits"], dtype=torch.bool).scatter(-1, chosen, True)
    grad = seen["logits"].grad
    assert grad is not None and (grad[used & there[..., None]] != 0).double().mean() > 0.5
    assert grad[~used].abs().max() < 1e-12 * grad[used].abs().max()  # nothing but rounding: the softmax is over all
    gates = seen["gates"][there]
    torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates)))
    assert (gates > 0).all() and (chosen[there] == 3).any()
    turned = gradient(objective(), model, {**batch, "routes": batch["routes"].flip(-1)})
    assert all(torch.equal(turned[name], value) for name, value in first.items())
    router.score = own  # type: ignore[method-assign]


def test_tokens_without_a_record_go_where_the_router_sends_them() -> None:
    model, made = experts(), objective()
    batch = collected(made, model)
    missing = {**batch, "routes": torch.full_like(batch["routes"], -1)}
    plain = {name: value for name, value in batch.items() if name != "routes"}
    found, wanted = gradient(made, model, missing), gradient(made, model, plain)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    metrics = made(model, missing, Key(0)).metrics
    assert metrics["routes_missing"][0] == metrics["routes_missing"][1] == batch["valid"].sum()
    partly = batch["routes"].clone()
    partly[0, :2, 1] = -1  # in the second layer alone
    assert made(model, {**batch, "routes": partly}, Key(0)).metrics["routes_missing"][0] == 2


def test_answers_without_routes_are_reported_and_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = experts(), objective()
    with torch.no_grad():
        full = made._answers(model, PROMPTS, 3, Key(1), True)
    assert full[0].routes is not None
    holed = full[0].routes.astype(np.int16)
    holed[1, 1] = -1  # of one token, in the second layer alone
    for found, missing in (
        ([replace(full[0], routes=holed), *full[1:]], 1),
        ([replace(f, routes=None) for f in full], 0),
    ):
        made = objective()
        monkeypatch.setattr(made, "_answers", lambda *arguments, found=found: found)
        batch, _ = collected(made, model), collected(made, model)
        assert capsys.readouterr().err.count("answers lack routes") == 1
        metrics = made(model, batch, Key(0)).metrics
        assert metrics["routes_missing"] == (missing or batch["valid"].sum(), batch["valid"].sum())
    monkeypatch.undo()
    collected(made, model)
    assert not capsys.readouterr().err
    assert "routes" not in objective(replay="none").batch(model, full, [0] * 6)


def test_the_reference_goes_its_own_ways_and_rounds_replay_too() -> None:
    model, made = experts(), objective(kl={"beta": 0.1, "reference": "r"}, rounds=2)
    made.__dict__["reference"] = transformer(3).double().eval()  # a dense one
    batch = collected(made, model)
    where = batch["next"] >= 0
    torch.testing.assert_close(batch["old"][where], batch["sampler"][where], atol=1e-9, rtol=0)
    assert torch.isfinite(made(model, batch, Key(0)).terms["loss"].total)


def test_bad_records_are_refused_before_the_forward() -> None:
    model, made = experts(), objective()
    batch = collected(made, model)
    routes, valid = batch["routes"], batch["valid"]

    def refused(match: str, routes: torch.Tensor, of: Any = model) -> None:
        with pytest.raises(TorchstoneError, match=match):
            Replay(of, routes, valid)

    def changed(value: list[int]) -> torch.Tensor:
        new = routes.clone()
        new[0, 0, 1] = torch.tensor(value, dtype=new.dtype)
        return new

    refused(r"decoder.layers.2.ffn.router is not among its 6", changed([1, 6]))
    refused(r"decoder.layers.2.ffn.router is not among its 6", changed([-1, 3]))
    refused(r"an expert of decoder.layers.2.ffn.router is recorded twice", changed([4, 4]))
    refused(r"rows, tokens and routed layers are \(6, \d+, 1\), the model's are \(6, \d+, 2\)", routes[:, :, :1])
    refused(r"rows, tokens and routed layers", routes[:, 1:])
    refused(r"takes 2 experts a token, 1 are recorded", routes[..., :1])
    refused("no layer of this model has a router", routes, transformer())
    with pytest.raises(TorchstoneError, match="replay is of routes, and no layer of the model has a router"):
        made.check(transformer())
    found = made._answers(model, PROMPTS, 3, Key(1), True)
    assert found[0].routes is not None
    short = [found[1].__class__(**{**vars(found[0]), "routes": found[0].routes[1:]})]
    with pytest.raises(TorchstoneError, match=r"routes: of answer 0 are"):
        batch_of(short, 1)


def uneven() -> Any:
    """Layers that take two, one and three experts."""
    ffn = {"kind": "moe", "experts": 6, "active": 2, "hidden": 16}
    layers = [{"at": [1], "ffn": {**ffn, "active": 1}}, {"at": [2], "ffn": {**ffn, "active": 3}}]
    return transformer(0, depth=3, ffn=ffn, layers=layers).double()


@pytest.mark.parametrize("replay", ["trainer", "rollout"])
def test_layers_may_take_different_numbers_of_experts(replay: str) -> None:
    model, made = uneven(), objective(replay=replay)
    batch = collected(made, model)
    assert batch["routes"].shape[2:] == (3, 3)
    filled = (batch["routes"][batch["valid"]] < 0).sum(-1)
    assert (filled == torch.tensor([1, 2, 0])).all()
    plain = {name: value for name, value in batch.items() if name != "routes"}
    found, wanted = gradient(made, model, batch), gradient(made, model, plain)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    metrics = made(model, batch, Key(0)).metrics
    assert metrics["routes_changed"][0] == 0 and metrics["routes_missing"][0] == 0 and metrics["sampler_gap"][0] < 1e-9
    # other records are used, in the layer that takes fewer experts too
    changed = batch["routes"].clone()
    changed[:, :, 1, 0] = torch.where(batch["valid"], (changed[:, :, 1].amax(-1) + 1) % 6, -1)
    assert made(model, {**batch, "routes": changed}, Key(0)).metrics["routes_changed"][0] >= batch["valid"].sum()
    changed[0, 0, 1, 1] = (changed[0, 0, 1, 0] + 1) % 6
    with pytest.raises(
        TorchstoneError, match=r"decoder.layers.1.ffn.router takes 1 experts a token, more are recorded"
    ):
        Replay(model, changed, batch["valid"])
    with pytest.raises(TorchstoneError, match=r"decoder.layers.2.ffn.router takes 3 experts a token, 2 are recorded"):
        Replay(model, batch["routes"][..., 1:], batch["valid"])


def test_the_engine_fills_rows_of_layers_that_take_fewer_experts() -> None:
    (done,) = Engine(uneven().eval(), compile="off", eos=0).generate(
        [[0, 3, 4]], Sampling(max_new_tokens=4), routes=True
    )
    assert done.routes is not None and done.routes.dtype == np.int16
    assert ((done.routes < 0).sum(-1) == [1, 2, 0]).all() and (done.routes[:, 1, 1:] == -1).all()


@pytest.mark.parametrize("router", [{"kind": "gshard", "second": "always"}, {"kind": "topk"}], ids=lambda r: r["kind"])
def test_replayed_experts_stand_in_the_order_of_live_scores(router: dict[str, Any]) -> None:
    """So that the first is the first choice, which gshard's balance loss is about."""
    model = experts(router={**router, "balance": 1.0})
    batch = other(collected(objective(), model))
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for each in routed_layers(model).values():

        def losses(scores: Any, routing: Any, valid: Any, ctx: Any, own: Any = each.losses) -> Any:
            made = own(scores, routing, valid, ctx)
            found.append((scores[valid], routing.experts[valid], made["balance_loss"]))
            return made

        each.losses = losses  # type: ignore[method-assign]
    gradient(objective(), model, batch)
    assert len(found) == 2
    for number, (scores, chosen, loss) in enumerate(found):
        given = scores.gather(-1, chosen)
        assert (given[:, 0] > given[:, 1]).all() and (chosen[:, 0] > chosen[:, 1]).any()
        recorded = batch["routes"][batch["valid"]][:, number].long()
        assert torch.equal(chosen.sort(-1).values, recorded.sort(-1).values)
        if router["kind"] == "gshard":
            first = [
                max(row, key=lambda e, s=s: s[e]) for row, s in zip(recorded.tolist(), scores.tolist(), strict=True)
            ]
            share = torch.bincount(torch.tensor(first), minlength=6)
            torch.testing.assert_close(loss, 6 * (share * scores.sum(0)).sum() / len(scores))
