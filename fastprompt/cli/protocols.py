"""`fastprompt protocols`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastprompt.terminal import say


@dataclass
class Protocols:
    """List the papers' protocols and their data sets, which of them are on this disk, and how to get the others."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """Protocol to describe, or a TOML file of your own; all if not given."""
    data_root: Path | None = None
    """Folder to look for the data in."""
    debug: bool = False
    """Show the traceback of an error."""


def protocols(command: Protocols) -> None:
    """Run `fastprompt protocols`."""
    from fastprompt.protocols import Protocol, list_protocols, load_protocol
    from fastprompt.runs.tables import text_table

    def described(protocol: Protocol) -> None:
        found = {} if command.data_root is None else protocol.found(command.data_root)
        header = ["task", "classes", "train", "val", "test", *(["found"] if found else [])]
        rows = [
            [
                task.name,
                str(task.classes),
                *(f"{getattr(task, part):,}{'?' * (part in task.unconfirmed)}" for part in ("train", "val", "test")),
                *([str(found[task.name] or "–")] if found else []),
            ]
            for task in protocol.tasks
        ]
        say(f"{protocol.name}: {protocol.title} ({protocol.paper})\n")
        say(text_table(header, rows))
        seeds = ", ".join(map(str, protocol.seeds))
        images = f"{protocol.size} px, resize {protocol.resize}, augmentation {protocol.augment}"
        say(f"\nimages: {images}, mean {protocol.mean}, std {protocol.std}")
        say(f"final runs: trained on {protocol.final_train.replace('+', ' and ')} images, seeds {seeds}")
        if protocol.base_lrs:
            rates, decays = (" ".join(f"{x:g}" for x in xs) for xs in (protocol.base_lrs, protocol.weight_decays))
            say(f"search: learning rate {rates} (for 256 images a step), weight decay {decays}")
        say(f"as published: {protocol.published}")
        if not all(found.values()) or not found:
            say(f"data: {protocol.get}")
        say(f"one task: fastprompt adapt --data {protocol.name}:{protocol.tasks[0].name} --data-root DIR --out RUN\n")

    for name in list_protocols() if command.name is None else [command.name]:
        described(load_protocol(name))
    say('"?": the number is from memory, and data that differ only give a warning.')
