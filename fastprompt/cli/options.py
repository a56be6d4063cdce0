"""What several commands share: the adapter they load, paths, threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.terminal import say

if TYPE_CHECKING:
    import torch

    from fastprompt.model import PromptedViT
    from fastprompt.runs.settings import RunSettings


def _method_hint(default: str) -> str:
    """What `--help` says of --method; asked for then, since listing the methods imports torch."""
    from fastprompt.generators import list_methods

    return f"(default: {default}; {', '.join(list_methods())})"


Plugins = Annotated[list[str], tyro.conf.arg(metavar="MODULE"), tyro.conf.UseAppendAction]
"""Of --plugin: modules that register methods, once for each."""


def load_plugins(words: Sequence[str]) -> None:
    """Import what --plugin names among the words of a command line, before these are parsed."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--plugin" and (equals or i + 1 < len(words)):
            from fastprompt.generators import load_plugin

            load_plugin(value if equals else words[i + 1])


METHOD = tyro.conf.arg(metavar="METHOD", help_behavior_hint=_method_hint)

RECIPE_FLAGS = (
    "epochs",
    "batch_size",
    "lr",
    "head_lr",
    "weight_decay",
    "optimizer",
    "warmup_epochs",
    "dtype",
    "seed",
)


class NamesMethod(Protocol):
    """A command with the options of a method."""

    options: dict[str, Any]
    num_prompts: int | None


class NamesAdapter(Protocol):
    """A command that loads an adapter."""

    adapter: Path
    backbone: str | None
    image_size: int | None


def method_options(command: NamesMethod) -> dict[str, Any]:
    """The options of --options, --set and --num-prompts."""
    options = dict(command.options)
    if command.num_prompts is not None:
        if "num_prompts" in options:
            raise ArgumentError("num_prompts", "must not be given in --options or --set as well")
        options["num_prompts"] = command.num_prompts
    return options


def absolute(name: str | Path) -> str:
    """A path that exists as an absolute one, so that `eval` finds it from anywhere; another name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def data_name(name: str) -> str:
    """--data as a run keeps it: a folder as an absolute path, the name of a known set as it is, whatever is here."""
    from fastprompt.data import known_names

    return name if name in known_names() else absolute(name)


def set_threads(threads: int | None) -> None:
    """Use that many threads; None leaves PyTorch's choice."""
    if threads is not None:
        import torch

        if threads < 1:
            raise ArgumentError("threads", f"must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def announce(model: PromptedViT, what: str) -> None:
    """Say on standard error what a command is about to compute, where, and in which number format."""
    from fastprompt.runs.devices import describe

    count = sum(p.numel() for p in model.parameters())
    text = f"{describe(model.backbone.device, model.backbone_dtype)}; {what}; {count:,} parameters"
    say(text, sys.stderr)


def load_adapter(
    command: NamesAdapter, settings: RunSettings | None, device: torch.device | None = None
) -> PromptedViT:
    """The adapter on its backbone, which is the one of the run unless --backbone names it.

    With a `device` it is there, in the number format of --dtype, else of the run.
    """
    import fastprompt as fp
    from fastprompt.adapters import read_adapter, source_of
    from fastprompt.runs.directory import adapter_dir
    from fastprompt.runs.execute import backbone_at

    directory = adapter_dir(command.adapter)
    config, _ = read_adapter(directory)
    name = command.backbone or (settings.backbone if settings else None)
    if command.backbone is None and command.image_size is None and source_of(config) is not None:
        model = fp.PromptedViT.from_pretrained(directory)
    elif name is None:
        raise ArgumentError(
            "backbone", f"is required: {command.adapter} does not say which backbone the adapter is for"
        )
    else:
        model = fp.PromptedViT.from_pretrained(backbone_at(name, command.image_size or stored_size(config)), directory)
    if device is not None:
        from fastprompt.train.fit import compute_dtype

        wanted = getattr(command, "dtype", None) or (settings.recipe.get("dtype") if settings else None)
        model = model.to(device)
        model.set_backbone_dtype(compute_dtype(wanted or "auto", device))
    return model.eval()


def stored_size(config: dict[str, Any]) -> int:
    """The image size that an adapter was trained at, in pixels."""
    return int(config["backbone"]["image_size"][0])
