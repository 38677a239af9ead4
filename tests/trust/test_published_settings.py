"""The recipes of published trainings in the documents, which wait for their images: they load, and are those."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from torchstone.recipe import Recipe, load_recipe, parse_yaml
from torchstone.train.run import shape_of

DOCS = Path(__file__).parents[2] / "docs"


def shown(page: str, name: str) -> Recipe:
    """The recipe that a page of the documents saves as `name`."""
    (body,) = re.findall(rf"```yaml\n# {name}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return load_recipe(parse_yaml(body))


# 440 epochs of 49,000 images in batches of 64, and so on; convolutions and the last layer of ResNet-110 count
@pytest.mark.parametrize(
    ("page", "name", "epochs", "falls", "layers"),
    [
        ("adversarial.md", "cifar-rejection.yaml", 110, {100: 0.1, 105: 0.01}, 18),
        ("certified-radius.md", "cifar-macer.yaml", 440, {200: 0.1, 400: 0.01}, 110),
    ],
    ids=["rejection", "macer"],
)
def test_a_published_training_is_a_recipe(
    page: str, name: str, epochs: int, falls: dict[int, float], layers: int
) -> None:
    recipe = shown(page, name)
    steps, each = recipe.trainer.steps, -(-49_000 // recipe.trainer.batch)
    assert steps == epochs * each and steps % recipe.evaluate.every == 0
    factors = [recipe.schedule.factor(step, steps) for step in range(steps)]
    pairs = enumerate(itertools.pairwise(factors), 1)
    changes = {step: now for step, (before, now) in pairs if now != before}
    assert factors[0] == 1 and changes == {epoch * each: factor for epoch, factor in falls.items()}
    model = shape_of(recipe.model)
    convolutions = [p for path, p in model.named_parameters() if p.dim() == 4 and "shortcut" not in path]
    assert len(convolutions) + 1 == layers and model.head.weight.shape[0] == 10
    assert recipe.optimizer.kind == "sgd" and recipe.optimizer.weight_decay == 5e-4 and recipe.trainer.clip is None
