"""Dilated attention as a part: what its card promises beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchstone
from conformance.cases import Case
from distributed import run_ranks
from torchstone.errors import TorchstoneError
from torchstone.model.attention.dilated import DilatedAttention, DilatedSpec
from torchstone.model.context import Context
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.ops.attention import attention_reference
from torchstone.ops.dilated import Shards
from torchstone.train.mesh import Mesh

FIELDS: dict[str, Any] = {
    "width": 32, "depth": 2, "vocabulary": 50,
    "attention": {"kind": "dilated", "heads": 4, "segments": [8, 16, 64], "dilations": [1, 2, 4]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 5}, "attention.heads: 5 heads do not divide width 32"),
        ({"kv_heads": 3}, "attention.kv_heads: 3 does not divide 4 heads"),
        ({"segments": [8, 16]}, "attention.dilations: 3 dilations for 2 segments; each pattern needs one of both"),
        ({"segments": [], "dilations": []}, "attention.dilations: 0 dilations for 0 segments"),
        ({"dilations": [2, 2, 4]}, "attention.dilations: the first is 2, and must be 1 for every token to be kept"),
        ({"segments": [16, 8, 64]}, r"attention.segments: \[16, 8, 64\] decreases; none may be less than"),
        ({"dilations": [1, 4, 2]}, r"attention.dilations: \[1, 4, 2\] decreases; none may be less than"),
        ({"segments": [8, 16, 16], "dilations": [1, 2, 17]}, "dilations: 17 is more than its segment of 16 tokens"),
        ({"segments": [0, 16, 64]}, "segments"),
        ({"head_dim": 7}, "rotary turns pairs of channels, and 1 of a head of 7 is 7, not even"),
    ],
)
def test_what_makes_no_schedule_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        torchstone.build({**FIELDS, "attention": {**FIELDS["attention"], **fields}})


def test_a_decoder_with_an_encoder_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="attention dilated cannot attend to an encoder"):
        torchstone.build({**FIELDS, "encoder": {"depth": 1}})


def test_offsets_are_dealt_out_to_heads_in_turn_or_in_blocks() -> None:
    fields: dict[str, Any] = {"heads": 7, "segments": (8, 8, 8), "dilations": (1, 3, 4)}
    mod, block = (DilatedSpec(**fields, offset=offset).patterns() for offset in ("mod", "block"))
    assert [p.offsets for p in mod] == [(0,) * 7, (0, 1, 2, 0, 1, 2, 0), (0, 1, 2, 3, 0, 1, 2)]
    # the published code fills heads up to a multiple of r and cuts them into r blocks
    assert [p.offsets for p in block] == [(0,) * 7, (0, 0, 0, 1, 1, 1, 2), (0, 0, 1, 1, 2, 2, 3)]


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_the_pairs_that_attend(causal: bool) -> None:
    N, spec = 64, DilatedSpec(heads=4, segments=(8, 16, 64), dilations=(1, 2, 4))
    layer = spec.build(Site(width=32, causal=causal))
    pairs = 0
    for pattern in spec.patterns():
        w, r = pattern.length, pattern.dilation
        for offset in pattern.offsets:
            kept = [t for t in range(N) if (t % w - offset) % r == 0]
            pairs += sum(s // w == t // w and (s <= t or not causal) for t in kept for s in kept)
    # what measures ask for: the mean number of keys of a sequence, all of them where it is not causal
    per_token = layer.flops((N + 1) / 2 if causal else N)  # type: ignore[arg-type]
    assert per_token * N == pytest.approx(4 * 8 * pairs)  # two multiply-adds for each of 8 channels of a pair
    if not causal:
        assert per_token == 4 * 32 * (8 + 16 / 4 + 64 / 16)


@pytest.mark.parametrize("causal", [True, False])
def test_without_dilation_it_is_softmax_attention_with_the_same_weights(causal: bool) -> None:
    names: dict[str, dict[str, Any]] = {"softmax": {}, "dilated": {"segments": [32], "dilations": [1]}}
    ids = torch.randint(50, (2, 20))
    fields = {**FIELDS, "causal": causal, "position": "alibi"}
    a, b = (
        initialise(torchstone.build({**fields, "attention": {"kind": kind, "heads": 4, **more}}), 0)
        for kind, more in names.items()
    )
    torch.testing.assert_close(a(ids).hidden, b(ids).hidden, rtol=0, atol=1e-5)


def test_an_offset_of_keys_is_added_to_their_scores() -> None:
    spec = DilatedSpec(heads=1, segments=(16,), dilations=(1,))
    layer, x = initialise(spec.build(Site(width=8)), 0), torch.randn(1, 6, 8)
    offset = torch.randn(1, 6)
    tokens = Tokens.blank(6, offset=offset)
    y = layer(x, Context(tokens, tokens))[0]
    q, k, v = layer.qkv(x)[:, None].split(8, -1)
    wanted = attention_reference(
        q, k, v, scale=8**-0.5, causal=True, mask_BHTS=offset[:, None, None].expand(1, 1, 6, 6)
    )[0]
    torch.testing.assert_close(y, layer.out(wanted[:, 0]))


def test_a_step_of_decoding_reads_what_its_segments_keep_and_not_the_whole_cache() -> None:
    model, seen = torchstone.build(FIELDS), []
    ids = torch.randint(50, (1, 300))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if function is flash:
                seen.append(arguments[1].shape[2])
            return function(*arguments, **(named or {}))

    state = model.state(rows=1, extent=300)
    model(ids[:, :299], state=state)
    with torch.no_grad(), Calls():
        last = model(ids[:, 299:], state=state).hidden
    assert seen == [8, 8, 16] * 2  # w / r keys of each pattern, in both layers
    torch.testing.assert_close(last, model(ids).hidden[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_places_are_counted_in_the_document() -> None:
    """A document that begins off the grid of segments equals the document alone, whatever is before it."""
    model = Case.of(attention="dilated_mod", position="none").model()
    ids = torch.randint(50, (1, 23))
    start = torch.tensor([[0] * 5 + [5] * 18])
    packed = model(Tokens.of(ids, start=start)).hidden
    torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).hidden, rtol=0, atol=1e-10)
    assert not torch.allclose(model(ids).hidden[:, 5:], packed[:, 5:])


# ------------------------------------------------------------------------------------- a sequence over two ranks


def _model() -> Any:
    return initialise(torchstone.build({**FIELDS, "depth": 2}), 0).double()


def _sharded(mesh: Mesh, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hidden states of this rank's part, and gradients of all parameters from it."""
    torch.set_default_dtype(torch.float64)
    model, part = _model(), ids.chunk(2, 1)[mesh.rank]
    for module in model.modules():
        if isinstance(module, DilatedAttention):
            module.shards = Shards()
    index = torch.arange(part.shape[1])[None] + mesh.rank * part.shape[1]
    hidden = model(Tokens(index, ids=part)).hidden
    hidden.square().sum().backward()
    return {"hidden": hidden.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_a_model_over_two_ranks_equals_one_process_forwards_and_backwards() -> None:
    ids, model = torch.randint(50, (2, 32)), _model()
    first, second = run_ranks(_sharded, 2, ids)
    hidden = model(ids).hidden
    hidden.square().sum().backward()
    torch.testing.assert_close(torch.cat([first.pop("hidden"), second.pop("hidden")], 1), hidden, rtol=0, atol=1e-10)
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert first.keys() == second.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(first[name] + second[name], gradient, rtol=0, atol=1e-9)


def test_packed_documents_cannot_be_sharded() -> None:
    layer = initialise(DilatedSpec(heads=1).build(Site(width=8)), 0)
    layer.shards = object()  # type: ignore[assignment]
    tokens = Tokens.blank(6, start=torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(TorchstoneError, match="a sequence sharded over ranks can have no packed documents"):
        layer(torch.randn(1, 6, 8), Context(tokens, tokens))
