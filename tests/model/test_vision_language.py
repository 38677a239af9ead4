"""Pictures and texts in one sequence: modalities, gradients of both sides, equality with a plain encoder, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.embedding.vision_language import VisionLanguage
from torchstone.model.site import initialise
from torchstone.model.stack.multiway import MultiwayLinear, MultiwayNorm
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.train import train

V, SIDE, N = 23, 6, 4
SPEC: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "vocabulary": V,
    "causal": False,
    "attention": {"heads": 4},
    "position": "none",
    "residual": "subln",
    "norm": "layernorm",
    "ffn": {"kind": "mlp"},
    "stack": "multiway",
    "embedding": {"kind": "vision_language", "image": SIDE, "patch": 3, "channels": 2, "positions": 12},
}
PIXELS = torch.randn(2, 2, SIDE, SIDE, generator=Key(0).generator())
IDS = torch.randint(V, (2, 7), generator=Key(1).generator())
MASKED = torch.tensor([[True, False, False, True], [False, False, True, False]])


def model(**changes: Any) -> Transformer:
    built = initialise(validate(TransformerSpec, {**SPEC, **changes}).build(), 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=Key(2).generator()))
    return built.eval()


def test_gradients_reach_both_sides_and_cross_over() -> None:
    both, pixels = model(), PIXELS.clone().requires_grad_()
    output = both(VisionLanguage(pixels, IDS, MASKED))
    assert output.hidden.shape == (2, 1 + N + 7, 16) and output.logits.shape == (2, 1 + N + 7, V)
    output.hidden.square().sum().backward()
    for name, parameter in both.named_parameters():
        if not name.startswith("head."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # a text's states depend on the picture, and a masked patch's on the text; on its own pixels they do not
    (of_text,) = torch.autograd.grad(both(VisionLanguage(pixels, IDS)).hidden[:, 1 + N :].sum(), pixels)
    assert of_text.abs().amax((1, 2, 3)).min() > 0
    (hidden,) = torch.autograd.grad(both(VisionLanguage(pixels, IDS, MASKED)).hidden.square().sum(), pixels)
    assert hidden[0, :, :3, :3].abs().max() == 0 and hidden[0, :, :3, 3:].abs().min() > 0
    with torch.no_grad():
        masked = [both(VisionLanguage(PIXELS, ids, MASKED)).hidden[0, 1] for ids in (IDS, (IDS + 1) % V)]
    assert (masked[0] - masked[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("inputs", "mine"), [(PIXELS, 0), (IDS, 1)])
def test_one_side_alone_does_not_meet_the_parameters_of_the_other(inputs: torch.Tensor, mine: int) -> None:
    both = model()
    both(inputs).hidden.square().sum().backward()
    seen = 0
    for name, module in both.encoder.named_modules():  # type: ignore[union-attr]
        if isinstance(module, MultiwayLinear):
            for parameter in module.parameters():
                halves = parameter.grad.reshape(2, -1).abs().amax(1)  # type: ignore[union-attr]
                assert halves[mine] > 0 and halves[1 - mine] == 0, name
                seen += 1
        elif isinstance(module, MultiwayNorm):
            grads = [next(iter(way.parameters())).grad for way in module]
            assert grads[mine] is not None and grads[mine].abs().max() > 0, name
            assert grads[1 - mine] is None or grads[1 - mine].abs().max() == 0, name
            seen += 1
    assert seen >= 2 * (4 + 4) + 1
    of_pictures, of_texts = both.embedding.project.weight.grad, both.embedding.weight.grad
    assert (of_pictures is None) == bool(mine) and (of_texts is None) == (not mine)


@torch.no_grad()
def test_with_equal_sides_it_is_a_plain_encoder() -> None:
    both, plain = model(), model(stack="plain")
    state = plain.state_dict()
    for name, value in both.state_dict().items():
        one = name
        for number in ("0", "1"):
            one = one.replace(f"norm.{number}.", "norm.")
        if one in state and state[one].shape == value.shape:
            value.copy_(state[one])
        else:  # a bank: one matrix below the other
            value.copy_(torch.cat([state[one]] * 2).view(value.shape))
    x = VisionLanguage(PIXELS, IDS, MASKED)
    torch.testing.assert_close(both(x).hidden, plain(x).hidden, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_among_the_ids_changes_nothing() -> None:
    both = model()
    short = both(VisionLanguage(PIXELS, IDS[:, :4])).hidden
    valid = torch.arange(7).expand(2, -1) < 4
    padded = both(VisionLanguage(PIXELS, IDS, valid=valid)).hidden
    torch.testing.assert_close(padded[:, : 1 + N + 4], short, rtol=0, atol=1e-5)
    left = torch.cat([IDS[:, 4:], IDS[:, :4]], 1)
    ahead = both(VisionLanguage(PIXELS, left, valid=valid.flip(1))).hidden
    torch.testing.assert_close(ahead[:, -4:], short[:, -4:], rtol=0, atol=1e-5)


def test_texts_alone_train_by_a_recipe(tmp_path: Path) -> None:
    embedding = {"kind": "vision_language", "image": 8, "patch": 4, "positions": 16}
    sections = {**tiny.MASKED, "model": {**tiny.MASKED["model"], "position": "none", "embedding": embedding}}
    done = train(tiny.recipe(tmp_path, **sections), out=tmp_path / "run", quiet=True)
    assert done.metrics()[-1]["test_loss"] > 0
    assert "embedding.vision_positions" in done.model().state_dict()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (PIXELS[:, :1], r"pixels of shape \(rows, 2, 6, 6\), not \(2, 1, 6, 6\)"),
        (VisionLanguage(), r"the model takes VisionLanguage\(pixels, ids\), or one of them, not VisionLanguage"),
        ("a picture", "or one of them, not str"),
        (VisionLanguage(PIXELS, IDS[:1]), "2 pictures and 1 texts do not make pairs"),
        (VisionLanguage(PIXELS, IDS[0]), r"ids of shape \(rows, length\), not \(7,\)"),
        (VisionLanguage(ids=IDS, masked=MASKED), "masked: goes with pixels, and there are none"),
        (VisionLanguage(PIXELS, valid=IDS > 0), "valid: goes with ids, and there are none"),
        (VisionLanguage(PIXELS, masked=MASKED[:, :3]), r"masked: needs shape \(rows, 4\), not \(2, 3\)"),
        (VisionLanguage(ids=IDS, valid=IDS[:, :2] > 0), r"valid: needs shape \(rows, 7\), not \(2, 2\)"),
        (torch.zeros(1, 13, dtype=torch.int64), "a text of 13 tokens: embedding.positions is 12"),
    ],
)
def test_inputs_that_do_not_fit_are_one_sentence(inputs: Any, message: str) -> None:
    with pytest.raises(TorchstoneError, match=message):
        model()(inputs)


def test_a_decoder_reads_texts_and_refuses_pictures() -> None:
    decoder = model(causal=True)
    assert decoder(IDS).logits.shape == (2, 7, V)
    with pytest.raises(TorchstoneError, match="a decoder reads texts; pictures go into an encoder"):
        decoder(VisionLanguage(PIXELS, IDS))
    with pytest.raises(TorchstoneError, match="3 does not divide an image of 8 pixels"):
        model(embedding={**SPEC["embedding"], "image": 8})
