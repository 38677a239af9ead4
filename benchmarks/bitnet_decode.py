"""Greedy decoding of one row from packed weights: BitLinear beside a plain model of the same size in bfloat16.

    python benchmarks/bitnet_decode.py [--rounds 10] [--threads 1] [--json FILE]

4 layers, width 1,536, 12 heads, SwiGLU of 4,096, vocabulary 4,096: 113 million weights in projections. All are compiled
by the engine, and hold what is no projection in bfloat16. The peers, each in a process of its own, in turn:

ternary   packed, 2 bits a weight
binary    packed, 1 bit a weight
dense     a plain model in bfloat16

A unit of work is one call that writes 16 tokens after a prompt of one. The ratio is dense's time over another's per
round, its median with a bootstrap 95 % interval. Bytes are those of weights and buffers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from _rounds import interleave, machine, ratio, serve

WIDTH, DEPTH, HEADS, HIDDEN, VOCABULARY, NEW = 1536, 4, 12, 4096, 4096, 16
PEERS = ("ternary", "binary", "dense")


def peer(name: str, threads: int) -> None:
    """Serve one peer."""
    import torch

    from torchstone.generate import Engine, Sampling
    from torchstone.model.linear.bitlinear import PackedBitLinear
    from torchstone.model.transformer import TransformerSpec
    from torchstone.spec import validate
    from torchstone.train.run import build_model

    torch.set_num_threads(threads)
    packed = {"kind": "bitlinear", "weights": name, "packed": True}
    fields = {
        "width": WIDTH,
        "depth": DEPTH,
        "vocabulary": VOCABULARY,
        "attention": {"heads": HEADS},
        "ffn": {"kind": "swiglu", "hidden": HIDDEN},
        "linear": packed if name in ("ternary", "binary") else "dense",
    }
    model = build_model(validate(TransformerSpec, fields), 0).eval()
    for module in model.modules():
        if isinstance(module, PackedBitLinear):
            module.load_state_dict(module.of(0.02 * torch.randn(module.out_features, module.in_features)))
    model = model.bfloat16()
    engine = Engine(model, compile="on")
    held = sum(tensor.nbytes for tensor in model.state_dict().values())

    def work() -> dict[str, float]:
        began = time.perf_counter()
        engine.generate([[1]], Sampling(temperature=0, max_new_tokens=NEW))
        return {"seconds": time.perf_counter() - began, "bytes": held}

    serve(work)


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer")
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.threads)
        return
    results = interleave(__file__, PEERS, options.rounds, options.threads)
    seconds = {who: [round_["seconds"] for round_ in results[who]] for who in PEERS}
    ratios = {who: ratio(seconds[who], seconds["dense"]) for who in PEERS if who != "dense"}
    held = {who: results[who][-1]["bytes"] for who in PEERS}
    print("            ms a token   MiB   faster than dense in bfloat16")
    for who in PEERS:
        line = f"{who:<12}{1000 * statistics.median(seconds[who]) / NEW:10.2f}{held[who] / 2**20:6.0f}"
        found = ratios.get(who)
        print(line + (f"   {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""))
    if options.json:
        report = {"machine": machine(options.threads), "seconds": seconds, "bytes": held, "ratio": ratios}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
