"""The device as a Prefect concurrency limit, so that two runs do not share it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from prefect.client.orchestration import get_client
from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from schemas.base import UserError

_LEASE_SECONDS = 60.0
"""A killed run gives its slot back after so long."""
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
    _require(name)
    log(f"waiting for a slot of {name}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                concurrency(
                    name,
                    occupy=1,
                    strict=True,
                    lease_duration=_LEASE_SECONDS,
                    raise_on_lease_renewal_failure=False,
                )
            )
        except ConcurrencySlotAcquisitionError as error:
            raise ConnectionError(f"no slot of {name} from Prefect: {error}") from error
        log(f"holding a slot of {name}")
        yield


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
