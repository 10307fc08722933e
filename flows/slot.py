"""The device as a Prefect concurrency limit, so that two runs do not share it.

Prefect's own context manager gives up renewing a lease after three tries in some seconds: a server
that is restarted then hands the slot to another run while its holder still computes.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.exceptions import ObjectNotFound

from schemas.base import UserError

_LEASE_SECONDS = 120.0
"""A killed run gives its slot back after so long; a server may be away for as long."""
_RENEW_SECONDS = 15.0
_ASK_SECONDS = 5.0
"""Between two questions for a slot that another run holds."""
_PATIENCE_SECONDS = 300.0
"""A server that does not answer is waited for so long before a stage begins."""
_WITHOUT_DEVICE = ("prepare_data", "promote")
"""Stages that need no slot: they read files, and the registry."""

Log = Callable[[str], None]


@contextlib.contextmanager
def device_slot(name: str | None, stage: str, log: Log) -> Iterator[None]:
    """Hold a slot of the limit `compute.slot` while a stage works; waits until one is free.

    A Prefect server that is away for a while does not end a stage that holds its slot. Raises
    ConnectionError where the server is away for minutes before the stage begins.
    """
    if name is None or stage in _WITHOUT_DEVICE:
        yield
        return
    _patiently(lambda: _require(name), log)
    log(f"waiting for a slot of {name}")
    lease = _Lease(name, _acquire(name, log), log)
    log(f"holding a slot of {name}")
    try:
        yield
    finally:
        lease.release()


class _Lease:
    """A slot that is held, and renewed in the background for as long as it is."""

    def __init__(self, name: str, lease: UUID, log: Log) -> None:
        self._name = name
        self._lease = lease
        self._log = log
        self._away = False
        self._stop = threading.Event()
        # Which server a client asks is a matter of this thread's context.
        work = contextvars.copy_context()
        self._thread = threading.Thread(
            target=work.run, args=(self._renew,), name="slot", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        """Give the slot back; a server that is away takes it back itself when the lease is over."""
        self._stop.set()
        self._thread.join(_RENEW_SECONDS)
        with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(self._lease)

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            try:
                self._renew_once()
            except httpx.HTTPError as error:
                if not self._away:
                    self._log(f"Prefect's server does not renew the slot of {self._name}: {error}")
                self._away = True
            else:
                self._away = False

    def _renew_once(self) -> None:
        try:
            # A new client each time: it says at once that nobody is there, and does not wait longer
            # and longer for it.
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(self._lease, _LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.GONE:
                raise
            found = _try_acquire(self._name)
            if found is None:
                self._log(f"the slot of {self._name} was lost, and another run holds it now")
            else:
                self._lease = found


def _acquire(name: str, log: Log) -> UUID:
    """A lease on a slot, as soon as one is free."""
    found: list[UUID] = []

    def ask() -> None:
        lease = _try_acquire(name)
        if lease is not None:
            found.append(lease)

    while not found:
        _patiently(ask, log)
        if not found:
            time.sleep(_ASK_SECONDS)
    return found[0]


def _try_acquire(name: str) -> UUID | None:
    """A lease on a slot, or None while all are taken."""
    with get_client(sync_client=True) as client:
        try:
            response = client.increment_concurrency_slots_with_lease(
                [name], 1, "concurrency", _LEASE_SECONDS
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.LOCKED:
                raise
            return None
    return ConcurrencyLimitWithLeaseResponse.model_validate(response.json()).lease_id


def _patiently(ask: Callable[[], None], log: Log) -> None:
    """Ask Prefect's server until it answers; a new connection of its client is not tried again.

    Raises ConnectionError when it has been away for minutes, which the stage's retries then meet.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    pause = 1.0
    while True:
        try:
            ask()
            return
        except httpx.TransportError as error:
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
