"""One trial: a stage is disturbed, asked again as `posttrain run` would ask, and compared."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.store import Store
from schemas.artifacts import Artifact
from tests.faults.house import (
    House,
    Reference,
    content,
    copy_artifact,
    shipped_metrics,
    steps_in,
)
from tests.faults.inject import Fault
from tests.faults.zygote import Ended, Zygote

Run = Callable[[Path, Sequence[Fault], dict[str, Any]], Ended]
"""Runs the stage of a work folder once: folder, faults, and more for the zygote's order."""


class Trial:
    """A stage in a store of its own, which holds what the stage reads and nothing else."""

    def __init__(self, house: House, case: str, root: Path, run: Run) -> None:
        self.reference: Reference = house.reference(case)
        self.root = root
        self.store = Store(root / "store")
        self.request = house.copy_inputs(self.reference.request, self.store)
        self.work = self.store.work_dir(self.request.fingerprint)
        self.log = self.work / "stage.log"
        self.checkpoints = self.work / "checkpoints"
        self._house = house
        self._run = run
        self._damaged: set[Path] = set()

    def attempt(
        self, *faults: Fault, before_run: Callable[[], None] = lambda: None, **order: Any
    ) -> Ended:
        """Run the stage once, and check that it went on from its newest checkpoint.

        before_run: what happens between the writing of the request and the stage's start.
        """
        newest = self.newest_step()
        before = len(self.log_text())
        (self.work / "result.json").unlink(missing_ok=True)
        (self.work / "request.json").write_text(self.request.model_dump_json(), encoding="utf-8")
        before_run()
        marked = [self._marked(number, fault) for number, fault in enumerate(faults)]
        ended = self._run(self.work, marked, order)
        assert ended.num_left == 0, f"{ended.num_left} processes outlived the stage"
        said = self.log_text()[before:]
        steps = steps_in(said)
        first = (newest or 0) + 1
        assert steps == list(range(first, first + len(steps))), f"from {newest}: steps {steps}"
        if newest is not None and steps:
            assert f"resuming at step {newest} of " in said
        return ended

    def struck(self, number: int = 0) -> bool:
        """Whether a fault of the last attempt has struck."""
        mark = self._mark(number)
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found

    def finish(self) -> Artifact:
        """Ask for the artifact as the same command does: what is there is verified and reused."""
        artifact = self.store.find_verified(self.request.fingerprint)
        if artifact is None:
            expected = self.newest_step()
            ended = self.attempt()
            assert ended.code == 0, f"{ended}\n{self.log_text()[-3000:]}"
            result = json.loads((self.work / "result.json").read_bytes())
            assert result["status"] == "done"
            assert result["resumed_from_step"] == expected
            artifact = self.store.find_verified(self.request.fingerprint)
        assert artifact is not None
        return artifact

    def compare(self, but_metrics_of: int | None = None) -> None:
        """Artifact, metrics and folder are those of the stage that nothing disturbed.

        but_metrics_of: a step whose metrics are lost.
        """
        artifact = self.finish()
        ours, theirs = content(artifact), content(self.reference.artifact)
        different = [name for name in theirs if ours[name] != theirs[name]]
        assert not different, f"{different} differ"
        expected = {k: v for k, v in self.reference.metrics.items() if k[0] != but_metrics_of}
        assert shipped_metrics(self.work) == expected
        again = self.store.find_verified(self.request.fingerprint)
        assert again == artifact
        left = {path.name for path in self.work.iterdir()}
        # What a kill in the cleaning up leaves is garbage, and small; never a second artifact.
        assert len(list(self.store.artifacts_folder.glob(f"{self.request.fingerprint}*"))) == 1
        assert "publish" not in left

    def set_damaged(self, folder: Path) -> None:
        """From now on this checkpoint must be passed over."""
        self._damaged.add(folder)

    def restore(self, fingerprint: str) -> None:
        """Make an input again, as the run of its stage would."""
        copy_artifact(self._house.store, fingerprint, self.store)

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint that is intact."""
        found = [int(path.name[5:]) for path in self._intact()]
        return max(found, default=None)

    def _intact(self) -> list[Path]:
        return [path for path in self.checkpoints.glob("step-*") if path not in self._damaged]

    def log_text(self) -> str:
        """What the stage has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def remove(self) -> None:
        """Give back the disk."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _mark(self, number: int) -> Path:
        return self.root / f"struck-{number}"

    def _marked(self, number: int, fault: Fault) -> Fault:
        return dataclasses.replace(fault, mark=str(self._mark(number)))


def forked(zygote: Zygote, root: Path) -> Run:
    """Runs a stage as a child of the zygote."""

    def run(work: Path, faults: Sequence[Fault], order: dict[str, Any]) -> Ended:
        return zygote.run(
            entry="stages.main:main",
            argv=[str(work)],
            log=str(work / "stage.log"),
            root=str(root),
            faults=[dataclasses.asdict(fault) for fault in faults],
            **order,
        )

    return run


def describe(error: BaseException) -> str:
    """An error in one line, for the table."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:500]


def wait_for(what: Callable[[], bool], seconds: float, text: str) -> None:
    """Wait until something is so; fails with the text after so many seconds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
