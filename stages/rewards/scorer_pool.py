"""Processes that score texts under a limit of time and memory, and are replaced when they die."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from schemas.base import UserError
from stages import heartbeat

# Reading the libraries takes seconds, and more on a busy machine.
_START_SECONDS = 300.0
# Processor time is limited by the kernel; this is how much more the clock may show before an item
# that does not even compute counts as stuck.
_CLOCK_FACTOR = 8.0
_MAX_FAILED_STARTS = 3


class ScorerPool:
    """Scores (completion, answer) pairs with a built-in scorer in child processes.

    Children are started with the first items. They are plain subprocesses: they do not import the
    main module again, may be started from any thread, and end when their standard input does.
    """

    def __init__(
        self, scorer: str, arguments: dict[str, Any], *, seconds: float, num_workers: int
    ) -> None:
        self._command = [scorer, json.dumps(arguments), str(seconds)]
        self._seconds = seconds
        self._num_workers = num_workers
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def score(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """A score for each item; 0.0 where an item took too long or killed its process twice."""
        with self._lock:
            try:
                return self._score(items)
            except BaseException:
                # Replies that are still under way must not meet the next batch.
                self._end()
                raise

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _score(self, items: Sequence[tuple[str, str]]) -> list[float]:
        scores = [0.0] * len(items)
        queue = deque(range(len(items)))
        tried_twice: set[int] = set()
        failed_starts = 0
        while queue or any(worker.item is not None for worker in self._workers):
            heartbeat.beat(f"verifying {len(items)} completions with {self._command[0]}")
            self._assign(items, queue)
            for worker in self._ready_workers():
                item = worker.item
                score = worker.receive()
                if worker.dead:
                    self._workers.remove(worker)
                    if item is None:
                        failed_starts += 1
                        if failed_starts == _MAX_FAILED_STARTS:
                            raise RuntimeError(f"processes of {self._command[0]} do not start")
                        continue
                    # Another process may have taken the memory: once more, but not for ever.
                    if not worker.out_of_time and item not in tried_twice:
                        tried_twice.add(item)
                        queue.appendleft(item)
                elif item is not None:
                    scores[item] = score
        return scores

    def _assign(self, items: Sequence[tuple[str, str]], queue: deque[int]) -> None:
        """Give every free process an item, and start processes while there are items for them."""
        # One may have died while there was nothing to do.
        self._workers = [worker for worker in self._workers if not worker.found_dead()]
        for worker in self._workers:
            if worker.free and queue:
                worker.send(queue[0], items[queue[0]], self._seconds * _CLOCK_FACTOR)
                queue.popleft()
        starting = sum(not worker.free and worker.item is None for worker in self._workers)
        while len(self._workers) < self._num_workers and starting < len(queue):
            self._workers.append(_Worker(self._command))
            starting += 1

    def _ready_workers(self) -> list[_Worker]:
        """Processes that have something to say or have run out of time; waits for the first."""
        waiting = [worker for worker in self._workers if not worker.free]
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            first = min(worker.deadline for worker in waiting)
            events = selector.select(max(0.0, first - time.monotonic()))
        found = [key.data for key, _ in events]
        now = time.monotonic()
        for worker in waiting:
            if worker not in found and worker.deadline <= now:
                worker.end()
                found.append(worker)
        return found


class _Worker:
    """One child process and the item that it is working on."""

    def __init__(self, command: Sequence[str]) -> None:
        # The child finds the same code; one thread, since there are other children.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stages.rewards.scoring_worker", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        self.replies = self._process.stdout
        self.item: int | None = None
        self.free = False
        self.dead = False
        self.out_of_time = False
        self.deadline = time.monotonic() + _START_SECONDS

    def found_dead(self) -> bool:
        """Whether it has ended by itself while it was free."""
        if self.free and self._process.poll() is not None:
            self.end()
        return self.dead

    def send(self, item: int, pair: tuple[str, str], seconds: float) -> None:
        """Hand out an item; a process that dies shows when its reply is read."""
        assert self._process.stdin is not None and self.free
        self.item, self.free = item, False
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(pair).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> float:
        """The score of the item, or 0.0 for the greeting and from a process that has died."""
        line = b"" if self.dead else self.replies.readline()
        if not line:
            self.end()
            return 0.0
        message = json.loads(line)
        if "error" in message:
            raise UserError(message["error"])
        self.item, self.free = None, True
        return float(message.get("score", 0.0))

    def end(self) -> None:
        """Kill the process, and say whether time was up."""
        if self.dead:
            return
        self.out_of_time = time.monotonic() >= self.deadline
        self._process.kill()
        self.out_of_time |= self._process.wait() == -signal.SIGXCPU
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # What was not yet written to it cannot be any more.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.dead = True
