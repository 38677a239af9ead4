"""What each router's paper promises of its choices, gates, losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.router import Routing
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.spec import resolve, validate

pytestmark = pytest.mark.usefixtures("float64")
D, V, B, T = 12, 30, 3, 8


def router(kind: str, experts: int = 8, active: int = 2, noise: float = 0.4, **fields: Any) -> Any:
    spec: Any = validate(resolve("router", kind), fields)
    assert spec.illegal(experts, active) is None
    module = initialise(spec.build(Site(width=D, vocabulary=V), experts, active), 0)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            drawn = torch.randn(parameter.shape, generator=Key(number).generator(), dtype=torch.float64)
            parameter.add_(noise * drawn)
    return module


def stream(seed: int = 0, rows: int = B, length: int = T) -> torch.Tensor:
    return torch.randn(rows, length, D, generator=Key(seed).generator(), dtype=torch.float64)


def context(rows: int = B, length: int = T, seed: int = 3, **columns: Any) -> Context:
    tokens = Tokens.of(torch.randint(V, (rows, length), generator=Key(seed).generator()), **columns)
    return Context(tokens, tokens)


def run(module: Any, x: torch.Tensor | None = None, **columns: Any) -> Routing:
    x = stream() if x is None else x
    return module(x, context(*x.shape[:2], **columns))


# --------------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize("kind", ["topk", "sigmoid_bias", "cosine"])
def test_balance_losses_equal_their_equations(kind: str) -> None:
    module = router(kind, groups=4, balance=0.3, group_balance=0.7, sequence_balance=0.2)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 5:] = False
    x = stream()
    routing = run(module, x, valid=valid)
    with torch.no_grad():
        scores = module.score(x, context())
        share = {"topk": scores, "sigmoid_bias": scores / scores.sum(-1, keepdim=True)}
        s = share[kind] if kind in share else (scores / 0.07).softmax(-1)
    E, K, tokens = 8, 2, [(b, t) for b in range(B) for t in range(T) if valid[b, t]]

    def level(over: list[tuple[int, int]]) -> tuple[list[float], list[float]]:
        f = [E / (K * len(over)) * sum(e in routing.experts[b, t] for b, t in over) for e in range(E)]
        return f, [sum(float(s[b, t, e]) for b, t in over) / len(over) for e in range(E)]

    f, P = level(tokens)
    assert sum(f) == pytest.approx(E)
    wanted = 0.3 * sum(a * b for a, b in zip(f, P, strict=True))
    assert routing.losses["balance_loss"].item() / len(tokens) == pytest.approx(wanted)
    groups = [(sum(f[g : g + 2]) / 2, sum(P[g : g + 2])) for g in range(0, E, 2)]
    wanted = 0.7 * sum(a * b for a, b in groups)
    assert routing.losses["group_balance_loss"].item() / len(tokens) == pytest.approx(wanted)
    rows = [[(b, t) for t in range(T) if valid[b, t]] for b in range(B)]
    each = [(len(row), level(row)) for row in rows]
    wanted = 0.2 * sum(n * sum(a * b for a, b in zip(f, P, strict=True)) for n, (f, P) in each)
    assert routing.losses["sequence_balance_loss"].item() == pytest.approx(wanted)


def test_even_scores_cost_exactly_the_weight_whatever_is_chosen() -> None:
    module = router("topk", balance=0.3, group_balance=0.7, sequence_balance=0.2)
    with torch.no_grad():
        module.weight.zero_()
    losses = run(module).losses
    assert [losses[name].item() / (B * T) for name in sorted(losses)] == pytest.approx([0.3, 0.7, 0.2])


def test_counts_are_constants_and_losses_reach_the_router() -> None:
    module, x = router("topk", active=1, balance=1.0), stream().requires_grad_()
    routing = run(module, x)
    assert not routing.counts.requires_grad
    (grad,) = torch.autograd.grad(routing.losses["balance_loss"], module.weight)
    assert grad.abs().max() > 1e-6
    module.eval()
    assert run(module).losses == {}


def test_unchosen_scores_get_no_gradient_from_gates_that_are_normalised() -> None:
    module, x = router("topk", normalise=True), stream(rows=1, length=1)
    logits: list[torch.Tensor] = []
    score = module.score
    module.score = lambda x, ctx: logits.append((x @ module.weight.T).requires_grad_()) or logits[0].softmax(-1)
    routing = run(module, x)
    module.score = score
    (grad,) = torch.autograd.grad((routing.gates * torch.tensor([1.0, 3.0])).sum(), logits[0])
    chosen = torch.zeros(8, dtype=torch.bool).scatter(0, routing.experts.flatten(), True)
    assert grad.flatten()[chosen].abs().min() > 1e-6 and grad.flatten()[~chosen].abs().max() < 1e-15


# --------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("kind", ["topk", "sigmoid_bias", "cosine"])
def test_chosen_experts_lie_in_no_more_groups_than_are_kept(kind: str) -> None:
    module = router(kind, experts=12, active=4, groups=6, keep_groups=2)
    experts = run(module).experts
    assert max(len({int(e) // 2 for e in token}) for token in experts.flatten(0, 1)) == 2
    free = router(kind, experts=12, active=4, groups=6)
    assert max(len({int(e) // 2 for e in token}) for token in run(free).experts.flatten(0, 1)) > 2
    plain = router(kind, experts=12, active=4)
    assert torch.equal(run(free).experts, run(plain).experts)


def test_a_group_is_worth_its_best_expert_or_its_best_two() -> None:
    scores = torch.tensor([[[0.9, 0.1, 0.1, 0.6, 0.5, 0.1]]]).double()
    fields = {"experts": 6, "active": 2, "groups": 2, "keep_groups": 1}
    assert int(router("topk", **fields).best(scores)[0, 0, 0]) == 0
    assert set(router("sigmoid_bias", **fields).best(scores)[0, 0].tolist()) == {3, 4}


# --------------------------------------------------------------------------------------------------- sigmoid_bias


def test_gates_add_up_to_the_scale_and_never_see_the_bias() -> None:
    module = router("sigmoid_bias", scale=2.5)
    before = run(module)
    torch.testing.assert_close(before.gates.sum(-1), torch.full((B, T), 2.5, dtype=torch.float64))
    module.bias += 0.7  # the same for all: nothing changes, in groups neither
    after = run(module)
    assert torch.equal(after.experts, before.experts) and torch.equal(after.gates, before.gates)
    module.bias[3] += 9.0
    moved = run(module)
    assert (moved.experts == 3).any(-1).all()
    stay = (moved.experts.sort(-1).values == before.experts.sort(-1).values).all(-1)
    torch.testing.assert_close(moved.gates.sort(-1).values[stay], before.gates.sort(-1).values[stay])
    grouped = router("sigmoid_bias", groups=4, keep_groups=2)
    kept = run(grouped).experts
    grouped.bias -= 3.0
    assert torch.equal(run(grouped).experts, kept)


def test_bias_stays_float32_and_is_saved() -> None:
    module = router("sigmoid_bias").bfloat16()
    assert module.weight.dtype == torch.bfloat16 and module.bias.dtype == torch.float32
    assert module.double().bias.dtype == torch.float32
    assert "bias" in module.state_dict() and "bias" not in dict(module.named_parameters())
    with torch.device("meta"):
        bare = resolve("router", "sigmoid_bias")().build(Site(width=D), 8, 2).to(torch.bfloat16)  # type: ignore[attr-defined]
    ready = initialise(bare.to_empty(device="cpu"), 0)
    assert ready.bias.dtype == torch.float32 and not ready.bias.any()


def test_an_expert_that_all_tokens_want_is_not_alone_once_the_bias_has_moved_far_enough() -> None:
    module, x = router("sigmoid_bias", experts=4, active=1, normalise=False, update_rate=0.05), stream()[:1, :1]
    x = x.expand(B, T, D)
    scores = module.score(x, context())[0, 0]
    steps, seen = int((scores.max() - scores.min()) / 0.05) + 2, set()
    for step in range(steps):
        routing = run(module, x)
        seen |= set(routing.experts.flatten().tolist())
        module.after_step(step, {"load.0": routing.counts.sum(0)})
    assert len(seen) > 1
    untouched = router("sigmoid_bias", update_steps=0)
    untouched.after_step(0, {"load.0": torch.arange(8.0)})
    assert not untouched.bias.any()


# --------------------------------------------------------------------------------------------------------- cosine


def test_cosines_see_directions_alone() -> None:
    module, x = router("cosine", dim=3), stream()
    score = module.score(x, context())
    assert score.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(module.score(3.7 * x, context()), score)
    with torch.no_grad():
        module.weight.mul_(torch.linspace(0.5, 4, 8)[:, None])
        torch.testing.assert_close(module.score(x, context()), score)
        turn = torch.linalg.qr(stream(4)[0, :3, :3])[0]
        module.weight.copy_(module.weight @ turn.T)
        module.down.copy_(turn @ module.down)
    torch.testing.assert_close(module.score(x, context()), score)


def test_routing_by_cosine_pulls_no_vector_longer_and_into_few_dimensions() -> None:
    module, x = router("cosine", dim=3), stream().requires_grad_()
    score = module.score(x, context())
    for e in (0, 5):
        to_x, to_e = torch.autograd.grad(score[..., e].sum(), (x, module.weight), retain_graph=True)
        assert (to_x * x).sum(-1).abs().max() < 1e-10
        assert (to_e[e] @ module.weight[e]).abs() < 1e-10
    (grad,) = torch.autograd.grad((run(module, x).gates * stream(7)[..., :2]).sum(), x)
    assert torch.linalg.matrix_rank(grad.flatten(0, 1)) <= 3
    plain, x = router("topk"), stream().requires_grad_()
    (grad,) = torch.autograd.grad((run(plain, x).gates * stream(7)[..., :2]).sum(), x)
    assert torch.linalg.matrix_rank(grad.flatten(0, 1)) == 7  # N - 1, of 12 dimensions


def test_temperature_starts_where_the_paper_says_and_cannot_satisfy_the_balance_loss() -> None:
    assert router("cosine", noise=0).log_temperature.exp().item() == pytest.approx(0.3)
    assert router("cosine", noise=0, gating="sigmoid").log_temperature.exp().item() == pytest.approx(0.07)
    module = router("cosine", balance=1.0)
    loss = run(module).losses["balance_loss"]
    assert torch.autograd.grad(loss, module.log_temperature, allow_unused=True)[0] is None
    gates = run(router("cosine", normalise=True)).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(B, T, dtype=torch.float64))
    assert sum(p.numel() for p in router("cosine", experts=32).parameters()) == 16 * (D + 32) + 1


def test_gradient_of_the_stream_is_the_collapse_identity() -> None:
    """h' = h + S_k F_k(h), k = argmax: dL/dh = J^T g + sum_j S_k (delta_kj - S_j) <F_k(h), g> e_j (section 2.2)."""
    e, h = stream(1, 1, 4)[0], stream(2, 1, 1)[0, 0].requires_grad_()
    W, g = stream(5, 1, D)[0], stream(6, 1, 1)[0, 0]
    module = router("topk", experts=4, active=1)
    with torch.no_grad():
        module.weight.copy_(e)
    routing = run(module, h[None, None])
    k = int(routing.experts)
    out = h + routing.gates.squeeze() * torch.tanh(W @ h)
    (found,) = torch.autograd.grad(out @ g, h)
    with torch.no_grad():
        S, f = (e @ h).softmax(-1), torch.tanh(W @ h)
        J = torch.eye(D) + S[k] * (1 - f**2)[:, None] * W
        collapse = sum(S[k] * (float(k == j) - S[j]) * (f @ g) * e[j] for j in range(4))
        torch.testing.assert_close(found, J.T @ g + collapse)


# -------------------------------------------------------------------------------------------------- hash and stable


@pytest.mark.parametrize("gating", ["even", "sigmoid"])
def test_hash_sends_an_id_to_the_same_experts_everywhere(gating: str) -> None:
    module = router("hash", gating=gating)
    ids = torch.tensor([[4, 9, 4], [9, 9, 4]])
    tokens = Tokens.of(ids)
    first = module(stream(0, 2, 3), Context(tokens, tokens)).experts
    again = module(stream(1, 2, 3), Context(tokens, tokens)).experts
    assert torch.equal(first, again) and torch.equal(first[0, 0], first[1, 2]) and torch.equal(first[0, 1], first[1, 0])
    every = Tokens.of(torch.arange(4000)[None])
    chosen = module(stream(0, 1, 4000), Context(every, every)).experts[0]
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert torch.bincount(chosen.flatten(), minlength=8).tolist() == pytest.approx([1000] * 8, rel=0.1)
    other = router("hash", gating=gating, seed=1)(stream(0, 1, 4000), Context(every, every)).experts[0]
    assert 0.5 < (other[:, 0] != chosen[:, 0]).double().mean() < 0.95


def test_stable_balance_pushes_scores_of_full_experts_down_and_of_empty_ones_up() -> None:
    module, x = router("stable", experts=4, active=1, balance=0.5), stream()
    routing = run(module, x)
    n = routing.counts.sum(0)
    a = routing.experts[..., 0]
    s = torch.sigmoid((x @ module.weight.T).gather(-1, a[..., None])[..., 0])
    wanted = 0.5 * sum(((n[i] - B * T / 4) / (B * T / 4) * s[a == i].sum() for i in range(4)), torch.zeros(()))
    torch.testing.assert_close(routing.losses["balance_loss"], wanted)
    scores = module.score(x, context()).detach().requires_grad_()
    valid = torch.ones(B, T, dtype=torch.bool)
    (grad,) = torch.autograd.grad(module.losses(scores, routing, valid, context())["balance_loss"], scores)
    assert len(set(n.tolist())) > 1
    for i in range(4):
        pushed = grad[..., i][a == i]
        assert (pushed > 0).all() if n[i] > B * T / 4 else (pushed < 0).all() if n[i] < B * T / 4 else True
    even = replace(routing, counts=torch.full((B, 4), T / 4.0), experts=routing.experts)
    assert module.losses(scores, even, valid, context())["balance_loss"] == 0


def test_stable_distills_without_touching_what_it_learns_from() -> None:
    module, x = router("stable", experts=4, active=1), stream().requires_grad_()
    routing = run(module, x)
    inputs = (x, module.weight, module.words, module.distilled)
    grads = torch.autograd.grad(routing.losses["distill_loss"], inputs, allow_unused=True, retain_graph=True)
    assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0 and grads[3].abs().max() > 0
    grads = torch.autograd.grad(routing.gates.sum(), inputs, allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1].abs().max() > 0 and grads[2] is None and grads[3] is None
    logits = module.words[context().q.ids] @ module.distilled.T
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), routing.experts.flatten(), reduction="sum")
    torch.testing.assert_close(routing.losses["distill_loss"], 0.3 * wanted)


def test_stable_becomes_a_table_of_ids_at_its_step() -> None:
    module = router("stable", experts=4, active=1, distill_steps=3)
    ids, small = context().q.ids, (module.words @ module.distilled.T).argmax(-1)
    module.before_step(2)
    learned = (stream() @ module.weight.T).argmax(-1)
    assert not module.frozen and torch.equal(run(module).experts[..., 0], learned)
    assert not torch.equal(learned, small[ids])
    module.eval()
    assert torch.equal(run(module).experts[..., 0], small[ids])  # evaluation goes by the small router at all times
    module.train()
    module.before_step(3)
    assert module.frozen and torch.equal(module.table, small)
    routing = run(module, stream(8))
    assert torch.equal(routing.experts[..., 0], small[ids]) and routing.losses == {}
    with torch.no_grad():
        module.words.zero_()
    module.before_step(4)
    assert torch.equal(module.table, small) and torch.equal(run(module).experts[..., 0], small[ids])


def test_choices_do_not_depend_on_the_precision_of_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    for kind in ("topk", "sigmoid_bias", "cosine"):
        module, x = router(kind).float(), stream().float()
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(module, x)
        plain = run(module, x)
        assert torch.equal(cast.experts, plain.experts) and torch.equal(cast.gates, plain.gates)
