"""`fastprompt demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import Plugins, set_threads
from fastprompt.terminal import say


@dataclass
class Demo:
    """Show on a web page what adapters make of pictures: classes, maps of their prompts, tokens of their library.

    The page is for this machine or a network that you trust: it has no keys and few limits. `fastprompt serve` is the
    host for others.
    """

    adapters: tyro.conf.Positional[Annotated[list[str], tyro.conf.arg(metavar="[NAME=]ADAPTER")]]
    """Adapter or run directories, or repositories of the Hugging Face Hub, as owner/name; NAME is shown."""
    backbone: str | None = None
    """Backbone of all adapters; if not given, the one that each records."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for the whole network."""
    port: int = 7860
    """Port to listen on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def named(texts: list[str]) -> dict[str, Path]:
    """Parse the words `[NAME=]ADAPTER`; without NAME, an adapter has the name of its folder or repository."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, where = text.partition("=")
        if not equals:
            name, where = Path(text).resolve().name, text
        if not name or not where:
            raise ArgumentError("adapters", f"must be ADAPTER or NAME=ADAPTER, got {text!r}")
        if name in found:
            raise ArgumentError("adapters", f"must have different names, got {name!r} twice: give NAME=ADAPTER")
        found[name] = Path(where)
    return found


def demo(command: Demo) -> None:
    """Run `fastprompt demo` until Ctrl+C."""
    from fastprompt.runs.devices import find_device
    from fastprompt.webdemo.models import load_models
    from fastprompt.webdemo.page import launch

    adapters, device = named(command.adapters), find_device(command.device)
    set_threads(command.threads)
    page, address = launch(load_models(adapters, command.backbone, device), command.host, command.port)
    say(f"{len(adapters)} adapters on {address}; Ctrl+C ends the page")
    page.block_thread()
