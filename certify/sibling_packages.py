"""The packages beside this one: a user's folder that is called analysis must not be taken for ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def claim() -> None:
    """Import them from where this package lies, before the current folder may come first; their modules follow them."""
    beside = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, beside)
    try:
        for name in ("analysis", "denoisers", "training"):
            importlib.import_module(name)
    finally:
        sys.path.remove(beside)
