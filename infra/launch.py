"""Runs a stage in its own process, so that its death is an event and not the flow's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from infra import heartbeat
from infra.files import encodable, write_atomic
from infra.redaction import redact
from infra.store import Store
from infra.tail import follow, last_lines
from schemas.artifacts import AnyArtifact
from schemas.base import Frozen, UserError
from schemas.requests import AnyRequest

Status = Literal["done", "user_error", "failed", "terminated"]

_GRACE_SECONDS = 20.0
"""Time to write a checkpoint between SIGTERM and SIGKILL; Prefect itself grants 30 s."""
_POLL_SECONDS = 0.05
_DUMP_SECONDS = 1.0
"""Time to write the stacks of the threads."""
PARENT_PID = "POSTTRAIN_PARENT_PID"
"""Names in the environment of a child the process that it dies with."""
# Keep large buffers between steps: giving them back means a page fault for each page again.
# No lists of small pieces (`tcache_count`, `mxfast`): what is left over where a tensor is
# aligned would lie in one, and the gap that the tensor leaves would be too small for the next.
# Pages of 2 MiB, where the kernel gives them on request: fewer faults, fewer misses of the TLB.
MALLOC_SETTINGS = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
    ":glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
)
"""glibc's tunables for a process that trains."""
_DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    "TQDM_DISABLE": "1",  # a bar redrawn in a log file is noise
    # Threads that spin while they wait take the core from those that work.
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": MALLOC_SETTINGS,
}
"""What a stage's process finds in its environment unless it is set already."""
_RETRYABLE_CODES = (75, 137)
"""EX_TEMPFAIL, and 128 + SIGKILL as shells and containers report an out-of-memory kill."""


class StageResult(Frozen):
    """What a stage's process leaves in `result.json`."""

    status: Status
    message: str = ""
    retryable: bool = False
    resumed_from_step: int | None = None
    peak_memory_bytes: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class StageOutcome:
    """A finished stage and what it took."""

    artifact: AnyArtifact
    seconds: float
    peak_memory_bytes: int | None
    """Largest resident set of the stage's process; None where the system does not tell."""
    resumed_from_step: int | None
    """Step of the checkpoint that the stage went on from, or None if it began at the start."""

    @property
    def resumed(self) -> bool:
        """Whether the stage went on from a checkpoint."""
        return self.resumed_from_step is not None


class StageFailed(RuntimeError):
    """A stage's process ended without an artifact, and not by the user's fault."""

    def __init__(
        self, message: str, exit_code: int | None, signal: int | None, retryable: bool
    ) -> None:
        super().__init__(redact(message))
        self.exit_code = exit_code
        self.signal = signal
        self.retryable = retryable


@dataclass(eq=False)
class _Child:
    """A live process and whether it was this program that asked it to stop."""

    process: subprocess.Popen[bytes]
    asked_to_stop: threading.Event = field(default_factory=threading.Event)

    def exited(self) -> bool:
        """Whether the process has ended. Leaves it unreaped, so that its group id stays its own."""
        if self.process.returncode is not None:
            return True
        try:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped by the thread that runs it
            return True
        return ended is not None

    def wait(self, timeout: float | None, watch: _Watch | None = None) -> bool:
        """Wait until the process has ended; False if the time ran out first, or `watch` says so."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.exited():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if watch is not None and watch.hung():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the process and everything that it has started."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.killpg(self.process.pid, number)

    def dump_stacks(self) -> None:
        """Have the process, and nothing that it has started, write its stacks to the log."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)
            self.wait(_DUMP_SECONDS)

    def stop(self, grace: float) -> None:
        """SIGTERM, time to checkpoint, SIGKILL."""
        self.asked_to_stop.set()
        self.signal_group(signal.SIGTERM)
        if not self.wait(grace):
            self.signal_group(signal.SIGKILL)

    def reap(self) -> int:
        """Kill what is left of the group, and collect the exit code."""
        self.signal_group(signal.SIGKILL)
        return self.process.wait()


class _Watch:
    """Tells a stage that hangs from one that is slow, by its signs of life.

    Time is this process's own, so that a clock that is set does no harm.
    """

    def __init__(self, stage: str, work: Path, limit: float | None) -> None:
        self._stage = stage
        self._work = work
        self._limit = limit
        self._seen = heartbeat.Beat(0, "starting")
        self._since = self._looked = time.monotonic()
        self.hung_when_last_seen = False

    def hung(self) -> bool:
        """Whether the stage has not moved on for longer than the limit."""
        now = time.monotonic()
        if self._limit is None or now - self._looked < min(1.0, self._limit / 10):
            return False
        self._looked = now
        beat = heartbeat.read_beat(self._work)
        if beat is not None and beat != self._seen:
            self._seen, self._since = beat, now
        self.hung_when_last_seen = now - self._since > self._limit
        return self.hung_when_last_seen

    def failure(self, code: int) -> StageFailed:
        """What to say about a stage that hung."""
        assert self._limit is not None
        idle = self._looked - self._since
        return StageFailed(
            f"{self._stage} hung: it made no progress for {idle:.0f} s while {self._seen.doing} "
            f"(sign of life {self._seen.number}), and compute.hang_timeout is {self._limit:g} s; "
            f"it was stopped. The stacks of its threads are in {self._work / 'stage.log'}",
            code,
            None,
            retryable=True,
        )


_live: set[_Child] = set()
_live_lock = threading.RLock()
"""Re-entrant: a signal handler may call `terminate_all` in the thread that holds it."""


def run_stage(
    request: AnyRequest,
    *,
    store: Store,
    on_line: Callable[[str], None],
    timeout: float | None = None,
    hang_timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> StageOutcome:
    """Run a stage to its end in a child process and return its artifact.

    The caller holds `store.lock(request.fingerprint)`; the child shares that lock, so nobody else
    can write before it is gone. `on_line` gets every line that the stage prints, in another thread.
    Any exception in this thread, KeyboardInterrupt and SystemExit too, stops the child first.

    timeout: seconds for the whole stage. hang_timeout: seconds without a sign of life, after which
    the stacks of the stage's threads go to its log and it is stopped, as a failure to be retried.
    """
    work = store.work_dir(request.fingerprint)
    for name in ("result.json", heartbeat.FILE):
        (work / name).unlink(missing_ok=True)
    write_atomic(work / "request.json", request.model_dump_json(indent=1))
    log = work / "stage.log"
    started = time.monotonic()
    with follow(log, lambda line: on_line(redact(line))):
        child = _start(work, store.lock_descriptor(request.fingerprint), env or {})
        code = _run_to_end(child, timeout, _Watch(request.stage, work, hang_timeout))
    result = _read_result(work)
    if result is not None and result.status == "done":
        artifact = store.find(request.fingerprint)
        if artifact is not None:
            seconds = time.monotonic() - started
            return StageOutcome(
                artifact, seconds, result.peak_memory_bytes, result.resumed_from_step
            )
    if result is not None and result.status == "user_error":
        raise UserError(redact(result.message))
    raise _failure(request.stage, code, result, log, child.asked_to_stop.is_set())


def terminate_all(grace: float = _GRACE_SECONDS) -> None:
    """Stop every live stage; for the flow's SIGTERM handler. Returns when all have ended."""
    with _live_lock:
        children = list(_live)
    for child in children:
        child.asked_to_stop.set()
        child.signal_group(signal.SIGTERM)
    deadline = time.monotonic() + grace
    for child in children:
        if not child.wait(max(0.0, deadline - time.monotonic())):
            child.signal_group(signal.SIGKILL)


def write_result(
    work_dir: Path,
    status: Status,
    message: str = "",
    retryable: bool = False,
    resumed_from_step: int | None = None,
) -> None:
    """Leave `result.json` for the parent; the stage's process calls it last."""
    result = StageResult(
        status=status,
        message=encodable(redact(message)),
        retryable=retryable,
        resumed_from_step=resumed_from_step,
        peak_memory_bytes=_peak_memory_bytes(),
    )
    write_atomic(work_dir / "result.json", result.model_dump_json())


def die_with_parent() -> None:
    """Make the kernel kill this process when the one that started it dies; call it first.

    Does nothing in a process that was not given `PARENT_PID`.
    """
    parent = os.environ.pop(PARENT_PID, None)  # not for processes that this one starts
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the request reached the kernel
        os.kill(os.getpid(), signal.SIGKILL)


def _start(work: Path, lock: int | None, env: Mapping[str, str]) -> _Child:
    """Start the child in a session of its own, so that Ctrl-C in a terminal reaches us only."""
    environment = {**_DEFAULTS, **os.environ, **env, PARENT_PID: str(os.getpid())}
    # A file and not a pipe: when this process dies, the child can still print and checkpoint.
    with (work / "stage.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.main", str(work)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    return _Child(process)


def _run_to_end(child: _Child, timeout: float | None, watch: _Watch) -> int:
    with _live_lock:
        _live.add(child)
    in_time = hung = False
    try:
        in_time = child.wait(timeout, watch)
        hung = not in_time and watch.hung_when_last_seen
        if hung:
            child.dump_stacks()
    finally:  # after the time limit, and after any exception
        if not in_time:
            child.stop(_GRACE_SECONDS)
        code = child.reap()
        with _live_lock:
            _live.discard(child)
    if hung:
        raise watch.failure(code)
    if not in_time:
        message = f"the stage took longer than {timeout:g} s and was stopped"
        raise StageFailed(message, code, None, retryable=True)
    return code


def _read_result(work: Path) -> StageResult | None:
    try:
        return StageResult.model_validate_json((work / "result.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _failure(
    stage: str, code: int, result: StageResult | None, log: Path, asked: bool
) -> StageFailed:
    number = -code if code < 0 else None
    if asked:
        return StageFailed(f"{stage} was stopped", code, number, retryable=False)
    if result is not None and result.status == "done":
        return StageFailed(f"{stage} ended, but left no artifact; see {log}", code, number, False)
    terminated = result is not None and result.status == "terminated"
    if result is not None:
        text = f"{stage} {result.status}: {result.message}"
    elif number is not None:
        text = f"{stage} was killed by {signal.Signals(number).name}{_guess(number)}"
    else:
        text = f"{stage} ended with exit code {code}{_quoted(last_lines(log, 5))}"
    retryable = (
        number is not None
        or code in _RETRYABLE_CODES
        or terminated
        or (result is not None and result.retryable)
    )
    return StageFailed(f"{text}\nsee {log}", code, number, retryable)


def _guess(number: int) -> str:
    if number != signal.SIGKILL:
        return ""
    return "; if nobody did that, the machine was short of memory"


def _quoted(lines: list[str]) -> str:
    return "".join(f"\n  | {line}" for line in lines)


def _peak_memory_bytes() -> int | None:
    """High-water mark of this process. `ru_maxrss` would count the parent's memory before exec."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((row for row in status.splitlines() if row.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024
