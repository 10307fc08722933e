"""The process of one stage: `python -m stages.main WORK_DIR`.

Reads `request.json`, runs the stage, publishes its artifact, and leaves `result.json`.
"""

from __future__ import annotations

import errno
import logging
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
from schemas.requests import AnyRequest, request_adapter
from stages import heartbeat, termination

logger = logging.getLogger("posttrain")

# These leave after a checkpoint; the others have nothing to save, and SIGTERM simply ends them.
_WITH_CHECKPOINTS = (
    "train_sft",
    "train_reward_model",
    "train_process_reward_model",
    "train_rl",
)

# Failures of the machine, which another attempt may not meet again.
_TRANSIENT = (OSError, MemoryError, TimeoutError)


def main() -> int:
    """Exit code 0 for a finished stage, 2 for a user's error, 75 when asked to stop, else 1."""
    die_with_parent()
    redact_process()
    work_dir = Path(sys.argv[1])
    heartbeat.install(work_dir)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        request = read_request(work_dir / "request.json")
    except UserError as error:
        write_result(work_dir, "user_error", str(error))
        return 2
    if request.stage in _WITH_CHECKPOINTS:
        termination.install()
    tracker = FileTracker(work_dir / "metrics.jsonl")
    try:
        artifact = run_stage(request, run_dir=work_dir, tracker=tracker)
        heartbeat.beat("publishing the artifact")
        Store(request.runtime.store).publish(request.fingerprint, artifact)
    except termination.Terminated as stopped:
        logger.info("%s", stopped)
        write_result(work_dir, "terminated", str(stopped), retryable=True)
        return termination.EXIT_CODE
    except UserError as error:
        write_result(work_dir, "user_error", str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        write_result(work_dir, "failed", _describe(error), retryable=isinstance(error, _TRANSIENT))
        return 1
    write_result(work_dir, "done", resumed_from_step=tracker.resumed_from_step)
    return 0


def read_request(path: Path) -> AnyRequest:
    """The request that the flow has written. Raises `UserError` for anything else."""
    try:
        return request_adapter.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UserError(
            f"{path} is no request of this version ({reason}): run the same command again"
        ) from error


def run_stage(request: AnyRequest, *, run_dir: Path, tracker: Tracker) -> AnyArtifact:
    """Run the stage that a request is for. Stages are imported here, each only when it runs."""
    if request.stage == "prepare_data":
        from stages import prepare_data

        return prepare_data.run(request, run_dir=run_dir, tracker=tracker)
    if request.stage == "credit":
        from stages import credit

        return credit.run(request, run_dir=run_dir, tracker=tracker)
    _prepare_torch(request)
    match request.stage:
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
    heartbeat.beat("importing torch and transformers")
    import transformers

    from infra.devices import configure_threads, deterministic

    configure_threads(request.runtime.num_threads)
    deterministic()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    heartbeat.beat(f"importing {request.stage}")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk ({error.filename}): free some, then run again"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
