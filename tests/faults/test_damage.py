"""Files that are cut or have a flipped bit: seen by their digest, told of, and never loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.fingerprint import fingerprint
from schemas.requests import request_adapter
from tests.faults.conftest import Play, Row, sampled
from tests.faults.house import TRAINING
from tests.faults.inject import Fault
from tests.faults.trials import Trial

pytestmark = pytest.mark.faults

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, draw: random.Random) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """Cut a file somewhere."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


KINDS: dict[str, Damage] = {"bit flipped": flip, "cut short": cut}


def change(path: Path, damage: Damage, draw: random.Random) -> None:
    """Damage a request where its fingerprint can tell, and not in where it runs."""
    before = path.read_bytes()
    while _same_work(path):
        path.write_bytes(before)
        damage(path, draw)


def _same_work(path: Path) -> bool:
    try:
        request = request_adapter.validate_json(path.read_bytes())
    except ValueError:
        return False
    return fingerprint(request) == request.fingerprint


def with_two_checkpoints(trial: Trial) -> list[Path]:
    """Kill the stage once it has two checkpoints; returns them, the older one first."""
    ended = trial.attempt(Fault("kill", "os.mkdir", r"/checkpoints/\.step-", nth=4))
    assert trial.struck(), ended
    folders = sorted(trial.checkpoints.glob("step-*"))
    assert len(folders) == 2
    return folders


@pytest.mark.parametrize("case", sampled(TRAINING, "train_rl:grpo"))
def test_a_checkpoint(play: Play, case: str) -> None:
    """Each file of the newest one in turn: the one before is used, and the log says why."""

    def row(kind: str, name: str) -> Row:
        def body(trial: Trial) -> None:
            older, newest = with_two_checkpoints(trial)
            path = newest / name if name else draw.choice(sorted(newest.iterdir()))
            KINDS[kind](path, draw)
            trial.set_damaged(newest)
            trial.compare()
            log = trial.log_text()
            assert f"checkpoint {newest} is damaged" in log
            assert f"resuming at step {int(older.name[5:])} of" in log

        draw = random.Random(f"{case} {kind} {name}")
        return Row(kind, "newest checkpoint", name or "any file", body)

    names = ("manifest.json", "state.json", "rng.pt", "")
    play(case, [row(kind, name) for kind in KINDS for name in names])


@pytest.mark.parametrize("case", TRAINING)
def test_every_checkpoint(play: Play, case: str) -> None:
    """The stage begins at the start, and the log says that no checkpoint was fit."""

    def body(trial: Trial) -> None:
        draw = random.Random(case)
        folders = with_two_checkpoints(trial)
        for folder in folders:
            flip(draw.choice(sorted(folder.glob("*.safetensors"))), draw)
            trial.set_damaged(folder)
        trial.compare()
        for folder in folders:
            assert f"checkpoint {folder} is damaged" in trial.log_text()

    play(case, [Row("bit flipped", "every checkpoint", "weights", body)])


@pytest.mark.parametrize("case", ["train_rl:grpo", "evaluate:grpo", "train_reward_model"])
def test_the_content_of_an_input(play: Play, case: str) -> None:
    """The stage refuses it by name; with the input made again it goes on."""

    def row(kind: str, seed: int) -> Row:
        def body(trial: Trial) -> None:
            draw = random.Random(f"{case} {kind} {seed}")
            # Of train_sft's policy every stage here reads every file.
            parent = trial.request.model_dump(mode="json")
            fingerprint = (parent.get("policy") or parent["candidate"])["fingerprint"]
            folder = trial.store.artifacts_folder / fingerprint
            path = draw.choice(sorted(p for p in folder.glob("content/*") if p.is_file()))
            before = path.read_bytes()
            KINDS[kind](path, draw)
            ended = trial.attempt()
            assert ended.code == 1
            result = json.loads((trial.work / "result.json").read_bytes())
            assert str(path) in result["message"]
            assert "CorruptArtifact" in result["message"]
            assert not trial.checkpoints.exists()
            # What `posttrain run` does first: verify, put aside, and have it made again.
            assert trial.store.find_verified(fingerprint) is None
            assert list(trial.store.quarantine_folder.glob(f"{fingerprint}.*"))
            trial.restore(fingerprint)
            assert path.read_bytes() == before
            trial.compare()

        return Row(kind, "content of an input", f"seed {seed}", body)

    play(case, [row(kind, seed) for kind in KINDS for seed in range(2)])


@pytest.mark.parametrize("case", sampled(("train_sft", "evaluate:grpo"), "train_sft"))
def test_a_finished_artifact(play: Play, case: str) -> None:
    """Any of its files: it is put in quarantine, and the stage is run again."""

    def row(kind: str, name: str) -> Row:
        def body(trial: Trial) -> None:
            draw = random.Random(f"artifact {case} {kind} {name}")
            trial.finish()
            folder = trial.store.artifacts_folder / trial.request.fingerprint
            path = folder / name if name else draw.choice(sorted(folder.glob("content/*.*")))
            KINDS[kind](path, draw)
            assert trial.store.find_verified(trial.request.fingerprint) is None
            assert list(trial.store.quarantine_folder.iterdir())
            trial.compare()

        return Row(kind, "finished artifact", name or "content", body)

    names = ("artifact.json", "manifest.json", "")
    play(case, [row(kind, name) for kind in KINDS for name in names])


@pytest.mark.parametrize("case", ["train_sft", "prepare_data:demonstrations"])
def test_the_request(play: Play, case: str) -> None:
    """Nothing is done on a request that is not the one with its fingerprint."""

    def row(kind: str, seed: int) -> Row:
        def body(trial: Trial) -> None:
            draw = random.Random(f"request {case} {kind} {seed}")
            path = trial.work / "request.json"
            ended = trial.attempt(before_run=lambda: change(path, KINDS[kind], draw))
            assert ended.code == 1, ended
            assert json.loads((trial.work / "result.json").read_bytes())["retryable"]
            assert not (trial.work / "content").exists()
            assert trial.store.find(trial.request.fingerprint) is None
            trial.compare()

        return Row(kind, "request.json", f"seed {seed}", body)

    play(case, [row(kind, seed) for kind in KINDS for seed in range(3)])


@pytest.mark.parametrize("case", ["train_sft", "train_rl:dpo"])
def test_the_metrics_of_a_killed_stage(play: Play, case: str) -> None:
    """A line that cannot be read does not keep the stage from going on."""

    def body(trial: Trial) -> None:
        with_two_checkpoints(trial)
        path = trial.work / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")
        lines[1] = b"\xff" + lines[1][1:]
        path.write_bytes(b"\n".join(lines))
        trial.compare(but_metrics_of=2)
        assert f"{path} line 2 is damaged" in trial.log_text()

    play(case, [Row("bit flipped", "metrics.jsonl", "line 2", body)])
