"""Each part compiles without a break, gives the same values and gradients, and depth and steps add no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from conformance.cases import Case, covering, fewest, kind_of, singles
from conformance.checks import drawn_ids, inputs, loss_of, same, with_memory
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("float64", "fresh")


def of_tokens(cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if case.chosen["embedding"] == "token" and case.chosen["head"] == "lm"]


def kinds_of(case: Case) -> set[tuple[str, str]]:
    return {(axis, kind_of(axis, value)) for axis, value in case.chosen.items()}


SINGLES = of_tokens(singles())
LONG = {"encoder_decoder", "dilated", "fp8_block", "bitlinear", "hysparse", "longmem", "tim"}
# a few models that have every kind that does not take long about it: what runs at every change
FIRST = fewest([case for case in of_tokens(covering()[0]) if not LONG & {kind for _, kind in kinds_of(case)}], kinds_of)


def cases_of(applies: Callable[[Case], bool] = lambda case: True, every: bool = False) -> list[Any]:
    """The usual model and, slow unless `every` kind is to be there at each change, those that have all; models that
    differ from the usual one by one variant are slow."""
    first = {Case.of(): None} | (dict.fromkeys(sorted(FIRST, key=str)) if every else {})
    rest = dict.fromkeys([*sorted(FIRST, key=str), *SINGLES])
    marked = {case: () for case in first} | {case: pytest.mark.slow for case in rest if case not in first}
    return [pytest.param(case, id=str(case), marks=marks) for case, marks in marked.items() if applies(case)]


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Transformer, backend: Any) -> Transformer:
    """The model with each layer compiled in place, as the engine does it."""
    for stack in model.stacks.values():
        for layer in stack.layers:
            layer.compile(fullgraph=True, backend=backend)
    return model


def values(model: Transformer, case: Case, **arguments: Any) -> dict[str, torch.Tensor]:
    output = model(inputs(case), **with_memory(case), **arguments)
    loss_of(output).backward()
    # modules beside the forward have no part in it
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "predictors" not in name}
    sums = {f"aux {name}": tensor for name, pair in output.aux.items() for tensor in pair}
    return {"hidden": output.hidden.detach(), "logits": output.logits.detach(), **sums, **gradients}


def agree(case: Case, backend: str, tolerance: float = 1e-8, **fields: Any) -> None:
    arguments = {"key": Key(3).tensor()} if fields.get("dropout") else {}
    eager = values(case.model(**fields), case, **arguments)
    other = values(compiled(case.model(**fields), backend), case, **arguments)
    assert eager.keys() == other.keys()
    for name, value in eager.items():
        same(other[name], value, name, tolerance)


def shallowest(case: Case) -> int:
    """Layers that show everything: one, or one of each sort that a stack places."""
    return 1 if case.chosen["stack"] == "plain" else 2


@pytest.mark.parametrize("case", cases_of(every=True))
def test_compiled_layer_gives_the_same_values_and_gradients(case: Case) -> None:
    agree(
        case,
        "aot_eager",
        depth=shallowest(case),
        **({"encoder": {"depth": 1}} if case.form == "encoder_decoder" else {}),
    )


def test_compiled_layer_drops_the_same_values() -> None:
    agree(Case.of(), "aot_eager", dropout=0.2, drop_path=0.3)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("case", SINGLES, ids=str)
def test_inductor_gives_the_same_values_and_gradients(case: Case) -> None:
    agree(case, "inductor", depth=shallowest(case))


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("size", [1, 7, 99, 1001, 4096])
def test_inductor_drops_the_same_values(size: int) -> None:
    def drop(x: torch.Tensor, ctx: Context) -> torch.Tensor:
        return ctx.inside("a").drop(x, 0.4, "x")

    tokens, x = Tokens.blank(1), torch.ones(3, size)
    ctx = Context(tokens, tokens, key=Key(5).tensor())
    assert torch.equal(torch.compile(drop, fullgraph=True)(x, ctx), drop(x, ctx))


# ------------------------------------------------------------------------------------------------- how many graphs


def graphs(case: Case, depth: int, training: bool = True, **arguments: Any) -> int:
    """Graphs that a forward of a model of equal layers compiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fields = {"depth": depth, **arguments.pop("fields", {})}
    model = compiled(case.model(noise=0, **fields), counter)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            model(inputs(case), **with_memory(case), **arguments)
    return counter.frame_count


@pytest.mark.parametrize("case", cases_of(lambda case: case.form != "encoder_decoder"))
def test_graphs_do_not_grow_with_depth(case: Case) -> None:
    """One a kind of layer; of HySparse there are three: full ones that hand on, full ones that do not, sparse ones."""
    assert graphs(case, 4) == graphs(case, 16) <= 3


def test_graphs_do_not_grow_with_depth_under_dropout() -> None:
    key, fields = Key(3).tensor(), {"dropout": 0.1}
    assert graphs(Case.of(), 4, key=key, fields=fields) == graphs(Case.of(), 7, key=key, fields=fields) <= 2


def test_graphs_do_not_grow_with_depth_under_stochastic_depth() -> None:
    key, fields = Key(3).tensor(), {"drop_path": 0.1}
    assert graphs(Case.of(), 4, key=key, fields=fields) == graphs(Case.of(), 7, key=key, fields=fields) <= 2


def test_new_dropout_key_compiles_nothing() -> None:
    counter = CompileCounterWithBackend("eager")
    model = compiled(Case.of().model(noise=0, depth=1, dropout=0.1), counter)
    for step in range(4):
        model(drawn_ids(2, 12), key=Key(3).fold(step).tensor())
    assert counter.frame_count == 1


@pytest.mark.slow
def test_graphs_do_not_grow_from_4_to_64_layers() -> None:
    assert graphs(Case.of(), 4) == graphs(Case.of(), 64) == 1


@pytest.mark.parametrize("case", cases_of(lambda case: case.decodes))
def test_64_decode_steps_compile_nothing_after_the_second(case: Case) -> None:
    counter = CompileCounterWithBackend("eager")
    model = compiled(case.model(depth=2, context=128), counter)
    ids, memory, prompts = drawn_ids(2, 5 + 64), with_memory(case), torch.tensor([5, 2])
    valid = torch.arange(5)[None] < prompts[:, None]
    with torch.no_grad():
        state = model.state(2, 80, static=True)
        model(Tokens.of(ids[:, :5], valid=valid), state=state, **memory)
        for step in range(64):
            model(ids.gather(1, prompts[:, None] + step), state=state)
            if step == 1:
                after_two = counter.frame_count
        assert counter.frame_count == after_two
