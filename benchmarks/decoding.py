"""Greedy decoding speed beside Hugging Face transformers: same architecture, precision, prompts, threads, machine.

    python benchmarks/decoding.py [--device cpu|cuda] [--rounds 20] [--cases bf16-1,fp32-1,...] [--json FILE]

6 layers, width 384, 6 heads, SwiGLU of 1,024, vocabulary 4,096, tied head; prompts of 32 tokens, 128 new tokens. A case
is a precision and a batch. The peers, each in a process of its own, in turn:

ours      Torchstone's engine, compiled
eager     Torchstone's engine, not compiled
theirs    transformers' LlamaForCausalLM.generate as it comes
static    the same with a static cache and its compiled forward
linears   nothing but the products with weight matrices that 128 steps need, compiled with packed weights: the ceiling

A unit of work is one call that writes 128 tokens a row, prompt included. The ratio is theirs / ours per round, its
median with a bootstrap 95 % interval; the lower end counts. The share is linears / ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _rounds import finish, interleave, machine, ratio, serve

WIDTH, DEPTH, HEADS, HIDDEN, VOCABULARY, PROMPT, NEW = 384, 6, 6, 1024, 4096, 32, 128
PEERS = ("ours", "eager", "theirs", "static", "linears")


def prompts(rows: int) -> list[list[int]]:
    """The same random prompts for every peer."""
    import torch

    return torch.randint(VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def ours(dtype: Any, rows: int, compile: str, device: str) -> Callable[[], Any]:
    """A function that generates with Torchstone's engine."""
    from torchstone.generate import Engine, Sampling
    from torchstone.model.transformer import TransformerSpec
    from torchstone.spec import validate
    from torchstone.train.run import build_model

    spec = {
        "width": WIDTH,
        "depth": DEPTH,
        "vocabulary": VOCABULARY,
        "attention": {"kind": "softmax", "heads": HEADS},
        "ffn": {"kind": "swiglu", "hidden": HIDDEN},
    }
    model = build_model(validate(TransformerSpec, spec), 0)
    engine = Engine(model, dtype=dtype, compile=compile, device=device)  # type: ignore[arg-type]
    batch, sampling = prompts(rows), Sampling(temperature=0, max_new_tokens=NEW)

    def work() -> None:
        assert all(len(done.ids) == NEW for done in engine.generate(batch, sampling))

    return work


def theirs(dtype: Any, rows: int, static: bool, device: str) -> Callable[[], Any]:
    """A function that generates with transformers."""
    import torch
    from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    ids = torch.tensor(prompts(rows), device=device)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
    }
    if static:
        compile_config = CompileConfig(mode="default", dynamic=False)
        compile_config._compile_all_devices = True  # without it, it compiles on accelerators only
        arguments |= {"cache_implementation": "static", "compile_config": compile_config}

    def work() -> None:
        assert model.generate(ids, **arguments).shape == (rows, PROMPT + NEW)

    return work


def linears(dtype: Any, rows: int, device: str) -> Callable[[], Any]:
    """A function that does the matrix products of `NEW` steps and nothing else."""
    import torch
    import torch._inductor.config
    from torch import nn

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)]
            shapes = [*(layer * DEPTH), (WIDTH, VOCABULARY)]
            self.each = nn.ModuleList(nn.Linear(a, b, bias=False, dtype=dtype) for a, b in shapes)

        def forward(self, x_of: dict[int, torch.Tensor]) -> list[torch.Tensor]:
            return [linear(x_of[linear.in_features]) for linear in self.each]

    torch._inductor.config.freezing = True
    products = torch.compile(
        Products().eval().to(device), dynamic=False, options={"guard_filter_fn": lambda guards: [False] * len(guards)}
    )
    x_of = {size: torch.randn(rows, size, dtype=dtype, device=device) for size in (WIDTH, HIDDEN)}

    def work() -> None:
        with torch.no_grad():
            for _ in range(NEW):
                products(x_of)

    return work


def peer(name: str, threads: int, device: str) -> None:
    """Serve one peer of one case."""
    import torch

    torch.set_num_threads(threads)
    who, precision, rows = name.split("-")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if who in ("ours", "eager"):
        work = ours(dtype, int(rows), "on" if who == "ours" else "off", device)
    elif who == "linears":
        work = linears(dtype, int(rows), device)
    else:
        work = theirs(dtype, int(rows), who == "static", device)
    for _ in range(2):
        work()

    def timed() -> dict[str, float]:
        began = time.perf_counter()
        work()
        finish(device)
        return {"seconds": time.perf_counter() - began}

    serve(timed)


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="bf16-1,fp32-1,bf16-16,fp32-16")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer")
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.threads, options.device)
        return
    who = options.peers.split(",")
    report: dict[str, Any] = {"machine": machine(options.threads, options.device), "new_tokens": NEW, "prompt": PROMPT}
    print("tokens/s, medians".ljust(18) + "".join(f"{name:>9}" for name in who))
    for case in options.cases.split(","):
        rows = int(case.split("-")[1])
        names, arguments = [f"{name}-{case}" for name in who], ("--device", options.device)
        results = interleave(__file__, names, options.rounds, options.threads, arguments=arguments)
        seconds = {name: [result["seconds"] for result in results[f"{name}-{case}"]] for name in who}
        rate = {name: rows * NEW / statistics.median(values) for name, values in seconds.items()}
        ratios = {name: ratio(seconds["ours"], values) for name, values in seconds.items() if name != "ours"}
        report[case] = {"seconds": seconds, "tokens_per_second": rate, "ratio_to_ours": ratios}
        print(case.ljust(18) + "".join(f"{rate[name]:9,.0f}" for name in who))
        for name, found in ratios.items():
            text = "share of the linears' rate" if name == "linears" else f"ours over {name}"
            print(f"    {text:<28} {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
