"""`posttrain run` as a user types it: real Prefect, real MLflow, real processes, and faults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.runs import Runs
from infra.environment import Home
from infra.store import Store
from tests.faults.house import RECIPE, TRAINING, House, config, content, copy_artifact, nodes
from tests.faults.inject import Fault
from tests.faults.matrix import Matrix, Trial
from tests.faults.moments import CHECKPOINT, PUBLISH
from tests.faults.processes import environment, processes_of
from tests.faults.records import check_metrics, own_runs, registry_of, runs_of, template
from tests.faults.trials import describe, wait_for
from tests.faults.zygote import ROOT

pytestmark = pytest.mark.faults

PROMOTION = Fault("kill", "os.rename", r"/publish -> .*/artifacts/", stage="posttrain")


class Command:
    """`posttrain run` of one algorithm, in a home of its own.

    start: a home with empty databases; None for none at all. stages: those whose work is not yet
    done there; None for all.
    """

    def __init__(
        self,
        house: House,
        start: Path | None,
        root: Path,
        algorithm: str,
        stages: Sequence[str] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.root = root
        self.house = house
        if start is None:
            root.mkdir()
        else:
            shutil.copytree(start, root)
        self.home = Home.resolve(str(root))
        house.complete(algorithm)
        for name in [] if stages is None else all_stages(algorithm):
            if name not in stages:
                artifact = house.reference(case_of(name, algorithm)).artifact
                copy_artifact(house.store, artifact.fingerprint, self.home.store)

    def start(self, *faults: Fault) -> subprocess.Popen[str]:
        """Begin; the faults strike once in the life of the home."""
        marked = [dataclasses.replace(fault, mark=str(self.mark(fault))) for fault in faults]
        words = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(RECIPE)]
        words += ["--home", str(self.root), "--json", "--set", f"rl.algorithm={self.algorithm}"]
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env={**_clean_environment(), **environment(marked)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *faults: Fault) -> tuple[int, str, str]:
        """Begin and wait for the end: exit code, standard output, and errors; nothing is left."""
        process = self.start(*faults)
        output, errors = process.communicate(timeout=500)
        self.nothing_is_left()
        return process.returncode, output, errors

    def finish(self) -> dict[str, Any]:
        """The same command, until the end."""
        code, output, errors = self.run()
        assert code == 0, errors[-3000:]
        document: dict[str, Any] = json.loads(output)
        return document

    def mark(self, fault: Fault) -> Path:
        """The file that tells that a fault has struck."""
        return self.root / f"struck {fault.do} {fault.stage or 'any'}"

    def nothing_is_left(self) -> None:
        """No stage, server or scorer of this home is alive a moment after the command's end."""
        wait_for(lambda: not processes_of(self.root), 20, f"alive: {processes_of(self.root)}")

    def compare(self) -> None:
        """Artifacts, metrics, runs and versions are those of an undisturbed run."""
        made = self.compare_artifacts()
        for name in made:
            if name in self.worked_on():
                expected = self.house.reference(case_of(name, self.algorithm)).metrics
                check_metrics(self.home, name, expected)
        assert set(map(tuple, runs_of(self.home).values())) == {("FINISHED",)}, runs_of(self.home)
        (version,) = registry_of(self.home)
        assert version["version"] == "1"
        assert version["sha256"] == made["train_rl"].sha256
        assert version["aliases"] == ["challenger", "champion"]
        (record,) = Runs(self.home.store.root).all()
        assert record.status == "finished"

    def worked_on(self) -> set[str]:
        """Stages that have a run in MLflow."""
        return set(runs_of(self.home)) - {"pipeline", "promote"}

    def compare_artifacts(self) -> dict[str, Any]:
        """Every artifact is that of an undisturbed run; returns them by stage."""
        made: dict[str, Any] = {}
        for node in nodes(config(self.algorithm), self.home.store):
            if node.stage == "promote":
                break
            request = node.build(made)
            ours = self.home.store.find_verified(request.fingerprint)
            theirs = self.house.store.find(request.fingerprint)
            assert ours is not None and theirs is not None, node.name
            assert content(ours) == content(theirs), node.name
            made[node.name] = ours
        return made


def _clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "POSTTRAIN_"))
    }


def all_stages(algorithm: str) -> list[str]:
    """Every stage that has a process of its own."""
    names = [node.name for node in nodes(config(algorithm), Store("."))]
    return [name for name in names if name != "promote"]


def stages_of(algorithm: str) -> list[str]:
    """The same, and of the data splits the first one only."""
    return [n for n in all_stages(algorithm) if ":" not in n or n.endswith(":evaluation")]


def case_of(name: str, algorithm: str) -> str:
    """The name of a stage in the house."""
    return f"{name}:{algorithm}" if name in ("train_rl", "credit", "evaluate") else name


def worst_moment(algorithm: str, stage: str, salt: str) -> tuple[str, Fault]:
    """One of the worst moments of a stage, drawn by lot."""
    moments = PUBLISH | (CHECKPOINT if case_of(stage, algorithm) in TRAINING else {})
    draw = random.Random(f"{salt} {algorithm} {stage}")
    moment, fault = draw.choice(sorted(moments.items(), key=lambda item: item[0]))
    return moment, dataclasses.replace(fault, stage=stage)


@pytest.fixture(scope="session")
def start(house: House, root: Path) -> Path:
    """A home with empty databases, made once: their tables take longer than a run."""
    folder = root / "start"
    home = Home.resolve(str(folder))
    template(root / "empty")
    shutil.copy(root / "empty" / "mlflow.db", home.mlflow_folder / "mlflow.db")
    house.complete("grpo")
    make_prefect_database(folder)
    return folder


def make_prefect_database(folder: Path) -> None:
    """What `posttrain run` would do first: start a server once."""
    code = (
        "import os, sys\n"
        "from infra.environment import Home, quiet_environment\n"
        "home = Home.resolve(sys.argv[1])\n"
        "os.environ.update(quiet_environment(home))\n"
        "from flows.local_server import start_local_server\n"
        "start_local_server(home)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env={**_clean_environment(), "PYTHONPATH": str(ROOT)},
        check=True,
    )


def _after_sft(algorithm: str) -> list[str]:
    """The stages that one algorithm does not share with the others."""
    return [name for name in AFTER_RL if name in all_stages(algorithm)]


@contextlib.contextmanager
def noted(matrix: Matrix, entries: Sequence[tuple[str, str, str, str]]) -> Iterator[None]:
    """Note a trial for each (fault, moment, stage, repeat): identical if the block goes through."""
    problem = ""
    try:
        yield
    except BaseException as error:
        problem = describe(error)
        raise
    finally:
        for fault, moment, stage, repeat in entries:
            matrix.add(Trial(fault, moment, stage, "command", repeat, not problem, problem))


Make = Callable[..., Command]
AFTER_RL = ("train_rl", "credit", "evaluate")


@pytest.fixture
def make(house: House, start: Path, root: Path) -> Make:
    def make(
        name: str, algorithm: str, stages: Sequence[str] | None = None, new: bool = False
    ) -> Command:
        folder = root / f"{name} {algorithm}"
        return Command(house, None if new else start, folder, algorithm, stages)

    return make


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "rloo", "dpo"])
def test_every_stage_is_killed_once_and_prefect_retries_it(
    make: Make, matrix: Matrix, algorithm: str
) -> None:
    stages = stages_of(algorithm) if algorithm == "grpo" else _after_sft(algorithm)
    command = make("retried", algorithm, stages)
    drawn = {stage: worst_moment(algorithm, stage, "retry") for stage in stages}
    rows = [
        ("kill -9, Prefect's retry", moment, stage, f"{algorithm}: {moment}")
        for stage, (moment, _) in drawn.items()
    ]
    with noted(matrix, rows):
        faults = [fault for _, fault in drawn.values()]
        code, output, errors = command.run(*faults)
        assert code == 0, errors[-3000:]
        for fault in faults:
            assert command.mark(fault).exists(), f"{fault.stage} was not killed"
        assert len(json.loads(output)["stages"]) == len(
            nodes(config(algorithm), command.home.store)
        )
        command.compare()


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
def test_the_whole_run_is_killed_in_every_stage(make: Make, matrix: Matrix, algorithm: str) -> None:
    """Command, Prefect task and flow are one process; its stage and its server die with it."""
    stages = stages_of(algorithm) if algorithm == "ppo" else _after_sft(algorithm)
    command = make("killed", algorithm, stages)
    drawn = {stage: worst_moment(algorithm, stage, "flow") for stage in stages}
    faults = [dataclasses.replace(fault, do="kill_parent", number=0) for _, fault in drawn.values()]
    rows = [
        ("kill -9 of the whole run", moment, stage, f"{algorithm}: {moment}")
        for stage, (moment, _) in drawn.items()
    ]
    rows.append(("kill -9 of the whole run", "decision not yet renamed", "promote", algorithm))
    with noted(matrix, rows):
        for fault in (*faults, PROMOTION):
            code, _, errors = command.run(fault)
            assert code == -signal.SIGKILL, f"{fault.stage}: {code} {errors[-2000:]}"
            assert command.mark(fault).exists()
            assert (
                not command.mark(fault).with_name(f"{command.mark(fault).name}.survived").exists()
            )
            (record,) = Runs(command.home.store.root).all()
            assert record.status == "stopped"
        command.finish()
        command.compare()


@pytest.mark.parametrize("algorithm", ["rloo", "dpo"])
def test_the_run_is_stopped_by_a_signal(make: Make, matrix: Matrix, algorithm: str) -> None:
    """SIGTERM is also what a cancellation in Prefect sends; SIGINT is Ctrl-C."""
    ends = {
        "train_sft": ("term_parent", 143),
        "train_reward_model": ("interrupt_parent", 130),
        "train_rl": ("term_parent", 143),
        "evaluate": ("interrupt_parent", 130),
    }
    if algorithm == "dpo":
        ends = {name: ends[name] for name in ("train_rl", "evaluate")}
    command = make("stopped", algorithm, list(ends))
    rows = [
        ("SIGTERM" if code == 143 else "SIGINT", "in the stage", stage, algorithm)
        for stage, (_, code) in ends.items()
    ]
    with noted(matrix, rows):
        for stage, (do, code) in ends.items():
            path = r"/content$" if stage == "evaluate" else r"/metrics\.jsonl$"
            event = "os.mkdir" if stage == "evaluate" else "write"
            fault = Fault(do, event, path, nth=1 if stage == "evaluate" else 2, stage=stage)
            found, _, errors = command.run(fault)
            assert found == code, errors[-2000:]
            assert command.mark(fault).exists()
            seconds = time.time() - command.mark(fault).stat().st_mtime
            assert seconds < 30 + 20, "the exit took longer than Prefect grants"
            (record,) = Runs(command.home.store.root).all()
            assert record.status == "stopped"
        command.finish()
        command.compare()


@pytest.mark.parametrize("others", [("dpo", "dpo"), ("grpo", "dpo")], ids=" and ".join)
def test_two_runs_at_once(make: Make, matrix: Matrix, others: tuple[str, str]) -> None:
    """What both need is worked on by one, while the other waits and then reuses it.

    The two of one recipe begin in a new home, where the databases are yet to be made.
    """
    first, second = others
    new = first == second
    command = make(f"two with {second}", first, ["train_sft", "train_rl"] if new else None, new)
    other = Command.__new__(Command)
    other.__dict__ |= {**command.__dict__, "algorithm": second}
    command.house.complete(second)
    with noted(matrix, [("two runs at once", "from the start", "all", f"{first} and {second}")]):
        processes = [command.start(), other.start()]
        ended = [process.communicate(timeout=500) for process in processes]
        for process, (_, errors) in zip(processes, ended, strict=True):
            assert process.returncode == 0, errors[-3000:]
        command.nothing_is_left()
        rows: dict[str, list[str]] = {}
        for output, _ in ended:
            for row in json.loads(output)["stages"]:
                rows.setdefault(row["fingerprint"], []).append(row["status"])
        for fingerprint, statuses in rows.items():
            assert statuses.count("ran") <= 1, (fingerprint, rows)
            assert statuses.count("resumed") == 0
            artifact = command.home.store.find_verified(fingerprint)
            if artifact is not None and artifact.mlflow_run_id in own_runs(command.home):
                assert statuses.count("ran") == 1, (fingerprint, rows)
            theirs = command.house.store.find(fingerprint)
            ours = command.home.store.find_verified(fingerprint)
            assert ours is not None
            assert theirs is None or content(ours) == content(theirs)
        shas = [version["sha256"] for version in registry_of(command.home)]
        assert len(shas) == len(set(shas)) == len(set(others))


def test_damaged_artifacts_of_a_finished_run(make: Make, matrix: Matrix) -> None:
    """The same command sees them by their digests, makes them again, and tells so."""
    command = make("damaged", "dpo", ["train_rl"])
    damaged = ("prepare_data:evaluation", "train_sft", "train_rl", "evaluate")
    rows = [("bit flipped", "finished artifact", stage, "dpo") for stage in damaged]
    with noted(matrix, rows):
        before = command.finish()
        by_name = {row["name"]: row for row in before["stages"]}
        for number, stage in enumerate(damaged):
            folder = command.home.store.artifacts_folder / by_name[stage]["fingerprint"]
            # `identity.json` is for people only, and is no part of what is loaded.
            files = sorted(p for p in folder.rglob("*.*") if p.name != "identity.json")
            path = files[number % len(files)]
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        code, output, errors = command.run()
        assert code == 0, errors[-3000:]
        after = {row["name"]: row["status"] for row in json.loads(output)["stages"]}
        assert {name for name, status in after.items() if status == "ran"} == set(damaged)
        assert errors.count("moved to") >= 1
        assert len(list(command.home.store.quarantine_folder.iterdir())) == len(damaged)
        command.compare_artifacts()


def test_a_disk_that_is_full_in_a_run(make: Make, matrix: Matrix) -> None:
    command = make("full", "dpo", ["train_sft"])
    fault = Fault("ENOSPC", "write", r"/checkpoints/", nth=2, stage="train_sft")
    with noted(matrix, [("disk full", "a checkpoint", "train_sft", "dpo")]):
        code, _, errors = command.run(fault)
        assert code == 1
        assert "the disk is full" in errors
        assert errors.count("the disk is full") == 1
        command.finish()
        command.compare()


def test_clocks_that_jump_in_a_run(make: Make, matrix: Matrix) -> None:
    """In two stages and in the command's own process."""
    command = make("clock", "dpo", ["train_sft", "train_rl"])
    day = 86_400
    faults = [
        Fault("clock", "write", r"/checkpoints/", nth=2, stage="train_sft", number=400 * day),
        Fault("clock", "write", r"/checkpoints/", nth=2, stage="train_rl", number=-400 * day),
        Fault("clock", "write", r"/run\.json", nth=5, stage="posttrain", number=-3 * day),
    ]
    rows = [("clock jump", "in mid-work", fault.stage, str(fault.number)) for fault in faults]
    with noted(matrix, rows):
        code, _, errors = command.run(*faults)
        assert code == 0, errors[-3000:]
        for fault in faults:
            assert command.mark(fault).exists(), fault
        command.compare()
