"""The device as a Prefect concurrency limit, so that two runs do not share it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from schemas.base import UserError

_LEASE_SECONDS = 60.0
"""A killed run gives its slot back after so long."""
_PATIENCE_SECONDS = 300.0
"""A server that is restarted is waited for so long."""
_WITHOUT_DEVICE = ("prepare_data", "promote")
"""Stages that need no slot: they read files, and the registry."""


@contextlib.contextmanager
def device_slot(name: str | None, stage: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold a slot of the limit `compute.slot` while a stage works; waits until one is free.

    A Prefect server that is away for a while does not end a stage that holds its slot.
    """
    if name is None or stage in _WITHOUT_DEVICE:
        yield
        return
    _patiently(lambda: _require(name), log)
    log(f"waiting for a slot of {name}")
    with contextlib.ExitStack() as stack:
        _patiently(lambda: stack.enter_context(_held(name)), log)
        log(f"holding a slot of {name}")
        yield


def _held(name: str) -> contextlib.AbstractContextManager[None]:
    return concurrency(
        name,
        occupy=1,
        strict=True,
        lease_duration=_LEASE_SECONDS,
        raise_on_lease_renewal_failure=False,
    )


def _patiently(ask: Callable[[], object], log: Callable[[str], None]) -> None:
    """Ask Prefect's server until it answers; a new connection of its client is not tried again.

    Raises ConnectionError when it has been away for minutes, which the stage's retries then meet.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    pause = 1.0
    while True:
        try:
            ask()
            return
        except (httpx.TransportError, ConcurrencySlotAcquisitionError) as error:
            if time.monotonic() + pause > deadline:
                raise ConnectionError(f"no slot from Prefect's server: {error}") from error
            log(f"Prefect's server does not answer ({error}); asking again in {pause:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _require(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            limit = None
    if limit is None or not limit.active:
        raise UserError(
            f"compute.slot {name}: this Prefect server has no such active concurrency limit; "
            f"make one with prefect gcl create {name} --limit 1"
        )
