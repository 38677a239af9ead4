"""The properties. Each check takes a case and raises AssertionError where its model does not have the property.

`CHECKS` maps a check's name to (the check, to which cases it applies). All run with default dtype float64 unless they
say otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conformance.cases import VOCABULARY, Case
from conformance.formulas import parameters
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model import ModelSpec
from torchstone.model.context import Memory
from torchstone.model.linear import Linear
from torchstone.model.site import initialise
from torchstone.model.stack.multi_token import predict, predictors_of
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Output, Transformer
from torchstone.spec import Part, Spec, validate

T = 12  # longer than two windows of 5


def same(a: torch.Tensor, b: torch.Tensor, what: str = "", tolerance: float = 1e-8) -> None:
    assert torch.isfinite(a).all(), f"{what}: not finite"
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def drawn_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = Key(seed).fold("ids", rows, length).generator()
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def inputs(case: Case, rows: int = 2, length: int = T, seed: int = 0) -> torch.Tensor:
    """Ids (rows, length), or pixels."""
    if case.of_tokens:
        return drawn_ids(rows, length, seed)
    spec: Any = case.spec().embedding
    shape = (rows, spec.channels, spec.image, spec.image)
    return torch.randn(shape, generator=Key(seed).fold("pixels").generator(), dtype=torch.float32).to(
        torch.get_default_dtype()
    )


def with_memory(case: Case, rows: int = 2) -> dict[str, Any]:
    """The encoder's inputs, where there is one."""
    return {"memory": inputs(case, rows, 9, seed=7)} if case.form == "encoder_decoder" else {}


def rows_of(memory: dict[str, Any], rows: slice | list[int]) -> dict[str, Any]:
    return {name: value[rows] for name, value in memory.items()}


def causality(case: Case) -> None:
    """Changing later tokens changes nothing earlier."""
    model, memory = case.model(), with_memory(case)
    x = inputs(case)
    hidden = model(x, **memory).hidden
    length = hidden.shape[1]
    for t in (1, 6, length - 1):
        if case.of_tokens:
            other = torch.cat([x[:, :t], (x[:, t:] + 1) % VOCABULARY], 1)
            changed = model(other, **memory).hidden
        else:
            put = torch.randn(hidden.shape, generator=Key(1).generator())
            hidden = model(x, embeddings=put, **memory).hidden
            put = torch.cat([put[:, :t], put[:, t:] + 1], 1)
            changed = model(x, embeddings=put, **memory).hidden
        same(changed[:, :t], hidden[:, :t], f"tokens before {t}")
        assert not torch.equal(changed[:, t:], hidden[:, t:]), "later tokens change nothing at all"


def documents(case: Case) -> None:
    """Packed documents equal separate ones; positions restart."""
    model, memory, lengths = case.model(), with_memory(case), (3, 5, 4)
    ids = drawn_ids(2, sum(lengths))
    start, at, alone = [], 0, []
    for length in lengths:
        start += [at] * length
        alone.append(model(ids[:, at : at + length], **memory).hidden)
        at += length
    packed = model(Tokens.of(ids, start=torch.tensor([start])), **memory).hidden
    same(packed, torch.cat(alone, 1), "packed documents")


def padding(case: Case) -> None:
    """Padding left and right changes nothing."""
    model, memory, lengths = case.model(), with_memory(case), (7, 4)
    alone = [model(drawn_ids(1, length, seed=row), **rows_of(memory, [row])) for row, length in enumerate(lengths)]
    for side in ("right", "left"):
        ids, valid = drawn_ids(2, 9, seed=9), torch.zeros(2, 9, dtype=torch.bool)
        where = [slice(0, n) if side == "right" else slice(9 - n, 9) for n in lengths]
        for row, length in enumerate(lengths):
            ids[row, where[row]] = drawn_ids(1, length, seed=row)[0]
            valid[row, where[row]] = True
        padded = model(Tokens.of(ids, valid=valid), **memory)
        assert torch.isfinite(padded.hidden).all(), "padding gives values that are not finite"
        for row in range(2):
            same(padded.hidden[row, where[row]], alone[row].hidden[0], f"row {row} padded on the {side}")
            logits = padded.logits[row] if padded.logits.dim() == 2 else padded.logits[row, where[row]]
            same(logits, alone[row].logits[0], f"logits of row {row} padded on the {side}")


def memory_padding(case: Case) -> None:
    """Padding of the memory, left and right, changes nothing."""
    model, ids, memory = case.model(), drawn_ids(2, T), drawn_ids(2, 6, seed=7)
    plain = model(ids, memory=memory).hidden
    for side in ("right", "left"):
        padded, valid = drawn_ids(2, 9, seed=9), torch.zeros(2, 9, dtype=torch.bool)
        where = slice(0, 6) if side == "right" else slice(3, 9)
        padded[:, where], valid[:, where] = memory, True
        same(model(ids, memory=Tokens.of(padded, valid=valid)).hidden, plain, f"memory padded on the {side}")


def decoding(case: Case) -> None:
    """Prompts of different lengths padded on the right, then token by token, equal one forward of each row."""
    model, memory, prompts, steps = case.model(), with_memory(case, 3), (9, 1, 5), 7
    ids = drawn_ids(3, max(prompts) + steps)
    whole = model(ids, **memory).hidden
    valid = torch.arange(max(prompts))[None] < torch.tensor(prompts)[:, None]
    junk = torch.where(valid, ids[:, : max(prompts)], 1)
    for static in (False, True):
        state = model.state(3, 16, static=static)
        out = model(Tokens.of(junk, valid=valid), state=state, **memory).hidden
        for row, n in enumerate(prompts):
            same(out[row, :n], whole[row, :n], f"prompt of row {row}, static={static}")
        for step in range(steps):
            at = torch.tensor(prompts) + step
            out = model(ids.gather(1, at[:, None]), state=state).hidden
            for row in range(3):
                same(out[row, 0], whole[row, at[row]], f"step {step} of row {row}, static={static}")


def decoding_alike(case: Case) -> None:
    """The same for rows of one length, from the first token on: the path in which the host knows the relation."""
    model, memory, ids = case.model(), with_memory(case), drawn_ids(2, T)
    whole = model(ids, **memory)
    for static in (False, True):
        state = model.state(2, T, static=static)
        for t in range(T):
            out = model(ids[:, t : t + 1], state=state, outputs="last", **(memory if t == 0 else {}))
            same(out.hidden[:, 0], whole.hidden[:, t], f"step {t}, static={static}")
            if whole.logits.dim() == 3:
                same(out.logits[:, 0], whole.logits[:, t], f"logits of step {t}, static={static}")


def chunks(case: Case) -> None:
    """A prompt in chunks equals the prompt at once, with documents, without, and with rows of different lengths."""
    model, memory, ids = case.model(), with_memory(case), drawn_ids(2, T)
    start = torch.tensor([[0] * 6 + [6] * 6, [0] * 2 + [2] * 10])
    for columns in ({}, {"start": start}):
        tokens = Tokens.of(ids, **columns)
        whole = model(tokens, **memory).hidden
        for static in (False, True):
            state, parts, at = model.state(2, T, static=static), [], 0
            for length in (4, 3, 1, 4):
                chunk = tokens.slice(at, at + length)
                parts.append(model(chunk, state=state, **(memory if at == 0 else {})).hidden)
                at += length
            same(torch.cat(parts, 1), whole, f"chunks, columns={sorted(columns)}, static={static}")
    whole, done = model(ids, **memory).hidden, torch.zeros(2, dtype=torch.int64)
    for static in (False, True):
        state, done = model.state(2, 2 * T, static=static), torch.zeros(2, dtype=torch.int64)
        for counts in ((4, 2), (3, 4), (1, 0), (4, 3)):
            longest, counts = max(counts), torch.tensor(counts)
            valid = torch.arange(longest)[None] < counts[:, None]
            at = (done[:, None] + torch.arange(longest)).clamp(max=T - 1)
            chunk = Tokens.of(torch.where(valid, ids.gather(1, at), 3), valid=valid)
            out = model(chunk, state=state, **(memory if not done.any() else {})).hidden
            for row in range(2):
                n = int(counts[row])
                same(out[row, :n], whole[row, done[row] : done[row] + n], f"chunk of row {row}, static={static}")
            done += counts


def batch(case: Case) -> None:
    """A row alone equals the row in a batch."""
    model, x, memory = case.model(), inputs(case, 3), with_memory(case, 3)
    together = model(x, **memory)
    for row in range(3):
        alone = model(x[row : row + 1], **rows_of(memory, [row]))
        same(alone.hidden[0], together.hidden[row], f"row {row}")
        same(alone.logits[0], together.logits[row], f"logits of row {row}")


def loss_of(output: Output) -> torch.Tensor:
    """A scalar that depends on every output and every auxiliary loss in a way of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in (("hidden", output.hidden), ("logits", output.logits)):
        weights = torch.randn(value.shape, generator=Key(0).fold(name).generator(), dtype=torch.float64)
        total = total + (value.double() * weights).sum()
    for name in sorted(output.aux):
        if name.endswith("_loss"):
            total = total + output.aux[name][0].double().sum()
    return total


def further(model: Transformer, x: torch.Tensor, output: Output, key: torch.Tensor | None = None) -> torch.Tensor:
    """A number that depends on what a model has besides its forward: predictors of further tokens; 0 without any."""
    total, hidden = torch.zeros(()), output.hidden
    for k in range(1, len(predictors_of(model) or ()) + 1):
        hidden, aux = predict(model, k, hidden[:, : T - k], Tokens.of(x[:, k:]), key=key)
        total = total + loss_of(Output(hidden, hidden, aux))
    return total


def met(case: Case, model: Transformer) -> dict[str, torch.nn.Parameter]:
    """Parameters that the inputs meet: all, but for those of pictures beside texts (test_vision_language.py has them),
    and of masked patches (test_masked_image.py)."""
    pictures = ("class_token", "vision_positions", "project.weight", "project.bias")
    beside = {f"embedding.{name}" for name in pictures} if case.spec().embedding.kind == "vision_language" else set()
    beside.add("embedding.mask_token")
    return {name: parameter for name, parameter in model.named_parameters() if name not in beside}


def gradients(case: Case) -> None:
    """Gradients reach every parameter, and every slice of a fused one."""
    model, x = case.model(), inputs(case)
    output = model(x, **with_memory(case))
    (loss_of(output) + (further(model, x, output) if case.of_tokens else 0)).backward()
    for name, parameter in met(case, model).items():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        assert parameter.grad.abs().max() > 1e-12, f"the gradient of {name} is zero"
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.weight.grad is not None:
            for role, grad in zip(module.roles, module.weight.grad.split(module.slices), strict=True):
                assert grad.abs().max() > 1e-12, f"the gradient of {name}.weight is zero for {role}"


def bfloat16(case: Case) -> None:
    """Outputs and gradients are finite in bfloat16: all of it, and by autocast over float32 weights."""
    torch.set_default_dtype(torch.float32)
    for cast in (False, True):
        model = case.model(noise=0.05)
        model = model if cast else model.bfloat16()
        x, memory = inputs(case), with_memory(case)
        if not case.of_tokens and not cast:
            x, memory = x.bfloat16(), {name: value.bfloat16() for name, value in memory.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            output = model(x, **memory)
            ahead = further(model, x, output) if case.of_tokens else 0
        assert torch.isfinite(output.hidden).all() and torch.isfinite(output.logits).all(), f"autocast={cast}"
        (loss_of(output) + ahead).backward()
        for name, parameter in met(case, model).items():
            assert parameter.grad is not None, f"{name} gets no gradient, autocast={cast}"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite, autocast={cast}"


def meta(case: Case) -> None:
    """Construction on the meta device, then memory, then initialisation, equals direct construction."""
    direct = initialise(case.spec().build(), 3)
    with torch.device("meta"):
        model = case.spec().build()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model = initialise(model.to_empty(device="cpu"), 3)
    identical(model, direct)
    x, memory = inputs(case), with_memory(case)
    assert torch.equal(model(x, **memory).hidden, direct(x, **memory).hidden)


def identical(a: Transformer, b: Transformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), f"{name} differs"


def count(case: Case) -> None:
    """As many parameters as the parts' formulas say."""
    model = case.spec().build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(case.spec())


def saving(case: Case) -> None:
    """Saved and loaded, the model gives the same outputs bit for bit."""
    model = case.model()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(model.state_dict(), path)
        other = case.model(seed=1)
        other.load_state_dict(load_file(path))
    x, memory = inputs(case), with_memory(case)
    a, b = model(x, **memory), other(x, **memory)
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.logits, b.logits)


class _Holder(Spec):
    model: Part[ModelSpec]


def round_trip(case: Case) -> None:
    """spec -> JSON -> spec is the same spec, with the same plan."""
    spec = case.spec()
    again = validate(_Holder, {"model": json.loads(json.dumps(spec.dump()))}).model
    assert again == spec and again.dump() == spec.dump()
    assert [again.plan(side) for side in ("encoder", "decoder")] == [spec.plan(side) for side in ("encoder", "decoder")]


def recomputation(case: Case) -> None:
    """With and without recomputed activations: the same loss, sums and gradients bit for bit, dropout included."""
    seen = []
    fields: dict[str, Any] = {"dropout": 0.2, "drop_path": 0.3}
    if "dropout" in type(case.spec().attention).model_fields:
        fields["attention"] = {**case.data()["attention"], "dropout": 0.1}
    for recompute in (False, True):
        model = case.model(**fields)
        for stack in model.stacks.values():
            stack.recompute = recompute
        output = model(inputs(case), key=Key(5).tensor(), **with_memory(case))
        loss = loss_of(output)
        if case.of_tokens:
            loss = loss + further(model, inputs(case), output, Key(6).tensor())
        loss.backward()
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen.append(
            {"loss": loss.detach(), **gradient, **{f"aux {n}": t for n, pair in output.aux.items() for t in pair}}
        )
        if not recompute:
            plain = loss_of(model(inputs(case), **with_memory(case)))
            assert plain != loss, "the key drops nothing"
    assert seen[0].keys() == seen[1].keys()
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), f"{name} differs under recomputation"


def copies(case: Case) -> None:
    """A snapshot, a fork and a truncated state go on as if nothing else had happened."""
    model, memory, ids = case.model(), with_memory(case), drawn_ids(2, T)
    whole = model(ids, **memory).hidden
    for static in (False, True):
        state = model.state(2, T, static=static)
        model(ids[:, :5], state=state, **memory)
        kept, forked = state.snapshot(), state.fork(torch.tensor([1, 0, 1]))
        for _ in range(2):  # the first turn must not touch what the second starts from
            for t in (5, 6, 7):
                other = (ids[:, t : t + 1] + 1) % VOCABULARY
                model(other, state=state)
            state, kept = kept, kept.snapshot()
        for t in (5, 6):
            same(model(ids[:, t : t + 1], state=kept).hidden[:, 0], whole[:, t], f"snapshot, static={static}")
            out = model(ids[[1, 0, 1], t : t + 1], state=forked).hidden[:, 0]
            same(out, whole[[1, 0, 1], t], f"fork, static={static}")
        if not kept.rewinds:
            try:
                kept.truncate(4)
            except TorchstoneError as error:
                assert "cannot be truncated" in str(error)
                continue
            raise AssertionError("a state that does not rewind was truncated")
        kept.truncate(torch.tensor([6, 3]))
        at = torch.tensor([6, 3])
        for step in range(3):
            out = model(ids.gather(1, (at + step)[:, None]), state=kept).hidden[:, 0]
            same(out, whole[torch.arange(2), at + step], f"truncated, static={static}")


def last(case: Case) -> None:
    """Asking for the last position gives what asking for all gives there."""
    model, memory, ids = case.model(), with_memory(case), drawn_ids(2, 6)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    tokens = Tokens.of(ids, valid=valid)
    whole, end = model(tokens, **memory), model(tokens, outputs="last", **memory)
    none = model(tokens, outputs="none", **memory)
    assert none.logits is None and torch.equal(none.hidden, whole.hidden)
    same(end.hidden[:, 0], whole.hidden[torch.arange(2), torch.tensor([5, 3])], "hidden states")
    if whole.logits.dim() == 3:
        same(end.logits[:, 0], whole.logits[torch.arange(2), torch.tensor([5, 3])], "logits")
    if not case.decodes:
        return
    for static in (False, True):
        state = model.state(2, 16, static=static)
        out = model(tokens.slice(0, 3), state=state, outputs="last", **memory).hidden[:, 0]
        same(out, whole.hidden[:, 2], f"first chunk, static={static}")
        out = model(tokens.slice(3, 6), state=state, outputs="last").hidden[:, 0]
        same(out, whole.hidden[torch.arange(2), torch.tensor([5, 3])], f"ragged chunk, static={static}")


def encoded(case: Case) -> None:
    """A memory made by `encode` beforehand equals the encoder's inputs."""
    model, ids, memory = case.model(), inputs(case), with_memory(case)["memory"]
    made, _ = model.encode(memory)
    assert isinstance(made, Memory)
    whole = model(ids, memory=memory).hidden
    same(model(ids, memory=made).hidden, whole, "memory from encode")
    changed = replace(made, x=made.x.flip(-1))  # a norm takes off what is added to all channels
    assert not torch.allclose(model(ids, memory=changed).hidden, whole), "the memory changes nothing"


Check = Callable[[Case], None]

CHECKS: dict[str, tuple[Check, Callable[[Case], bool]]] = {
    "causality": (causality, lambda case: case.form != "encoder"),
    "documents": (documents, lambda case: case.of_tokens),
    "padding": (padding, lambda case: case.of_tokens),
    "memory_padding": (memory_padding, lambda case: case.of_tokens and case.form == "encoder_decoder"),
    "decoding": (decoding, lambda case: case.decodes),
    "decoding_alike": (decoding_alike, lambda case: case.decodes),
    "chunks": (chunks, lambda case: case.decodes),
    "batch": (batch, lambda case: True),
    "gradients": (gradients, lambda case: True),
    "bfloat16": (bfloat16, lambda case: True),
    "meta": (meta, lambda case: True),
    "count": (count, lambda case: True),
    "saving": (saving, lambda case: True),
    "round_trip": (round_trip, lambda case: True),
    "recomputation": (recomputation, lambda case: True),
    "copies": (copies, lambda case: case.decodes),
    "last": (last, lambda case: case.of_tokens),
    "encoded": (encoded, lambda case: case.form == "encoder_decoder"),
}
