"""`fastprompt convert`."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.cli.words import key_values
from fastprompt.terminal import say


@dataclass
class Convert:
    """Turn a checkpoint of the authors of PGN, VPT or VAPT into an adapter directory.

    Method and sizes are read from the file. The adapter then works with every other command and with
    `PromptedViT.from_pretrained`.
    """

    checkpoint: tyro.conf.Positional[Path]
    """File as the authors publish it or their code writes it: .pt, .pth or .safetensors. No code in it is run."""
    out: Path
    """Folder to write the adapter to."""
    backbone: str
    """Backbone that the prompts were trained on: a name of timm, local-dir:FOLDER or checkpoint:ARCH:FILE."""
    image_size: int | None = None
    """Image side in pixels; the backbone's own if not given."""
    head: Literal["linear", "text", "label_map", "prototypes"] | None = None
    """Classifier as in the authors' code; the file's own if not given."""
    num_classes: int | None = None
    """Number of classes, if the head does not determine it."""
    class_embeddings: Path | None = None
    """.npy file with one row per class, for --head text."""
    dino: Path | None = None
    """DINO's full checkpoint, for --head prototypes."""
    class_names: Path | None = None
    """Text file with the name of one class per line."""
    readout: str | None = None
    """What the head reads; as in the authors' code if not given."""
    set: list[str] = field(default_factory=list)
    """KEY=VALUE ...: options of the method that a file does not show, such as activation=sigmoid."""
    debug: bool = False
    """Show the traceback of an error."""


def overrides(items: list[str]) -> dict[str, Any]:
    """Parse `["activation=sigmoid", "padding=1"]` into values; what is no Python literal is a text."""
    from fastprompt.generators import get_method, list_methods

    known = {"grid", "patch_size", "depth"}
    for name in list_methods():
        known |= set(get_method(name).config_class.__dataclass_fields__)
    found: dict[str, Any] = {}
    for key, words in key_values(items, "--set", sorted(known), "the checkpoint's method").items():
        values = [_literal(word) for word in words]
        found[key] = values[0] if len(values) == 1 else tuple(values)
    return found


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def convert(command: Convert) -> None:
    """Run `fastprompt convert`."""
    import fastprompt as fp
    from fastprompt.runs.execute import backbone_at, read_rows

    if not command.checkpoint.is_file():
        raise ArgumentPathError("checkpoint", f"must be a file that exists, got {command.checkpoint}")
    if command.out.exists() and not command.out.is_dir():
        raise ArgumentError("out", f"must be a folder, got the file {command.out}")
    options, names = overrides(command.set), None
    if command.class_names is not None:
        if not command.class_names.is_file():
            raise ArgumentPathError("class_names", f"must be a file that exists, got {command.class_names}")
        names = command.class_names.read_text(encoding="utf-8").splitlines()
    embeddings = None
    if command.class_embeddings is not None:
        embeddings = read_rows(command.class_embeddings, "class_embeddings")
    model = fp.load_official(
        command.checkpoint,
        backbone_at(command.backbone, command.image_size),
        head=command.head,
        num_classes=command.num_classes,
        class_embeddings=embeddings,
        dino=command.dino,
        readout=command.readout,
        **options,
    )
    assert isinstance(model, fp.PromptedViT)
    if names is not None:
        if len(names) != model.num_classes:
            raise ArgumentError("class_names", f"must name {model.num_classes} classes, got {len(names)} lines")
        model.class_names = names
    model.save_pretrained(command.out)
    head = "no head" if model.head is None else f"head {model.head.kind} with {model.num_classes:,} classes"
    say(f"{command.out}: {model.config}, {head}, on {model.backbone.spec.name}")
