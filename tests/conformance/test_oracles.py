"""Every kind against an independent definition of a few lines: what consistency checks cannot see.

`ORACLES` has one function per kind; a kind without one fails a test. Definitions are loops over plain numbers, written
from the papers, not from the modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conformance.cases import FAMILIES, Case
from conformance.checks import drawn_ids, same
from conformance.variants import EXPERTS, layout, layouts, variants
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.context import Context, Memory
from torchstone.model.embedding.patch import Patches
from torchstone.model.embedding.vision_language import VisionLanguage
from torchstone.model.position import Positions
from torchstone.model.site import Site, initialise
from torchstone.model.stack import LayerSpec
from torchstone.model.stack.multi_token import predict
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.ops import noise
from torchstone.spec import PartSpec, kinds, resolve, validate

pytestmark = pytest.mark.usefixtures("float64")

Oracle = Callable[[], None]
ORACLES: dict[tuple[str, str], Oracle] = {}


def oracle(family: str, kind: str) -> Callable[[Oracle], Oracle]:
    def add(function: Oracle) -> Oracle:
        ORACLES[family, kind] = function
        return function

    return add


def every(family: str) -> list[tuple[str, str]]:
    return [(family, kind) for kind in kinds(family)]


@pytest.mark.parametrize(
    ("family", "kind"), [pair for family in (*FAMILIES, "scaling", "router") for pair in every(family)]
)
def test_kind_agrees_with_its_independent_definition(family: str, kind: str) -> None:
    assert (family, kind) in ORACLES, f"{family} {kind} has no oracle in {__file__}"
    ORACLES[family, kind]()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=Key(seed).fold("oracle", *shape).generator(), dtype=torch.float64)


def ready(module: nn.Module, seed: int = 0) -> Any:
    """The module with parameters far from their usual start."""
    initialise(module, seed)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * drawn(*parameter.shape, seed=number + 1))
    return module


def specs(family: str, kind: str) -> list[Any]:
    """Every variant of a kind, as specs."""
    found = []
    for fields in variants(family).values():
        body = dict(fields)
        if body.pop("kind") == kind:
            found.append(validate(resolve(family, kind), body))
    return found


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()


# ------------------------------------------------------------------------------------------------------ attention


def normed(spec: PartSpec, x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None = None) -> np.ndarray:
    """RMS or layer norm of one vector."""
    eps = spec.eps
    y = x / math.sqrt((x**2).mean() + eps) if spec.kind == "rmsnorm" else (x - x.mean()) / math.sqrt(x.var() + eps)
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


def softmax_by_hand(
    spec: Any, module: Any, x_TD: np.ndarray, memory_SD: np.ndarray | None, seen: Callable[[int, int], bool]
) -> np.ndarray:
    """Softmax attention of one sequence, query by query and head by head; eq. 1 of Vaswani et al. 2017."""
    H, G = spec.heads, spec.kv_heads or spec.heads
    K = spec.head_dim or x_TD.shape[1] // H
    state = {name: array(value) for name, value in module.state_dict().items()}
    if memory_SD is None:
        source, W, b = x_TD, list(state["qkv.weight"]), state.get("qkv.bias", np.zeros(H * K + 2 * G * K))
        if spec.bias == "qvo":
            b = np.concatenate([b[: H * K], np.zeros(G * K), b[H * K :]])
    else:
        source, W = memory_SD, [*state["q.weight"], *state["kv.weight"]]
        of_kv = state.get("kv.bias", np.zeros(2 * G * K))
        of_kv = np.concatenate([np.zeros(G * K), of_kv]) if spec.bias == "qvo" else of_kv
        b = np.concatenate([state.get("q.bias", np.zeros(H * K)), of_kv])
    out = np.zeros((len(x_TD), H * K))
    for t, h in product(range(len(x_TD)), range(H)):
        g = h // (H // G)
        q_rows = slice(h * K, (h + 1) * K)
        k_rows, v_rows = (slice(H * K + (i * G + g) * K, H * K + (i * G + g + 1) * K) for i in (0, 1))
        q = np.array(W[q_rows]) @ x_TD[t] + b[q_rows]
        if spec.qk_norm:
            q = normed(module.q_norm.oracle, q, state.get("q_norm.weight"), state.get("q_norm.bias"))
        scores, values = [], []
        for s in range(len(source)):
            if not seen(t, s):
                continue
            k = np.array(W[k_rows]) @ source[s] + b[k_rows]
            if spec.qk_norm:
                k = normed(module.k_norm.oracle, k, state.get("k_norm.weight"), state.get("k_norm.bias"))
            score = (spec.scale or 1 / math.sqrt(K)) * (q @ k)
            scores.append(spec.softcap * math.tanh(score / spec.softcap) if spec.softcap else score)
            values.append(np.array(W[v_rows]) @ source[s] + b[v_rows])
        e = np.exp(np.array(scores) - max(scores))
        out[t, h * K : (h + 1) * K] = (e / e.sum()) @ np.array(values)
    return out @ state["out.weight"].T + state.get("out.bias", 0)


def softmax_agrees_with_its_definition(spec: Any) -> None:
    for norm in ("rmsnorm", "layernorm"):
        norm_spec = resolve("norm", norm)()
        for causal, crossed in ((True, False), (False, False), (False, True)):
            site = Site(width=32, norm_spec=norm_spec, memory_width=24 if crossed else None)
            module = ready(spec.build(site))
            if spec.qk_norm:
                module.q_norm.oracle = module.k_norm.oracle = norm_spec
            x, memory = drawn(1, 11, 32), drawn(1, 7, 24) if crossed else None
            ctx = Context.alone(x, causal=causal)
            if memory is not None:
                ctx = replace(ctx, memory=Memory(memory, Tokens.blank(7)))
            window = math.inf if crossed or spec.window is None else spec.window

            def seen(t: int, s: int, causal: bool = causal, window: float = window) -> bool:
                return abs(t - s) < window and (s <= t or not causal)

            by_hand = softmax_by_hand(spec, module, array(x[0]), None if memory is None else array(memory[0]), seen)
            same(module(x, ctx)[0][0], torch.from_numpy(by_hand), f"{spec}, causal={causal}, memory={crossed}")


@oracle("attention", "softmax")
def _() -> None:
    for spec in specs("attention", "softmax"):
        softmax_agrees_with_its_definition(spec.model_copy(update={"heads": 4}))


@oracle("attention", "retention")
def _() -> None:
    for spec in specs("attention", "retention"):
        spec = spec.model_copy(update={"heads": 4})
        module, x = ready(spec.build(Site(width=32))), drawn(1, 11, 32)
        by_hand = retention_by_hand(spec, module, array(x[0]))
        same(module(x)[0][0], torch.from_numpy(by_hand), f"{spec}")


def retention_by_hand(spec: Any, module: Any, x_TD: np.ndarray) -> np.ndarray:
    """Retention of one sequence as a sum over pairs; eqs. 5 and 8 of Sun et al. 2023, without a rotation."""
    H, D = spec.heads, x_TD.shape[1]
    E = int(spec.value_expansion * D)
    K, V = D // H, E // H
    W = array(module.qkvg.weight)
    q, k, v, g = (x_TD @ part.T for part in np.split(W, [D, 2 * D, 2 * D + E]))
    out = np.zeros((len(x_TD), E))
    for h, n in product(range(H), range(len(x_TD))):
        decay, of_k, of_v = 1 - 2.0 ** (-5 - h), slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
        y = sum(decay ** (n - m) * (q[n, of_k] @ k[m, of_k]) / math.sqrt(K) * v[m, of_v] for m in range(n + 1))
        y = y / math.sqrt(sum(decay ** (n - m) for m in range(n + 1)))
        y = y / math.sqrt((y**2).mean() + spec.eps)
        out[n, of_v] = y * g[n, of_v] / (1 + np.exp(-g[n, of_v]))
    return out @ array(module.out.weight).T


@oracle("attention", "gated_retention")
def _() -> None:
    for spec in specs("attention", "gated_retention"):
        spec = spec.model_copy(update={"heads": 4})
        module, x = ready(spec.build(Site(width=32))), drawn(1, 11, 32)
        by_hand = gated_retention_by_hand(spec, module, array(x[0]))
        same(module(x)[0][0], torch.from_numpy(by_hand), f"{spec}")


def gated_retention_by_hand(spec: Any, module: Any, x_TD: np.ndarray) -> np.ndarray:
    """Gated retention of one sequence as a sum over pairs; section 3.1 of Sun et al. 2024, without a rotation."""
    H, (T, D) = spec.heads, x_TD.shape
    K = D // H
    q, k, v, g = (x_TD @ part.T for part in np.split(array(module.qkvg.weight), 4))
    gamma = (1 / (1 + np.exp(-x_TD @ array(module.decay.weight).T))) ** (1 / spec.temperature)
    out = np.zeros((T, D))
    for h, n in product(range(H), range(T)):
        of = slice(h * K, (h + 1) * K)
        D_nm = [np.prod(gamma[m + 1 : n + 1, h]) for m in range(n + 1)]
        y = sum(D_nm[m] * (q[n, of] @ k[m, of]) / math.sqrt(K) * v[m, of] for m in range(n + 1))
        y = y / math.sqrt((y**2).mean() + spec.eps)
        out[n, of] = y * g[n, of] / (1 + np.exp(-g[n, of]))
    return out @ array(module.out.weight).T


@oracle("attention", "mla")
def _() -> None:
    rotary = resolve("position", "rotary")(interleaved=True, base=20.0)
    for spec, norm, turned in product(specs("attention", "mla"), ("rmsnorm", "layernorm"), (True, False)):
        if turned and not spec.rope_dim:
            continue
        spec, norm_spec = spec.model_copy(update={"heads": 3}), resolve("norm", norm)()
        positions = Positions(64, True)
        site = Site(width=32, norm_spec=norm_spec, position_spec=rotary if turned else None, positions=positions)
        module, x = ready(spec.build(site)), drawn(1, 11, 32)
        for causal in (True, False):
            by_hand = mla_by_hand(spec, norm, module, array(x[0]), rotary if turned else None, causal)
            same(module(x, Context.alone(x, causal, positions))[0][0], torch.from_numpy(by_hand), f"{spec}, {norm}")


def mla_by_hand(spec: Any, norm: str, module: Any, x_TD: np.ndarray, rotary: Any, causal: bool) -> np.ndarray:
    """Latent attention of one sequence, query by query; eqs. 9 to 19 of DeepSeek-V2, keys and values of every head."""
    H, N, R, V, C, q_latent = spec.heads, spec.nope_dim, spec.rope_dim, spec.v_dim, spec.kv_latent, spec.q_latent
    state = {name: array(value) for name, value in module.state_dict().items()}
    latent = SimpleNamespace(kind=norm, eps=spec.eps)

    def turned(x: np.ndarray, t: int) -> np.ndarray:
        return (
            x if rotary is None else rotated_by_hand(rotary, x, t, [20.0 ** (-2 * i / R) for i in range(R // 2)], 1.0)
        )

    W_q, W_kv = np.split(state["down.weight" if q_latent else "qkv.weight"], [q_latent or H * (N + R)])
    W_uk, W_uv = np.split(state["kv_up.weight"], [H * N])
    queries, latents, rotated = [], [], []
    for t, x in enumerate(x_TD):
        c = W_q @ x
        if q_latent:
            c = state["q_up.weight"] @ normed(latent, c, state["q_norm.weight"], state.get("q_norm.bias"))
        queries.append([(q[:N], turned(q[N:], t)) for q in c.reshape(H, N + R)])
        latents.append(normed(latent, W_kv[:C] @ x, state["kv_norm.weight"], state.get("kv_norm.bias")))
        rotated.append(turned(W_kv[C:] @ x, t))
    out = np.zeros((len(x_TD), H * V))
    for t, h in product(range(len(x_TD)), range(H)):
        seen = range(t + 1 if causal else len(x_TD))
        keys = [W_uk[h * N : (h + 1) * N] @ latents[s] for s in seen]
        values = [W_uv[h * V : (h + 1) * V] @ latents[s] for s in seen]
        nope, rope = queries[t][h]
        scores = np.array([nope @ k + rope @ rotated[s] for s, k in zip(seen, keys, strict=True)])
        e = np.exp((spec.scale or 1 / math.sqrt(N + R)) * scores)
        out[t, h * V : (h + 1) * V] = (e / e.sum()) @ np.array(values)
    return out @ state["out.weight"].T


def kept_together(spec: Any, i: int, h: int, t: int, s: int) -> bool:
    """Whether head h of pattern i keeps both tokens of one segment; section 2.2 of Ding et al. 2023."""
    w, r = spec.segments[i], spec.dilations[i]
    offset = h % r if spec.offset == "mod" else h // math.ceil(spec.heads / r)
    return t // w == s // w and (t % w - offset) % r == 0 == (s % w - offset) % r


def dilated_by_hand(spec: Any, module: Any, x_TD: np.ndarray, causal: bool) -> np.ndarray:
    """Dilated attention of one sequence, pair by pair: the sum of all patterns' numerators over that of their
    denominators, which eq. 10 of Ding et al. 2023 comes to."""
    H, G, T = spec.heads, spec.kv_heads or spec.heads, len(x_TD)
    K = spec.head_dim or x_TD.shape[1] // H
    state = {name: array(value) for name, value in module.state_dict().items()}
    qkv = x_TD @ state["qkv.weight"].T + state.get("qkv.bias", 0)
    q, k, v = (x.reshape(T, -1, K) for x in np.split(qkv, [H * K, (H + G) * K], axis=1))
    if spec.qk_norm:
        norm = resolve("norm", "rmsnorm")()
        q, k = (
            np.array([[normed(norm, head, state[f"{name}_norm.weight"]) for head in token] for token in x])
            for name, x in (("q", q), ("k", k))
        )
    out = np.zeros((T, H, K))
    for t, h in product(range(T), range(H)):
        above, below, g = np.zeros(K), 0.0, h // (H // G)
        for s, i in product(range(t + 1 if causal else T), range(len(spec.segments))):
            if kept_together(spec, i, h, t, s):
                weight = np.exp((spec.scale or K**-0.5) * (q[t, h] @ k[s, g]))
                above, below = above + weight * v[s, g], below + weight
        out[t, h] = above / below
    return out.reshape(T, -1) @ state["out.weight"].T + state.get("out.bias", 0)


@oracle("attention", "dilated")
def _() -> None:
    for spec, causal in product(specs("attention", "dilated"), (True, False)):
        spec = spec.model_copy(update={"heads": 4})
        module, x = ready(spec.build(Site(width=32, causal=causal))), drawn(1, 13, 32)
        by_hand = dilated_by_hand(spec, module, array(x[0]), causal)
        same(module(x)[0][0], torch.from_numpy(by_hand), f"{spec}, causal={causal}")


def reach(spec: Any, t: int, length: int, causal: bool) -> set[int]:
    """The inputs that output `t` depends on, as the kind declares it: segments, a window, or all."""
    if spec.kind == "dilated":
        patterns = product(range(len(spec.segments)), range(spec.heads))
        seen = {s for i, h in patterns for s in range(length) if kept_together(spec, i, h, t, s)}
        return {s for s in seen if s <= t or not causal}
    window = getattr(spec, "window", None) or length
    return set(range(max(0, t - window + 1), t + 1 if causal else min(length, t + window)))


@pytest.mark.parametrize("name", variants("attention"))
def test_gradient_reaches_exactly_the_declared_inputs(name: str) -> None:
    fields = dict(variants("attention")[name])
    spec = validate(resolve("attention", fields.pop("kind")), {"heads": 4, **fields})
    for causal in (True,) if spec.causal_only else (True, False):
        module = ready(spec.build(Site(width=32, causal=causal)))
        x = drawn(1, 13, 32).requires_grad_()
        y = module(x, Context.alone(x, causal=causal))[0]
        for t in range(13):
            (grad,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
            assert set(grad[0].abs().amax(-1).nonzero().flatten().tolist()) == reach(spec, t, 13, causal)


@pytest.mark.parametrize("name", variants("attention"))
def test_decode_state_grows_where_the_kind_says_so(name: str) -> None:
    fields = dict(variants("attention")[name])
    spec = validate(resolve("attention", fields.pop("kind")), {"heads": 4, **fields})
    assert spec.grows == any(slot.growth == "growing" for slot in spec.build(Site(width=32)).state_spec())


# ------------------------------------------------------------------------------------------------------- position


def rotated_by_hand(spec: Any, x: np.ndarray, t: int, frequencies: list[float], size: float) -> np.ndarray:
    """One head's vector at position `t` as complex numbers times e^(i t f)."""
    R = 2 * len(frequencies)
    turn = np.exp(1j * t * np.array(frequencies))
    first, second = (slice(0, R, 2), slice(1, R, 2)) if spec.interleaved else (slice(0, R // 2), slice(R // 2, R))
    z = (x[first] + 1j * x[second]) * turn * size
    out = x.copy()
    out[first], out[second] = z.real, z.imag
    return out


def rotary_agrees(spec: Any, frequencies: list[float], size: float, dim: int = 8) -> None:
    rotation = spec.build(dim, 4, 32, 64, True).rotation(torch.tensor([[0, 3, 50]]))
    x = drawn(1, 2, 3, dim)
    wanted = x.clone()
    for h, (i, t) in product(range(2), enumerate((0, 3, 50))):
        wanted[0, h, i] = torch.from_numpy(rotated_by_hand(spec, array(x[0, h, i]), t, frequencies, size))
    same(rotation.q(x), wanted, f"queries of {spec}")
    same(rotation.k(x), wanted, f"keys of {spec}")


@oracle("position", "rotary")
def _() -> None:
    for spec in specs("position", "rotary"):
        if spec.scaling is None:
            R = int(8 * spec.fraction)
            last = R // 2 - 1 if spec.inclusive else R / 2  # at which i the exponent is 1
            rotary_agrees(spec, [spec.base ** (-i / last) for i in range(R // 2)], 1.0)


@oracle("position", "xpos")
def _() -> None:
    """Sun et al. 2022, eq. 13: a pair's product is zeta^((n - m) / B) Re(q conj(k) e^(i (n - m) theta))."""
    dim, length = 8, 9
    for spec in specs("position", "xpos"):
        module, start = spec.build(dim, 1, dim, 64, True), torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4]])
        q, k, tokens = drawn(1, 1, length, dim), drawn(1, 1, length, dim, seed=1), Tokens.blank(length, start=start)
        rotation, decay = module.rotation(tokens.where), module.decay(tokens, tokens)
        products = [
            (lambda a, b: a @ b.mT)(
                *decay.slice(n, n + 1, 0, length).rebased(rotation.q(q)[:, :, n : n + 1], rotation.k(k))
            )
            for n in range(length)
        ]
        scores = torch.cat(products, 2)[0, 0]
        x = array(q[0, 0]), array(k[0, 0])
        pairs = (slice(0, dim, 2), slice(1, dim, 2)) if spec.interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
        zq, zk = (each[:, pairs[0]] + 1j * each[:, pairs[1]] for each in x)
        i = np.arange(dim // 2)
        zeta, theta = (i / (dim / 2) + spec.gamma) / (1 + spec.gamma), spec.base ** (-2 * i / dim)
        for n, m in product(range(length), range(length)):
            if m <= n and start[0, n] == start[0, m]:
                by_hand = (
                    zeta ** ((n - m) / spec.scale_base) * (zq[n] * zk[m].conj() * np.exp(1j * (n - m) * theta)).real
                )
                same(scores[n, m], torch.tensor(by_hand.sum()), f"query {n}, key {m} of {spec}")


def scaled(kind: str, frequencies: Callable[[float, int, int], float], size: float = 1.0, **fields: Any) -> None:
    """Rotary of 32 channels whose channel i has frequency ``frequencies(f, i, R)`` instead of f."""
    R = 32
    spec = validate(resolve("position", "rotary"), {"scaling": {"kind": kind, **fields}})
    rotary_agrees(spec, [frequencies(10000 ** (-2 * i / R), i, R) for i in range(R // 2)], size, dim=R)


@oracle("scaling", "linear")
def _() -> None:
    scaled("linear", lambda f, i, R: f / 4, factor=4.0)


@oracle("scaling", "ntk")
def _() -> None:
    scaled("ntk", lambda f, i, R: f / 4 ** (2 * i / (R - 2)), factor=4.0)  # the last divided by 4, the first kept


@oracle("scaling", "llama3")
def _() -> None:
    def new(f: float, i: int, R: int) -> float:  # the published reference code, in wavelengths
        wavelength, low, high = 2 * math.pi / f, 1.0, 4.0
        if wavelength < 512 / high:
            return f
        if wavelength > 512 / low:
            return f / 4
        smooth = (512 / wavelength - low) / (high - low)
        return (1 - smooth) * f / 4 + smooth * f

    scaled("llama3", new, factor=4.0, original=512)


@oracle("scaling", "yarn")
def _() -> None:
    def ends(low: float, high: float) -> Callable[[float, int, int], float]:
        def new(f: float, i: int, R: int) -> float:
            ramp = min(1.0, max(0.0, (i - low) / (high - low)))
            return f / 4 * ramp + f * (1 - ramp)

        return new

    # channel i turns 512 f_i / 2 pi times: 32 times at 1.62, once at 7.64 (base 10000, R 32)
    at = [32 * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1)]
    assert [round(value, 2) for value in at] == [1.62, 7.64]
    size = 0.1 * math.log(4) + 1
    scaled("yarn", ends(1, 8), size, factor=4.0, original=512)
    scaled("yarn", ends(*at), size, factor=4.0, original=512, truncate=False)
    scaled("yarn", ends(1, 8), 1.0, factor=4.0, original=512, temperature=1.0)


@oracle("position", "alibi")
def _() -> None:
    tokens = Tokens(torch.arange(6)[None])
    for heads, slopes in ((4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]), (3, [1 / 16, 1 / 256, 1 / 4]), (1, [1 / 256])):
        bias = resolve("position", "alibi")().build(8, heads, 32, 64, True).bias(tokens, tokens)
        wanted = [[[-slope * abs(t - s) for s in range(6)] for t in range(6)] for slope in slopes]
        same(bias[0], torch.tensor(wanted), f"{heads} heads")


@oracle("position", "t5")
def _() -> None:
    def bucket(ahead: int, causal: bool, buckets: int, far: int) -> int:
        """Raffel et al. 2019 and its published code: half exact, half logarithmic up to `far`."""
        first = 0
        if not causal:
            buckets //= 2
            first = buckets if ahead > 0 else 0
        distance = max(0, -ahead) if causal else abs(ahead)
        exact = buckets // 2
        if distance < exact:
            return first + distance
        grown = exact + int(math.log(distance / exact) / math.log(far / exact) * (buckets - exact) + 1e-9)
        return first + min(buckets - 1, grown)

    q, k = Tokens(torch.tensor([[0, 40, 200]])), Tokens(torch.arange(230)[None])
    for spec, causal in product(specs("position", "t5"), (True, False)):
        module = ready(spec.build(8, 4, 32, 64, causal))
        bias = module.bias(q, k)
        for (i, t), s in product(enumerate((0, 40, 200)), range(230)):
            wanted = module.weight[bucket(s - t, causal, spec.buckets, spec.far)]
            same(bias[0, :, i, s], wanted, f"query {t}, key {s}, {spec}, causal={causal}")


@oracle("position", "relative_2d")
def _() -> None:
    for spec in specs("position", "relative_2d"):
        S, one = spec.side, spec.class_token
        module = ready(spec.build(8, 3, 32, 64, False))
        places = [None] * one + list(product(range(S), range(S)))
        numbers = {offset: n for n, offset in enumerate(product(range(1 - S, S), repeat=2))}
        tokens, at = Tokens.blank(len(places)), len(numbers)
        bias = module.bias(tokens, tokens)
        for (t, a), (s, b) in product(enumerate(places), enumerate(places)):
            if a is None or b is None:
                row = at + (2 if a is b else 0 if a is None else 1)
            else:
                row = numbers[a[0] - b[0], a[1] - b[1]]
            same(bias[0, :, t, s], module.weight[row], f"{a} sees {b}, {spec}")


@oracle("position", "learned")
def _() -> None:
    module = ready(resolve("position", "learned")().build(8, 4, 32, 64, True))
    same(module.embed(torch.tensor([[5, 0, 63]])), module.weight[[5, 0, 63]][None])
    assert module.limit == 64


@oracle("position", "t5_learned")
def _() -> None:
    fields, tokens = {"buckets": 8, "far": 10}, Tokens(torch.arange(9)[None])
    ours, plain = (
        ready(resolve("position", kind)(**fields).build(8, 4, 32, 64, False)) for kind in ("t5_learned", "t5")
    )
    same(ours.bias(tokens, tokens), plain.bias(tokens, tokens))
    model = {"width": 32, "depth": 1, "vocabulary": 9, "context": 16, "position": "t5_learned"}
    stack = ready(validate(TransformerSpec, model).build()).decoder
    same(stack.added(torch.tensor([[5, 0]])), stack.positions["learned"].weight[[5, 0]][None])
    assert stack.limit == 16
    later = {**model, "depth": 2, "position": "t5", "layers": [{"at": [1], "position": "t5_learned"}]}
    with pytest.raises(TorchstoneError, match="position t5_learned adds to the input and cannot differ by layer"):
        validate(TransformerSpec, later).build()


@oracle("position", "sinusoidal")
def _() -> None:
    for width, scale in ((8, 1.0), (7, 0.02)):
        module = resolve("position", "sinusoidal")(scale=scale).build(8, 4, width, 64, True)
        wanted = [
            [scale * (math.sin if j % 2 == 0 else math.cos)(t / 10000 ** ((j - j % 2) / width)) for j in range(width)]
            for t in (0, 1, 700)
        ]
        same(module.embed(torch.tensor([[0, 1, 700]]))[0], torch.tensor(wanted), f"width {width}")


@oracle("position", "none")
def _() -> None:
    module, tokens = resolve("position", "none")().build(8, 4, 32, 64, True), Tokens.blank(3)
    assert module.rotation(tokens.where) is module.bias(tokens, tokens) is module.embed(tokens.where) is None


# -------------------------------------------------------------------------------- feed-forward, norm, linear


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def mapped(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([ACTIVATIONS[name](value) for value in x.flatten().tolist()]).view(x.shape)


@oracle("ffn", "mlp")
def _() -> None:
    for activation, bias in product(ACTIVATIONS, (True, False)):
        m = ready(resolve("ffn", "mlp")(activation=activation, bias=bias, hidden=20).build(Site(width=32)))
        x = drawn(2, 3, 32)
        b1, b2 = (m.up.bias, m.down.bias) if bias else (0, 0)
        same(m(x)[0], mapped(activation, x @ m.up.weight.T + b1) @ m.down.weight.T + b2, activation)
    assert resolve("ffn", "mlp")().build(Site(width=32)).up.weight.shape == (128, 32)


def gated(kind: str, act: str, **fields: Any) -> None:
    for bias in (True, False):
        m = ready(resolve("ffn", kind)(bias=bias, hidden=20, **fields).build(Site(width=32)))
        x, state = drawn(2, 3, 32), m.state_dict()
        gate, up = state["gate_up.weight"].split(20)
        bg, bu = state["gate_up.bias"].split(20) if bias else (0, 0)
        hidden = mapped(act, x @ gate.T + bg) * (x @ up.T + bu)
        same(m(x)[0], hidden @ m.down.weight.T + (m.down.bias if bias else 0), kind)


@oracle("ffn", "swiglu")
def _() -> None:
    gated("swiglu", "silu")


@oracle("ffn", "geglu")
def _() -> None:
    gated("geglu", "gelu")
    gated("geglu", "gelu_tanh", activation="gelu_tanh")


@oracle("ffn", "reglu")
def _() -> None:
    gated("reglu", "relu")
    gated("reglu", "relu2", activation="relu2")


def norms(kind: str) -> None:
    for spec in (*specs("norm", kind), resolve("norm", kind)(eps=0.1)):
        m, x = ready(spec.build(9)), drawn(2, 3, 9) * 3 + 1
        state = {name: array(value) for name, value in m.state_dict().items()}
        for b, t in product(range(2), range(3)):
            wanted = normed(spec, array(x[b, t]), state.get("weight"), state.get("bias"))
            same(m(x)[b, t], torch.from_numpy(wanted), str(spec))


def experts_by_hand(spec: Any, module: Any, x_ND: np.ndarray, ids_N: list[int]) -> np.ndarray:
    """Token by token and expert by expert; eq. 9 of Dai et al. 2024."""
    out, E = np.zeros_like(x_ND), spec.experts
    up, down = (np.split(array(bank.weight), E) for bank in (module.up, module.down))

    def network(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        h = torch.from_numpy(up @ x)
        if spec.gated:
            gate, h = h.chunk(2)
            h = mapped(spec.activation, gate) * h
        else:
            h = mapped(spec.activation, h)
        return down @ h.numpy()

    for n, x in enumerate(x_ND):
        for e, gate in chosen_by_hand(spec, module.router, x, ids_N[n]).items():
            out[n] += gate * network(x, up[e], down[e])
        if spec.shared:
            out[n] += network(x, array(module.shared.up.weight), array(module.shared.down.weight))
    return out


def chosen_by_hand(spec: Any, module: Any, x: np.ndarray, id: int) -> dict[int, float]:
    """The experts of one token with their gates, from the equations of each router's paper."""
    router, E, K = spec.router, spec.experts, spec.active
    state = {name: array(value) for name, value in module.state_dict().items()}

    def sigmoid(z: Any) -> Any:
        return 1 / (1 + np.exp(-z))

    if router.kind == "hash":
        bits = [int(noise.bits(noise.mix(torch.tensor(id), router.seed), E)[e]) for e in range(E)]
        best = sorted(range(E), key=lambda e: -bits[e])[:K]
        return {e: 1 / K if router.gating == "even" else float(sigmoid(state["weight"][e] @ x)) for e in best}
    if router.kind == "stable":
        learned, small = state["weight"] @ x, state["distilled"] @ state["words"][id]
        a = int((learned if module.training else small).argmax())
        return {a: float(sigmoid(learned[a]))}
    if router.kind == "cosine":
        p = state["down"] @ x
        score = np.array([e @ p / math.sqrt(e @ e) / math.sqrt(p @ p) for e in state["weight"]])
        z = score / np.exp(state["log_temperature"])
        gate = sigmoid(z) if router.gating == "sigmoid" else np.exp(z) / np.exp(z).sum()
    else:
        z = (
            state["weight"] @ x
            if router.kind != "gshard" or router.rank is None
            else np.array([e @ (state["down"] @ x) / math.sqrt(e @ e) for e in state["vectors"]])
        )
        gate = sigmoid(z) if router.kind == "sigmoid_bias" else np.exp(z) / np.exp(z).sum()
        score = gate + state.get("bias", 0)
    G = router.groups
    worth = [sorted(group)[-2:] if router.kind == "sigmoid_bias" else [max(group)] for group in np.split(score, G)]
    kept = sorted(range(G), key=lambda g: -sum(worth[g]))[: router.keep_groups or G]
    best = sorted((e for e in range(E) if e // (E // G) in kept), key=lambda e: -score[e])[:K]
    total = sum(gate[e] for e in best) if router.normalise else 1.0
    return {e: float(router.scale * gate[e] / total) for e in best}


def experts_agree(fields: dict[str, Any], training: bool = True) -> None:
    spec = validate(resolve("ffn", "moe"), {name: value for name, value in fields.items() if name != "kind"})
    module = ready(spec.build(Site(width=32, vocabulary=61))).train(training)
    if hasattr(module.router, "bias"):
        module.router.bias.copy_(torch.linspace(-0.2, 0.3, spec.experts))
    x, ids = drawn(2, 9, 32), drawn_ids(2, 9)
    ctx = replace(Context.alone(x), q=Tokens.of(ids))
    by_hand = experts_by_hand(spec, module, array(x.flatten(0, 1)), ids.flatten().tolist())
    same(module(x, ctx)[0].flatten(0, 1), torch.from_numpy(by_hand), str(fields))


@oracle("ffn", "moe")
def _() -> None:
    for fields in layouts().values():
        experts_agree(fields)


@oracle("ffn", "gshard")
def _() -> None:
    site = Site(width=32, residual_spec=resolve("residual", "subln")(), norm_spec=resolve("norm", "layernorm")())
    spec = resolve("ffn", "gshard")(experts=3, hidden=20, activation="relu", renormalise=True)
    m = ready(spec.build(site))
    x = drawn(2, 9, 32)
    w1, w2 = m.up.weight.view(3, 20, 32), m.down.weight.view(3, 32, 20)
    b1, b2, gain, bias = (each.weight.view(3, -1) for each in (m.up_bias, m.down_bias, m.inner_gain, m.inner_bias))

    def network(e: int, v: torch.Tensor) -> torch.Tensor:
        h = (w1[e] @ v + b1[e]).relu()
        h = (h - h.mean()) / ((h - h.mean()).square().mean() + 1e-5).sqrt() * gain[e] + bias[e]
        return w2[e] @ h + b2[e]

    hand = []
    for v in x.flatten(0, 1):
        gates, experts = (m.router.weight @ v).softmax(0).topk(2)
        hand.append(sum(g / gates.sum() * network(int(e), v) for g, e in zip(gates, experts, strict=True)))
    same(m(x)[0].flatten(0, 1), torch.stack(hand))


@oracle("ffn", "multiway")
def _() -> None:
    m = ready(resolve("ffn", "multiway")(modalities=3, hidden=20, bias=True, activation="relu").build(Site(width=32)))
    x, of = drawn(2, 9, 32), torch.arange(18).view(2, 9) % 7 % 3
    up, down = m.up.weight.view(3, 20, 32), m.down.weight.view(3, 32, 20)
    b1, b2 = m.up_bias.view(3, 20), m.down_bias.view(3, 32)
    hand = [
        [down[k] @ (up[k] @ v + b1[k]).relu() + b2[k] for v, k in zip(*r, strict=True)]
        for r in zip(x, of.tolist(), strict=True)
    ]
    ctx = replace(Context.alone(x), q=Tokens.of(of, modality=of))
    same(m(x, ctx)[0], torch.stack([torch.stack(row) for row in hand]))


def routed(kind: str) -> None:
    for fields in variants("router").values():
        if fields["kind"] == kind:
            for training in (True, False):
                experts_agree(layout(fields, EXPERTS["shared"]), training)


for _kind in kinds("router"):
    ORACLES["router", _kind] = partial(routed, _kind)


@oracle("norm", "rmsnorm")
def _() -> None:
    norms("rmsnorm")


@oracle("norm", "layernorm")
def _() -> None:
    norms("layernorm")


@oracle("linear", "dense")
def _() -> None:
    m, x = ready(Site(width=32).linear(32, (5, 7), ("up", "gate"), bias=True)), drawn(2, 3, 32)
    same(m(x), torch.einsum("bti,oi->bto", x, m.weight) + m.bias)


@oracle("linear", "lora")
def _() -> None:
    spec = resolve("linear", "lora")(rank=3, alpha=6.0, targets=("up",))
    m, x = ready(Site(width=32, linear_spec=spec).linear(32, (5, 7), ("up", "gate"), bias=True)), drawn(2, 3, 32)
    y = torch.einsum("bti,oi->bto", x, m.weight) + m.bias
    y[..., :5] += 6.0 / 3 * torch.einsum("bti,ri,or->bto", x, m.lora_a, m.lora_b)
    same(m(x), y)


@oracle("linear", "bitlinear")
def _() -> None:
    """Eqs. 1 to 5, 11 and 12 of BitNet, and 1 to 3 of b1.58, in numbers: slice by slice, group by group."""
    for weights, norm, groups, bits in product(("ternary", "binary"), ("rmsnorm", "layernorm", "none"), (1, 4), (4, 8)):
        spec = resolve("linear", "bitlinear")(weights=weights, norm=norm, groups=groups, act_bits=bits)
        m = ready(Site(width=32, linear_spec=spec).linear(32, (5, 7), ("up", "gate"), bias=True))
        x, Q, n = drawn(2, 3, 32), 2 ** (bits - 1) - 1, 32 // groups
        y = np.zeros((2, 3, 12)) + array(m.bias)
        for (at, to), g in product(((0, 5), (5, 12)), range(groups)):
            w, h = array(m.weight)[at:to, g * n : (g + 1) * n], array(x)[..., g * n : (g + 1) * n]
            if norm == "layernorm":
                h = h - h.mean(-1, keepdims=True)
            if norm != "none":
                h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
            gamma, beta = abs(h).max(-1, keepdims=True), abs(w).mean()
            w = np.where(w >= w.mean(), 1, -1) if weights == "binary" else np.clip(np.round(w / beta), -1, 1)
            y[..., at:to] += np.clip(np.round(h * Q / gamma), -Q, Q) @ w.T * beta * gamma / Q
        same(m(x), torch.tensor(y), str(spec))


def e4m3(value: float) -> float:
    """The nearest number of four bits of exponent and three of mantissa, ties to the even one."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(-6, math.floor(math.log2(abs(value)))) - 3)
    return math.copysign(min(448.0, round(abs(value) / step) * step), value)


@oracle("linear", "fp8_block")
def _() -> None:
    """Section 3.3 of DeepSeek-V3 in numbers: tiles of the input, squares of each slice of the weight."""
    for spec in specs("linear", "fp8_block"):
        m, tile = ready(Site(width=32, linear_spec=spec).linear(32, (5, 7), ("up", "gate"), bias=True)), spec.tile

        def rounded(block: np.ndarray, spec: Any = spec) -> np.ndarray:
            scale = max(abs(block).max(), 1e-4) / 448
            scale = 2.0 ** math.ceil(math.log2(scale)) if spec.power_of_two else scale
            return np.vectorize(e4m3)(block / scale) * scale

        x, rows = drawn(6, 32), []
        a = np.concatenate(
            [rounded(array(x)[r : r + 1, c : c + tile]) for r in range(6) for c in range(0, 32, tile)], 1
        )
        for part in array(m.weight)[:5], array(m.weight)[5:]:
            for r in range(0, len(part), tile):
                rows.append(np.concatenate([rounded(part[r : r + tile, c : c + tile]) for c in range(0, 32, tile)], 1))
        same(m(x[None])[0], torch.tensor(a.reshape(6, 32) @ np.concatenate(rows).T + array(m.bias)), str(spec))


# --------------------------------------------------------------------------- residual, block, stack, embedding, head


def joined(kind: str, rule: Callable[[torch.Tensor, Callable[..., torch.Tensor], Any], torch.Tensor]) -> Any:
    """A residual's read, sublayer, write against its formula, with a sublayer that is no identity."""
    site = Site(width=32)
    m, x = ready(resolve("residual", kind)().build(site)), drawn(2, 3, 32)
    sublayer = lambda h: torch.sin(3 * h)  # noqa: E731
    same(m.write(x, sublayer(m.read(x)), Context.alone(x)), rule(x, sublayer, m), kind)
    return resolve("residual", kind)().final_norm(site)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@oracle("residual", "pre")
def _() -> None:
    assert not isinstance(joined("pre", lambda x, f, m: x + f(rms(x, m.norm.weight))), nn.Identity)


@oracle("residual", "layer_scale")
def _() -> None:
    def rule(x: torch.Tensor, f: Any, m: Any) -> torch.Tensor:
        return x + m.gamma * f(rms(x, m.norm.weight))

    assert not isinstance(joined("layer_scale", rule), nn.Identity)
    assert isinstance(resolve("residual", "layer_scale")(final=False).final_norm(Site(width=32)), nn.Identity)


@oracle("residual", "post")
def _() -> None:
    assert isinstance(joined("post", lambda x, f, m: rms(x + f(x), m.norm.weight)), nn.Identity)


@oracle("residual", "post_scaled")
def _() -> None:
    assert isinstance(joined("post_scaled", lambda x, f, m: rms(x + f(x), m.norm.weight)), nn.Identity)


@oracle("residual", "deepnorm")
def _() -> None:
    alpha = 2**0.25  # a decoder of one layer
    final = joined("deepnorm", lambda x, f, m: rms(alpha * x + f(x), m.norm.weight))
    assert isinstance(final, nn.Identity)


@oracle("residual", "weighted")
def _() -> None:
    alpha = 2**0.25  # a decoder of one layer
    final = joined("weighted", lambda x, f, m: alpha * x + f(rms(x, m.norm.weight)))
    assert not isinstance(final, nn.Identity)


@oracle("residual", "subln")
def _() -> None:
    assert not isinstance(joined("subln", lambda x, f, m: x + f(rms(x, m.norm.weight))), nn.Identity)
    site = Site(width=32, residual_spec=resolve("residual", "subln")())
    x = drawn(2, 3, 32)
    plain = ready(resolve("ffn", "mlp")(activation="relu").build(site))
    hidden = rms((x @ plain.up.weight.T).clamp(min=0), plain.inner_norm.weight)
    same(plain(x)[0], hidden @ plain.down.weight.T, "mlp")
    gated = ready(resolve("ffn", "swiglu")().build(site))
    gate, up = (x @ gated.gate_up.weight.T).chunk(2, -1)
    hidden = rms(gate / (1 + torch.exp(-gate)) * up, gated.inner_norm.weight)
    same(gated(x)[0], hidden @ gated.down.weight.T, "swiglu")


@oracle("residual", "sandwich")
def _() -> None:
    def rule(x: torch.Tensor, f: Any, m: Any) -> torch.Tensor:
        return x + rms(f(rms(x, m.norm.weight)), m.norm_out.weight)

    assert not isinstance(joined("sandwich", rule), nn.Identity)


def block(kind: str, memory: bool) -> tuple[Any, torch.Tensor, Context]:
    """A block of that kind over softmax without position, an input and a context."""
    layer = LayerSpec(block={"kind": kind}, attention={"kind": "softmax", "heads": 4}, position={"kind": "none"})
    m = ready(layer.block.build(layer, Site(width=32), 32 if memory else None))
    x = drawn(2, 5, 32)
    return m, x, replace(Context.alone(x), memory=Memory(drawn(2, 4, 32), Tokens.blank(4)) if memory else None)


@oracle("block", "sequential")
def _() -> None:
    for memory in (False, True):
        m, x, ctx = block("sequential", memory)
        y = x + m.attention(m.attention_residual.norm(x), ctx)[0]
        if memory:
            y = y + m.cross(m.cross_residual.norm(y), ctx)[0]
        y = y + m.ffn(m.ffn_residual.norm(y))[0]
        same(m(x, ctx)[0], y, f"memory={memory}")


@oracle("block", "attention_only")
def _() -> None:
    for memory in (False, True):
        m, x, ctx = block("attention_only", memory)
        y = x + m.attention(m.attention_residual.norm(x), ctx)[0]
        if memory:
            y = y + m.cross(m.cross_residual.norm(y), ctx)[0]
        same(m(x, ctx)[0], y, f"memory={memory}")


@oracle("block", "parallel")
def _() -> None:
    m, x, ctx = block("parallel", False)
    h = m.residual.norm(x)
    same(m(x, ctx)[0], x + m.attention(h, ctx)[0] + m.ffn(h)[0])


@oracle("stack", "plain")
def _() -> None:
    model, ids = Case.of(position="learned").model(depth=3), drawn_ids(2, 6)
    x = model.embedding.weight[ids] + model.decoder.positions["learned"].weight[:6]
    for layer in model.decoder.layers:
        x = layer(x, Context.alone(x))[0]
    same(model(ids).hidden, rms(x, model.decoder.norm.weight))


@oracle("stack", "yoco")
def _() -> None:
    for stack in ("yoco", "yoco_window"):
        model, ids = Case.of(stack=stack, attention="softmax_grouped").model(depth=4), drawn_ids(1, 7)
        decoder: Any = model.decoder
        x = model.embedding.weight[ids]
        for layer in decoder.layers[:2]:
            x = layer(x, Context.alone(x, positions=decoder.positions))[0]
        made = rms(x, decoder.keys_values.norm.weight) @ decoder.keys_values.kv.weight.T
        for layer in decoder.layers[2:]:
            h = rms(x, layer.attention_residual.norm.weight)[0]
            x = x + torch.from_numpy(shared_by_hand(layer.attention, array(h), array(made[0])))
            x = x + layer.ffn(rms(x, layer.ffn_residual.norm.weight))[0]
        same(model(ids).hidden, rms(x, decoder.norm.weight), stack)


def shared_by_hand(module: Any, h_TD: np.ndarray, made_TE: np.ndarray) -> np.ndarray:
    """A cross-decoder layer of one sequence with 4 heads of 8, 2 sets of keys and values; eq. 3 of Sun et al. 2024."""
    rotary, frequencies = resolve("position", "rotary")(), [10000 ** (-i / 4) for i in range(4)]
    turned = lambda x, t: rotated_by_hand(rotary, x, t, frequencies, 1.0)  # noqa: E731
    q, (k, v) = h_TD @ array(module.q.weight).T, np.split(made_TE, 2, axis=1)
    out = np.zeros((len(h_TD), 32))
    for t, i in product(range(len(h_TD)), range(4)):
        mine, group = slice(8 * i, 8 * i + 8), slice(8 * (i // 2), 8 * (i // 2) + 8)
        scores = [turned(q[t, mine], t) @ turned(k[s, group], s) / math.sqrt(8) for s in range(t + 1)]
        e = np.exp(np.array(scores) - max(scores))
        out[t, mine] = (e / e.sum()) @ v[: t + 1, group]
    return out @ array(module.out.weight).T


@oracle("stack", "hysparse")
def _() -> None:
    for spec in specs("stack", "hysparse"):
        spec = spec.model_copy(update={"sparse_per_full": 2, "final_full": True})
        model = Case.of(attention="softmax_grouped", position="none", block="attention_only").model(
            depth=5, stack=spec.dump()
        )
        x = array(model.embedding.weight[drawn_ids(1, 11)[0]])
        shared, full = None, (0, 3, 4)  # every third, and the last
        for number, layer in enumerate(model.decoder.layers):
            module, y = layer.attention, array(layer.attention_residual.read(torch.from_numpy(x)))
            if number in full:
                x, shared = x + softmax_by_hand(module.spec, module, y, None, lambda t, s: s <= t), (module, y)
            else:
                x = x + sparse_by_hand(spec, module, y, *shared)
        same(model(drawn_ids(1, 11)).hidden[0], rms(torch.from_numpy(x), model.decoder.norm.weight), f"{spec}")


def sparse_by_hand(spec: Any, module: Any, x_TD: np.ndarray, giver: Any, given_TD: np.ndarray) -> np.ndarray:
    """A sparse layer after a full one that saw `given_TD`, query by query and head by head; equations of HySparse."""
    H, G, D, B = 4, 2, 32, spec.block
    K, R = D // H, H // G

    def projected(module: Any, x: np.ndarray) -> list[np.ndarray]:
        q, k, v = np.split(x @ array(module.qkv.weight).T, [D, D + G * K], axis=1)
        return [part.reshape(len(x), -1, K) for part in (q, k, v)]

    def weights(q: np.ndarray, k_SK: np.ndarray) -> np.ndarray:
        e = np.exp(k_SK @ q / math.sqrt(K))
        return e / e.sum()

    (q, k, v), (full_q, full_k, full_v) = projected(module, x_TD), projected(giver, given_TD)
    gate = 1 / (1 + np.exp(-(x_TD @ array(module.gate.weight).T)))
    of_sparse, of_window = (part.reshape(len(x_TD), H, -1) for part in np.split(gate, 2, axis=1))
    out = np.zeros((len(x_TD), H, K))
    for t, g in product(range(len(x_TD)), range(G)):
        probs = np.array([weights(full_q[t, g * R + r], full_k[: t + 1, g]) for r in range(R)])
        best = [probs[:, n * B : (n + 1) * B].max() for n in range(t // B + 1)]
        if spec.selection == "random":  # whichever they are, the heads of a group share them
            best = [float(of) for of in drawn_blocks(module, g, t, len(best))]
        chosen = sorted(range(len(best)), key=lambda n: (-best[n], n))[: spec.top_tokens // B]
        seen = [s for n in chosen for s in range(n * B, min(t + 1, (n + 1) * B))]
        near = list(range(max(0, t - spec.window + 1), t + 1))
        for h in range(g * R, (g + 1) * R):
            out[t, h] = of_sparse[t, h] * (weights(q[t, h], full_k[seen, g]) @ full_v[seen, g])
            out[t, h] += of_window[t, h] * (weights(q[t, h], k[near, g]) @ v[near, g])
    return out.reshape(len(x_TD), -1) @ array(module.out.weight).T


def drawn_blocks(module: Any, group: int, t: int, count: int) -> torch.Tensor:
    """The uniform numbers of a query's blocks: a key of its own for each group and position."""
    key = noise.mix(noise.mix(torch.tensor(module.draws), group), t)
    return noise.uniform(key, count)


@oracle("stack", "longmem")
def _() -> None:
    for reduction in (2, 4):
        case, ids = Case.of(stack="longmem", position="none"), drawn_ids(2, 6)
        model = case.model(depth=4, stack={"kind": "longmem", "reduction": reduction})
        h = x = model.embedding.weight[ids]
        for number, side in enumerate(model.decoder.side):
            before = h
            for layer in model.decoder.layers[reduction * number : reduction * (number + 1)]:
                h = layer(h, Context.alone(h))[0]
            x = side(x, Context.alone(x))[0] + h - before
        same(model(ids).hidden, rms(x, model.decoder.norm.weight), f"reduction={reduction}")


@oracle("stack", "multi_token")
def _() -> None:
    model, ids = Case.of(stack="multi_token_two", attention="softmax_grouped", position="none").model(), drawn_ids(1, 7)
    h = model(ids).hidden
    for k, module in enumerate(model.decoder.predictors, 1):
        ours, _ = predict(model, k, h[:, : 7 - k], Tokens.of(ids[:, k:]))
        x = []
        for i in range(7 - k):  # eq. 21, a position at a time
            e = rms(model.embedding.weight[ids[0, i + k]], module.embedding_norm.weight)
            x.append(module.project.weight @ torch.cat([e, rms(h[0, i], module.hidden_norm.weight)]))
        x, layer = torch.stack(x)[None], module.block
        read = array(rms(x, layer.attention_residual.norm.weight))[0]
        x = x + torch.from_numpy(
            softmax_by_hand(layer.attention.spec, layer.attention, read, None, lambda t, s: s <= t)
        )
        x = x + layer.ffn(rms(x, layer.ffn_residual.norm.weight))[0]
        h = rms(x, model.decoder.norm.weight)  # eq. 22, with the norm before the shared head
        same(ours, h, f"module {k}")


@oracle("stack", "multiway")
def _() -> None:
    """Token by token: each by the matrices and norms of its modality, attention over all before it."""
    E, H, which = 3, 4, [0, 2, 2, 1, 0, 1, 2]
    model, ids = Case.of(stack="multiway_three", ffn="mlp", position="none").model(), drawn_ids(1, 7)
    x = model.embedding.weight[ids[0]]

    def of(module: Any, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.stack([module.weight.view(E, -1, len(x_TI[0]))[m] @ v for m, v in zip(which, x_TI, strict=True)])

    def normed(norms: Any, x_TD: torch.Tensor) -> torch.Tensor:
        return torch.stack([rms(v, norms[m].weight) for m, v in zip(which, x_TD, strict=True)])

    for layer in model.decoder.layers:
        q, k, v = of(layer.attention.qkv, normed(layer.attention_residual.norm, x)).view(7, 3, H, -1).unbind(1)
        mixed = []
        for t in range(7):
            scores = torch.einsum("hk,shk->hs", q[t], k[: t + 1]) / q.shape[-1] ** 0.5
            mixed.append(torch.einsum("hs,shk->hk", scores.softmax(-1), v[: t + 1]).flatten())
        x = x + of(layer.attention.out, torch.stack(mixed))
        hidden = torch.nn.functional.gelu(of(layer.ffn.up, normed(layer.ffn_residual.norm, x)))
        x = x + of(layer.ffn.down, hidden)
    tokens = Tokens.of(ids, modality=torch.tensor([which]))
    same(model(tokens).hidden[0], normed(model.decoder.norm, x))


@oracle("stack", "lazy")
def _() -> None:
    for spec in (*specs("stack", "lazy"), validate(resolve("stack", "lazy"), {"block_sizes": [1, 4]})):
        model = Case.of(attention="softmax_grouped", position="none", block="attention_only").model(
            depth=5, stack=spec.dump()
        )
        x = array(model.embedding.weight[drawn_ids(1, 7)[0]])
        probs: list[np.ndarray] = []
        for number, layer in enumerate(model.decoder.layers):
            module, h = layer.attention, array(layer.attention_residual.read(torch.from_numpy(x)))
            first = number in (0, 1) if spec.block_sizes else number % spec.block_size == 0
            weights = array(module.qkv.weight if first else module.v.weight)
            if first:
                q, k, weights = np.split(weights, [32, 48])
                probs = [causal_probs(h @ q[8 * i : 8 * i + 8].T, h @ k[8 * (i // 2) :][:8].T) for i in range(4)]
            mixed = [probs[i] @ h @ weights[8 * (i // 2) :][:8].T for i in range(4)]
            x = x + np.concatenate(mixed, 1) @ array(module.out.weight).T
        same(model(drawn_ids(1, 7)).hidden[0], rms(torch.from_numpy(x), model.decoder.norm.weight), f"{spec}")


def causal_probs(q_TK: np.ndarray, k_TK: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(K)), row by row over the past."""
    probs = np.zeros((len(q_TK), len(q_TK)))
    for t, q in enumerate(q_TK):
        e = np.exp(k_TK[: t + 1] @ q / math.sqrt(len(q)))
        probs[t, : t + 1] = e / e.sum()
    return probs


@oracle("stack", "tim")
def _() -> None:
    for stack, residual in product(("tim", "tim_early", "tim_apart"), ("post", "pre")):
        model, ids = Case.of(stack=stack, residual=residual, position="none").model(depth=3), drawn_ids(1, 7)
        x = model.embedding.weight[ids]
        for layer in model.decoder.layers:
            plain = not hasattr(layer, "mechanisms")
            x = layer(x, Context.alone(x))[0] if plain else mechanisms_by_hand(layer, x[0], residual)[None]
        same(model(ids).hidden, x if residual == "post" else rms(x, model.decoder.norm.weight), f"{stack} {residual}")


def mechanisms_by_hand(layer: Any, x_TD: torch.Tensor, residual: str) -> torch.Tensor:
    """A layer of mechanisms position by position; section 2 of Lamb et al. 2021, with norms by slice."""
    spec, M, T = layer.spec, len(layer.mechanisms), len(x_TD)
    x = [list(slice_TW) for slice_TW in x_TD.reshape(T, M, -1).unbind(1)]  # x[m][t]
    pre = residual == "pre"

    def updated(joins: list[Any], update: Callable[[list[list[torch.Tensor]]], Any]) -> None:
        """Every x[m][t] with update(what is read)[m][t] added to it."""
        read = [[rms(v, joins[m].norm.weight) if pre else v for v in x[m]] for m in range(M)]
        y = update(read)
        for m, t in product(range(M), range(T)):
            x[m][t] = x[m][t] + y[m][t] if pre else rms(x[m][t] + y[m][t], joins[m].norm.weight)

    def attention(h: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        y = []
        for m, one in enumerate(layer.mechanisms):
            seen = lambda t, s: s <= t  # noqa: E731
            by_hand = softmax_by_hand(one.attention.spec, one.attention, array(torch.stack(h[m])), None, seen)
            y.append(list(torch.from_numpy(by_hand)))
        if spec.competition == "none":
            return y
        for t in range(T):
            c = layer.competition
            e = [math.exp((c.weight[m] @ h[m][t] + c.bias[m]).item()) for m in range(M)]
            for m in range(M):
                y[m][t] = y[m][t] * e[m] / sum(e) * (M if spec.competition == "scaled" else 1)
        return y

    def across(h: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        H, K = spec.communication.heads, spec.communication.head_dim or 16
        y = [[torch.zeros(H * K, dtype=torch.float64) for _ in range(T)] for _ in range(M)]
        for t, i in product(range(T), range(H)):
            mine = slice(i * K, (i + 1) * K)
            q, k, v = zip(*((layer.communication.qkv[m].weight @ h[m][t]).split(H * K) for m in range(M)), strict=True)
            for m in range(M):
                e = [math.exp((q[m][mine] @ k[n][mine]).item() / math.sqrt(K)) for n in range(M)]
                y[m][t][mine] = sum(e[n] / sum(e) * v[n][mine] for n in range(M))
        return [[layer.communication.out[m].weight @ y[m][t] for t in range(T)] for m in range(M)]

    updated([one.attention_residual for one in layer.mechanisms], attention)
    place = spec.communication.place if spec.communication else "nowhere"
    if place == "before_ffn":
        updated(layer.communication.residual, across)
    feed = lambda h: [[one.ffn(v[None])[0][0] for v in h[m]] for m, one in enumerate(layer.mechanisms)]  # noqa: E731
    updated([one.ffn_residual for one in layer.mechanisms], feed)
    if place == "after_ffn":
        updated(layer.communication.residual, across)
    return torch.cat([torch.stack(slice_) for slice_ in x], -1)


@oracle("embedding", "token")
def _() -> None:
    ids, segment = drawn_ids(2, 6), drawn_ids(2, 6, seed=1) % 2
    more = ({"scale": True, "types": 2, "norm": "rmsnorm"}, {"scale": True, "size": 40})
    for spec in (*specs("embedding", "token"), *(validate(resolve("embedding", "token"), fields) for fields in more)):
        E = spec.size or 32
        m, added = ready(spec.build(Site(width=32), 61)), drawn(1, 6, E)
        wanted = m.weight[ids] * (math.sqrt(E) if spec.scale else 1) + added
        wanted = wanted + (m.types.weight[segment] if spec.types else 0)
        if spec.norm is not None:
            state = {name: array(value) for name, value in m.norm.state_dict().items()}
            rows = [
                normed(spec.norm, row, state.get("weight"), state.get("bias")) for row in array(wanted).reshape(-1, E)
            ]
            wanted = torch.tensor(np.array(rows)).view(2, 6, E)
        wanted = wanted if E == 32 else wanted @ m.project.weight.T + m.project.bias
        same(m(ids, Tokens.of(ids, segment=segment), added, Context.alone(added)), wanted, str(spec))


@oracle("embedding", "patch")
def _() -> None:
    for spec in specs("embedding", "patch"):
        m, pixels = ready(spec.build(Site(width=32), None)), drawn(2, 2, 8, 8)
        rows = [[] if not spec.class_token else [m.class_token] for _ in range(2)]
        for b, i, j in product(range(2), range(4), range(4)):  # eq. 1 of Dosovitskiy et al. 2020, in reading order
            patch = torch.stack([
                pixels[b, c, 2 * i + di, 2 * j + dj] for c, di, dj in product(range(2), range(2), range(2))
            ])  # fmt: skip
            mean, std = (torch.tensor(values).repeat(2)[:2].repeat_interleave(4) for values in (spec.mean, spec.std))
            hidden = spec.mask_token and (b, i, j) in ((0, 1, 2), (1, 3, 0))
            made = m.project.weight @ ((patch - mean) / std) + m.project.bias
            rows[b].append(m.mask_token if hidden else made)
        wanted, inputs = torch.stack([torch.stack(row) for row in rows]), pixels
        if spec.mask_token:
            masked = torch.zeros(2, 16, dtype=torch.bool)
            masked[0, 6] = masked[1, 12] = True
            inputs = Patches(pixels, masked)
        same(m(inputs, m.tokens(inputs), None, Context.alone(wanted)), wanted, str(spec))


@oracle("embedding", "vision_language")
def _() -> None:
    for spec in specs("embedding", "vision_language"):
        m, P, n = ready(spec.build(Site(width=32), 61)), spec.patch, spec.image // spec.patch
        pixels, ids = drawn(2, spec.channels, spec.image, spec.image), drawn_ids(2, 6)
        valid, masked = torch.arange(6) >= torch.tensor([[0], [2]]), drawn(2, n * n) > 0
        factor, rows = math.sqrt(32) if spec.scale else 1, []
        for b in range(2):
            row = [m.class_token]
            for i, j in product(range(n), range(n)):
                patch = pixels[b, :, P * i : P * (i + 1), P * j : P * (j + 1)].reshape(-1)
                row.append(m.mask_token if masked[b, n * i + j] else m.project.weight @ patch + m.project.bias)
            row = [factor * x + place for x, place in zip(row, m.vision_positions, strict=True)]
            for t in range(6):
                place = max(0, int(valid[b, :t].sum()) if valid[b, t] else int(valid[b, : t + 1].sum()) - 1)
                row.append(factor * m.weight[ids[b, t]] + m.text_positions[place])
            rows.append(torch.stack(row))
        wanted = torch.stack(rows)
        both, whole = VisionLanguage(pixels, ids, masked, valid), Context.alone(wanted, causal=False)
        tokens = m.tokens(both)
        assert tokens.modality.tolist() == [[0] * (1 + n * n) + [1] * 6]
        assert tokens.valid.tolist() == [[True] * (1 + n * n) + row for row in valid.tolist()]
        same(m(both, tokens, None, whole), wanted, str(spec))
        for alone, part in (
            (VisionLanguage(pixels, masked=masked), wanted[:, : 1 + n * n]),
            (Tokens.of(ids[:1]), wanted[:1, 1 + n * n :]),
        ):
            same(m(alone, m.tokens(alone), None, Context.alone(part, causal=False)), part, str(spec))


@oracle("head", "lm")
def _() -> None:
    h, table = drawn(2, 3, 32), drawn(61, 32)
    for tied, bias, scale, cap in product((True, False), (True, False), (True, False), (None, 2.0)):
        spec = resolve("head", "lm")(tied=tied, bias=bias and not tied, scale=scale, softcap=cap)
        m = ready(spec.build(Site(width=32), 61))
        z = h * (1 / math.sqrt(32) if scale else 1) @ (table if tied else m.out.weight).T
        z = z + (m.out.bias if spec.bias else 0)
        same(m(h, Tokens.blank(3), table), z if cap is None else cap * torch.tanh(z / cap), str(spec))


@oracle("head", "mlm")
def _() -> None:
    for tied, E in product((True, False), (32, 12)):
        h, table = drawn(2, 3, 32), drawn(61, E)
        m = ready(resolve("head", "mlm")(tied=tied).build(Site(width=32, table_width=E), 61))
        y = rms(mapped("gelu", h @ m.transform.weight.T + m.transform.bias), m.norm.weight)
        same(m(h, Tokens.blank(3), table), y @ (table if tied else m.out.weight).T + m.bias, f"tied={tied}, E={E}")


@oracle("head", "classification")
def _() -> None:
    h, valid = drawn(2, 4, 32), torch.tensor([[False, True, True, True], [True, True, False, False]])
    transforms = (None, "tanh", "gelu", "relu")
    for pool, name, padded in product(("first", "last", "mean"), transforms, (True, False)):
        fields = {"pooler": True, "activation": name} if name else {}
        m = ready(resolve("head", "classification")(pool=pool, classes=3, **fields).build(Site(width=32), None))
        rows = [h[0, 1:], h[1, :2]] if padded else [h[0], h[1]]
        y = torch.stack([{"first": row[0], "last": row[-1], "mean": row.mean(0)}[pool] for row in rows])
        if name:
            y = y @ m.pooler.weight.T + m.pooler.bias
            y = torch.tanh(y) if name == "tanh" else mapped(name, y)
        logits = m(h, Tokens.blank(4, valid=valid if padded else None), None)
        same(logits, y @ m.out.weight.T + m.out.bias, f"{pool}, {name}, padded={padded}")


@oracle("head", "token_classification")
def _() -> None:
    h = drawn(2, 4, 32)
    for transform, classes, name in product((True, False), (1, 3), ("gelu", "relu")):
        fields = {"transform": transform, "classes": classes, "activation": name}
        m = ready(resolve("head", "token_classification")(**fields).build(Site(width=32), None))
        y = mapped(name, h @ m.transform.weight.T + m.transform.bias) if transform else h
        same(m(h, Tokens.blank(4), None), y @ m.out.weight.T + m.out.bias, str(fields))


def test_softmax_defaults_are_those_of_the_paper() -> None:
    assert SoftmaxSpec().scale is None and SoftmaxSpec().softcap is None and SoftmaxSpec().window is None
