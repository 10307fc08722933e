"""Python imports this when it starts, where the folder is on its path: see `inject.py`."""

from tests.faults.inject import from_environment

from_environment()
