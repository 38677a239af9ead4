"""Worker processes: each takes one request at a time, and one that dies takes only its own request with it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torchstone.errors import TorchstoneError

__all__ = ["Answer", "run_all", "run_on_ray"]

Answer = dict[str, Any]

_COMMAND = [sys.executable, "-c", "from torchstone.compare.cell import serve; serve()"]


class _Worker:
    """A process that runs `torchstone.compare.cell.serve`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, request: Mapping[str, Any]) -> Answer | None:
        """The answer; None if the process died over it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, OSError):
            line = ""
        return json.loads(line) if line else None

    def close(self) -> int:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        return self.process.wait()


def run_all(
    requests: Sequence[Mapping[str, Any]], jobs: int = 1, fresh: bool = False, devices: Sequence[str] = ()
) -> Iterator[tuple[int, Answer]]:
    """(number of the request, its answer), in the order in which they are done.

    A request over which a worker dies is tried once more, by a new worker; then its answer says so.

    Args:
        requests: for `torchstone.compare.cell`.
        jobs: processes at once.
        fresh: a new process for every request, so that memory is measured from a clean start.
        devices: values of CUDA_VISIBLE_DEVICES, shared out among the workers.
    """
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer] | BaseException] = queue.SimpleQueue()
    for number in range(len(requests)):
        todo.put(number)
    stop = threading.Event()
    live: set[_Worker] = set()

    def serve(job: int) -> None:
        environment = {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if devices else {}
        worker: _Worker | None = None
        try:
            while not stop.is_set():
                try:
                    number = todo.get_nowait()
                except queue.Empty:
                    return
                assert number is not None
                answer: Answer | None = None
                for _ in range(2):
                    if worker is None:
                        worker = _Worker(environment)
                        live.add(worker)
                    answer = worker.ask(requests[number])
                    if answer is not None or stop.is_set():
                        break
                    live.discard(worker)
                    status, worker = worker.close(), None
                    reason = f"its process died twice (status {status})"
                    answer_if_dead = {"status": "memory" if status == -9 else "died", "reason": reason}
                done.put((number, answer if answer is not None else answer_if_dead))
                if fresh and worker is not None:
                    live.discard(worker)
                    worker.close()
                    worker = None
        except BaseException as error:
            done.put(error)
        finally:
            if worker is not None:
                live.discard(worker)
                worker.close()

    threads = [threading.Thread(target=serve, args=(job,), daemon=True) for job in range(min(jobs, len(requests)))]
    for thread in threads:
        thread.start()
    try:
        for _ in requests:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        for worker in list(live):
            worker.process.terminate()  # a cell under way writes a checkpoint and leaves
        for thread in threads:
            thread.join(timeout=60)


def run_on_ray(requests: Sequence[Mapping[str, Any]], threads: int, gpus: int = 0) -> Iterator[tuple[int, Answer]]:
    """As `run_all`, by tasks of a Ray cluster (the one that RAY_ADDRESS names, else this machine), whose nodes must see
    the comparison's folder.

    Args:
        requests: for `torchstone.compare.cell`.
        threads: processor cores that a cell takes.
        gpus: accelerators that a cell takes.

    Raises:
        TorchstoneError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise TorchstoneError("compare: --ray needs the extra `dist`: pip install 'torchstone[dist]'") from None
    from torchstone.compare.cell import answer

    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(answer)
        waiting = {task.remote(dict(request)): number for number, request in enumerate(requests)}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(ready)
            try:
                yield number, ray.get(ready)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0][:300]
                yield number, {"status": "died", "reason": f"its task failed twice ({reason})"}
    finally:
        if mine:
            ray.shutdown()
