"""Where a user's runs live, and the environment that keeps the libraries quiet and inside it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infra.store import Store
from schemas.base import UserError

PREFECT_RETRIES = "7"
"""A Prefect server that is restarted is waited for 2 + 4 + ... + 128 = 254 seconds."""


@dataclass(frozen=True)
class Home:
    """The folder that holds the store, the tracking database and Prefect's own files."""

    root: Path

    @classmethod
    def resolve(cls, flag: str | None) -> Home:
        """The home named by `--home`, by POSTTRAIN_HOME, or `.posttrain` here; it is made."""
        named = flag or os.environ.get("POSTTRAIN_HOME") or ".posttrain"
        home = cls(Path(named).expanduser().absolute())
        if "?" in str(home.root):
            raise UserError(f"home {home.root}: '?' cannot stand in a database path; rename it")
        try:
            for folder in (home.root, home.mlflow_folder, home.prefect_home, home.locks):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=home.root):
                pass
        except OSError as error:
            raise UserError(
                f"home {home.root} cannot be written to ({error.strerror}): "
                "choose another with --home or POSTTRAIN_HOME"
            ) from error
        return home

    @cached_property
    def store(self) -> Store:
        """The store of artifacts; one object, which knows what it has verified and locked."""
        return Store(self.root / "store")

    @property
    def mlflow_folder(self) -> Path:
        """The local tracking database and its artifacts."""
        return self.root / "mlflow"

    @property
    def mlflow_uri(self) -> str:
        """MLFLOW_TRACKING_URI where it is set, else a database inside the home."""
        default = f"sqlite:///{self.mlflow_folder / 'mlflow.db'}"
        return os.environ.get("MLFLOW_TRACKING_URI") or default

    @property
    def prefect_home(self) -> Path:
        """Prefect's database and profiles."""
        return self.root / "prefect"

    @property
    def locks(self) -> Path:
        """Locks that are not about one fingerprint, such as a promotion."""
        return self.root / "locks"


def quiet_environment(home: Home) -> dict[str, str]:
    """Variables to set, where the user has not, before Prefect and MLflow are imported."""
    prefect = home.prefect_home
    return {
        # Nothing is asked of a hub beyond the files that a recipe names.
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        # No telemetry, from anyone.
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Prefect inside the home. PREFECT_HOME alone moves neither results nor the memo store.
        "PREFECT_HOME": str(prefect),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(prefect / "results"),
        "PREFECT_MEMO_STORE_PATH": str(prefect / "memo_store.toml"),
        # A new database on a busy machine takes longer than the default allows.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # A dead tracking server must not hang a run for minutes. Trying again is the business of
        # the outbox and of the registry: MLflow would send a request that creates something twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        # In memory, a server that is restarted forgets who holds a slot, and never frees it again.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "PREFECT_CLIENT_MAX_RETRIES": PREFECT_RETRIES,
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # Standard output is the document of --json.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        # Forking after the tokenizer's threads have started only earns a warning.
        "TOKENIZERS_PARALLELISM": "false",
    }
