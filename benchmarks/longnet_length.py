"""Time per token of dilated attention against the length of the sequence: is it flat?

    python benchmarks/longnet_length.py [--lengths 16384,32768,...] [--rounds 5] [--width 192] [--dense] [--json FILE]

One layer of LongNet's published schedule (segments 2,048 to 32,768, dilations 1 to 12, 12 heads, causal), width 192,
one row, float32, one thread. Each length runs in a process of its own: a forward without gradients, and a forward with
its backward. "Flat" means that the slowest length takes at most 1.3 times as long a token as the fastest. ``--dense``
times full attention beside it, up to 32,768 tokens. Memory is the process's peak less what it held before the layer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _rounds import machine

HEADS, FLAT, DENSE_UP_TO = 12, 1.3, 32_768
LENGTHS = [2**n for n in range(14, 20)]


def measure(kind: str, length: int, width: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round, and the peak of memory before and after, in bytes."""
    import torch

    from torchstone.model.site import Site, initialise
    from torchstone.spec import resolve

    torch.set_num_threads(1)
    layer = initialise(resolve("attention", kind)(heads=HEADS).build(Site(width=width)), 0)  # type: ignore[attr-defined]
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def training() -> None:
        layer(x)[0].square().mean().backward()

    found: dict[str, Any] = {"kind": kind, "length": length, "before": before}
    for name, work in (("forward", forward), ("training", training)):
        seconds = []
        for number in range(-1, rounds):
            began = time.perf_counter()
            work()
            if number >= 0:
                seconds.append(time.perf_counter() - began)
        found[name] = seconds
        found[f"{name}_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def peer(kind: str, length: int, width: int, rounds: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--peer", kind, "--lengths", str(length)]
    command += ["--width", str(width), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="numbers of tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=16 * HEADS)
    parser.add_argument("--dense", action="store_true", help="time full attention too")
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    if options.peer:
        print(json.dumps(measure(options.peer, lengths[0], options.width, options.rounds)))
        return
    rows = [peer("dilated", length, options.width, options.rounds) for length in lengths]
    if options.dense:
        dense = [length for length in lengths if length <= DENSE_UP_TO]
        rows += [peer("softmax", length, options.width, options.rounds) for length in dense]
    for row in rows:
        line = f"{row['kind']:8} {row['length']:8,} tokens"
        for name in ("forward", "training"):
            row[f"{name}_us_per_token"] = 1e6 * statistics.median(row[name]) / row["length"]
            line += f"   {name} {row[f'{name}_us_per_token']:7.2f} us a token"
        print(f"{line}   {(row['training_peak'] - row['before']) / row['length'] / 1024:6.1f} KiB a token")
    verdict = {}
    for name in ("forward", "training"):
        each = [row[f"{name}_us_per_token"] for row in rows if row["kind"] == "dilated"]
        verdict[name] = max(each) / min(each)
        print(f"{name}: slowest / fastest {verdict[name]:.2f}, {'flat' if verdict[name] <= FLAT else 'not flat'}")
    if options.json:
        data = {"machine": machine(1), "width": options.width, "rows": rows, "slowest_over_fastest": verdict}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
