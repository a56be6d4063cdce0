"""`fastprompt export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from fastprompt.arguments import ArgumentError, argument_names
from fastprompt.cli.options import Plugins, load_adapter, set_threads
from fastprompt.terminal import say

if TYPE_CHECKING:
    from PIL import Image


CLIENT_FLAGS = ("invert", "golden", "resize")
"""Flags that belong to --client."""


@dataclass
class Export:
    """Export an adapter: with --format the whole model for another runtime, with --client a client's folder.

    A file of --format takes images of the backbone's size, any number of them, and gives logits. It is written only if
    it computes what the model computes. The folder of --client is for `fastprompt-client`, which needs no torch and no
    backbone; the adapter must prompt with pixels (method rgb-pgn with placement extend or replace, pixel, or pgn with
    --invert).
    """

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory, or repository of the Hugging Face Hub, as owner/name."""
    out: Path
    """File to write (.onnx, .pt2 or .xml), or with --client the folder."""
    format: Literal["onnx", "pt2", "openvino"] | None = None
    """Runtime of the file: ONNX Runtime, torch.export or OpenVINO."""
    input: Literal["uint8", "float32"] | None = None
    """What the file takes: raw pixels, which it normalises, or normalised images; uint8 if not given."""
    client: bool = False
    """Export a client's folder."""
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
    if command.client == (command.format is not None):
        raise ArgumentError("format", "or --client is required, one of the two")
    if command.client:
        if command.input is not None:
            raise ArgumentError("input", "is for --format")
        export_folder(command)
    else:
        for name in CLIENT_FLAGS:
            if getattr(command, name):
                raise ArgumentError(name, "is for --client")
        export_file(command)


def export_file(command: Export) -> None:
    """Write the whole model for another runtime."""
    from fastprompt.export import export_model
    from fastprompt.runs.directory import adapter_dir, read_settings

    set_threads(command.threads)
    model = load_adapter(command, adapter_dir(command.adapter), read_settings(command.adapter))
    with argument_names(path="out"):
        record = export_model(model, command.out, command.format, input=command.input or "uint8")
    files = [command.out, command.out.with_suffix(".bin")] if command.format == "openvino" else [command.out]
    height, width = record["image_size"]
    classes, names = record["num_classes"], record["class_names"]
    outputs = "features" if classes is None else f"logits of {classes:,} classes"
    say(
        f"{', '.join(map(str, files))}: {sum(file.stat().st_size for file in files):,} bytes; {record['input']} images "
        f"(B, 3, {height}, {width}) to {outputs}{'' if names is None else ', ' + ', '.join(names[:3])}"
    )


def export_folder(command: Export) -> None:
    """Write the folder of a client."""
    from fastprompt.adapters import Preprocessing
    from fastprompt.data.images import to_tensor
    from fastprompt.pixels.export import export_client, unnoticed
    from fastprompt.pixels.prompts import RGBPrompts
    from fastprompt.runs.directory import adapter_dir, read_settings

    if command.out.exists() and not command.out.is_dir():
        raise ArgumentError("out", f"must be a folder, got the file {command.out}")
    if command.golden is not None:
        golden_image(command.golden, None)  # reject a wrong file before loading the adapter
    set_threads(command.threads)
    model = load_adapter(command, adapter_dir(command.adapter), read_settings(command.adapter))
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
