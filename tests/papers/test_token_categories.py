"""The probe of METRO's claim: what a character of Python source is part of, and a score that features can reach."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.papers import metro


def test_categories_of_a_source_by_hand() -> None:
    text = (
        'import os\n\n\ndef area(width, of="a b"):  # sides\n    half = len(width.x) * 0.5\n    return half, of, os\n'
    )
    found = metro._categories(text)
    seen: dict[str, set[str]] = {}
    for name in ("keyword", "builtin", "attribute", "parameter", "local", "operator", "string", "number"):
        inside = found == metro._CATEGORIES.index(name)
        words = "".join(char if yes else " " for char, yes in zip(text, inside, strict=True)).split()
        seen[name] = set(words)
    assert seen == {
        "keyword": {"import", "def", "return"},
        "builtin": {"len"},
        "attribute": {"x"},
        "parameter": {"width", "of"},
        "local": {"half"},
        "operator": {"(", ",", "=", "):", ")", "*", "."},
        "string": {'"a', 'b"'},
        "number": {"0.5"},
    }
    assert (found[text.index("area") : text.index("area") + 4] == -1).all() and found[text.index("#")] == -1


def test_the_probe_tells_features_that_hold_the_answer_from_noise(monkeypatch: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    label = {split: torch.randint(-1, 8, (60, 10), generator=draw) for split in ("valid", "test")}
    monkeypatch.setattr(metro, "_labelled", lambda data, split, rows: (label[split], label[split]))

    class Stub:
        spec = type("Spec", (), {"depth": 2})

        def eval(self) -> None: ...

        def __call__(self, ids: torch.Tensor, taps: Any, outputs: str) -> None:
            noise = torch.randn(*ids.shape, 12, generator=draw)
            known = noise.clone()
            known[..., :9] += 6 * torch.nn.functional.one_hot(ids + 1, 9)
            taps.seen |= {"encoder.layers.0.x": noise, "encoder.layers.1.x": known if self.knows else noise}

        knows = True

    model: Any = Stub()
    assert min(metro._probe(model, None, 60)) > 0.95  # type: ignore[arg-type]
    model.knows = False
    assert max(metro._probe(model, None, 60)) < 0.3  # type: ignore[arg-type]
