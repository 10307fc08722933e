"""A server and what it starts die with the process that started it. vLLM is a stand-in here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.launch import PARENT_PID

ROOT = Path(__file__).parents[3]

_VLLM = """
import multiprocessing, os, sys, time
from pathlib import Path

def engine(folder):
    Path(folder, "engine").write_text(str(os.getpid()))
    time.sleep(600)

def main():
    folder, method = sys.argv[1:]
    multiprocessing.get_context(method).Process(target=engine, args=(folder,)).start()
    Path(folder, "server").write_text(str(os.getpid()))
    time.sleep(600)
"""

_STAGE = f"""
import os, subprocess, sys, time
environment = {{**os.environ, "{PARENT_PID}": str(os.getpid())}}
command = [sys.executable, "-m", "stages.rollout.vllm_serve", *sys.argv[1:]]
subprocess.Popen(command, env=environment, start_new_session=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("victim", ["stage", "server"])
def test_nothing_is_left(tmp_path: Path, method: str, victim: str) -> None:
    entry = tmp_path / "packages/vllm/entrypoints/launchers/api_server"
    entry.mkdir(parents=True)
    for folder in (entry, *list(entry.parents)[:3]):
        (folder / "__init__.py").touch()
    (entry / "entry.py").write_text(_VLLM)
    path = os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])
    stage = subprocess.Popen(
        [sys.executable, "-c", _STAGE, str(tmp_path), method],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        server, engine = (wait_for(tmp_path / name) for name in ("server", "engine"))
        assert alive(server) and alive(engine)
        os.kill(stage.pid if victim == "stage" else server, 9)
        deadline = time.monotonic() + 20
        while (alive(server) or alive(engine)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(server)
        assert not alive(engine)
    finally:
        stage.kill()
        stage.wait()


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return int(path.read_text())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
