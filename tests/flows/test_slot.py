from __future__ import annotations

import contextvars
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows import slot
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.slot import device_slot
from infra.environment import Home
from schemas.base import UserError
from tests.servers import STANDSTILL_SECONDS, PrefectServer, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def limit() -> str:
    name = f"gpu-{time.time_ns()}"
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    return name


def in_a_thread(work: Callable[[], None]) -> threading.Thread:
    """A thread that uses the same Prefect server; which one that is is a matter of context."""
    return threading.Thread(target=contextvars.copy_context().run, args=(work,))


def expiration(server: PrefectServer, name: str) -> str:
    """When the newest lease of a limit is over, as its file says; other tests leave theirs."""
    with get_client(sync_client=True) as client:
        limit = str(client.read_global_concurrency_limit_by_name(name).id)
    leases = (server.folder / "server" / "prefect" / "concurrency_leases").glob("*-*.json")
    found = [json.loads(path.read_text()) for path in leases]
    return max(lease["expiration"] for lease in found if limit in lease["resource_ids"])


def active_slots(name: str) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name).active_slots


def test_one_waits_for_the_other(limit: str) -> None:
    order: list[str] = []
    held = threading.Event()

    def first() -> None:
        with device_slot(limit, "train_rl", order.append):
            held.set()
            time.sleep(2)
            order.append("first ends")

    thread = in_a_thread(first)
    thread.start()
    held.wait(30)
    with device_slot(limit, "train_sft", lambda text: None):
        order.append("second begins")
    thread.join()
    assert order[-2:] == ["first ends", "second begins"]
    assert active_slots(limit) == 0


def test_without_a_slot_nobody_is_asked() -> None:
    lines: list[str] = []
    with device_slot(None, "train_rl", lines.append), device_slot("x", "promote", lines.append):
        assert lines == []


@pytest.mark.usefixtures("tracked_home")
def test_a_run_holds_its_slot_while_it_computes(
    home: Home, stages: Any, files_recipe: Path, limit: str
) -> None:
    with pytest.raises(UserError, match="prefect gcl create nowhere --limit 1"):
        post_train(
            load_recipe(str(files_recipe), ["compute.slot=nowhere"]),
            home=str(home.root),
        )
    held: dict[str, int] = {}
    stages.before = lambda request: held.__setitem__(request.stage, active_slots(limit))
    post_train(load_recipe(str(files_recipe), [f"compute.slot={limit}"]), home=str(home.root))
    assert held["train_sft"] == held["train_rl"] == held["evaluate"] == 1
    assert "prepare_data" not in held  # done in the first attempt, which needed no slot
    assert active_slots(limit) == 0


def test_a_server_that_is_restarted_does_not_lose_the_slot(
    limit: str, real_prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is renewed while the server is away, and when it is back; with leases in the server's
    memory it would be taken for ever."""
    monkeypatch.setattr(slot, "_RENEW_SECONDS", 1.0)
    monkeypatch.setattr(slot, "_ASK_SECONDS", 1.0)
    order: list[str] = []

    def second() -> None:
        with device_slot(limit, "train_sft", lambda text: None):
            order.append("second begins")

    thread = in_a_thread(second)
    with device_slot(limit, "train_rl", order.append):
        real_prefect.kill()
        thread.start()  # it asks while the server is away
        time.sleep(10)  # Prefect's own renewal has given up by now
        real_prefect.start()
        assert active_slots(limit) == 1
        before = expiration(real_prefect, limit)
        wait_for(lambda: expiration(real_prefect, limit) > before, STANDSTILL_SECONDS)
        assert "second begins" not in order
        order.append("first ends")
    thread.join(90)
    assert order[-2:] == ["first ends", "second begins"]
    assert active_slots(limit) == 0
