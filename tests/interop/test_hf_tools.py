"""Runs inside Trainer, TRL, PEFT and lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_runs import run

from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.train.run import RunFolder

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import torchstone.interop.hf  # noqa: F401  (registers the classes)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def causal(name: str = "grouped-rotary") -> Any:
    return AutoModelForCausalLM.from_pretrained(run(name).path)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(run("grouped-rotary").path)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(seed))


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }


def logged(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------------------------------------------------- trainer


def plain_loop(batches: list[list[torch.Tensor]]) -> list[float]:
    """Losses of AdamW steps on the run itself, each over all shifted labels of its examples; gradients clipped at 1."""
    model = run("grouped-rotary").model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for batch in batches:
        logits = [model(example[None]).logits[0, :-1] for example in batch]
        loss = F.cross_entropy(torch.cat(logits), torch.cat([example[1:] for example in batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_three_steps_of_trainer_are_three_steps_of_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    # lengths differ: only a mean over the tokens of both micro-batches gives the loss of the whole batch
    examples = [ids(4 + 2 * n, seed=n) for n in range(6)]
    trainer = Trainer(
        model=causal(),
        args=TrainingArguments(
            **arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, adam_epsilon=1e-8)
        ),
        # transformers 5.0 counts the first label too, which is never predicted; so there is none
        train_dataset=[{"input_ids": row, "labels": F.pad(row[1:], (1, 0), value=-100)} for row in examples],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(6))
    trainer.train()
    assert logged(trainer) == pytest.approx(plain_loop([examples[:2], examples[2:4], examples[4:]]), abs=2e-4)


# -------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped-rotary", "untied-softcap"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_three_sft_steps_of_trl_start_at_the_models_own_loss(name: str, packed: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    prompts, completions = ["ab", "g", "jkl", "r"], ["c def", "hi", " mno pq", "st uv"]
    model, end = causal(name), tokenizer()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **arguments(tmp_path, per_device_train_batch_size=4, bf16=False, gradient_checkpointing=packed),
            max_length=None,
            padding_free=packed,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "completion": completions}),
        processing_class=end,
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    total = count = 0.0
    ours = run(name).model()
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([*end(prompt + completion)["input_ids"], end.eos_token_id])
        logits = ours(tokens[None]).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, tokens[len(prompt) :], reduction="sum").item()
        count += len(logits)
    losses = logged(trainer)
    assert losses[0] == pytest.approx(total / count, abs=2e-3)
    assert len(losses) == 3 and losses[2] < losses[0]
    assert not torch.equal(model.state_dict()["embedding.weight"], before["embedding.weight"])


@pytest.mark.slow
def test_trl_trains_an_adapter_of_peft_alone(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    trainer = trl.SFTTrainer(
        model=causal(),
        args=trl.SFTConfig(**arguments(tmp_path), bf16=False),
        train_dataset=datasets.Dataset.from_dict({"text": ["abc def", "ghi", "jkl mno pq", "rst uv"]}),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    losses, ours = logged(trainer), run("grouped-rotary").model().state_dict()
    assert len(losses) == 3 and losses[2] < losses[0]
    base = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(base[name], value) for name, value in ours.items())


# ------------------------------------------------------------------------------------------------------------- PEFT


def adapted(name: str = "grouped-rotary", **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear", **options)
    base = causal(name)  # the first of a name draws from torch's generator, so the seed comes after it
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


def trained(model: Any) -> Any:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(ids(2, 8, seed=step), labels=ids(2, 8, seed=step)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped-rotary", "untied-softcap"])
def test_a_lora_of_peft_is_trained_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    model, given = adapted(name), ids(2, 8, seed=9)
    names = {key.rpartition(".lora_A")[0].rpartition(".")[2] for key, _ in model.named_parameters() if "lora_A" in key}
    assert names == {"qkv", "out", "up", "down"}
    assert not [key for key, _ in model.named_parameters() if "lora" in key and "head" in key]
    before = model(given).logits
    after = trained(model)(given).logits
    assert (after - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    import peft

    again = peft.PeftModel.from_pretrained(causal(name), tmp_path).eval()
    assert torch.equal(again(given).logits, after)
    tokens = again.generate(input_ids=given, do_sample=False, max_new_tokens=5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(given).logits, after, atol=2e-4, rtol=1e-4)
    assert torch.equal(merged.generate(given, do_sample=False, max_new_tokens=5), tokens)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(RunFolder(tmp_path / "merged").model()(given).logits, merged(given).logits)


@pytest.mark.slow
def test_a_lora_of_peft_trains_with_recomputing() -> None:
    losses = []
    for recompute in (False, True):
        model = adapted().train()
        if recompute:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable()
        loss = model(ids(2, 8), labels=ids(2, 8)).loss
        loss.backward()
        losses.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert losses[0]
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_an_adapter_on_the_heads_matrix_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["out"])
    with pytest.raises(TorchstoneError, match=r"head\.out: an adapter there has no effect"):
        peft.get_peft_model(causal("untied-softcap"), config)(ids(1, 3))


@pytest.mark.slow
def test_a_head_that_peft_trains_whole_is_used_and_saved(tmp_path: Path) -> None:
    model, given = adapted("untied-softcap", modules_to_save=["head"]), ids(2, 8, seed=9)
    after = trained(model)(given).logits
    model.save_pretrained(tmp_path)
    import peft

    again = peft.PeftModel.from_pretrained(causal("untied-softcap"), tmp_path).eval()
    assert torch.equal(again(given).logits, after)
    ours = run("untied-softcap").model().head.out.weight
    assert not torch.equal(again.base_model.model.head.modules_to_save["default"].out.weight, ours)


# ---------------------------------------------------------------------------------------------------------- lm-eval


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{more}
"""


QUESTIONS, CHOICES = ["abc", "f", "ghi jk"], [" de", " xyz", "q"]


def harness_tasks(folder: Path) -> Any:
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    rows = [{"question": question, "choices": CHOICES, "answer": n} for n, question in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, more in (
        ("choose", "multiple_choice", 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'),
        (
            "write",
            "generate_until",
            "generation_kwargs: {until: [zzzz], max_gen_toks: 4, do_sample: false}\n"
            "metric_list: [{metric: exact_match}]",
        ),
    ):
        text = TASK.format(name=name, kind=kind, data=folder / "rows.jsonl", more=more)
        (folder / f"{name}.yaml").write_text(text)
    return tasks.TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.slow
def test_lm_evaluation_harness_scores_a_run_as_the_run_itself_does(tmp_path: Path, monkeypatch: Any) -> None:
    manager = harness_tasks(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run("grouped-rotary").path), "dtype": "float32"},
        tasks=["choose", "write"],
        task_manager=manager,
        device="cpu",
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )
    end, ours = tokenizer(), run("grouped-rotary").model()
    right = 0
    for sample in results["samples"]["choose"]:
        prompt, scores = end(sample["doc"]["question"])["input_ids"], []
        for (found, _), choice in zip((resp[0] for resp in sample["resps"]), CHOICES, strict=True):
            target = end(choice)["input_ids"]
            log_probs = ours(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[len(prompt) - 1 + n, token].item() for n, token in enumerate(target)))
            assert float(found) == pytest.approx(scores[-1], abs=1e-3)
        right += scores.index(max(scores)) == sample["doc"]["answer"]
    assert results["results"]["choose"]["acc,none"] == pytest.approx(right / 3)
    engine = Engine(ours, run("grouped-rotary").tokenizer())
    for sample in results["samples"]["write"]:
        done = engine.generate([sample["doc"]["question"]], Sampling(temperature=0, max_new_tokens=4))[0]
        assert sample["resps"][0][0] == end.decode(done.ids, skip_special_tokens=True)
