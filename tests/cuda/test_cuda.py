"""On a CUDA device every part gives the values, gradients, tokens and drops that it gives on the CPU; trainings stop
and resume bit for bit; kernels that only such a device has agree with their definitions. Skipped where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conformance.cases import Case, singles
from conformance.checks import inputs, loss_of, same, with_memory
from conformance.test_compiled import cases_of, compiled, shallowest
from torchstone.evaluate import evaluate
from torchstone.generate import Engine, Sampling
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import Output, Transformer, TransformerSpec
from torchstone.ops.experts import collect, group, grouped, grouped_product, spread
from torchstone.ops.fp8 import fp8_product, hardware, product_reference, quantise
from torchstone.spec import validate
from torchstone.train.run import RunFolder
from torchstone.train.training import train

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

EVERY = [pytest.param(case, id=str(case)) for case in singles()]
DECODING = [pytest.param(case, id=str(case)) for case in singles() if case.decodes and case.chosen["head"] == "lm"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def there(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def back(output: Output) -> Output:
    """The same on the CPU, gradients going back."""
    aux = {name: tuple(tensor.cpu() for tensor in pair) for name, pair in output.aux.items()}
    return replace(output, hidden=output.hidden.cpu(), logits=output.logits.cpu(), aux=aux)


def values(model: Transformer, case: Case, device: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Outputs, sums and gradients, on the CPU, of a forward and backward on `device`."""
    model = model.to(device)
    memory = {name: tensor.to(device) for name, tensor in with_memory(case).items()}
    arguments = {name: value.to(device) for name, value in arguments.items()}
    output = back(model(inputs(case).to(device), **memory, **arguments))
    loss_of(output).backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    sums = {f"aux {name}": tensor for name, pair in output.aux.items() for tensor in pair}
    return {"hidden": output.hidden.detach(), "logits": output.logits.detach(), **sums, **gradients}


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same(found[name], value, name, tolerance)


@pytest.mark.parametrize("case", EVERY)
def test_values_and_gradients_are_those_of_the_cpu(case: Case, float64: None) -> None:
    agree(values(case.model(), case, DEVICE), values(case.model(), case, "cpu"), 1e-8)


@pytest.mark.parametrize("case", EVERY)
def test_the_same_values_are_dropped(case: Case, float64: None) -> None:
    fields, key = {"dropout": 0.2, "drop_path": 0.3}, Key(5).tensor()
    found, wanted = (values(case.model(**fields), case, device, key=key) for device in (DEVICE, "cpu"))
    agree(found, wanted, 1e-8)


@pytest.mark.parametrize("case", EVERY)
def test_bfloat16_is_near(case: Case) -> None:
    """By autocast, as a training takes it: within some roundings of the CPU's float32, and finite."""
    wanted = values(case.model(noise=0.05), case, "cpu")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = values(case.model(noise=0.05), case, DEVICE)
    for name in wanted:
        assert torch.isfinite(found[name]).all(), name
    if case.chosen["linear"] == "linear" and case.chosen["ffn"] in ("mlp", "swiglu"):  # no choice turns on a rounding
        assert (found["hidden"].float() - wanted["hidden"]).norm() < 0.1 * wanted["hidden"].norm()


@pytest.mark.parametrize("case", cases_of(lambda case: "fp8" not in case.chosen["linear"]))
def test_compiled_by_inductor_it_gives_the_same(case: Case, float64: None) -> None:
    """But for numbers of 8 bits: Triton makes none of float64."""
    depth = shallowest(case)
    other = values(compiled(case.model(depth=depth).to(DEVICE), "inductor"), case, DEVICE)
    agree(other, values(case.model(depth=depth), case, "cpu"), 1e-8)


@pytest.mark.parametrize("case", DECODING)
def test_the_same_tokens_are_written(case: Case, float64: None) -> None:
    """Greedy and drawn, rows of different lengths; the noise is keyed, so that the device has no say in it."""
    generator = Key(1).generator()
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (7, 1, 12)]
    memory = {"memory": [prompt[::-1] for prompt in prompts]} if case.form == "encoder_decoder" else {}
    for sampling in (
        Sampling(temperature=0, max_new_tokens=12),
        Sampling(temperature=1.0, top_k=20, max_new_tokens=12),
    ):
        found, wanted = (
            Engine(case.model(), device=device, compile="off").generate(prompts, sampling, **memory)
            for device in (DEVICE, "cpu")
        )
        assert [one.ids for one in found] == [one.ids for one in wanted]


def test_compiled_decoding_writes_the_same_tokens() -> None:
    spec = {"width": 64, "depth": 2, "vocabulary": 61, "context": 128, "residual": {"kind": "pre", "std": 0.3}}
    model = initialise(validate(TransformerSpec, spec).build(), 0)
    prompts, sampling = [[1, 2, 3], [4], [5, 6]], Sampling(temperature=0, max_new_tokens=60)
    found, wanted = (
        Engine(model, device=device, compile=how).generate(prompts, sampling)
        for device, how in ((DEVICE, "on"), ("cpu", "off"))
    )
    assert [one.ids for one in found] == [one.ids for one in wanted]


# -------------------------------------------------------------------------------------- kernels of such a device


def choices(name: str, N: int, E: int) -> torch.Tensor:
    """Two experts for each token."""
    generator = Key(0).fold(name).generator()
    experts = torch.rand(N, E, generator=generator).topk(2).indices
    return {
        "mixed": experts,
        "one_for_all": torch.full_like(experts, 3),
        "first_and_last": torch.tensor([0, E - 1]).expand(N, 2),
        "some_have_none": torch.where(torch.rand(N, 2, generator=generator) < 0.3, E, experts),
    }[name]


@pytest.mark.parametrize("name", ["mixed", "one_for_all", "first_and_last", "some_have_none"])
@pytest.mark.parametrize("tokens", [3, 300])
def test_grouped_products_of_bfloat16(name: str, tokens: int) -> None:
    """Torch's grouped kernel, forwards and backwards, beside every token times the matrices that it chose."""
    E, D, H = 8, 64, 48
    drawn = [torch.randn(s, generator=Key(0).fold(i).generator()) for i, s in enumerate([(tokens, D), (E, H, D)])]
    x, bank = (t.to(DEVICE, torch.bfloat16).requires_grad_() for t in drawn)
    gates = torch.full((tokens, 2), 0.5, device=DEVICE, dtype=torch.bfloat16)
    groups = group(choices(name, tokens, E).to(DEVICE), E)
    assert grouped._by_grouped_mm(x, bank)
    rows = spread(x, groups)
    y = collect(grouped_product(rows, bank, groups), gates, groups)
    y.float().square().sum().backward()

    x64, bank64 = (t.detach().cpu().double().requires_grad_() for t in (x, bank))
    experts = choices(name, tokens, E)
    wanted = torch.zeros(tokens, H, dtype=torch.float64)
    for k in range(2):
        padded = torch.cat([bank64, bank64.new_zeros(1, H, D)])
        wanted = wanted + 0.5 * torch.einsum("nhd,nd->nh", padded[experts[:, k]], x64)
    wanted.square().sum().backward()
    for found, exact in ((y, wanted), (x.grad, x64.grad), (bank.grad, bank64.grad)):
        assert (found.cpu().double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("rows_b", [1, 128])
def test_products_of_8_bits_by_the_device(rows_b: int, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this device has another format of scales than Hopper's")
    a, b = (torch.randn(s, generator=Key(0).fold(s[0]).generator()).to(DEVICE) for s in ((96, 512), (384, 512)))
    (qa, sa), (qb, sb) = quantise(a), quantise(b, rows=rows_b)
    taken = hardware.takes(qa, qb, 128, rows_b)
    assert taken, capfd.readouterr().err
    found, wanted = fp8_product(qa, sa, qb, sb, rows_b=rows_b), product_reference(qa, sa, qb, sb, rows_b=rows_b)
    assert (found - wanted).norm() < 0.005 * wanted.norm()
    assert (found - a @ b.T).norm() < 0.06 * (a @ b.T).norm()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_of_bfloat16_at_length(heads: tuple[int, int]) -> None:
    """A length and width for which torch takes its fused kernels."""
    spec = {
        "width": 256,
        "depth": 1,
        "vocabulary": 61,
        "context": 1024,
        "attention": {"heads": heads[0], "kv_heads": heads[1]},
    }
    model = initialise(validate(TransformerSpec, spec).build(), 0)
    ids = torch.randint(61, (2, 1024), generator=Key(0).generator())
    wanted = model(ids).hidden.detach()
    found = model.to(DEVICE, torch.bfloat16)(ids.to(DEVICE)).hidden.detach().cpu().float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


# ------------------------------------------------------------------------------------------------------ trainings


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunFolder]:
    def go(name: str, resume: bool = False, **sections: Any) -> RunFolder:
        trainer = {"device": DEVICE, **sections.pop("trainer", {})}
        data = tiny.recipe(tmp_path, trainer=trainer, **sections)
        return train(data, out=tmp_path / name, resume=resume, quiet=True)

    return go


EXPERTS: dict[str, Any] = {"kind": "moe", "experts": 4, "active": 2, "router": "sigmoid_bias", "hidden": 8}
EIGHT_BITS = {**tiny.MODEL, "width": 128, "linear": "fp8_block", "ffn": {"kind": "mlp", "hidden": 256}}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "compiled-bf16": {"trainer": {"compile": "on", "precision": "bf16"}},
    "muon-dropout-accumulate": {
        "model": {**tiny.MODEL, "dropout": 0.2, "drop_path": 0.2},
        "optimizer": {"kind": "muon", "lr": 0.01},
        "trainer": {"accumulate": 2, "ema": 0.9},
    },
    "sgd": {"optimizer": {"kind": "sgd", "lr": 0.1}},
    "masked": tiny.MASKED,
    "experts": {"model": {**tiny.MODEL, "ffn": EXPERTS}},
    "multi_token": {
        "model": {**tiny.MODEL, "stack": "multi_token"},
        "objective": {"kind": "multi_token"},
    },
    "fp8": {"model": EIGHT_BITS},
    "fp8-compiled": {"model": EIGHT_BITS, "trainer": {"compile": "on", "precision": "bf16"}},
}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_training_cut_and_resumed_equals_the_uncut_one_bit_for_bit(name: str, run: Callable[..., RunFolder]) -> None:
    whole = run("whole", **KINDS[name])
    with tiny.cut_after(3):
        run("cut", **KINDS[name])
    tiny.assert_same_run(run("cut", resume=True, **KINDS[name]), whole)


@pytest.mark.parametrize("name", [name for name in KINDS if "compiled" not in name])
def test_a_training_loses_as_it_does_on_the_cpu(name: str, run: Callable[..., RunFolder]) -> None:
    sections = KINDS[name]
    trainer = {"precision": "fp32", "steps": 6, **sections.get("trainer", {})}
    found, wanted = (
        [row["loss"] for row in run(device, **{**sections, "trainer": {**trainer, "device": device}}).metrics()
         if "loss" in row]
        for device in (DEVICE, "cpu")
    )  # fmt: skip
    assert len(found) == len(wanted) > 0
    near = 3e-2 if name == "fp8" else 1e-3  # a number of 8 bits that falls on the other side is 6 % away
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=near, atol=near)


def test_texts_score_as_they_do_on_the_cpu(run: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder, report = run("scored", trainer={"precision": "fp32"}), []
    for device in (DEVICE, "cpu"):
        found = evaluate(folder, text=str(tmp_path / "corpus.txt"), device=device)
        report.append([result["bits_per_byte"].value for result in found])
    assert report[0] == pytest.approx(report[1], rel=1e-4)


def test_drafted_tokens_change_no_text(run: Callable[..., RunFolder]) -> None:
    folder = run("drafting", **{**KINDS["multi_token"], "trainer": {"precision": "fp32"}})
    sampling = Sampling(temperature=0, max_new_tokens=20)
    texts = [
        [one.ids for one in Engine.of_run(folder, device=device, draft=draft).generate(["ab", "c"], sampling)]
        for device, draft in ((DEVICE, "mtp"), (DEVICE, None), ("cpu", None))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_comparison_runs_there(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "recipe.yaml"
    data = tiny.recipe(tmp_path, trainer={"device": DEVICE, "precision": "fp32"})
    path.write_text(json.dumps(data))
    said = cli("compare", path, "model.position=rotary,none", "--seeds", "2", "--out", tmp_path / "out")
    assert said.status == 0, said.err


def test_peak_memory_is_about_what_is_predicted(tmp_path: Path) -> None:
    """Within 1.3 of it, above what torch holds before."""
    from torchstone.recipe import load_recipe
    from torchstone.train.memory import training_memory

    data = tiny.recipe(
        tmp_path,
        model={"width": 256, "depth": 6, "vocabulary": 32768, "context": 1024, "attention": {"heads": 4}},
        data={"block": 1024},
        trainer={"device": DEVICE, "batch": 8, "steps": 2},
    )
    tiny.text(Path(data["data"]["corpus"]["path"]), lines=6000)
    predicted = training_memory(load_recipe(data)).peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(data, out=tmp_path / "run", quiet=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert predicted is not None and predicted / 1.3 < peak < 1.3 * predicted, (peak, predicted)


def test_commands_take_the_device(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tiny.recipe(tmp_path)))
    assert cli("train", path, "--out", tmp_path / "run", "--device", DEVICE).status == 0
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name()
    texts = [
        cli("generate", tmp_path / "run", "--prompt", "a", "--max-new-tokens", "20", "--seed", "3", "--device", device)
        for device in (DEVICE, "cpu")
    ]
    assert texts[0].status == 0 and texts[0].out == texts[1].out
    assert torch.cuda.get_device_name() in cli("doctor").out
