"""`fastprompt adapt`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import (
    METHOD,
    RECIPE_FLAGS,
    Plugins,
    absolute,
    data_name,
    method_options,
    set_threads,
)
from fastprompt.runs.settings import RunSettings
from fastprompt.terminal import say


@dataclass
class Adapt:
    """Adapt a frozen backbone to a data set and write a run directory.

    The same command goes on where an interrupted run stopped. The test split is read only with --test, once,
    at the end. --set KEY=VALUE ... is short for --options.KEY VALUE, --recipe KEY=VALUE ... for --recipe.KEY VALUE.
    --recipe vapt-paper trains as the authors published it; fields and flags beside it change it.
    """

    data: str
    """Image folder, torchvision data set, mnist5k or fashion-mnist."""
    out: Path
    """Run directory: adapter, log, results."""
    config: Path | None = None
    """YAML file with any of these settings, or a run.json; flags take the place of what it says."""
    method: Annotated[str, METHOD] = "pgn"
    """What trains."""
    backbone: str = "clip-vit-b16"
    """clip-vit-b16, vit-s14, any timm name, or a file of published weights as checkpoint:ARCH:PATH."""
    image_size: int | None = None
    """Side in pixels; the backbone's own if not given."""
    num_prompts: int | None = None
    """Prompts, short for --options.num-prompts."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step."""
    lr: float | None = None
    """Peak learning rate; the method's own if not given."""
    head_lr: float | None = None
    """Peak learning rate of the head."""
    weight_decay: float | None = None
    """On tensors with two or more axes."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """The method's own if not given, as for all of the recipe."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises."""
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    """Number format of the frozen backbone."""
    seed: int | None = None
    """Initial values, batch order, dropout."""
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    num_train: int | None = None
    """Training images; all that are left if not given."""
    num_val: int | None = None
    """Validation images."""
    num_test: int | None = None
    """Test images; all if not given."""
    data_seed: int = 0
    """Seed of the train/validation/test split."""
    data_root: Path | None = None
    """Where torchvision sets are kept."""
    augment: str | None = None
    """Of training images: none, flip, crop or pgn; that of a named recipe, else none, if not given."""
    resize: Literal["crop", "squash"] | None = None
    """Images are cropped or squashed to a square; as with a named recipe, else cropped, if not given."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    intensity_range: tuple[float, float] | None = None
    """Values that are black and white in grey images of more than 8 bits; by the train images if not given."""
    max_decoded_bytes: int | None = None
    """Memory that one image may take decoded; 2^29 if not given."""
    head: Literal["linear", "text", "label_map", "prototypes"] = "linear"
    """How features become classes."""
    class_embeddings: Path | None = None
    """(classes, width) array in a .npy file for --head text or prototypes."""
    readout: str | None = None
    """cls, patches, patches+prompts, prompts or map; the backbone's own if not given."""
    train_backbone: bool = False
    """Train the backbone, too, beside prompts and head: --recipe backbone_lr=1e-5"""
    test: bool = False
    """Evaluate once on the test split after training."""
    resume: bool = True
    """Go on with what is in --out; --no-resume starts over."""
    progress: bool = True
    """Progress bar on standard error."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes a GPU where there is one."""
    threads: int | None = None
    """Processor threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers methods of your own: its name or its .py file; once for each."""
    debug: bool = False
    """Show the traceback of an error."""


def adapt_settings(command: Adapt) -> RunSettings:
    """The flags as settings. A recipe field given both as a flag and in --recipe is an error."""
    from fastprompt.generators import published_recipes
    from fastprompt.train.recipes import named_recipe

    recipe = dict(command.recipe)
    published = recipe.pop("published", None)
    if published is None and "base_lr" in recipe:
        raise ArgumentError(
            "recipe",
            "takes base_lr with a published recipe alone, as in --recipe vapt-paper base_lr=25; --lr is not scaled",
        )
    for name in RECIPE_FLAGS:
        value = getattr(command, name)
        if value is not None:
            if name in recipe:
                raise ArgumentError(name, "must not be given in --recipe as well")
            recipe[name] = value
    augment, resize = "none", "crop"
    if published is not None:
        recipe = named_recipe(published, recipe, command.num_train)
        found = published_recipes()[published]
        augment, resize = found.augment, found.resize
    return RunSettings(
        method=command.method,
        data=data_name(command.data),
        backbone=command.backbone,
        options=method_options(command),
        recipe=recipe,
        image_size=command.image_size,
        data_root=None if command.data_root is None else absolute(command.data_root),
        num_train=command.num_train,
        num_val=command.num_val,
        num_test=command.num_test,
        data_seed=command.data_seed,
        augment=augment if command.augment is None else command.augment,
        resize=resize if command.resize is None else command.resize,
        on_bad=command.on_bad,
        intensity_range=command.intensity_range,
        max_decoded_bytes=command.max_decoded_bytes,
        head=command.head,
        class_embeddings=None if command.class_embeddings is None else absolute(command.class_embeddings),
        readout=command.readout,
        train_backbone=command.train_backbone,
    )


def adapt(command: Adapt) -> None:
    """Run `fastprompt adapt`."""
    from fastprompt.runs.execute import execute
    from fastprompt.runs.tables import results_table

    settings = adapt_settings(command)
    set_threads(command.threads)
    results = execute(
        settings,
        command.out,
        test=command.test,
        resume=command.resume,
        progress=command.progress,
        device=command.device,
        announce=lambda text: say(text, sys.stderr),
    )
    say(results_table([results]))
    say(f"\nadapter: {command.out / 'best'}\nresults: {command.out / 'results.json'}")
