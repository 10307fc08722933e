"""What a training loop says and checks when it starts, resumes, or is about to keep its weights."""

from __future__ import annotations

import logging

from schemas.base import UserError
from stages.checkpoint import Checkpoint, Checkpoints
from stages.stability import Unstable

logger = logging.getLogger(__name__)


def say_resumed(checkpoint: Checkpoint, num_steps: int, cursor: str) -> None:
    """Say at which step and with which data cursor a stage goes on, and on whose work."""
    if checkpoint.step >= num_steps:
        logger.info(
            "nothing left to train: all %d steps were done before; writing the artifact", num_steps
        )
    else:
        logger.info("resuming at step %d of %d: %s", checkpoint.step, num_steps, cursor)
    if checkpoint.changed_code:
        logger.warning(
            "the checkpoint was written by other code: since then, %s changed; "
            "--rerun-changed-code starts such work anew",
            ", ".join(checkpoint.changed_code),
        )


def data_cursor(position: int, num_records: int, what: str = "record") -> str:
    """A position in the data, counted over epochs, for people: epoch from 1, record from 0."""
    epoch, offset = divmod(position, num_records)
    return f"epoch {epoch + 1}, {what} {offset} of {num_records} in the data order"


def refuse_ruined(checkpoints: Checkpoints) -> None:
    """Raise Unstable if the weights are not finite: they must not be kept as a good checkpoint."""
    name = checkpoints.ruined()
    if name is not None:
        raise Unstable(
            "non_finite",
            f"weight {name} is not finite any more",
            value=float("nan"),
            limit=None,
            remedy="lower the learning rate, or set non_finite to rewind",
            skippable=False,
        )


def regular_step(step: int, checkpoint_every: int) -> int:
    """Step of the last regular checkpoint at `step`: what training goes back to.

    A checkpoint that was written because the stage was asked to leave is never gone back to, so
    that a run that was interrupted goes the way of one that was not.
    """
    return step // checkpoint_every * checkpoint_every


def go_back(checkpoints: Checkpoints, step: int) -> Checkpoint:
    """Load the checkpoint of `step`, or an intact one before it. Raises UserError without one."""
    found = checkpoints.resume(last=step)
    if found is None:
        raise UserError(
            f"there is no intact checkpoint of step {step} or before to go back to: "
            "run again, and the stage starts anew"
        )
    return found
