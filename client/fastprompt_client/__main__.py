"""`python -m fastprompt_client`."""

from __future__ import annotations

import sys

from fastprompt_client.cli import main

sys.exit(main())
