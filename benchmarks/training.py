"""Training speed beside Hugging Face transformers: same architecture, precision, batch, threads, machine.

    python benchmarks/training.py [--shape small|base] [--device cpu|cuda] [--rounds 20] [--json FILE]

`small` is 6 layers, width 384, 6 heads, SwiGLU of 1,024, vocabulary 4,096, 8 x 256 tokens; `base` is 12 layers, width
768, 12 heads, SwiGLU of 2,048, vocabulary 32,000, 16 x 1,024 tokens. Tied head; bf16 products over float32 master
weights, AdamW, clipping at 1. Eager against eager and compiled against compiled; each figure is seconds of one
optimiser step. Theirs is LlamaForCausalLM with its default attention (SDPA); its compiled form compiles the model as a
whole, which is what its users do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from _rounds import finish, interleave, machine, ratio, serve


class Shape(NamedTuple):
    """Sizes of the model and of a batch."""

    width: int
    depth: int
    heads: int
    hidden: int
    vocabulary: int
    rows: int
    length: int
    steps: int  # that a round takes


SHAPES = {"small": Shape(384, 6, 6, 1024, 4096, 8, 256, 2), "base": Shape(768, 12, 12, 2048, 32000, 16, 1024, 10)}


def ours(compiled: bool, shape: Shape, device: str) -> Any:
    """A function that takes one step of Torchstone's engine."""
    import torch

    from torchstone.objectives import Facts
    from torchstone.recipe import load_recipe
    from torchstone.train.engine import Source, Trainer
    from torchstone.train.run import build_model
    from torchstone.train.training import compile_model

    recipe = load_recipe(
        {
            "model": {
                "width": shape.width,
                "depth": shape.depth,
                "vocabulary": shape.vocabulary,
                "context": shape.length,
                "attention": {"kind": "softmax", "heads": shape.heads},
                "ffn": {"kind": "swiglu", "hidden": shape.hidden},
            },
            "data": {"kind": "text", "block": shape.length},
            "optimizer": {"kind": "adamw", "betas": [0.9, 0.95]},
            "trainer": {"steps": 1000, "batch": shape.rows, "precision": "bf16", "clip": 1.0},
        }
    )

    class Random:
        bytes, tokens, block = 1, 1, shape.length

        def batch(self, key: Any, step: int, size: int, *rest: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(shape.vocabulary, (size, shape.length + 1), generator=key.fold(step).generator())
            return {"ids": ids[:, :-1], "next": ids[:, 1:]}

    model = build_model(recipe.model, 0).to(device)
    trainer = Trainer(
        model,
        recipe.objective.build(Facts()),
        Source(Random()),
        recipe.optimizer,
        recipe.schedule,
        recipe.trainer,
        device=torch.device(device),
        quiet=True,
    )
    if compiled:
        compile_model(model)
    return trainer.train_step


def theirs(compiled: bool, shape: Shape, device: str) -> Any:
    """A function that takes one step of a plain loop over transformers' model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.length,
            tie_word_embeddings=True,
        )
    ).to(device)
    model.train()
    forward = torch.compile(model) if compiled else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), generator=generator).to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def peer(name: str, threads: int, shape: Shape, device: str) -> None:
    """Serve one peer."""
    import torch

    torch.set_num_threads(threads)
    who, mode = name.split("-")
    step = (ours if who == "ours" else theirs)(mode == "compiled", shape, device)
    step()

    def work() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(shape.steps):
            step()
        finish(device)
        return {"seconds": (time.perf_counter() - began) / shape.steps}

    serve(work)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer")
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], options.device
    if options.peer:
        peer(options.peer, options.threads, shape, device)
        return
    tokens, arguments = shape.rows * shape.length, ("--shape", options.shape, "--device", device)
    report: dict[str, Any] = {"machine": machine(options.threads, device), **shape._asdict(), "tokens_per_step": tokens}
    for mode in options.modes.split(","):
        names = [f"ours-{mode}", f"theirs-{mode}"]
        results = interleave(__file__, names, options.rounds, options.threads, arguments=arguments)
        seconds = {name: [result["seconds"] for result in results[name]] for name in names}
        report[mode] = {"seconds": seconds, "ratio": ratio(seconds[names[0]], seconds[names[1]])}
        median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
        low, high = report[mode]["ratio"]["low"], report[mode]["ratio"]["high"]
        rates = {name: tokens / value for name, value in median.items()}
        print(
            f"{mode:<9} ours {rates[names[0]]:7,.0f} tok/s   theirs {rates[names[1]]:7,.0f} tok/s   "
            f"ratio {report[mode]['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
