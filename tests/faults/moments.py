"""The worst moments of a stage, as places in the order of its operations on files."""

from __future__ import annotations

from tests.faults.inject import Fault

_TEMPORARY = r"/checkpoints/\.step-"

CHECKPOINT = {
    "before a checkpoint": Fault("kill", "os.mkdir", _TEMPORARY, nth=3),
    "half of a checkpoint's weights written": Fault(
        "cut", "os.mkdir", _TEMPORARY, nth=3, number=20_000
    ),
    "weights of a checkpoint written, state not": Fault(
        "kill", "write", _TEMPORARY + r".*/state\.json", nth=2
    ),
    "checkpoint written, manifest not": Fault(
        "kill", "write", _TEMPORARY + r".*/manifest\.json", nth=2
    ),
    "checkpoint complete, not yet renamed": Fault(
        "kill", "os.rename", _TEMPORARY + r".* -> .*/step-", nth=2
    ),
    "checkpoint renamed, folder not yet flushed": Fault("kill", "open", r"/checkpoints$", nth=2),
    "old checkpoint half deleted": Fault("kill", "os.remove", r"^rng\.pt$", nth=1),
}
"""Only of a stage that writes checkpoints, at its second one. The first is made in two calls: its
folder has to be made too."""

PUBLISH = {
    "artifact's content half written": Fault("cut", "os.mkdir", r"/content$", number=500),
    "content moved, artifact not yet renamed": Fault("kill", "os.rename", r"/publish -> "),
    "before the content is moved": Fault("kill", "os.rename", r"/content -> .*/publish/content"),
    "artifact renamed, result not written": Fault("kill", "open", r"/artifacts$"),
    "before the cleaning up after it": Fault("kill", "shutil.rmtree", r"/work/.*/checkpoints$"),
    "result written, not yet renamed": Fault("kill", "os.rename", r"-> .*/result\.json"),
}
"""Of every stage."""
