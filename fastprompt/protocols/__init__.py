"""The papers' evaluation protocols as data: which images train, which choose, which test, and what is searched.

Each protocol is a TOML file in this folder. `tables.py` reads it, `layouts.py` reads the lists that its publishers ship
beside the images, and `splits.py` turns both into checked `DataSplits`.
"""

from __future__ import annotations

from fastprompt.protocols.tables import Protocol, list_protocols, load_protocol, named_task
from fastprompt.protocols.tasks import Task

__all__ = ["Protocol", "Task", "list_protocols", "load_protocol", "named_task"]
