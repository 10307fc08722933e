"""What the process of a stage imports, and what it does not."""

from __future__ import annotations

import gc
import importlib
import sys

# For object detection and assisted decoding, which no stage does: 0.8 s and 110 MB of each process.
_UNUSED = ("scipy", "sklearn")


def hide_unused_packages() -> None:
    """Let transformers not find SciPy and scikit-learn, which it imports wherever they are.

    To be called before anything imports it. It looks once and remembers; anybody else may
    import them as ever.
    """
    missing = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    try:
        # Importing it takes a second, which only those who need it are to pay.
        from transformers.utils.import_utils import is_scipy_available, is_sklearn_available

        is_scipy_available()
        is_sklearn_available()
    finally:
        for name in missing:
            del sys.modules[name]


def import_stage(name: str, *, hide: bool) -> None:
    """Import `stages.NAME` and all that it takes, before it runs; `hide` what transformers would.

    Garbage is not collected meanwhile, and what was imported is left out of later collections: each
    of them looks at every object, of which torch and transformers make more than half a million.
    """
    gc.disable()
    try:
        if hide:
            hide_unused_packages()
        importlib.import_module(f"stages.{name}")
    finally:
        gc.freeze()
        gc.enable()
