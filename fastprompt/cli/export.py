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
    """Export an adapter with pixel prompts as a folder for `fastprompt-client`, which needs no torch."""

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory: method rgb-pgn (placement extend or replace), pixel, or pgn with --invert."""
    out: Path
    """Folder to write."""
    client: bool = False
    """Export a client's folder. Required, because there is no other kind of export."""
    invert: bool = False
    """Turn the token prompts of a PGN into pictures first; `fastprompt info --rgb` reports the loss."""
    golden: Path | None = None
    """Image file to verify hosts with; a synthetic one of gradients, edges and noise if not given."""
    resize: Literal["crop", "squash"] | None = None
    """How the client fits images to the backbone's size; as in training if not given."""
    backbone: str | None = None
    """Backbone; required if neither the adapter nor the run directory names it."""
    image_size: int | None = None
    """Image side in pixels; the one used in training if not given."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def golden_image(file: Path, intensity_range: tuple[float, float] | None) -> Image.Image:
    """Read the image of --golden; errors name that flag."""
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
        raise ArgumentError("client", "is required: there is no other kind of export")
    if command.out.exists() and not command.out.is_dir():
        raise ArgumentError("out", f"must be a folder, got the file {command.out}")
    if command.golden is not None:
        golden_image(command.golden, None)  # reject a wrong file before loading the adapter
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
        say(f"verify may miss a mistake that hardly changes the golden picture's features: {mistake}")
