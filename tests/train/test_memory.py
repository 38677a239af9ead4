"""What `inspect` says that a training needs is what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import tiny
from torchstone.recipe import load_recipe
from torchstone.train.memory import TrainingMemory, training_memory

MODEL: dict[str, Any] = {**tiny.MODEL, "depth": 4, "vocabulary": 300, "context": 64}
BASE: dict[str, Any] = {"model": MODEL, "data": {"tokenizer": "bytes", "block": 64}, "trainer": {"batch": 4}}
MASKED: dict[str, Any] = {**tiny.MASKED, "model": {**MODEL, "causal": False, "head": "mlm"}}


def memory(**sections: Any) -> TrainingMemory:
    base = {name: {**BASE.get(name, {}), **section} for name, section in sections.items()}
    return training_memory(load_recipe({**BASE, **base}))


@pytest.mark.parametrize("sections", [{}, MASKED], ids=["causal", "masked"])
def test_weights_gradients_and_state_are_exact_and_activations_plausible(sections: dict[str, Any]) -> None:
    plain = memory(**sections)
    model = load_recipe({**BASE, **sections}).model.build()
    assert plain.weights == plain.gradients == 4 * sum(p.numel() for p in model.parameters())
    count = len(list(model.parameters()))
    assert plain.optimizer == 2 * plain.weights + 4 * count  # two moments, and a step for each parameter
    assert plain.activations is not None
    # 4 layers x 256 tokens x 4 bytes x some tens of vectors of the width
    assert 4 * 256 * 4 * 16 * 8 < plain.activations < 4 * 256 * 4 * 16 * 60
    assert plain.peak == plain.weights * 2 + plain.optimizer + plain.activations + plain.work


def test_activations_grow_with_the_batch_and_shrink_with_bf16_and_recomputation() -> None:
    plain = memory()
    assert plain.activations is not None
    double = memory(trainer={"batch": 8}).activations
    assert double is not None and double == pytest.approx(2 * plain.activations, rel=0.05)
    for trainer in ({"precision": "bf16"}, {"recompute": True}):
        less = memory(trainer={"batch": 4, **trainer}).activations
        assert less is not None and less < 0.9 * plain.activations
    assert memory(trainer={"batch": 4, "ema": 0.9}).ema == plain.weights


def test_only_chosen_positions_reach_the_masked_head() -> None:
    few, many = (
        memory(**{**MASKED, "objective": {"kind": "masked_lm", "rate": rate}}).activations for rate in (0.1, 0.9)
    )
    assert few is not None and many is not None and few < many


STEPS = """
import json, sys, torch
torch.set_num_threads(1)
from torchstone.objectives import Facts
from torchstone.recipe import load_recipe
from torchstone.train.engine import Source, Trainer
from torchstone.train.run import build_model

def status(line):
    return next(int(row.split()[1]) * 1024 for row in open("/proc/self/status") if row.startswith(line))

recipe = load_recipe(json.loads(sys.argv[1]))
block, vocabulary = recipe.data.block, recipe.model.vocabulary

class Random:
    bytes = tokens = 0
    def batch(self, key, step, size, *rest):
        ids = torch.randint(0, vocabulary, (size, block + 1), generator=key.fold(step).generator())
        return {"ids": ids[:, :-1].contiguous(), "next": ids[:, 1:].contiguous()}
    def evaluation(self, size, limit=None):
        return iter(())

x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()  # what torch itself sets up is idle memory
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
idle = status("VmRSS")
model = build_model(recipe.model, 0)
for stack in model.stacks.values():
    stack.recompute = recipe.trainer.recompute
objective = recipe.objective.build(Facts(vocabulary, 1, 2, 0))
trainer = Trainer(model, objective, Source(Random()), recipe.optimizer, recipe.schedule, recipe.trainer, quiet=True)
for _ in range(2):
    trainer.train_step()
print(status("VmHWM") - idle)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "sections",
    [{}, {"trainer": {"precision": "bf16"}}, {"trainer": {"recompute": True}}, {"optimizer": {"kind": "muon"}}, MASKED],
    ids=["plain", "bf16", "recompute", "muon", "masked"],
)
def test_peak_above_idle_is_within_1_3_times_of_what_is_predicted(sections: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "model": {"width": 256, "depth": 4, "vocabulary": 32_768, "context": 1024, "attention": {"heads": 4}},
        "data": {"tokenizer": "bytes", "block": 1024},
        "trainer": {"batch": 8, "device": "cpu", "threads": 1},
    }
    own = {name: value for name, value in sections.items() if name != "model"}
    recipe = {**base, **{name: {**base.get(name, {}), **section} for name, section in own.items()}}
    if "model" in sections:
        recipe["model"] = {**base["model"], "causal": False, "head": "mlm"}
    predicted = training_memory(load_recipe(recipe)).peak
    command = [sys.executable, "-c", STEPS, json.dumps(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio = int(done.stdout) / predicted
    print(f"measured / predicted = {ratio:.3f}")
    assert 1 / 1.3 < ratio < 1.3
