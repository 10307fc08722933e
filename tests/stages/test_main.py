"""The process of a stage, as the flow starts it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.files import disk_full_named
from schemas.data import DataSource
from schemas.fingerprint import fingerprint
from schemas.requests import PrepareDataRequest, Runtime
from stages import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"count":4', '"count":5', "is not the request"),
        ('"prepare_data"', '"prepare_date"', "is no request of this version"),
    ],
)
def test_a_changed_request_is_refused_and_tried_again(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    request = PrepareDataRequest(
        runtime=Runtime(store=str(tmp_path)),
        split="prompts",
        layout="verifiable",
        source=DataSource(generator="stages.tasks.arithmetic:problems", arguments={"count": 4}),
    )
    request = request.model_copy(update={"fingerprint": fingerprint(request)})
    text = request.model_dump_json()
    assert old in text
    (tmp_path / "request.json").write_text(text.replace(old, new))
    command = [sys.executable, "-m", "stages.main", str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert result["status"] == "failed"
    assert message in result["message"]
    assert result["retryable"]
    assert not (tmp_path / "content").exists()


def test_a_full_disk_is_seen_whatever_a_library_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main._disk_is_full(OSError(errno.ENOSPC, "full"), tmp_path)
    with pytest.raises(OSError, match="full") as caught, disk_full_named(tmp_path):
        raise OSError(errno.EDQUOT, "quota")
    assert main._disk_is_full(caught.value, tmp_path)
    assert not main._disk_is_full(OSError(errno.EIO, "lost"), tmp_path)
    assert not main._disk_is_full(RuntimeError("file write failed"), tmp_path)
    monkeypatch.setattr(main, "_LITTLE_SPACE", 1 << 62)
    assert main._disk_is_full(RuntimeError("file write failed"), tmp_path)
