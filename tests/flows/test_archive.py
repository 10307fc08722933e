"""Promotion under races, deaths and changed files: a real registry, and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.archive import Archive
from infra.environment import Home
from infra.manifest import CorruptArtifact
from infra.registry import Registry
from schemas.artifacts import PromotionDecision
from schemas.base import UserError
from tests.flows.racing import MODEL, judge, open_run, policy, request

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tracked_home")]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def archive(home: Home) -> Archive:
    return Archive(home, MODEL)


@pytest.fixture
def run_id(home: Home, tracked_home: Home) -> str:
    return open_run(home, "run")


def aliases(archive: Archive) -> dict[str, tuple[str, ...]]:
    return {one.version: one.aliases for one in archive.registry.list_models()}


def promote(
    archive: Archive, run_id: str, name: str, value: float, against: Any = None, **gate: Any
) -> PromotionDecision:
    asked = request(archive.store, name, value, against, **gate)
    said = archive.approval(asked) if asked.gate.approval else None
    assert said is None
    decision = archive.promote(asked, judge, run_id)
    assert decision is not None
    return decision


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))


def registered(home: Home, name: str) -> Path:
    """The registry's own copy of a candidate's only file."""
    (found,) = [
        path
        for path in (home.mlflow_folder / "artifacts").rglob("config.json")
        if path.read_text() == name
    ]
    return found


@pytest.mark.parametrize(("first", "second"), [("a6", "b7"), ("b7", "a6")])
def test_two_promotions_race(home: Home, archive: Archive, first: str, second: str) -> None:
    (home.root / "ready").mkdir()
    policy(archive.store, "baseline")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    values = {"a6": "0.6", "b7": "0.7"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.flows.racing", str(home.root), name, values[name], "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        for name in (first, second)
    ]
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        results.append(json.loads(output.splitlines()[-1]))
    winner, loser = sorted(results, key=lambda one: one["num_evaluations"])
    assert (winner["num_evaluations"], loser["num_evaluations"]) == (1, 2)
    assert winner["incumbent"] == policy(archive.store, "baseline").sha256
    assert loser["incumbent"] == policy(archive.store, winner["name"]).sha256
    assert winner["promoted"] is True
    # The better one is the champion, whoever came first; a refusal moves no alias.
    assert loser["promoted"] is (loser["name"] == "b7")
    champion = archive.registry.champion(MODEL)
    assert champion is not None
    assert champion.sha256 == policy(archive.store, "b7").sha256
    previous = archive.registry.aliased(MODEL, "previous")
    assert (previous is not None) is loser["promoted"]


def test_a_promotion_by_hand_in_the_middle_of_another_waits_for_it(
    home: Home, archive: Archive, run_id: str
) -> None:
    first = promote(archive, run_id, "a6", 0.6)
    promote(archive, run_id, "b7", 0.7, (policy(archive.store, "a6"), 0.6))
    assert aliases(archive) == {"1": ("previous",), "2": ("challenger", "champion")}
    script = (
        "import sys\nfrom flows.cli import app\n"
        "app(['promote', 'racing', '1', '--reason', 'x', '--home', sys.argv[1]])\n"
    )
    hand: list[subprocess.Popen[bytes]] = []

    def slow(asked: Any, store: Any) -> Any:
        hand.append(
            subprocess.Popen(
                [sys.executable, "-c", script, str(home.root)],
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
            )
        )
        with pytest.raises(subprocess.TimeoutExpired):
            hand[0].wait(timeout=10)
        return judge(asked, store)

    asked = request(archive.store, "c8", 0.8, (policy(archive.store, "b7"), 0.7))
    third = archive.promote(asked, slow, run_id)
    assert third is not None
    assert third.aliases == ("challenger", "champion")
    assert hand[0].wait(timeout=60) == 0
    assert aliases(archive) == {"1": ("champion",), "2": (), "3": ("challenger", "previous")}
    assert first.version == "1"


def test_promoting_again_changes_nothing(home: Home, archive: Archive, run_id: str) -> None:
    promote(archive, run_id, "a6", 0.6)
    against = (policy(archive.store, "a6"), 0.6)
    asked = request(archive.store, "b7", 0.7, against)
    first = archive.promote(asked, judge, run_id)
    before = {one.version: one for one in archive.registry.list_models()}
    again = archive.promote(asked, judge, run_id)
    assert again is not None
    assert first is not None
    assert again.model_copy(update={"created_by": first.created_by}) == first
    assert {one.version: one for one in archive.registry.list_models()} == before


DYING = """
import os, signal, sys
from infra.environment import Home
from infra.registry import Registry
from infra.store import Store
from flows.archive import Archive
from schemas.artifacts import PromotionDecision
from tests.flows.racing import MODEL, judge, policy, request

root, run_id, moment = sys.argv[1:]
archive = Archive(Home.resolve(root), MODEL)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_on_alias(alias):
    real = Registry.set_alias
    def set_alias(self, name, which, version):
        real(self, name, which, version)
        if which == alias:
            die()
    Registry.set_alias = set_alias

if moment == "registered":
    Registry.set_tags = die
elif moment in ("challenger", "previous", "champion"):
    die_on_alias(moment)
elif moment == "published":
    real = Store.publish
    def publish(self, fingerprint, artifact):
        real(self, fingerprint, artifact)
        if isinstance(artifact, PromotionDecision):
            die()
    Store.publish = publish
asked = request(archive.store, "b7", 0.7, (policy(archive.store, "a6"), 0.6))
archive.promote(asked, judge, run_id)
"""


@pytest.mark.parametrize(
    "moment", ["registered", "challenger", "previous", "champion", "published"]
)
def test_a_death_at_any_moment_is_mended_by_the_same_command(
    home: Home, archive: Archive, run_id: str, moment: str
) -> None:
    promote(archive, run_id, "a6", 0.6)
    asked = request(archive.store, "b7", 0.7, (policy(archive.store, "a6"), 0.6))
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(home.root), run_id, moment],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    assert archive.registry.champion(MODEL) is not None
    decision = archive.promote(asked, judge, run_id)
    assert decision is not None
    assert decision.promoted
    assert decision.aliases == ("challenger", "champion")
    assert aliases(archive) == {"1": ("previous",), "2": ("challenger", "champion")}
    assert home.store.find_verified(asked.fingerprint) == decision
    assert archive.rollback("it swears") == ("2", "1")


def test_a_champion_that_was_changed_in_the_store_is_fetched_from_the_registry(
    home: Home, archive: Archive, run_id: str
) -> None:
    promote(archive, run_id, "a6", 0.6)
    champion = policy(archive.store, "a6")
    flip(home.store.root / champion.uri / "config.json")
    fresh = Archive(Home.resolve(str(home.root)), MODEL)
    found = fresh.incumbent(policy(fresh.store, "b7"))
    assert found is not None
    assert found.sha256 == champion.sha256
    assert (fresh.store.path(found) / "config.json").read_text() == "a6"
    assert len(list(home.store.quarantine_folder.iterdir())) == 1


def test_a_champion_that_was_changed_everywhere_is_refused(
    home: Home, archive: Archive, run_id: str
) -> None:
    promote(archive, run_id, "a6", 0.6)
    flip(registered(home, "a6"))
    home.store.quarantine("a6")
    with pytest.raises(CorruptArtifact, match="racing version 1 is not the content"):
        archive.incumbent(policy(archive.store, "b7"))
    assert home.store.find("a6") is None


def test_a_version_that_was_changed_is_not_promoted_again(
    home: Home, archive: Archive, run_id: str
) -> None:
    promote(archive, run_id, "a6", 0.6)
    promote(archive, run_id, "b7", 0.7, (policy(archive.store, "a6"), 0.6))
    flip(registered(home, "a6"))
    with pytest.raises(CorruptArtifact):
        archive.rollback("it swears")
    with pytest.raises(CorruptArtifact):
        archive.promote_by_hand("1", "please")
    assert "posttrain.promoted_by_hand" not in archive.registry.version(MODEL, "1").tags
    assert aliases(archive) == {"1": ("previous",), "2": ("challenger", "champion")}


class TestApproval:
    """A decision that waits for a person."""

    def waiting(self, archive: Archive, run_id: str) -> PromotionDecision:
        promote(archive, run_id, "a6", 0.6)
        against = (policy(archive.store, "a6"), 0.6)
        return promote(archive, run_id, "b7", 0.7, against, approval=True)

    def asked(self, archive: Archive, against: str = "a6", value: float = 0.6) -> Any:
        incumbent = (policy(archive.store, against), value)
        return request(archive.store, "b7", 0.7, incumbent, approval=True)

    def test_what_fails_the_gate_does_not_wait(self, archive: Archive, run_id: str) -> None:
        decision = promote(archive, run_id, "a4", 0.4, approval=True)
        assert (decision.awaiting_approval, decision.outcome) == (False, "refused by the gate")
        with pytest.raises(UserError, match="not awaiting approval: refused by the gate"):
            archive.approve("1", granted=True, by="ada", reason="still")

    def test_approved(self, archive: Archive, run_id: str) -> None:
        waiting = self.waiting(archive, run_id)
        assert waiting.awaiting_approval
        assert not waiting.promoted
        assert waiting.aliases == ("challenger",)
        assert archive.approval(self.asked(archive)) is None

        done = archive.approve("challenger", granted=True, by="ada", reason="I read 20 answers")
        assert done.promoted
        assert done.checks == waiting.checks
        assert done.reasons == ("gain +0.1", "approved by ada: I read 20 answers")
        assert aliases(archive) == {"1": ("previous",), "2": ("challenger", "champion")}
        said = archive.approval(self.asked(archive))
        assert said is not None
        assert said == done.approval
        assert (said.by, said.granted, said.decision) == ("ada", True, waiting.fingerprint)
        tags = archive.registry.version(MODEL, "2").tags
        assert json.loads(tags["posttrain.approval"])["by"] == "ada"
        assert tags["posttrain.decision"] == done.fingerprint
        assert tags["posttrain.run"] == "run"  # lineage stays

        assert archive.approve("2", granted=True, by="bob", reason="me too") == done
        with pytest.raises(UserError, match="is not awaiting approval: approved by ada"):
            archive.approve("2", granted=False, by="bob", reason="no")

    def test_refused(self, archive: Archive, run_id: str) -> None:
        self.waiting(archive, run_id)
        done = archive.approve("2", granted=False, by="ada", reason="it swears")
        assert (done.promoted, done.outcome) == (False, "refused by ada")
        assert aliases(archive) == {"1": ("champion",), "2": ("challenger",)}
        with pytest.raises(UserError, match="not awaiting approval: refused by ada"):
            archive.approve("2", granted=True, by="bob", reason="does not")

    def test_another_champion_since_then(self, archive: Archive, run_id: str) -> None:
        self.waiting(archive, run_id)
        promote(archive, run_id, "c8", 0.8, (policy(archive.store, "a6"), 0.6))
        with pytest.raises(UserError, match="another model has become the champion since"):
            archive.approve("2", granted=True, by="ada", reason="fine")
        assert archive.registry.champion(MODEL).version == "3"  # type: ignore[union-attr]
        # Judged again, against the other one, nobody has said anything yet.
        again = self.asked(archive, "c8", 0.8)
        assert archive.approval(again) is None

    def test_an_approval_that_is_cut_short(
        self, archive: Archive, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waiting = self.waiting(archive, run_id)
        with monkeypatch.context() as patch:

            def die(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Registry, "promote", die)
            with pytest.raises(KeyboardInterrupt):
                archive.approve("2", granted=True, by="ada", reason="fine")
        with pytest.raises(UserError, match="not awaiting approval: approved by ada"):
            archive.approve("2", granted=False, by="bob", reason="no")
        done = archive.approve("2", granted=True, by="bob", reason="again")
        assert done.promoted
        assert done.approval is not None
        assert (done.approval.by, done.approval.decision) == ("ada", waiting.fingerprint)

    def test_files_that_were_changed_while_it_waited(
        self, home: Home, archive: Archive, run_id: str
    ) -> None:
        self.waiting(archive, run_id)
        flip(registered(home, "b7"))
        with pytest.raises(CorruptArtifact):
            archive.approve("2", granted=True, by="ada", reason="fine")
        assert archive.registry.champion(MODEL).version == "1"  # type: ignore[union-attr]
