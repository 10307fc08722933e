"""A process that has everything imported, and forks a child for each order.

`python -m tests.faults.zygote` reads one JSON order a line and answers one line when its child has
ended. A stage's process spends its first seconds on imports; its faults come after them. The child
runs the real entry point and is really killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parents[2]
STAGES = (
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "pyarrow.parquet",
    "stages.main",
    "stages.credit",
    "stages.evaluate",
    "stages.label_steps",
    "stages.prepare_data",
    "stages.promote",
    "stages.sample_preferences",
    "stages.train_process_reward_model",
    "stages.train_reward_model",
    "stages.train_rl",
    "stages.train_sft",
)


class Ended(NamedTuple):
    """How a child ended."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    cpu: float
    """Processor time, in seconds."""
    seconds: float
    num_events: int
    """Operations on files below the root of the order; 0 if it was killed."""
    num_left: int
    """Processes of its group that were still there when it had ended."""


class Zygote:
    """The process as its user sees it; one order at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "TQDM_DISABLE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )

    def run(self, **order: Any) -> Ended:
        """Fork a child and wait for its end.

        entry: `module:function`; argv: its arguments; log: file for its output; root: folder of the
        trial; faults: a list of `Fault` as dictionaries; signal and after_cpu: a signal from
        outside after so much processor time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, f"the zygote has died, order {order}"
        return Ended(**json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in STAGES:
        importlib.import_module(name)
    importlib.import_module("infra.code").loaded_code()  # it keeps the digests of the files
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        for name in order.get("preload", ()):
            importlib.import_module(name)
        replies.write(json.dumps(_run(order)) + "\n")
        replies.flush()


def _run(order: dict[str, Any]) -> dict[str, Any]:
    tally, write_end = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(tally)
        _child(order, write_end)
    os.close(write_end)
    used = _wait(pid, order.get("after_cpu"), order.get("signal", signal.SIGKILL))
    with os.fdopen(tally) as pipe:
        num_events = int(pipe.read() or 0)
    left = _members(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status, _ = os.wait4(pid, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "cpu": used,
        "seconds": time.monotonic() - started,
        "num_events": num_events,
        "num_left": left,
    }


def _wait(pid: int, after_cpu: float | None, number: int) -> float:
    """Wait until a child has ended, and leave it unreaped; sends the signal when it is due."""
    clock = ((~pid) << 3) | 2  # the process's own clock: see clock_getcpuclockid(3)
    used, sent = 0.0, False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        with contextlib.suppress(OSError):
            used = time.clock_gettime(clock)
        if after_cpu is not None and not sent and used >= after_cpu:
            os.kill(pid, number)
            sent = True
        time.sleep(0.001)
    return used


def _members(group: int) -> int:
    """Processes of a group, other than its leader."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and int(folder.name) != group and fields[0] != "Z":
                count += 1
    return count


def _child(order: dict[str, Any], tally: int) -> None:
    """The forked child: a session of its own, as `infra.launch` gives a stage."""
    code = 1
    injector = None
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        os.environ["POSTTRAIN_PARENT_PID"] = str(os.getppid())
        os.environ.update(order.get("environment", {}))
        from tests.faults.inject import Fault, Injector

        faults = [Fault(**fields) for fields in order.get("faults", ())]
        injector = Injector(faults, order["root"]).install()
        module, _, name = order["entry"].partition(":")
        sys.argv = [module, *order["argv"]]
        code = getattr(importlib.import_module(module), name)() or 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        if injector is not None:
            os.write(tally, str(injector.num_events).encode())
        os._exit(code)


if __name__ == "__main__":
    main()
