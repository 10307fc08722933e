"""Spreads requests over servers, and goes on when some of them die, hang or are slow."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from schemas.rl import ServersConfig
from stages.rollout.http_client import ServerFailure, ServerRefused
from stages.rollout.replicas import Replica, progress

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
_DEATH_SECONDS = 0.25
_T = TypeVar("_T")


class ServersLost(OSError):
    """No server is left, and none may be started again: a failure of the machine, not of the user.

    Another attempt at the stage may not meet it.
    """


@dataclass(eq=False)
class _Seat:
    """A replica and how it fares."""

    replica: Replica
    width: int
    """Requests that it gets at once; halved when it fails, which may be for want of memory."""
    failure: str | None = None
    """Why it has to be started again."""
    starting: Future[None] | None = None
    num_restarts: int = 0
    lost: bool = False
    busy: set[int] = field(default_factory=set)
    """Jobs that it works on."""
    moved_at: float = 0.0
    """When its engine was last seen to move, or had nothing to do."""

    @property
    def up(self) -> bool:
        return not self.lost and self.starting is None and self.failure is None


@dataclass(eq=False)
class _Batch(Generic[_T]):
    """Jobs of one call, by number."""

    pending: deque[int]
    results: dict[int, _T]
    send: Callable[[Replica, int], _T]
    started: dict[int, float] = field(default_factory=dict)
    """When a job was first given to a replica."""
    workers: dict[int, int] = field(default_factory=dict)
    """Replicas that work on a job."""
    error: BaseException | None = None
    over: bool = False


class Dispatcher:
    """Replicas that share the jobs of a call.

    A replica that fails is killed, which makes its requests fail; they go to the others, or wait
    for it to be started again, which happens `max_restarts` times for each.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        config: ServersConfig,
        *,
        prepare: Callable[[Replica], None],
    ) -> None:
        """Start every replica. `prepare` gives one that has just started what it needs.

        Raises ServersLost where one does not start: that is not a fault to work around.
        """
        self._config = config
        self._prepare = prepare
        self._seats = [_Seat(replica, 0) for replica in replicas]
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(len(replicas), "replicas")
        self.num_moved = 0
        for seat in self._seats:
            seat.starting = self._pool.submit(self._start, seat)
        wait([seat.starting for seat in self._seats if seat.starting])
        for seat in self._seats:
            assert seat.starting is not None
            error = seat.starting.exception()
            seat.starting = None
            if error is not None:
                self.close()
                if isinstance(error, ServerFailure):
                    raise ServersLost(str(error)) from error
                raise error

    @property
    def num_restarts(self) -> int:
        """How often a replica has been started again."""
        return sum(seat.num_restarts for seat in self._seats)

    def everywhere(self, action: Callable[[Replica], None]) -> None:
        """Do something on every replica that is up; one that fails is started again by `run`.

        One that is starting is waited for: what it is given must not change while it takes it.
        """
        wait([seat.starting for seat in self._seats if seat.starting])
        for seat in self._seats:
            self._greet(seat)
        seats = [seat for seat in self._seats if seat.up]
        futures = [self._pool.submit(action, seat.replica) for seat in seats]
        for seat, future in zip(seats, futures, strict=True):
            try:
                future.result()
            except ServerFailure as error:
                seat.failure = str(error)

    def run(self, count: int, send: Callable[[Replica, int], _T], *, width: int) -> list[_T]:
        """Results of `send` for the jobs 0 to count - 1, each replica at `width` jobs at once.

        Raises ServersLost when no replica is left; ServerRefused, and whatever else `send` raises
        but ServerFailure, at once.
        """
        batch: _Batch[_T] = _Batch(deque(range(count)), {}, send)
        threads: list[threading.Thread] = []
        for seat in self._seats:
            # What a failure has taken from the width stays taken.
            seat.width = max(1, width >> seat.num_restarts)
            seat.busy.clear()
            threads += self._hire(seat, batch) if seat.up else []
        try:
            while True:
                with self._changed:
                    if batch.error is not None:
                        raise batch.error
                    if len(batch.results) == count:
                        return [batch.results[job] for job in range(count)]
                    self._changed.wait(_TICK_SECONDS)
                for seat in self._seats:
                    threads += self._look_after(seat, batch)
                self._refuse_none_left()
        finally:
            with self._changed:
                batch.over = True
                self._changed.notify_all()
            while any(thread.is_alive() for thread in threads):
                # Again and again: a request may just have been about to be sent.
                for seat in self._seats:
                    if seat.starting is None:
                        seat.replica.client.abort()
                time.sleep(_TICK_SECONDS / 10)

    def close(self) -> None:
        """End every replica."""
        for seat in self._seats:
            if seat.starting is not None:
                seat.replica.stop()
        self._pool.shutdown(cancel_futures=True)
        for seat in self._seats:
            seat.replica.close()

    def _start(self, seat: _Seat) -> None:
        seat.replica.start(self._config.start_timeout)
        self._prepare(seat.replica)

    def _hire(self, seat: _Seat, batch: _Batch[_T]) -> list[threading.Thread]:
        """Threads that send a replica its jobs, and one that watches its engine."""
        seat.moved_at = time.monotonic()
        known = (seat, batch, seat.num_restarts)
        threads = [
            threading.Thread(target=self._work, args=known, daemon=True)
            for _ in range(min(seat.width, len(batch.pending) + len(batch.workers)))
        ]
        threads.append(threading.Thread(target=self._watch, args=known, daemon=True))
        for thread in threads:
            thread.start()
        return threads

    def _look_after(self, seat: _Seat, batch: _Batch[_T]) -> list[threading.Thread]:
        """Start a failed replica again, and hire for one that is back."""
        if self._greet(seat):
            return self._hire(seat, batch)
        if seat.up:
            seat.failure = seat.replica.death() or self._stall(seat)
        if seat.failure is not None and not seat.lost and seat.starting is None:
            self._fail(seat)
        return []

    def _greet(self, seat: _Seat) -> bool:
        """Whether a replica that was starting is back, which is noted once."""
        if seat.starting is None or not seat.starting.done():
            return False
        error, seat.starting = seat.starting.exception(), None
        if error is None:
            logger.warning("%s is back", seat.replica.name)
            return True
        if not isinstance(error, ServerFailure):
            raise error
        seat.failure = str(error)
        return False

    def _stall(self, seat: _Seat) -> str | None:
        limit = self._config.stall_timeout
        if not seat.busy or time.monotonic() - seat.moved_at <= limit:
            return None
        return f"its engine has not moved for {limit:g} s"

    def _fail(self, seat: _Seat) -> None:
        seat.failure = _death(seat.replica) or seat.failure
        seat.replica.stop()
        seat.replica.client.abort()
        if seat.num_restarts == self._config.max_restarts:
            logger.warning("%s: %s; going on without it", seat.replica.name, seat.failure)
            seat.lost = True
            return
        seat.num_restarts += 1
        seat.width = max(1, seat.width // 2)
        logger.warning(
            "%s: %s; starting it again (%d of %d), with at most %d requests at once",
            seat.replica.name,
            seat.failure,
            seat.num_restarts,
            self._config.max_restarts,
            seat.width,
        )
        seat.starting = self._pool.submit(self._start, seat)
        # Its threads leave while it is starting; those of after the start are new.
        with self._changed:
            seat.failure = None
            self._changed.notify_all()

    def _refuse_none_left(self) -> None:
        if all(seat.lost for seat in self._seats):
            failures = "\n".join(f"{seat.replica.name}: {seat.failure}" for seat in self._seats)
            raise ServersLost(f"no server is left after {self.num_restarts} restarts:\n{failures}")

    def _work(self, seat: _Seat, batch: _Batch[_T], generation: int) -> None:
        while (job := self._take(seat, batch, generation)) is not None:
            failure: str | None = None
            try:
                result = batch.send(seat.replica, job)
            except ServerFailure as error:
                failure = str(error)
            except BaseException as error:
                with self._changed:
                    batch.error = batch.error or error
                    self._changed.notify_all()
                return
            with self._changed:
                seat.busy.discard(job)
                batch.workers[job] -= 1
                if failure is None:
                    if job not in batch.results:
                        batch.results[job] = result
                        self._let_go(seat, job)
                    self._changed.notify_all()
                    continue
                if job in batch.results or batch.over:
                    continue
                if batch.workers[job] == 0:
                    self.num_moved += 1
                    batch.pending.appendleft(job)
                if seat.up and seat.num_restarts == generation:
                    seat.failure = failure
                self._changed.notify_all()
                return

    def _take(self, seat: _Seat, batch: _Batch[_T], generation: int) -> int | None:
        """The next job for a replica, or None when there will be none."""
        with self._changed:
            while not batch.over and seat.up and seat.num_restarts == generation:
                job = batch.pending.popleft() if batch.pending else self._slow(seat, batch)
                if job is not None:
                    if not seat.busy:
                        seat.moved_at = time.monotonic()
                    seat.busy.add(job)
                    batch.started.setdefault(job, time.monotonic())
                    batch.workers[job] = batch.workers.get(job, 0) + 1
                    return job
                self._changed.wait(_TICK_SECONDS)
        return None

    def _slow(self, seat: _Seat, batch: _Batch[_T]) -> int | None:
        """A job that another replica alone works on, and has for too long."""
        limit = time.monotonic() - self._config.slow_after
        for job, began in batch.started.items():
            alone = batch.workers[job] == 1 and job not in seat.busy
            if alone and began < limit and job not in batch.results:
                logger.warning(
                    "a request has taken more than %g s; giving it to %s too",
                    self._config.slow_after,
                    seat.replica.name,
                )
                self.num_moved += 1
                return job
        return None

    def _let_go(self, winner: _Seat, job: int) -> None:
        """Break the request of whoever else works on a job that is done."""
        for seat in self._seats:
            if seat is not winner and job in seat.busy:
                seat.replica.client.abort(job)

    def _watch(self, seat: _Seat, batch: _Batch[_T], generation: int) -> None:
        """Note when the replica's engine moves."""
        last = -1.0
        pause = self._config.stall_timeout / 8
        while not batch.over and seat.num_restarts == generation and not seat.lost:
            try:
                now = progress(seat.replica.client, timeout=pause)
            except (ServerFailure, ServerRefused):
                now = last
            if now != last or not seat.busy:
                seat.moved_at = time.monotonic()
            last = now
            with self._changed:
                self._changed.wait_for(lambda: batch.over, min(pause, 5.0))


def _death(replica: Replica) -> str | None:
    """How its process ended; a connection breaks a moment before that can be seen."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while (death := replica.death()) is None and time.monotonic() < deadline:
        time.sleep(_TICK_SECONDS)
    return death
