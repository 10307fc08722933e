"""A run is killed while it registers a model: one version, whole aliases, and the same decision."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import random
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.runs import Runs
from flows.sync import sync, waiting
from infra.environment import Home
from tests.faults.house import House, content, copy_artifact
from tests.faults.inject import Fault
from tests.faults.matrix import Matrix, Trial
from tests.faults.records import registry_of, runs_of, template
from tests.faults.session import PRELOAD
from tests.faults.trials import describe
from tests.faults.zygote import Ended, Zygote

pytestmark = pytest.mark.faults

CLIENT = "mlflow:MlflowClient."
FIRST = {
    "before anything is registered": Fault("kill", f"before {CLIENT}create_logged_model"),
    "model entered, files not uploaded": Fault("kill", f"after {CLIENT}create_logged_model"),
    "files uploaded, model not closed": Fault("kill", f"after {CLIENT}log_model_artifacts"),
    "model uploaded, version not made": Fault("kill", f"before {CLIENT}create_model_version"),
    "version made, no alias set": Fault("kill", f"after {CLIENT}create_model_version"),
    "challenger set": Fault("kill", f"after {CLIENT}set_registered_model_alias"),
    "champion set, decision not written": Fault(
        "kill", f"after {CLIENT}set_registered_model_alias", nth=2
    ),
    "decision not yet renamed": Fault("kill", "os.rename", r"/publish -> "),
    "decision renamed, run still open": Fault("kill", "open", r"/artifacts$"),
    "run not yet closed": Fault("kill", "before infra.mlflow_tracking:Tracking.finish_run"),
}
SECOND = {
    "between the two alias moves": Fault(
        "kill", f"after {CLIENT}set_registered_model_alias", nth=2
    ),
    "champion moved, decision not written": Fault(
        "kill", f"after {CLIENT}set_registered_model_alias", nth=3
    ),
    "version made, no alias set": Fault("kill", f"after {CLIENT}create_model_version"),
}
REFUSED = {
    "version made, no alias set": Fault("kill", f"after {CLIENT}create_model_version"),
    "challenger set, decision not written": Fault(
        "kill", f"after {CLIENT}set_registered_model_alias"
    ),
}
SCENES: dict[str, tuple[dict[str, Fault], tuple[str, ...]]] = {
    "first champion": (FIRST, ()),
    "champion replaced": (SECOND, ()),
    "refused": (REFUSED, ("gate.min_primary=1.0",)),
}
_NUM_SEEDS = 6
_NUMBERS = itertools.count()
"""Of the homes, for the names of their folders."""


class Scene:
    """A home in which everything is done but the promotion of the GRPO policy."""

    def __init__(
        self, house: House, zygote: Zygote, folder: Path, database: Path, name: str
    ) -> None:
        self.home = Home.resolve(str(folder / "home"))
        self._zygote = zygote
        self._folder = folder
        self._more = SCENES[name][1]
        shutil.copy(database, self.home.mlflow_folder / "mlflow.db")
        algorithms = ("grpo", "dpo") if name == "champion replaced" else ("grpo",)
        self._num_runs = len(algorithms)
        for algorithm in algorithms:
            house.complete(algorithm)
        for artifact in house.store.artifacts():
            copy_artifact(house.store, artifact.fingerprint, self.home.store)
        if name == "champion replaced":
            assert self.run("dpo").code == 0, self.log()

    def run(self, algorithm: str = "grpo", *faults: Fault, **order: Any) -> Ended:
        """The run, without Prefect."""
        return self._zygote.run(
            entry="tests.faults.session:main",
            argv=[str(self.home.root), algorithm, *self._more],
            log=str(self._folder / "log"),
            root=str(self.home.root),
            preload=PRELOAD,
            faults=[dataclasses.asdict(fault) for fault in faults],
            **order,
        )

    def went_through(self) -> bool:
        """Whether the run under trial, the last one, had its results written down."""
        ended = [record for record in Runs(self.home.store.root).all() if record.ended is not None]
        done = [record for record in ended if record.status == "finished"]
        return len(done) == self._num_runs

    def log(self) -> str:
        return (self._folder / "log").read_text()[-3000:]

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on kills: decisions, versions, aliases, and runs."""
        store = self.home.store
        decisions = [a for a in store.artifacts() if a.type == "decision"]
        reports = [a for a in store.artifacts() if a.type == "evaluation"]
        return {
            "decisions": [content(a) for a in sorted(decisions, key=lambda a: a.fingerprint)],
            "reports": [content(a) for a in sorted(reports, key=lambda a: a.fingerprint)],
            "registry": registry_of(self.home),
            "runs": runs_of(self.home),
        }


Played = Callable[[str, list[tuple[str, str, Callable[[Scene, Ended], Ended]]]], None]


@pytest.fixture(scope="session")
def database(root: Path) -> Path:
    return template(root / "database")


@pytest.fixture
def play(
    house: House,
    zygotes: queue.SimpleQueue[Zygote],
    root: Path,
    database: Path,
    matrix: Matrix,
) -> Played:
    """Makes trials of a scene: each is compared with the scene that nobody disturbed."""

    def scene(name: str, zygote: Zygote) -> Scene:
        return Scene(house, zygote, root / f"{name} {next(_NUMBERS)}", database, name)

    def play(name: str, rows: list[tuple[str, str, Callable[[Scene, Ended], Ended]]]) -> None:
        zygote = zygotes.get()
        if name == "champion replaced":
            # The evaluation against the champion is done here, and is not what is tried.
            first = scene(name, zygote)
            assert first.run().code == 0, first.log()
            for artifact in first.home.store.artifacts():
                if artifact.type == "evaluation":
                    copy_artifact(first.home.store, artifact.fingerprint, house.store)
        whole = scene(name, zygote)
        undisturbed = whole.run()
        zygotes.put(zygote)
        assert undisturbed.code == 0, whole.log()
        expected = whole.outcome()

        def one(row: tuple[str, str, Callable[[Scene, Ended], Ended]]) -> str:
            moment, repeat, disturb = row
            zygote = zygotes.get()
            problem = ""
            try:
                own = scene(name, zygote)
                ended = disturb(own, undisturbed)
                if own.went_through():  # again would be another run; the command only delivers
                    list(sync(own.home, waiting(own.home)))
                else:
                    ended = own.run()
                    assert ended.code == 0, own.log()
                found = own.outcome()
                for key in expected:
                    assert found[key] == expected[key], f"{key}: {found[key]}"
            except Exception as error:
                problem = describe(error)
            finally:
                zygotes.put(zygote)
            stage = f"promote ({name})"
            matrix.add(Trial("kill -9", moment, stage, "session", repeat, not problem, problem))
            return f"{moment} ({repeat}): {problem}" if problem else ""

        with ThreadPoolExecutor(2) as pool:
            problems = [text for text in pool.map(one, rows) if text]
        assert not problems, "\n".join([f"{name}:", *problems])

    return play


@pytest.mark.parametrize(
    "name", [pytest.param("first champion", marks=pytest.mark.slow), "champion replaced", "refused"]
)
def test_at_the_worst_moments(play: Played, name: str) -> None:
    def row(moment: str, fault: Fault) -> tuple[str, str, Callable[[Scene, Ended], Ended]]:
        def disturb(scene: Scene, _whole: Ended) -> Ended:
            ended = scene.run("grpo", fault)
            assert ended.code == -signal.SIGKILL, f"{ended}: {scene.log()}"
            return ended

        return moment, moment, disturb

    play(name, [row(moment, fault) for moment, fault in SCENES[name][0].items()])


@pytest.mark.parametrize("name", list(SCENES))
def test_at_random_operations_on_files(play: Played, name: str) -> None:
    """Twice in a row, at any operation on a file of the home: reading, writing, or renaming."""

    def row(seed: int) -> tuple[str, str, Callable[[Scene, Ended], Ended]]:
        def disturb(scene: Scene, whole: Ended) -> Ended:
            draw = random.Random(f"{name} {seed}")
            ended = scene.run("grpo", Fault("kill", nth=draw.randint(1, whole.num_events)))
            assert ended.code == -signal.SIGKILL, f"{ended}: {scene.log()}"
            # What goes on may have fewer operations left.
            ended = scene.run("grpo", Fault("kill", nth=draw.randint(1, whole.num_events)))
            assert ended.code in (-signal.SIGKILL, 0), f"{ended}: {scene.log()}"
            return ended

        return "random operations on files", f"seed {seed}", disturb

    play(name, [row(seed) for seed in range(_NUM_SEEDS)])


@pytest.mark.parametrize("name", list(SCENES))
def test_at_random_times(play: Played, name: str) -> None:
    def row(seed: int) -> tuple[str, str, Callable[[Scene, Ended], Ended]]:
        def disturb(scene: Scene, whole: Ended) -> Ended:
            when = random.Random(f"time {name} {seed}").uniform(0.1, 1.0) * whole.cpu
            ended = scene.run("grpo", after_cpu=when)
            assert ended.code in (-signal.SIGKILL, 0), f"{ended}: {scene.log()}"
            return ended

        return "random times", f"seed {seed}", disturb

    play(name, [row(seed) for seed in range(4)])
