"""Side-by-side timing: each peer in a process of its own, rounds interleaved, the median ratio with an interval.

A peer is a script that, started with ``--peer NAME``, sets itself up, warms up, prints ``ready``, and then for every
line on its standard input does one unit of work and prints a JSON object {"seconds": ..., ...}. Only one peer works at
a time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["finish", "interleave", "machine", "ratio", "serve"]


def serve(work: Callable[[], Mapping[str, Any]]) -> None:
    """The peer's side: one unit of work a line, until standard input ends."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


class _Peer:
    def __init__(self, script: str, name: str, threads: int, arguments: Sequence[str] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, script, "--peer", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name = name
        while (line := self._line()) != "ready":  # whatever a library prints while it sets up
            print(f"[{name}] {line}", file=sys.stderr)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"peer {self.name} ended with status {self.process.wait()}")
        return line.strip()

    def work(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def interleave(
    script: str, names: Sequence[str], rounds: int, threads: int, warmup: int = 2, arguments: Sequence[str] = ()
) -> dict[str, list[dict]]:
    """`rounds` results of every peer, in turn: A B C, A B C, ... All peers are up and warm before the first round."""
    peers = [_Peer(script, name, threads, arguments) for name in names]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for peer in peers:
            result = peer.work()
            if number >= 0:
                results[peer.name].append(result)
        print(f"round {number + 1}/{rounds}" if number >= 0 else "warm-up", file=sys.stderr, flush=True)
    for peer in peers:
        peer.close()
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """Median over rounds of theirs / ours (seconds: above 1 means we are faster), with a bootstrap 95 % interval."""
    each = np.asarray(theirs) / np.asarray(ours)
    picks = np.random.default_rng(0).integers(0, len(each), (draws, len(each)))
    low, high = np.percentile(np.median(each[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(each)), "low": float(low), "high": float(high), "rounds": len(each)}


def finish(device: str) -> None:
    """Wait until a device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
