"""Faults inside a process, at moments that can be named and counted.

Nothing of the program is patched for the faults of its files: Python's audit events come just
before a file is opened, renamed or removed, and the hook here may kill the process there, or fail
the operation. Only the moments of a promotion, which are calls to MLflow, wrap the calls.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "POSTTRAIN_TEST_FAULTS"
"""A JSON list of faults, for a process that finds `hook/sitecustomize.py` on its path."""

_FILE_EVENTS = {
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens, at the n-th event of a kind on a matching path."""

    do: str
    """`kill`, `kill_parent`, `term`, `term_parent`, `interrupt_parent`, `cut` (die inside the next
    write past `number` bytes), `clock` (jump by `number` seconds), or the name of an errno that the
    operation fails with."""
    event: str = "any"
    """An audit event, `write` (a file opened for writing), `any`, or `before MODULE:NAME` and
    `after MODULE:NAME` for a call."""
    path: str = ""
    """Regular expression for the event's path; `FROM -> TO` for a rename."""
    nth: int = 1
    stage: str = ""
    """Only in the process of this stage (`prepare_data:prompts`); empty: wherever installed."""
    mark: str = ""
    """File that is made when the fault strikes; while it is there, it does not strike again."""
    number: int = 0
    lasting: bool = False
    """Every matching operation from the n-th on fails, as on a full disk."""


class Injector:
    """The faults of one process."""

    def __init__(self, faults: list[Fault], root: str = "") -> None:
        self.faults = faults
        self.root = root
        self.num_events = 0
        """Operations on files below `root` so far."""
        self._counts = [0] * len(faults)
        self._busy = False

    def install(self) -> Injector:
        """Watch this process; there is no way back."""
        for number, fault in enumerate(self.faults):
            if " " in fault.event:
                self._wrap(number, fault)
        sys.addaudithook(self._audit)
        return self

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS or self._busy:
            return
        text = f"{args[0]} -> {args[1]}" if event == "os.rename" else str(args[0])
        if self.root and self.root in text:
            self.num_events += 1
        writes = event == "open" and bool((args[2] or 0) & _FOR_WRITING)
        for number, fault in enumerate(self.faults):
            if fault.event == "any" and not (self.root and self.root in text):
                continue
            kinds = ("any", event, "write" if writes else event)
            if fault.event in kinds and re.search(fault.path, text):
                self._count(number, fault, text)

    def _wrap(self, number: int, fault: Fault) -> None:
        when, _, place = fault.event.partition(" ")
        module, _, name = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original: Callable[..., Any] = getattr(owner, last)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                self._count(number, fault, place)
            result = original(*args, **kwargs)
            if when == "after":
                self._count(number, fault, place)
            return result

        setattr(owner, last, wrapped)

    def _count(self, number: int, fault: Fault, text: str) -> None:
        self._counts[number] += 1
        count = self._counts[number]
        if count != fault.nth and not (fault.lasting and count > fault.nth):
            return
        self._busy = True
        try:
            if not self._first(fault, count):
                return
            _strike(fault, text)
        finally:
            self._busy = False

    def _first(self, fault: Fault, count: int) -> bool:
        if not fault.mark or count > fault.nth:
            return True
        try:
            Path(fault.mark).open("x").close()
        except FileExistsError:
            return False
        return True


def _strike(fault: Fault, text: str) -> None:
    match fault.do:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill_parent":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)  # the kernel ends this process meanwhile
            Path(f"{fault.mark}.survived").touch()
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "term_parent":
            os.kill(os.getppid(), signal.SIGTERM)
        case "interrupt_parent":
            os.kill(os.getppid(), signal.SIGINT)
        case "cut":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, fault.number))
        case "clock":
            _jump(fault.number)
        case name:
            code = getattr(errno, name)
            raise OSError(code, os.strerror(code), text.split(" -> ")[0])


def _jump(seconds: int) -> None:
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + seconds
    time.time_ns = lambda: clock_ns() + seconds * 1_000_000_000


def from_environment() -> None:
    """Install the faults meant for this process, if there are any."""
    faults = [Fault(**fields) for fields in json.loads(os.environ.get(VARIABLE, "[]"))]
    own = [fault for fault in faults if fault.stage == _stage()]
    if own:
        Injector(own).install()


def _stage() -> str:
    """The stage that this process is for; `posttrain` in the program's own; else nothing."""
    words = sys.orig_argv
    if "stages.main" not in words:
        return "posttrain" if any("flows.cli" in word for word in words) else ""
    try:
        request = json.loads(Path(words[-1], "request.json").read_bytes())
    except (OSError, ValueError):
        return ""
    split = request.get("split")
    return f"{request['stage']}:{split}" if split else str(request["stage"])
