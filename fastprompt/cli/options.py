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
    """Describe --method in `--help`. Called only for `--help`, because listing the methods imports torch."""
    from fastprompt.generators import list_methods

    return f"(default: {default}; {', '.join(list_methods())})"


Plugins = Annotated[list[str], tyro.conf.arg(metavar="MODULE"), tyro.conf.UseAppendAction]
"""Type of --plugin: modules that register methods; the flag may be repeated."""
MoreData = Annotated[list[str], tyro.conf.arg(metavar="DATA"), tyro.conf.UseAppendAction]
"""Type of --more-data: data sets; the flag may be repeated."""


def load_plugins(words: Sequence[str]) -> None:
    """Import the modules of --plugin, before the command line is parsed."""
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
    """A command that takes a method's options."""

    options: dict[str, Any]
    num_prompts: int | None


class NamesAdapter(Protocol):
    """A command that loads an adapter."""

    backbone: str | None
    image_size: int | None


def method_options(command: NamesMethod) -> dict[str, Any]:
    """Merge the method options of --options, --set and --num-prompts."""
    options = dict(command.options)
    if command.num_prompts is not None:
        if "num_prompts" in options:
            raise ArgumentError("num_prompts", "must not be given in --options or --set as well")
        options["num_prompts"] = command.num_prompts
    return options


def absolute(name: str | Path) -> str:
    """Make an existing path absolute, so that `eval` finds it from any folder; return other names unchanged."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def data_name(name: str) -> str:
    """Return --data as a run records it: the name of a known data set unchanged, a folder as an absolute path.

    A known name wins over a folder of the same name.
    """
    from fastprompt.data import known_names
    from fastprompt.data.shards import split_prefix

    prefix, place = split_prefix(name)
    return name if name in known_names() else prefix + absolute(place)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None keeps PyTorch's default."""
    if threads is not None:
        import torch

        if threads < 1:
            raise ArgumentError("threads", f"must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def announce(model: PromptedViT, what: str) -> None:
    """Print to standard error what a command is about to compute, on which device and in which data type."""
    from fastprompt.runs.devices import describe

    count = sum(p.numel() for p in model.parameters())
    text = f"{describe(model.backbone.device, model.backbone_dtype)}; {what}; {count:,} parameters"
    say(text, sys.stderr)


def load_adapter(
    command: NamesAdapter, directory: Path, settings: RunSettings | None, device: torch.device | None = None
) -> PromptedViT:
    """Load the adapter in `directory` (`adapter_dir(command.adapter)`) on the backbone of --backbone, else of the run.

    With `device`, move the model there and set the data type of --dtype, else of the run.
    """
    import fastprompt as fp
    from fastprompt.adapters import read_adapter, source_of
    from fastprompt.runs.execute import backbone_at

    config, _ = read_adapter(directory)
    name = command.backbone or (settings.backbone if settings else None)
    if command.backbone is None and command.image_size is None and source_of(config) is not None:
        model = fp.PromptedViT.from_pretrained(directory)
    elif name is None:
        raise ArgumentError("backbone", f"is required: {directory} does not name the adapter's backbone")
    else:
        model = fp.PromptedViT.from_pretrained(backbone_at(name, command.image_size or stored_size(config)), directory)
    if device is not None:
        from fastprompt.train.evaluate import compute_dtype

        wanted = getattr(command, "dtype", None) or (settings.recipe.get("dtype") if settings else None)
        wanted = "float32" if wanted == "int8" else wanted  # `in_int8` rounds float32 weights
        model = model.to(device)
        model.set_backbone_dtype(compute_dtype(wanted or "auto", device))
    return model.eval()


def in_int8(model: PromptedViT, weights: Path | None, train: Any = None) -> PromptedViT:
    """Return a copy of the model whose frozen Linears run in int8.

    Without `weights`, the user cache holds them, or they are calibrated on images of the data set `train` and kept
    there.
    """
    import torch

    from fastprompt.engine.engine import Engine
    from fastprompt.int8.weights import CALIBRATION_IMAGES, Int8Weights, cached

    if weights is None and train is not None and not cached(model.backbone.fingerprint).is_file():
        count = min(CALIBRATION_IMAGES, len(train))
        say(f"calibrating int8 weights on {count} training images", sys.stderr)
        images = [train[i * len(train) // count][0] for i in range(count)]
        if not images:
            raise ArgumentError("int8", "is required: there are no training images to calibrate on")
        path = Int8Weights.calibrate(model.backbone, torch.stack(images)).save()
        say(f"kept in {path}", sys.stderr)
    return Engine(model, dtype="int8", backend="eager", int8=weights).model


def stored_size(config: dict[str, Any]) -> int:
    """Return the image side, in pixels, that an adapter was trained at."""
    return int(config["backbone"]["image_size"][0])
