"""Trials with processes that are started as a user's are: slower, nothing forked from a zygote."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.launch import StageFailed, run_stage
from infra.store import Store
from schemas.requests import request_adapter
from tests.faults.inject import VARIABLE, Fault
from tests.faults.zygote import ROOT, Ended

_HOOK = Path(__file__).parent / "hook"


def environment(faults: Sequence[Fault] = ()) -> dict[str, str]:
    """Variables that bring faults into every Python process that is started with them."""
    return {
        "PYTHONPATH": os.pathsep.join([str(_HOOK), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        VARIABLE: json.dumps([dataclasses.asdict(fault) for fault in faults]),
    }


def launched(work: Path, faults: Sequence[Fault], order: dict[str, Any]) -> Ended:
    """Runs a stage by `infra.launch.run_stage`: `python -m stages.main` in a session of its own."""
    request = request_adapter.validate_json((work / "request.json").read_bytes())
    split = getattr(request, "split", None)
    stage = f"{request.stage}:{split}" if split else request.stage
    own = [dataclasses.replace(fault, stage=stage) for fault in faults]
    store = Store(request.runtime.store)
    started = time.monotonic()
    code = 0
    with store.lock(request.fingerprint), _signalled(work, order):
        try:
            run_stage(request, store=store, on_line=lambda _: None, env=environment(own))
        except StageFailed as error:
            if error.exit_code is None or not error.retryable:
                raise
            code = error.exit_code
    return Ended(code, 0.0, time.monotonic() - started, 0, len(processes_of(work)))


def processes_of(folder: Path) -> list[psutil.Process]:
    """Live processes that were started with a folder, or a path below it, as an argument."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(str(folder) in word for word in process.cmdline())
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextlib.contextmanager
def _signalled(work: Path, order: dict[str, Any]) -> Iterator[None]:
    """Inside, a signal is sent to the stage's process after so much processor time."""
    over = threading.Event()
    thread = threading.Thread(target=_send, args=(work, order, over))
    if "after_cpu" in order:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _send(work: Path, order: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(0.01):
        for process in processes_of(work):
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                if used.user + used.system >= order["after_cpu"]:
                    process.send_signal(order.get("signal", signal.SIGKILL))
                    return
