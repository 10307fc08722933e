"""The process of one stage: `python -m stages.main WORK_DIR`.

Reads `request.json`, runs the stage, publishes its artifact, and leaves `result.json`.
"""

from __future__ import annotations

import errno
import logging
import shutil
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from infra.launch import die_with_parent, write_result
from infra.redaction import redact_process
from infra.store import Store
from infra.tracking import FileTracker, Tracker
from schemas.artifacts import AnyArtifact
from schemas.base import UserError
from schemas.fingerprint import fingerprint
from schemas.requests import AnyRequest, request_adapter
from stages import heartbeat, termination
from stages.imports import import_stage

logger = logging.getLogger("posttrain")

# These leave after a checkpoint; the others have nothing to save, and SIGTERM simply ends them.
_WITH_CHECKPOINTS = (
    "train_sft",
    "train_reward_model",
    "train_process_reward_model",
    "train_rl",
)

# These do without transformers.
_WITHOUT_TRANSFORMERS = ("prepare_data", "credit")


class DamagedRequest(UserError):
    """The file does not hold what was asked; another attempt writes it anew."""


# Failures of the machine, which another attempt may not meet again.
_TRANSIENT = (OSError, MemoryError, TimeoutError)
_LITTLE_SPACE = 1 << 20
"""Bytes; a disk with less is full."""


def main() -> int:
    """Exit code 0 for a finished stage, 2 for a user's error, 75 when asked to stop, else 1."""
    die_with_parent()
    redact_process()
    work_dir = Path(sys.argv[1])
    heartbeat.install(work_dir)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    tracker = FileTracker(work_dir / "metrics.jsonl")
    try:
        request = read_request(work_dir / "request.json")
        if request.stage in _WITH_CHECKPOINTS:
            termination.install()
        heartbeat.beat(f"importing {request.stage}")
        import_stage(request.stage, hide=request.stage not in _WITHOUT_TRANSFORMERS)
        artifact = run_stage(request, run_dir=work_dir, tracker=tracker)
        heartbeat.beat("publishing the artifact")
        Store(request.runtime.store).publish(request.fingerprint, artifact)
    except termination.Terminated as stopped:
        logger.info("%s", stopped)
        write_result(work_dir, "terminated", str(stopped), retryable=True)
        return termination.EXIT_CODE
    except DamagedRequest as error:
        write_result(work_dir, "failed", str(error), retryable=True)
        return 1
    except UserError as error:
        write_result(work_dir, "user_error", str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        full = _disk_is_full(error, work_dir)
        message = f"the disk is full: free space for {work_dir}, then run again; " if full else ""
        write_result(
            work_dir,
            "failed",
            f"{message}{type(error).__name__}: {error}",
            retryable=isinstance(error, _TRANSIENT) and not full,
        )
        return 1
    write_result(work_dir, "done", resumed_from_step=tracker.resumed_from_step)
    return 0


def read_request(path: Path) -> AnyRequest:
    """The request that the flow has written. Raises `DamagedRequest` for anything else."""
    try:
        request = request_adapter.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise DamagedRequest(
            f"{path} is no request of this version ({reason}): run the same command again"
        ) from error
    if fingerprint(request) != request.fingerprint:
        raise DamagedRequest(f"{path} is not the request {request.fingerprint[:12]}: run again")
    return request


def run_stage(request: AnyRequest, *, run_dir: Path, tracker: Tracker) -> AnyArtifact:
    """Run the stage that a request is for. Each is imported only when it runs."""
    if request.stage not in _WITHOUT_TRANSFORMERS:
        _prepare_torch(request)
    match request.stage:
        case "prepare_data":
            from stages import prepare_data

            return prepare_data.run(request, run_dir=run_dir, tracker=tracker)
        case "credit":
            from stages import credit

            return credit.run(request, run_dir=run_dir, tracker=tracker)
        case "train_sft":
            from stages import train_sft

            return train_sft.run(request, run_dir=run_dir, tracker=tracker)
        case "sample_preferences":
            from stages import sample_preferences

            return sample_preferences.run(request, run_dir=run_dir, tracker=tracker)
        case "label_steps":
            from stages import label_steps

            return label_steps.run(request, run_dir=run_dir, tracker=tracker)
        case "train_reward_model":
            from stages import train_reward_model

            return train_reward_model.run(request, run_dir=run_dir, tracker=tracker)
        case "train_process_reward_model":
            from stages import train_process_reward_model

            return train_process_reward_model.run(request, run_dir=run_dir, tracker=tracker)
        case "train_rl":
            from stages import train_rl

            return train_rl.run(request, run_dir=run_dir, tracker=tracker)
        case "evaluate":
            from stages import evaluate

            return evaluate.run(request, run_dir=run_dir, tracker=tracker)


def _prepare_torch(request: AnyRequest) -> None:
    import transformers

    from infra.devices import configure_threads, deterministic

    configure_threads(request.runtime.num_threads)
    deterministic()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _disk_is_full(error: Exception, work_dir: Path) -> bool:
    """Whether space was missing: not every library raises the system's own error then."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return shutil.disk_usage(work_dir).free < _LITTLE_SPACE


if __name__ == "__main__":
    sys.exit(main())
