"""`fastprompt adapt`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastprompt.arguments import ArgumentError, argument_names
from fastprompt.cli.options import (
    METHOD,
    RECIPE_FLAGS,
    MoreData,
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

    Run the same command again to resume an interrupted run. The test split is read only with --test, once, at the
    end. --set KEY=VALUE ... is short for --options.KEY VALUE, and --recipe KEY=VALUE ... for --recipe.KEY VALUE.
    --recipe vapt-paper selects the authors' published recipe; further fields and flags override it.
    --grid lr=1e-3,3e-3 seed=0,1 trains an adapter for every combination of the values, all of them together on one
    frozen backbone, each into a run directory of its own below --out; --test then evaluates the best on validation.
    """

    data: str
    """Image folder, torchvision data set, mnist5k, fashion-mnist, wds:FOLDER or wds:ADDRESSES of .tar shards, hfds:NAME
    of Hugging Face or hfids:NAME without a download, or a protocol's task, such as vtab1k:dtd."""
    out: Path
    """Run directory for the adapter, log and results."""
    config: Path | None = None
    """YAML file with any of these settings, or a run.json; flags override it."""
    method: Annotated[str, METHOD] = "pgn"
    """Method to train."""
    backbone: str = "clip-vit-b16"
    """clip-vit-b16, vit-s14, any timm name, or a file of published weights as checkpoint:ARCH:PATH."""
    image_size: int | None = None
    """Image side in pixels; the backbone's own if not given."""
    mean: tuple[float, float, float] | None = None
    """Mean that pixels are normalised by, for each channel; the backbone's own if not given."""
    std: tuple[float, float, float] | None = None
    """Standard deviation that pixels are normalised by, for each channel; the backbone's own if not given."""
    num_prompts: int | None = None
    """Number of prompts; short for --options.num-prompts."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step."""
    lr: float | None = None
    """Peak learning rate; the method's own if not given."""
    head_lr: float | None = None
    """Peak learning rate of the head."""
    weight_decay: float | None = None
    """Weight decay of tensors with two or more axes."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """Optimizer; like every recipe setting, the method's own if not given."""
    warmup_epochs: float | None = None
    """Epochs of learning-rate warmup."""
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    """Data type of the frozen backbone."""
    seed: int | None = None
    """Seed of initial values, batch order and dropout."""
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    together: int | None = None
    """With --grid: number of adapters that share a batch; all of them if not given."""
    more_data: MoreData = field(default_factory=list)
    """Another data set, a domain like --data; repeat for several. The adapter knows its domains."""
    labels: Literal["union", "per-domain"] | None = None
    """With --more-data: one label space, in which classes of one name are one class (union, if not given), or a head
    for each domain."""
    sampling: Literal["proportional", "balanced"] | None = None
    """With --more-data: every image once in each epoch (proportional, if not given), or equally many of each domain."""
    num_train: int | None = None
    """Number of training images; all remaining ones if not given."""
    num_val: int | None = None
    """Number of validation images."""
    num_test: int | None = None
    """Number of test images; all if not given."""
    data_seed: int = 0
    """Seed of the train/validation/test split."""
    data_root: Path | None = None
    """Folder of torchvision's data sets, or with a protocol's data."""
    final: bool = False
    """With a protocol's task: train as its final runs do, so that --test may read the locked test split."""
    per_class: int | None = None
    """With a protocol's task: number of training images, and of validation images, of each class."""
    probe_C: float | None = None
    """With --final: inverse regularisation of the L-BFGS probe, as chosen on validation."""
    augment: str | None = None
    """Augmentation of training images: none, flip, crop, pgn, timm's rand-... or augmix-..., or several joined by +; if
    not given, that of a named recipe, else none."""
    resize: Literal["crop", "squash"] | None = None
    """Crop or squash images to a square; if not given, as a named recipe does, else crop."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    intensity_range: tuple[float, float] | None = None
    """Black and white level of grey images with more than 8 bits; taken from the training images if not given."""
    max_decoded_bytes: int | None = None
    """Maximum size of one decoded image in bytes; 2^29 if not given."""
    head: Literal["linear", "text", "label_map", "prototypes"] = "linear"
    """Head that turns features into logits."""
    class_embeddings: Path | None = None
    """.npy file with a (classes, width) array, for --head text or prototypes."""
    readout: str | None = None
    """cls, patches, patches+prompts, prompts or map; the backbone's own if not given."""
    train_backbone: bool = False
    """Train the backbone along with prompts and head; --recipe backbone_lr=1e-5 sets its learning rate."""
    test: bool = False
    """Evaluate once on the test split after training."""
    resume: bool = True
    """Resume the run in --out; --no-resume starts over."""
    extend: bool = False
    """Go on with a finished run in --out for more --epochs."""
    compare_probe: Literal["auto", "yes", "no"] = "auto"
    """Fit a linear probe first, which costs a pass over the training images, and warn if the result is below it; auto
    does so where that costs little: 10 epochs or more, at most 5000 training images, scikit-learn installed."""
    cache_dir: Path | None = None
    """Folder for what no training changes, such as VQT's frozen features, which later runs on the same images and
    backbone read; if not given, it is computed once for each run. Needs --augment none."""
    track: Annotated[list[str], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction] = field(default_factory=list)
    """Experiment tracker: tensorboard, wandb or trackio; repeat for several."""
    explain: bool = False
    """Print what is computed once and how large it is, and exit before anything is trained or written."""
    progress: bool = True
    """Show a progress bar and a line per epoch on standard error."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def adapt_settings(command: Adapt) -> RunSettings:
    """Return the flags as settings. Giving a recipe field both as a flag and in --recipe is an error."""
    from fastprompt.generators import published_recipes
    from fastprompt.train.recipes import named_recipe

    recipe = dict(command.recipe)
    published = recipe.pop("published", None)
    if published is None and "base_lr" in recipe:
        raise ArgumentError(
            "recipe",
            "must name a published recipe to take base_lr, as in --recipe vapt-paper base_lr=25; --lr is not scaled",
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
        final=command.final,
        per_class=command.per_class,
        probe_C=command.probe_C,
        more_data=tuple(data_name(name) for name in command.more_data),
        labels=command.labels,
        sampling=command.sampling,
        mean=command.mean,
        std=command.std,
    )


def _adapt_grid(command: Adapt, settings: RunSettings) -> None:
    """Train the adapters of --grid, and print them all and the best."""
    from fastprompt.runs.grid import execute_grid
    from fastprompt.runs.tables import grid_table
    from fastprompt.train.termination import sigterm_handled

    for name, given in (
        ("extend", command.extend),
        ("compare_probe", command.compare_probe == "yes"),
        ("track", command.track),
    ):
        if given:
            raise ArgumentError(name, "must not be given with --grid")
    with sigterm_handled():
        runs, best = execute_grid(
            settings,
            command.grid,
            command.out,
            together=command.together,
            test=command.test,
            resume=command.resume,
            progress=command.progress,
            device=command.device,
            announce=lambda text: say(text, sys.stderr),
            cache_dir=command.cache_dir,
        )
    say(grid_table(runs))
    if best:
        say(f"\nbest on validation: {', '.join(best)}\nadapter: {command.out / best[0] / 'best'}")


def adapt(command: Adapt) -> None:
    """Run `fastprompt adapt`."""
    from fastprompt.runs.execute import execute, plan_of
    from fastprompt.runs.tables import results_table
    from fastprompt.train.ranks import leave_job
    from fastprompt.train.termination import sigterm_handled

    settings = adapt_settings(command)
    set_threads(command.threads)
    if command.explain:
        say(str(plan_of(settings, command.device, command.cache_dir)))
        return
    if command.grid:
        _adapt_grid(command, settings)
        return
    if command.together is not None:
        raise ArgumentError("together", "must be given with --grid")
    with argument_names(callbacks="track"), sigterm_handled():
        results = execute(
            settings,
            command.out,
            test=command.test,
            resume=command.resume,
            progress=command.progress,
            device=command.device,
            announce=lambda text: say(text, sys.stderr),
            extend=command.extend,
            compare_probe={"auto": None, "yes": True, "no": False}[command.compare_probe],
            callbacks=command.track,
            cache_dir=command.cache_dir,
        )
    leave_job()
    if not results:  # another process of the job says it
        return
    say(results_table([results]))
    for name, record in ((results.get("domains") or {}).get("validation") or {}).items():
        given = f"{record['accuracy_with_domain']:.4f} where the domain is given"
        say(f"{name}: val accuracy {record['accuracy']:.4f}, {given}")
    say(f"\nadapter: {command.out / 'best'}\nresults: {command.out / 'results.json'}")
