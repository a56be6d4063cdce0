"""The command line: a thin shell over the API, with a command for each file (`fastprompt adapt`, `eval`, ...).

Exit codes: 0 success, 1 failure at run time (disk, network, diverged training), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

from fastprompt.cli.main import main

__all__ = ["main"]
