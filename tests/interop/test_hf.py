"""Runs in transformers' classes: the same numbers as the run itself, and `generate` the same tokens as the engine."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_runs import MODELS, run

from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.model.taps import Taps
from torchstone.train.run import RunFolder, build_model

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)

from torchstone.interop.hf import TorchstoneCache, TorchstoneConfig, TorchstoneForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DECODERS = ["grouped-rotary", "window", "window-in-one-layer", "alibi", "t5", "learned", "untied-softcap", "experts"]
STATES = ["retention", "mla", "dilated", "xpos", "yoco", "hysparse", "lazy", "tim", "longmem"]
"""Decoders whose state, or what their layers share, is of another kind than a softmax attention's."""
TEXTS = ["abc de", "a", "fgh ij abcde"]


def causal(name: str = "grouped-rotary", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(run(name).path, **options)


def batch(name: str = "grouped-rotary", side: str = "left") -> Any:
    return AutoTokenizer.from_pretrained(run(name).path)(
        TEXTS, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=True
    )


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", [*DECODERS, *STATES])
def test_greedy_generate_of_left_padded_rows_equals_the_engine(name: str) -> None:
    given = batch(name)
    out = causal(name).generate(**given, do_sample=False, max_new_tokens=12)
    done = Engine(run(name).model(), run(name).tokenizer()).generate(TEXTS, Sampling(temperature=0, max_new_tokens=12))
    width = given["input_ids"].shape[1]
    for row, completion in zip(out[:, width:].tolist(), done, strict=True):
        assert row[: len(completion.ids)] == completion.ids
    assert len({tuple(completion.ids) for completion in done}) > 1


@pytest.mark.parametrize("name", ["grouped-rotary", "window", "t5"])
def test_beam_search_equals_beam_search_without_a_cache(name: str) -> None:
    model, given = causal(name), batch(name)
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8}
    assert torch.equal(model.generate(**given, **options), model.generate(**given, **options, use_cache=False))


def test_sampling_with_a_cache_equals_sampling_without_and_rows_differ() -> None:
    model, given = causal(), batch()
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(model.generate(**given, max_new_tokens=8, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("name", ["grouped-rotary", "window", "learned"])
def test_a_prompt_read_in_chunks_and_a_continued_cache_give_the_same_tokens(name: str) -> None:
    model, given = causal(name), batch(name)
    whole = model.generate(**given, do_sample=False, max_new_tokens=10)
    chunks = model.generate(**given, do_sample=False, max_new_tokens=10, prefill_chunk_size=3)
    assert torch.equal(chunks, whole)
    first = model.generate(**given, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    mask = F.pad(given["attention_mask"], (0, first.sequences.shape[1] - given["attention_mask"].shape[1]), value=1)
    kept = {"past_key_values": first.past_key_values}
    second = model.generate(first.sequences, attention_mask=mask, do_sample=False, max_new_tokens=6, **kept)
    assert torch.equal(second, whole)


def test_embeddings_in_the_place_of_ids_give_the_same_tokens() -> None:
    model, given = causal(), batch()
    looked_up = F.embedding(given["input_ids"], model.get_input_embeddings().weight)
    out = model.generate(
        inputs_embeds=looked_up, attention_mask=given["attention_mask"], do_sample=False, max_new_tokens=6
    )
    assert torch.equal(out, model.generate(**given, do_sample=False, max_new_tokens=6)[:, -6:])


def test_assisted_decoding_gives_the_same_tokens() -> None:
    model, assistant, given = causal(), causal(), ids(1, 6)
    with torch.no_grad():
        for parameter in assistant.parameters():  # so that it is right now and then
            parameter.mul_(1.1)
    options = {"do_sample": False, "max_new_tokens": 15}
    assert torch.equal(model.generate(given, assistant_model=assistant, **options), model.generate(given, **options))


def test_a_callers_max_length_goes_before_the_runs_own_max_new_tokens() -> None:
    model, given = causal(), ids(1, 5)
    assert model.generation_config.max_new_tokens == 256
    out = model.generate(given, do_sample=False, max_length=8)
    assert torch.equal(out, model.generate(input_ids=given, do_sample=False, max_new_tokens=3))


def test_a_cache_of_another_kind_is_refused() -> None:
    model = causal()
    with pytest.raises(TorchstoneError, match="needs a TorchstoneCache, got DynamicCache"):
        model(ids(1, 3), past_key_values=DynamicCache())
    with pytest.raises(TorchstoneError, match="cache_implementation: 'static'"):
        model.generate(ids(1, 3), cache_implementation="static", max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("name", [*DECODERS, *STATES])
def test_decoding_step_by_step_equals_one_forward(name: str) -> None:
    model, given = causal(name), ids(2, 9)
    cache = TorchstoneCache()
    steps = [model(given[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(steps, 1), model(given).logits, atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 9


def test_a_cropped_cache_is_as_if_the_tokens_had_not_been() -> None:
    model, given = causal(), batch()
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        before = cache.get_seq_length()
        mask = F.pad(given["attention_mask"], (0, 2), value=1)
        model(ids(3, 2), attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == before
        again = model(ids(3, 2, seed=1), attention_mask=mask, past_key_values=cache).logits
        cache.crop(before)
        assert torch.equal(model(ids(3, 2, seed=1), attention_mask=mask, past_key_values=cache).logits, again)
        whole = model(torch.cat([given["input_ids"], ids(3, 2, seed=1)], 1), attention_mask=mask).logits[:, -2:]
    torch.testing.assert_close(again, whole, atol=2e-4, rtol=1e-4)


def test_a_ring_cannot_be_cropped() -> None:
    cache = causal("window")(ids(1, 6), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(TorchstoneError, match="is ring and cannot be truncated"):
        cache.crop(-1)


def test_rows_of_a_cache_are_repeated_selected_and_reset() -> None:
    model, given, more = causal(), ids(2, 5), ids(1, 1, seed=3)
    cache = model(given, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = model(more.expand(2, -1), past_key_values=cache).logits
    want = model(torch.cat([given.flip(0), more.expand(2, -1)], 1)).logits[:, -1:]
    torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)
    with pytest.raises(TorchstoneError, match="holds 2 rows, and 3 rows were given"):
        model(ids(3, 1), past_key_values=cache)
    cache.reset()
    assert torch.equal(model(given, past_key_values=cache).logits, model(given, use_cache=True).logits)


def test_a_cache_grows_beyond_its_first_room() -> None:
    model = causal()
    model.config.name_or_path = ""
    given = ids(1, 300)
    cache = TorchstoneCache()
    model(given[:, :1], past_key_values=cache)
    first = cache.state.extent  # type: ignore[union-attr]
    last = model(given[:, 1:], past_key_values=cache).logits[:, -1]
    assert cache.state.extent > first  # type: ignore[union-attr]
    torch.testing.assert_close(last, model(given).logits[:, -1], atol=2e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- masks, positions


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["grouped-rotary", "window", "learned", "alibi"])
def test_logits_of_a_padded_row_equal_those_of_the_row_alone(name: str, side: str, cached: bool) -> None:
    model, given = causal(name), batch(name, side)
    out = model(**given, use_cache=cached).logits
    for row, tokens, mask in zip(out, given["input_ids"], given["attention_mask"].bool(), strict=True):
        torch.testing.assert_close(row[mask], model(tokens[mask][None]).logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_masked_columns_in_the_middle_are_left_out(cached: bool) -> None:
    model, given = causal(), ids(1, 6)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    out = model(given, attention_mask=mask, use_cache=cached).logits[mask.bool()]
    torch.testing.assert_close(out, model(given[mask.bool()][None]).logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("name", ["grouped-rotary", "window", "learned", "t5"])
def test_positions_that_restart_separate_documents(name: str, cached: bool) -> None:
    model, documents = causal(name), [ids(1, 4), ids(1, 6, seed=1), ids(1, 1, seed=2)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    cache = TorchstoneCache() if cached else None
    packed = model(torch.cat(documents, 1), position_ids=positions, past_key_values=cache).logits
    alone = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)
    if cached:  # what follows belongs to the last document
        more = ids(1, 1, seed=3)
        out = model(more, position_ids=torch.tensor([[1]]), past_key_values=cache).logits
        want = model(torch.cat([documents[-1], more], 1)).logits[:, -1:]
        torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_positions_that_start_later_are_taken_as_they_are(cached: bool) -> None:
    model, given = causal("learned"), ids(1, 4)
    cache = TorchstoneCache() if cached else None
    out = model(given, position_ids=torch.arange(3, 7)[None], past_key_values=cache).logits
    assert not torch.allclose(out, model(given).logits, atol=1e-2)
    table = run("learned").model().decoder.positions["learned"].weight
    looked_up = F.embedding(given, model.get_input_embeddings().weight) + table[3:7] - table[:4]
    torch.testing.assert_close(out, model(inputs_embeds=looked_up).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask: needs one number a column, shape \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"got \(2, 3\)"),
        ({"position_ids": torch.arange(3)[None]}, r"position_ids: has shape \(1, 3\), needs \(2, 4\)"),
        ({"token_type_ids": torch.ones(2, 4, dtype=torch.long)}, "this model has no token types"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "needs input_ids or inputs_embeds, got both"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TorchstoneError, match=said):
        causal()(ids(2, 4), **options)


def test_positions_and_lengths_beyond_the_table_are_refused() -> None:
    model = causal("learned")
    with pytest.raises(TorchstoneError, match="the model knows 64 positions"):
        model(ids(1, 4), position_ids=torch.arange(61, 65)[None])
    with pytest.raises(TorchstoneError, match="65 tokens: position learned knows 64 positions"):
        model(ids(1, 65), use_cache=True)


# ------------------------------------------------------------------------------------------------ losses, recordings


def test_the_causal_loss_is_shifted_ignores_minus_100_and_honours_a_count() -> None:
    model, given = causal("untied-softcap"), ids(2, 7)
    labels = given.clone()
    labels[0, :3] = -100
    out = model(given, labels=labels)
    log_probs = out.logits[:, :-1].log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]
    kept = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, -log_probs[kept].mean())
    counted = model(given, labels=labels, num_items_in_batch=40).loss
    torch.testing.assert_close(counted, -log_probs[kept].sum() / 40)


def test_the_masked_loss_is_not_shifted() -> None:
    model = AutoModelForMaskedLM.from_pretrained(run("masked").path)
    given = ids(2, 7)
    labels = torch.where(torch.arange(7) % 3 == 0, given, -100)
    out = model(given, labels=labels)
    want = -out.logits[:, ::3].log_softmax(-1).gather(-1, given[:, ::3, None]).mean()
    torch.testing.assert_close(out.loss, want)


def test_logits_to_keep_are_the_last_columns() -> None:
    model, given = causal(), batch()
    whole = model(**given, use_cache=True).logits
    assert torch.equal(model(**given, use_cache=True, logits_to_keep=2).logits, whole[:, -2:])


def test_hidden_states_are_the_stream_and_attentions_the_probabilities() -> None:
    model, given = causal(), ids(2, 5)
    out = model(given, output_hidden_states=True, output_attentions=True)
    names = ["decoder.embedding", "decoder.layers.0.x", "decoder.norm"]
    taps = Taps(record=[*names, "*.probs"])
    run("grouped-rotary").model()(given, taps=taps)
    for found, name in zip(out.hidden_states, names, strict=True):
        torch.testing.assert_close(found, taps.seen[name])
    assert [probs.shape for probs in out.attentions] == [(2, 4, 5, 5)] * 2
    torch.testing.assert_close(out.attentions[1], taps.seen["decoder.layers.1.attention.probs"])
    hidden = AutoModel.from_pretrained(run("grouped-rotary").path)(given).last_hidden_state
    torch.testing.assert_close(hidden, out.hidden_states[-1])


def test_hidden_states_of_padded_rows_stand_in_the_callers_columns() -> None:
    model, given = causal(), batch()
    mask = given["attention_mask"].bool()
    cached = model(**given, use_cache=True, output_hidden_states=True).hidden_states
    plain = model(**given, output_hidden_states=True).hidden_states
    for a, b in zip(cached, plain, strict=True):
        torch.testing.assert_close(a[mask], b[mask], atol=2e-4, rtol=1e-4)
    with pytest.raises(TorchstoneError, match="output_attentions: not for padded rows with a cache"):
        model(**given, use_cache=True, output_attentions=True)


def test_attentions_that_a_part_does_not_make_are_refused() -> None:
    model = causal()
    attention = model.decoder.layers[1].attention
    attend = attention.attend
    # as a kind without probabilities does
    attention.attend = lambda q, k, v, low, ctx, *rest: attend(q, k, v, low, replace(ctx, taps=None), *rest)
    with pytest.raises(
        TorchstoneError, match=r"output_attentions: this model has no decoder\.layers\.1\.attention\.probs"
    ):
        model(ids(1, 3), output_attentions=True)


# ------------------------------------------------------------------------------------------------- being an nn.Module


def test_recomputing_is_that_of_the_stacks_and_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = causal("dropout").train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.transformer.decoder.recompute and model.gradient_checkpointing
        torch.manual_seed(0)
        model(ids(2, 6), labels=ids(2, 6)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    with pytest.raises(TorchstoneError, match="gradient checkpointing: recomputes every layer"):
        model._set_gradient_checkpointing(every_n_layers=2)
    model.gradient_checkpointing_disable()
    assert not model.transformer.decoder.recompute
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_follows_torchs_seed_in_training_and_is_off_in_evaluation() -> None:
    model, given = causal("dropout"), ids(2, 6)
    assert torch.equal(model(given).logits, model(given).logits)
    model.train()
    torch.manual_seed(0)
    first, second = model(given).logits, model(given).logits
    torch.manual_seed(0)
    assert torch.equal(model(given).logits, first) and not torch.equal(first, second)


def test_a_copy_is_independent_and_a_replaced_module_is_used() -> None:
    model, given = causal(), ids(1, 4)
    twin, before = copy.deepcopy(model), model(given).logits
    with torch.no_grad():
        twin.embedding.weight.mul_(2.0)
    assert torch.equal(model(given).logits, before) and not torch.equal(twin(given).logits, before)
    model.embedding = twin.embedding
    other = copy.deepcopy(twin)
    other.decoder = model.decoder
    assert torch.equal(model(given).logits, other(given).logits)
    assert model.to(torch.float64)(given).logits.dtype == torch.float64


def test_the_vocabulary_keeps_its_size() -> None:
    model = causal()
    assert model.resize_token_embeddings(259) is model.get_input_embeddings()
    with pytest.raises(TorchstoneError, match="keeps its vocabulary of 259 ids, and 264 were asked for"):
        model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.get_output_embeddings().weight is model.embedding.weight
    untied = causal("untied-softcap")
    assert untied.get_output_embeddings() is untied.head.out


# ------------------------------------------------------------------------------------------------ loading and saving


@pytest.mark.parametrize("name", [*DECODERS, *STATES, "dropout"])
def test_a_decoder_loads_saves_and_loads_exactly(name: str, tmp_path: Path) -> None:
    model, given, ours = causal(name), ids(2, 5), run(name).model()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in ours.state_dict().items()
    }
    assert torch.equal(model(given).logits, ours(given).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(given).logits, model(given).logits)
    saved = RunFolder(tmp_path)
    assert saved.model_spec == run(name).model_spec
    assert torch.equal(saved.model()(given).logits, model(given).logits)


def test_an_encoder_loads_saves_and_loads_exactly(tmp_path: Path) -> None:
    model, given = AutoModelForMaskedLM.from_pretrained(run("masked").path), ids(2, 5)
    assert torch.equal(model(given).logits, run("masked").model()(given).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(RunFolder(tmp_path).model()(given).logits, model(given).logits)


def test_a_run_loads_in_another_precision() -> None:
    model = causal(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out = model.generate(**batch(), do_sample=False, max_new_tokens=3)
    assert out.shape[1] == batch()["input_ids"].shape[1] + 3


def test_first_values_are_those_of_a_training_with_torchs_seed() -> None:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run("t5").path))
    ours = build_model(run("t5").model_spec, 7)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_decoder_becomes_a_classifier_with_a_new_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(run("grouped-rotary").path, num_labels=3)
    given = batch()
    out = model(**given, labels=torch.tensor([0, 2, 1]))
    hidden = AutoModel.from_pretrained(run("grouped-rotary").path)(**given).last_hidden_state[:, -1]
    want = F.linear(hidden, model.head.out.weight, model.head.out.bias)
    torch.testing.assert_close(out.logits, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, F.cross_entropy(want, torch.tensor([0, 2, 1])), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3 and torch.equal(again(**given).logits, out.logits)
    assert RunFolder(tmp_path).model_spec.head.kind == "classification"  # type: ignore[attr-defined]
    fresh = build_model(again.config.model_spec, 3)
    assert torch.equal(again.head.out.weight, fresh.head.out.weight)  # type: ignore[union-attr]


def test_a_config_is_made_from_fields_of_a_recipe() -> None:
    config = TorchstoneConfig({**MODELS["grouped-rotary"], "vocabulary": 50})
    model = TorchstoneForCausalLM(config)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50, 32, 2)
    assert model(ids(1, 3) % 50).logits.shape == (1, 3, 50)


def copied(name: str, folder: Path, **changes: Any) -> Path:
    """The files of a run with changed fields of its config.json."""
    folder = folder / "run"
    shutil.copytree(run(name).path, folder, ignore=shutil.ignore_patterns("state", "plots"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": {"kind": "transformer", "widht": 32}}, r"config\.json.*no field 'widht'"),
        ({"spec": {"width": 32}}, "model.vocabulary: is required"),
        ({"format_version": 99}, "written in format 99"),
        ({"spec": None}, "TorchstoneConfig: needs spec"),
        (
            {"spec": {**MODELS["alibi"], "vocabulary": 9, "encoder": {"depth": 1}}},
            "an encoder-decoder has no Hugging Face class",
        ),
        (
            {"spec": {"embedding": "patch", "causal": False, "position": "learned", "head": "classification"}},
            "embedding patch: its inputs are no token ids",
        ),
    ],
)
def test_a_config_that_is_no_language_model_is_one_sentence(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(copied("grouped-rotary", tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_labels_of_another_number_than_the_heads_classes_are_refused() -> None:
    spec = {**MODELS["grouped-rotary"], "vocabulary": 50, "head": {"kind": "classification", "classes": 2}}
    with pytest.raises(TorchstoneError, match="id2label: 3 labels for a head of 2 classes"):
        TorchstoneConfig(spec, id2label={0: "a", 1: "b", 2: "c"})


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    spec = {**run("grouped-rotary").model_spec.dump(), "depth": 3}
    folder = copied("grouped-rotary", tmp_path, spec=spec)
    with pytest.raises(TorchstoneError, match=r"has no tensor decoder\.layers\.2\."):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_wrong_class_says_which_is_right() -> None:
    with pytest.raises(TorchstoneError, match="AutoModelForMaskedLM takes it"):
        AutoModelForCausalLM.from_pretrained(run("masked").path)
    with pytest.raises(TorchstoneError, match="AutoModelForCausalLM takes it"):
        AutoModelForMaskedLM.from_pretrained(run("alibi").path)


@pytest.mark.parametrize(
    ("found", "said"),
    [("None", "needs transformers 5; pip install"), ("SimpleNamespace(__version__='4.57.1')", "5, found 4.57.1")],
)
def test_without_a_fitting_transformers_the_import_is_one_sentence(found: str, said: str) -> None:
    code = f"""
import sys
from types import SimpleNamespace
sys.modules["transformers"] = {found}
try:
    import torchstone.interop.hf
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TorchstoneError torchstone.interop.hf: needs transformers 5") and said in done.stdout


# -------------------------------------------------------------------------------------------------------- pipelines


def test_pipeline_of_text_generation_writes_what_the_engine_writes() -> None:
    pipe = transformers.pipeline("text-generation", model=str(run("alibi").path))
    pipe.tokenizer.padding_side = "left"
    said = pipe(TEXTS, do_sample=False, max_new_tokens=6, batch_size=3, return_full_text=False)
    engine = Engine(run("alibi").model(), run("alibi").tokenizer())
    done = engine.generate(TEXTS, Sampling(temperature=0, max_new_tokens=6))
    for found, completion in zip(said, done, strict=True):
        want = pipe.tokenizer.decode([*completion.ids], skip_special_tokens=True)
        assert found[0]["generated_text"] == want


def test_pipeline_of_fill_mask_gives_the_most_probable_tokens() -> None:
    pipe = transformers.pipeline("fill-mask", model=str(run("masked").path))
    best = pipe(f"abc{pipe.tokenizer.mask_token}d", top_k=2)
    given = pipe.tokenizer(f"abc{pipe.tokenizer.mask_token}d", return_tensors="pt")["input_ids"]
    at = given[0].tolist().index(pipe.tokenizer.mask_token_id)
    probs = run("masked").model()(given).logits[0, at].softmax(-1).topk(2)
    assert [found["token"] for found in best] == probs.indices.tolist()
    assert [found["score"] for found in best] == pytest.approx(probs.values.tolist(), rel=1e-4)


def test_pipeline_of_text_classification_gives_the_heads_probabilities(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        run("masked").path, num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run("masked").path).save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path))
    found = {entry["label"]: entry["score"] for entry in pipe("abc de", top_k=None)}
    given = pipe.tokenizer("abc de", return_tensors="pt")["input_ids"]
    want = RunFolder(tmp_path).model()(given).logits[0].softmax(-1).tolist()
    assert [found[f"LABEL_{n}"] for n in range(3)] == pytest.approx(want, rel=1e-4)
