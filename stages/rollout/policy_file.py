"""The policy's weights as a file that other processes read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from stages.adapters import plain_parameters

_SHARED_MEMORY = Path("/dev/shm")
_NAME = "policy.safetensors"


class PolicyFile:
    """Holds one version of the weights at a time, in shared memory or in a folder.

    A file in shared memory has no name: it is reached through this process and goes when this
    process goes, however it ends. A folder (None: shared memory) is for servers on another machine.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    @property
    def path(self) -> str:
        """Where the newest version is to be read; the next `write` ends it."""
        if self._folder is not None:
            return str((self._folder / _NAME).absolute())
        assert self._descriptor is not None, "nothing has been written yet"
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, policy: PreTrainedModel) -> None:
        """Put the newest weights in place of the old: tied ones once, adapters merged."""
        weights = {name: value.contiguous() for name, value in plain_parameters(policy)}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, self._folder / _NAME)
            return
        self.close()
        memory = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="posttrain-", dir=memory) as folder:
            save_file(weights, Path(folder, _NAME))
            self._descriptor = os.open(Path(folder, _NAME), os.O_RDONLY)

    def close(self) -> None:
        """Remove the file."""
        if self._folder is not None:
            (self._folder / _NAME).unlink(missing_ok=True)
        elif self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
