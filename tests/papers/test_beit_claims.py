"""The exact claim holds, its gates can fail, and the sabotage is the defect that it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.embedding.patch import PatchEmbedding, Patches
from torchstone.objectives import Facts
from torchstone.papers import beit as paper
from torchstone.papers import find_paper
from torchstone.vision.objectives.masked_image import MaskedImageSpec
from torchstone.vision.tokenizers import KMeansTokenizer


def answers() -> dict[str, str]:
    claim = find_paper("beit").claim("exact")
    assert claim is not None and claim.run is not None
    numbers = claim.run("quick", 0).numbers
    return {gate.name: gate.answer(numbers, {}) for gate in claim.gates}


def test_the_exact_claim_holds() -> None:
    assert set(answers().values()) == {"holds"}


def test_an_encoder_that_sees_hidden_patches_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PatchEmbedding._projected

    def leaking(self: PatchEmbedding, inputs: object) -> torch.Tensor:
        pixels = inputs.pixels if isinstance(inputs, Patches) else inputs
        return plain(self, inputs) + 1e-3 * plain(self, pixels)

    monkeypatch.setattr(PatchEmbedding, "_projected", leaking)
    assert answers()["logits that pixels of hidden patches change"] == "does not hold"


def test_the_sabotage_pairs_pictures_with_codes_of_others(tmp_path: Path) -> None:
    tokenizer = KMeansTokenizer(torch.rand(64, 4, generator=Key(0).generator()), 2, 1)
    tokenizer.save(tmp_path / "codes.safetensors")
    fields = {"tokenizer": str(tmp_path / "codes.safetensors"), "mask": {"ratio": 0.4, "min_patches": 4}}
    facts = Facts(model=paper._spec(64), load=lambda run: torch.nn.Identity())
    right, wrong = (spec.model_validate(fields).build(facts) for spec in (MaskedImageSpec, paper.UnpairedViewsSpec))
    batch = {"pixels": torch.rand(3, 1, 28, 28, generator=Key(1).generator())}
    a, b = right.prepare(batch, Key(2)), wrong.prepare(batch, Key(2))
    codes = tokenizer.tokens(batch["pixels"]).flatten(1)
    assert torch.equal(a["masked"], b["masked"])
    assert torch.equal(a["targets"][a["masked"]], codes[a["masked"]])
    assert torch.equal(b["targets"][a["masked"]], codes[[2, 0, 1]][a["masked"]])


@pytest.mark.parametrize("name", ["linear-probe", "few-labels"])
def test_claims_on_digits_say_which_scales_they_have(name: str) -> None:
    claim = find_paper("beit").claim(name)
    assert claim is not None and claim.run is not None
    with pytest.raises(TorchstoneError, match=f"claim {name}: has no scale gpu; it has quick, evidence"):
        claim.run("gpu", 0)
