from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra import launch
from infra.launch import StageFailed, run_stage, terminate_all, write_result
from infra.store import Store
from schemas.base import UserError
from schemas.data import DataSource
from schemas.fingerprint import fingerprint
from schemas.requests import PrepareDataRequest, Runtime

FINGERPRINT = "a" * 64
RequestFor = Callable[[str], PrepareDataRequest]


def ignore(_line: str) -> None:
    pass


def await_line(lines: list[str], line: str) -> None:
    deadline = time.monotonic() + 30
    while line not in lines:
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended, within a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def run(
    store: Store, request_for: RequestFor, scripted_stage: dict[str, str]
) -> Callable[..., launch.StageOutcome]:
    def run(
        behaviour: str,
        on_line: Callable[[str], None] = ignore,
        timeout: float | None = None,
        hang_timeout: float | None = None,
    ) -> launch.StageOutcome:
        return run_stage(
            request_for(behaviour),
            store=store,
            on_line=on_line,
            timeout=timeout,
            hang_timeout=hang_timeout,
            env=scripted_stage,
        )

    return run


Run = Callable[..., launch.StageOutcome]


def test_a_stage_returns_its_artifact_and_what_it_took(run: Run, store: Store) -> None:
    lines: list[str] = []
    outcome = run("done", lines.append)
    assert outcome.artifact == store.find(FINGERPRINT)
    assert lines == ["hello from done", "a grüner line", "no newline at the end"]
    assert outcome.resumed_from_step == 7
    assert outcome.resumed
    assert 0.1 < outcome.seconds < 60
    # A Python with pydantic, and not this process with torch in it.
    assert outcome.peak_memory_bytes is not None
    assert 10e6 < outcome.peak_memory_bytes < 200e6
    assert b"hello from done\n" in (store.work_dir(FINGERPRINT) / "stage.log").read_bytes()


def test_only_new_lines_of_the_log_are_told(run: Run, store: Store) -> None:
    (store.work_dir(FINGERPRINT) / "stage.log").write_text("from an earlier try\n")
    lines: list[str] = []
    run("done", lines.append)
    assert lines[0] == "hello from done"


def test_a_broken_listener_does_not_break_the_stage(run: Run) -> None:
    def listener(line: str) -> None:
        raise RuntimeError(line)

    assert run("done", listener).artifact.fingerprint == FINGERPRINT


def test_the_users_error_is_the_users(run: Run) -> None:
    with pytest.raises(UserError, match="line 3: no field prompt; add it"):
        run("user_error")


@pytest.mark.parametrize(
    ("behaviour", "retryable", "message"),
    [
        ("bug", False, "(?s)exit code 1.*KeyError: 'a bug of ours'.*stage.log"),
        ("temporary", True, "exit code 75"),
        ("memory_error", True, "MemoryError"),
        ("killed", True, "killed by SIGKILL"),
        ("done_without_artifact", False, "left no artifact"),
    ],
)
def test_failures_say_whether_to_retry(
    run: Run, behaviour: str, retryable: bool, message: str
) -> None:
    with pytest.raises(StageFailed, match=message) as caught:
        run(behaviour)
    assert caught.value.retryable is retryable
    assert caught.value.signal == (signal.SIGKILL if behaviour == "killed" else None)


def test_what_a_killed_stage_had_started_is_gone(run: Run, store: Store) -> None:
    with pytest.raises(StageFailed):
        run("killed")
    assert gone(int((store.work_dir(FINGERPRINT) / "grandchild").read_text()))


def test_a_result_of_an_earlier_try_does_not_count(run: Run, store: Store) -> None:
    write_result(store.work_dir(FINGERPRINT), "user_error", "old")
    with pytest.raises(StageFailed, match="exit code 1"):
        run("bug")


@pytest.mark.slow
def test_a_time_limit_lets_the_stage_checkpoint(run: Run, store: Store) -> None:
    with pytest.raises(StageFailed, match="longer than 5 s") as caught:
        run("checkpoints_on_sigterm", timeout=5)
    assert caught.value.retryable
    assert (store.work_dir(FINGERPRINT) / "checkpoint").read_text() == "step 5"


@pytest.mark.slow
def test_a_stage_that_ignores_sigterm_is_killed(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.5)
    with pytest.raises(StageFailed, match="longer than 5 s"):
        run("ignores_sigterm", timeout=5)
    assert gone(int((store.work_dir(FINGERPRINT) / "pid").read_text()))


@pytest.mark.slow
def test_a_stage_that_hangs_shows_its_stacks_and_is_killed(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.5)
    # What an earlier attempt left is no sign of life of this one.
    (store.work_dir(FINGERPRINT) / "heartbeat.json").write_text('{"number": 9, "doing": "old"}')
    with pytest.raises(
        StageFailed,
        match=r"prepare_data hung: it made no progress for \d+ s while training on step 3 "
        r"\(sign of life 3\), and compute.hang_timeout is 5 s.*stage.log",
    ) as caught:
        run("hangs_for_good", hang_timeout=5)
    assert caught.value.retryable
    assert caught.value.exit_code == -signal.SIGKILL
    log = (store.work_dir(FINGERPRINT) / "stage.log").read_text()
    assert "most recent call first" in log
    assert "in hangs_for_good" in log
    assert gone(int((store.work_dir(FINGERPRINT) / "pid").read_text()))


SOURCE = """
import time

def hanging():
    yield {"prompt": "1+1=", "answer": "2"}
    time.sleep(600)

def slow():
    for number in range(40):
        time.sleep(0.5)
        yield {"prompt": f"{number}+1=", "answer": str(number + 1)}
"""


@pytest.fixture
def run_real(tmp_path: Path, store: Store) -> Callable[[str], launch.StageOutcome]:
    """Runs the real stage that prepares data, with a generator of the user's."""
    (tmp_path / "own_source.py").write_text(SOURCE)
    repository = str(Path(__file__).parents[2])

    def run_real(generator: str) -> launch.StageOutcome:
        request = PrepareDataRequest(
            runtime=Runtime(store=str(store.root)),
            split="prompts",
            layout="verifiable",
            source=DataSource(generator=f"own_source:{generator}"),
        )
        request = request.model_copy(update={"fingerprint": fingerprint(request)})
        return run_stage(
            request,
            store=store,
            on_line=ignore,
            hang_timeout=10,
            env={"PYTHONPATH": os.pathsep.join([str(tmp_path), repository])},
        )

    return run_real


@pytest.mark.slow
def test_a_real_stage_that_hangs_is_found_out(
    run_real: Callable[[str], launch.StageOutcome], store: Store
) -> None:
    with pytest.raises(
        StageFailed, match=r"for \d+ s while preparing data.prompts \(sign of life \d+\)"
    ) as caught:
        run_real("hanging")
    assert caught.value.retryable
    (log,) = (path.read_text() for path in store.work_folder.glob("*/stage.log"))
    assert "own_source.py" in log and "in hanging" in log


@pytest.mark.slow
def test_a_real_stage_that_is_slow_is_left_alone(
    run_real: Callable[[str], launch.StageOutcome],
) -> None:
    # Twenty seconds of work, twice the limit; but no ten of them without a record.
    assert run_real("slow").artifact.metrics["num_kept"] == 40


def test_terminate_all_stops_stages_of_other_threads(run: Run, store: Store) -> None:
    lines: list[str] = []
    caught: list[StageFailed] = []

    def work() -> None:
        try:
            run("checkpoints_on_sigterm", lines.append)
        except StageFailed as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    await_line(lines, "ready")
    terminate_all()
    thread.join(10)
    assert len(caught) == 1
    assert not caught[0].retryable  # it was we who stopped it
    assert (store.work_dir(FINGERPRINT) / "checkpoint").exists()
    assert not launch._live


def test_terminate_all_kills_what_does_not_leave(run: Run, store: Store) -> None:
    lines: list[str] = []
    caught: list[StageFailed] = []

    def work() -> None:
        try:
            run("ignores_sigterm", lines.append)
        except StageFailed as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    await_line(lines, "ready")
    terminate_all(grace=0.3)
    thread.join(10)
    assert [error.retryable for error in caught] == [False]
    assert gone(int((store.work_dir(FINGERPRINT) / "pid").read_text()))


def test_sigterm_from_elsewhere_is_retried(run: Run, store: Store) -> None:
    lines: list[str] = []
    caught: list[StageFailed] = []

    def work() -> None:
        try:
            run("checkpoints_on_sigterm", lines.append)
        except StageFailed as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    await_line(lines, "ready")
    os.kill(int((store.work_dir(FINGERPRINT) / "pid").read_text()), signal.SIGTERM)
    thread.join(10)
    assert [error.retryable for error in caught] == [True]
    assert "stopped after step 5" in str(caught[0])


PARENT = """
import signal, sys
from infra.launch import run_stage
from infra.store import Store
from schemas.requests import request_adapter
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
store = Store(sys.argv[1])
request = request_adapter.validate_json(sys.argv[2])
with store.lock(request.fingerprint):
    run_stage(request, store=store, on_line=lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize(
    ("number", "checkpoint", "code"),
    [(signal.SIGTERM, True, 143), (signal.SIGINT, True, 1), (signal.SIGKILL, False, -9)],
)
def test_no_stage_outlives_its_parent(
    store: Store,
    request_for: RequestFor,
    scripted_stage: dict[str, str],
    number: signal.Signals,
    checkpoint: bool,
    code: int,
) -> None:
    request = request_for("checkpoints_on_sigterm").model_dump_json()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(store.root), request],
        env={**os.environ, **scripted_stage},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)][1] == b"ready\n"
    parent.send_signal(number)
    assert parent.wait(10) in (code, -number)
    parent.stdout.close()
    work = store.work_dir(FINGERPRINT)
    assert gone(int((work / "pid").read_text()))
    assert (work / "checkpoint").exists() is checkpoint
    with store.lock(FINGERPRINT, lambda message: pytest.fail(message)):
        pass


def test_the_child_shares_the_lock(
    store: Store, request_for: RequestFor, scripted_stage: dict[str, str]
) -> None:
    lines: list[str] = []
    thread_done = threading.Event()

    def work() -> None:
        with store.lock(FINGERPRINT), pytest.raises(StageFailed):
            run_stage(
                request_for("ignores_sigterm"),
                store=store,
                on_line=lines.append,
                env=scripted_stage,
            )
        thread_done.set()

    thread = threading.Thread(target=work)
    thread.start()
    await_line(lines, "ready")
    pid = int((store.work_dir(FINGERPRINT) / "pid").read_text())
    held = [entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert store.root / "locks" / f"{FINGERPRINT}.lock" in held
    os.kill(pid, signal.SIGKILL)
    assert thread_done.wait(10)
    thread.join()


def test_a_process_that_nobody_launched_may_outlive_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("POSTTRAIN_PARENT_PID", raising=False)
    launch.die_with_parent()


def test_a_child_whose_parent_is_gone_already_ends_itself() -> None:
    script = "from infra.launch import die_with_parent; die_with_parent(); print('alive')"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "POSTTRAIN_PARENT_PID": "1"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not ended.stdout


def test_a_message_that_no_file_can_hold_is_written_as_escapes(store: Store) -> None:
    work = store.work_dir(FINGERPRINT)
    write_result(work, "failed", "bad \ud800 text")
    found = launch._read_result(work)
    assert found is not None and found.message == "bad \\ud800 text"
