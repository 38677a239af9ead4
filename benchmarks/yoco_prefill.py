"""Reading a prompt: a YOCO decoder beside a plain one of the same size, time and memory.

    python benchmarks/yoco_prefill.py [--lengths 8192,32768] [--rounds 5] [--json FILE]

4 layers, width 256, 4 heads, SwiGLU, vocabulary 4,096, float32; one row, read in chunks of 512 tokens as the engine
does, up to the logits of the next token. The peers, each in a process of its own, in turn:

gated    YOCO, gated retention in its first half
window   YOCO, a window of 1,024 in its first half
whole    as gated, without the early exit: all tokens go through all layers, and no logits are made
plain    a plain decoder with softmax attention in every layer

A unit of work is one prompt read. The ratio is the others' time over gated's per round, its median with a bootstrap
95 % interval. State is the bytes of decode state at the end, peak the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from _rounds import interleave, machine, ratio, serve

WIDTH, DEPTH, HEADS, VOCABULARY, WINDOW, CHUNK = 256, 4, 4, 4096, 1024, 512
PEERS = ("gated", "window", "whole", "plain")
FIRST: dict[str, dict[str, Any]] = {
    "gated": {"kind": "gated_retention", "heads": HEADS},
    "whole": {"kind": "gated_retention", "heads": HEADS},
    "window": {"kind": "softmax", "heads": HEADS, "window": WINDOW},
}


def peer(name: str, threads: int) -> None:
    """Serve one peer at one length."""
    import torch

    from torchstone.model.transformer import TransformerSpec
    from torchstone.spec import validate
    from torchstone.train.run import build_model

    torch.set_num_threads(threads)
    who, length = name.split("-")
    fields = {
        "width": WIDTH,
        "depth": DEPTH,
        "vocabulary": VOCABULARY,
        "attention": {"kind": "softmax", "heads": HEADS},
        "stack": "plain" if who == "plain" else {"kind": "yoco", "self_attention": FIRST[who]},
    }
    model: Any = build_model(validate(TransformerSpec, fields), 0)
    ids = torch.randint(VOCABULARY, (1, int(length)), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def work() -> dict[str, float]:
        began = time.perf_counter()
        state = model.state(1, ids.shape[1])
        for at in range(0, ids.shape[1], CHUNK):
            model(ids[:, at : at + CHUNK], state=state, outputs="none" if who == "whole" else "last")
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": seconds, "state": state.bytes(), "peak": peak}

    serve(work)


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer")
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.threads)
        return
    report: dict[str, Any] = {"machine": machine(options.threads)}
    for length in options.lengths.split(","):
        names = [f"{who}-{length}" for who in PEERS]
        results = interleave(__file__, names, options.rounds, options.threads, warmup=1)
        seconds = {who: [round_["seconds"] for round_ in results[f"{who}-{length}"]] for who in PEERS}
        last = {who: results[f"{who}-{length}"][-1] for who in PEERS}
        ratios = {who: ratio(seconds["gated"], seconds[who]) for who in PEERS if who != "gated"}
        report[length] = {
            "seconds": seconds,
            "ratio_to_gated": ratios,
            "state_bytes": {who: last[who]["state"] for who in PEERS},
            "peak_bytes": {who: last[who]["peak"] for who in PEERS},
        }
        print(f"{int(length):,} tokens".ljust(16) + "seconds   state MiB   peak MiB   time over gated")
        for who in PEERS:
            line = f"    {who:<10}{statistics.median(seconds[who]):9.3f}"
            line += f"{last[who]['state'] / 2**20:12.2f}{last[who]['peak'] / 2**20:11.0f}"
            found = ratios.get(who)
            print(line + (f"   {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
