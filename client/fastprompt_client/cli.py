"""The command `fastprompt-client`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastprompt_client.client import Client
from fastprompt_client.host import HostError, printable

KEY = "FASTPROMPT_API_KEY"


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="fastprompt-client",
        description="Classify images with a frozen vision transformer that a host runs.",
        epilog=f"Exit codes: 0 done, 1 the host failed or was refused, 2 wrong input. The host's key, if it wants one, "
        f"is read from the environment variable {KEY}.",
    )
    made.add_argument("folder", type=Path, help="what `fastprompt export --client` wrote")
    made.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files; none: the host is verified")
    made.add_argument("--url", help="the host; it is verified before anything else is sent to it")
    made.add_argument("--model", help="which of the host's models")
    made.add_argument("--png", type=Path, help="write the picture with prompts of the (one) image to this file")
    made.add_argument("--timeout", type=float, default=30.0, help="seconds (default 30)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        if given.png is not None and len(given.images) != 1:
            raise ValueError(f"--png: takes one image, got {len(given.images)}")
        if given.url is None and given.png is None:
            raise ValueError("--url or --png: one of them is needed")
        client = Client(given.folder, model=given.model, api_key=os.environ.get(KEY) or None, timeout=given.timeout)
        if given.png is not None:
            given.png.write_bytes(client.png(given.images[0]))
        if given.url is None:
            return 0
        if not given.images:
            print(printable(client.verify(given.url).message))
        for image in given.images:
            found = client.predict(given.url, image)
            print(json_line({"file": str(image), "class": found.name, "probability": round(found.probability, 6)}))
        return 0
    except (HostError, ValueError, TypeError, OSError) as error:
        print(f"fastprompt-client: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if not isinstance(error, HostError) else 1


def json_line(value: Any) -> str:
    """JSON on one line, in which characters that a terminal would obey, or not show, are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)
