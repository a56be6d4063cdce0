"""`python -m fastprompt`."""

from __future__ import annotations

import sys

from fastprompt.cli import main

sys.exit(main())
