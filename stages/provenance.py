"""What every artifact carries about its own making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.code import created_by
from infra.store import Store
from schemas.fingerprint import parents
from schemas.requests import StageRequest
from stages import heartbeat


def provenance(request: StageRequest, content: Path) -> dict[str, Any]:
    """The base fields of an artifact whose content has been written to a folder.

    Returns uri, sha256, fingerprint, parents, mlflow_run_id and created_by.
    """
    heartbeat.beat("computing the digest of the artifact")
    store = Store(request.runtime.store)
    return {
        "uri": store.content_uri(request.fingerprint),
        "sha256": store.seal(content),
        "fingerprint": request.fingerprint,
        "parents": parents(request),
        "mlflow_run_id": request.runtime.mlflow_run_id,
        "created_by": created_by(),
    }
