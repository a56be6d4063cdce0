"""`fastprompt export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fastprompt.cli.options import Plugins, load_adapter, set_threads


@dataclass
class Export:
    """Write an adapter whose prompts are pixels as a folder for `fastprompt-client`, which needs no torch."""

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory: method rgb-pgn (placement extend or replace), pixel, or pgn with --invert."""
    out: Path
    """Folder to write."""
    client: bool = False
    """Has to be given: a client's folder is the only kind of export there is."""
    invert: bool = False
    """Make pictures of the token prompts of a PGN first; `fastprompt info --rgb` says what is lost."""
    golden: Path | None = None
    """Image file that hosts are verified with; one made of gradients, edges and noise if not given."""
    resize: Literal["crop", "squash"] | None = None
    """How the client brings images to the backbone's size; as in training if not given."""
    backbone: str | None = None
    """Needed where neither the adapter nor the run directory says."""
    image_size: int | None = None
    threads: int | None = None
    plugin: Plugins = field(default_factory=list)
    """Module that registers methods of your own: its name or its .py file; once for each."""
    debug: bool = False
    """Show the traceback of an error."""


def export(command: Export) -> None:
    """Run `fastprompt export`."""
    from fastprompt.adapters import Preprocessing
    from fastprompt.data.images import open_image, to_tensor
    from fastprompt.pixels.export import export_client, unnoticed
    from fastprompt.pixels.prompts import RGBPrompts
    from fastprompt.runs.directory import read_settings

    if not command.client:
        raise ValueError("--client: is needed, a client's folder is the only kind of export there is")
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"--out: {command.out} is a file, a folder is needed")
    golden = None
    if command.golden is not None:
        try:
            golden = open_image(command.golden)
        except ValueError as error:
            raise ValueError(f"--golden: {error}") from error
    set_threads(command.threads)
    model = load_adapter(command, read_settings(command.adapter))
    if command.invert:
        model = RGBPrompts.invert(model, "extend", picture=True)
    resize = command.resize or (model.preprocessing or Preprocessing()).resize
    picture = None if golden is None else to_tensor(golden, model.backbone.image_size, resize)
    manifest = export_client(model, command.out, picture, resize)
    height, width = manifest["picture_size"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(
        f"{command.out}: {len(manifest['files']) + 1} files, {size:,} bytes; pictures of {height} x {width} pixels "
        f"for {manifest['backbone']['name']}"
    )
    for mistake in unnoticed(manifest):
        print(f"hardly changes the golden picture's features, so that verify may miss it: {mistake}")
