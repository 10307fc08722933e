"""The server that tests share is alive at the beginning of each."""

from __future__ import annotations

import pytest

from tests.servers import PrefectServer


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(real_prefect: PrefectServer) -> None:
    process = real_prefect.process.process.pid
    real_prefect.revive()
    assert real_prefect.process.process.pid == process
    real_prefect.process.suspend()
    with pytest.warns(UserWarning, match="is started again: timed out"):
        real_prefect.revive(patience=2.0)
    assert real_prefect.answers()
    assert real_prefect.process.process.pid != process
