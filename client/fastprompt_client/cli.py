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
    """Build the command's argument parser."""
    made = argparse.ArgumentParser(
        prog="fastprompt-client",
        description="Classify images with a frozen vision transformer that a host runs.",
        epilog=f"Exit codes: 0 success, 1 the host failed or was refused, 2 wrong input. The host's API key, if it "
        f"requires one, is read from the environment variable {KEY}.",
    )
    made.add_argument("folder", type=Path, help="folder written by `fastprompt export --client`")
    made.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="image files to classify; without any, verify the host"
    )
    made.add_argument("--url", help="address of the host; it is verified before anything else is sent to it")
    made.add_argument("--model", help="name of the host's model to use")
    made.add_argument("--png", type=Path, help="write the prompted picture of the only image to this file")
    made.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for the host (default 30)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = parser().parse_args(arguments)
    try:
        if given.png is not None and len(given.images) != 1:
            raise ValueError(f"--png must be given with one image, got {len(given.images)}")
        if given.url is None and given.png is None:
            raise ValueError("--url or --png must be given")
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
    """Format JSON on one line with control and invisible characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)
