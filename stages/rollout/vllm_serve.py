"""The process of a vLLM server: `python -m stages.rollout.vllm_serve ARGUMENTS OF VLLM SERVE`.

It dies with the process that started it, and so does every process that it starts itself: vLLM's
engine would outlive a server that was killed, and keep its memory.
"""

from __future__ import annotations

import os
import sys

from infra.launch import PARENT_PID, die_with_parent


def _die_with_parent() -> None:
    die_with_parent()
    os.environ[PARENT_PID] = str(os.getpid())


# A process that multiprocessing spawns runs this module again under the second name.
if __name__ in ("__main__", "__mp_main__"):
    _die_with_parent()
    os.register_at_fork(after_in_child=_die_with_parent)

if __name__ == "__main__":
    from stages.rollout.vllm_engine import serve

    serve(sys.argv[1:])
