"""`fastprompt export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import Plugins, load_adapter, set_threads
from fastprompt.terminal import say

if TYPE_CHECKING:
    from PIL import Image


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


def golden_image(file: Path, intensity_range: tuple[float, float] | None) -> Image.Image:
    """The image of --golden, which errors name."""
    from fastprompt.data.images import open_image

    try:
        return open_image(file, intensity_range=intensity_range)
    except ValueError as error:
        raise ArgumentError("golden", f"must be an image: {error}") from error


def export(command: Export) -> None:
    """Run `fastprompt export`."""
    from fastprompt.adapters import Preprocessing
    from fastprompt.data.images import to_tensor
    from fastprompt.pixels.export import export_client, unnoticed
    from fastprompt.pixels.prompts import RGBPrompts
    from fastprompt.runs.directory import read_settings

    if not command.client:
        raise ArgumentError("client", "is required: a client's folder is the only kind of export there is")
    if command.out.exists() and not command.out.is_dir():
        raise ArgumentError("out", f"must be a folder, got the file {command.out}")
    if command.golden is not None:
        golden_image(command.golden, None)  # a wrong file is told before the adapter is loaded
    set_threads(command.threads)
    model = load_adapter(command, read_settings(command.adapter))
    preprocessing = model.preprocessing or Preprocessing()
    resize = command.resize or preprocessing.resize
    picture = None
    if command.golden is not None:
        golden = golden_image(command.golden, preprocessing.intensity_range)
        picture = to_tensor(golden, model.backbone.image_size, resize)
    if command.invert:
        model = RGBPrompts.invert(model, "extend", picture=True)
    manifest = export_client(model, command.out, picture, resize)
    height, width = manifest["picture_size"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    say(
        f"{command.out}: {len(manifest['files']) + 1} files, {size:,} bytes; pictures of {height} x {width} pixels "
        f"for {manifest['backbone']['name']}"
    )
    for mistake in unnoticed(manifest):
        say(f"hardly changes the golden picture's features, so that verify may miss it: {mistake}")
