"""Train a `PromptedViT`: its generator and head, and the backbone in full fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.kernels import stopwatch
from fastprompt.train.batches import num_batches
from fastprompt.train.callbacks import Callback, make_callbacks
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.directory import RECIPE_FILE, RunDirectory, open_run
from fastprompt.train.evaluate import activation_bits, device_of
from fastprompt.train.identity import data_identities
from fastprompt.train.loop import TrainingDiverged
from fastprompt.train.plan import Plan
from fastprompt.train.probe import is_worth_comparing
from fastprompt.train.prompt_init import check_prompts
from fastprompt.train.ranks import find_ranks, synced_batch_norms
from fastprompt.train.recipes import Recipe, adjusted_recipe, default_recipe
from fastprompt.train.result import FitResult
from fastprompt.train.run import Options, Run
from fastprompt.train.sources import RunData
from fastprompt.train.tasks import kind_of_labels
from fastprompt.train.through_int8 import backbone_of_run, prepare_int8

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

__all__ = ["FitResult", "TrainingDiverged", "check_model", "describe_data", "fit", "fit_in", "plan"]


def fit(
    model: PromptedViT,
    train: Any,
    val: Any,
    recipe: Recipe | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    extend: bool = False,
    compare_probe: bool = False,
    callbacks: Sequence[Callback | str] = (),
    **fields: Any,
) -> FitResult:
    """Train the model and leave it with the weights that were best on validation.

    The loss is the recipe's, by default cross-entropy, plus beta · mean(KL) if the generator returns a KL (V²APT; beta
    is in its configuration). The frozen backbone runs in `recipe.dtype`, and its own tensors are restored bit for bit
    at the end. In full fine-tuning, its weights stay float32 and bfloat16 is autocast. A linear probe on data without
    augmentation computes its features once. Without augmentation, what else no trained parameter has a part in is
    computed once too (`PromptedViT.constants`, `Recipe.cache`): VQT's frozen features, and with `first_block` k the
    blocks before k.

    In a job of several processes (`torchrun --nproc-per-node=2 script.py`), each batch is shared among them, and the
    result is that of one process up to rounding, whatever their number. Draws for dropout, latent noise and mixing
    differ between processes. The first one writes the files; all of them return the result.

    With `out_dir`, `fit` writes the files that `fastprompt.train.directory` lists, each one atomically: the state to
    resume from, the log, the recipe and the best adapter. Only one process at a time may write there. A killed run
    resumes after its last checkpoint (`Recipe.checkpoint_every`) and ends with the same bits as an uninterrupted one
    (on a CPU, and wherever the operations are deterministic): implementations chosen by timing are kept, and a warning
    names differences in threads, processor or versions. A finished run returns its result at once.

    A run is resumed, or its result returned, only if everything it depends on is unchanged: recipe, configuration,
    initial weights, head, class names, backbone with its normalisation and data types, and the images after their
    transforms (a sample of more than 20,000, plus the Dataset's `identity()`). A warning says what this comparison
    cannot detect.

    Args:
        model: a model built with num_classes. Without class names it takes those of the data set (`describe_data`).
        train, val: a Dataset yielding (image (3, H, W), label), an (images, labels) pair of tensors, or a
            DataLoader. Labels are class indices; for `loss="bce"` they may be rows (num_classes,) of zeros and ones,
            for "mse" and "l1" they are rows of floating-point values, one per output of the head. uint8 images are raw
            pixels, floating-point images are normalised. All images are checked before training; of more than 20,000,
            a sample is, and the others are checked in their batches. A last batch of one image is appended to the one
            before.
        recipe: None is `default_recipe(model.config)`. To change some of its fields, pass `fields` or its `replace`:
            a `Recipe(...)` of your own has the class's defaults in all other fields, not the method's, and a warning
            names those that differ.
        out_dir: None keeps everything in memory.
        resume: False starts over and replaces what is in `out_dir`.
        progress: print device, sizes and number of trained parameters, then show a progress bar with loss, accuracy,
            images per second and remaining time, and a line per epoch (stderr).
        cache_dir: folder for what is computed once, which runs on the same images and backbone share; files used least
            recently make room within `Recipe.cache_gib`. None: each run keeps its own in memory.
        extend: if `out_dir` holds a finished run of fewer epochs and the same identity otherwise, go on with it. Its
            later epochs follow the learning rates of a run of that many epochs, so the rate rises again.
        compare_probe: fit a linear probe to the features before the first step (of the model as it is, which costs
            one forward pass over all images), and warn if the run ends below its validation accuracy. With
            `head_init="probe"`, this is known without.
        callbacks: `fastprompt.Callback` objects, or names of trackers: "tensorboard", "wandb", "trackio".
        fields: fields of the recipe to change, such as `epochs=3, lr=1e-3`. If `epochs` changes the method's own
            recipe, the warmups are scaled with it.

    Raises:
        TypeError, ValueError: an argument or the data are wrong, the adapter would not hold all trained parameters,
            or `out_dir` holds another run or is damaged. Nothing is trained.
        DirectoryInUse: another process writes into `out_dir`.
        RankLost: another process of the job has ended.
        TrainingDiverged: loss or gradient became NaN or infinite; the log records it.
        OSError: a file could not be written; earlier files are intact.
    """
    check_model(model)
    recipe = chosen_recipe(model, recipe, fields)
    options = Options(extend, compare_probe, callbacks, None if cache_dir is None else Path(cache_dir))
    if out_dir is None or not find_ranks(device_of(model)).main:
        return fit_in(None, model, train, val, recipe, resume, progress, options=options)
    with open_run(out_dir) as directory:
        return fit_in(directory, model, train, val, recipe, resume, progress, options=options)


def plan(
    model: PromptedViT,
    train: Any,
    val: Any,
    recipe: Recipe | None = None,
    *,
    cache_dir: str | Path | None = None,
    **fields: Any,
) -> Plan:
    """Say what `fit`, called with the same arguments, will compute once, and how large it is. Nothing is trained.

    One image is computed to know the sizes. With `cache_dir` the images are read as `fit` reads them first, because
    files are shared only by runs on the same images.

    Raises:
        TypeError, ValueError: as `fit`.
    """
    check_model(model)
    recipe = chosen_recipe(model, recipe, fields)
    kind, directory = kind_of_labels(recipe.loss, train), None if cache_dir is None else Path(cache_dir)
    assert model.head is not None
    facts = None if directory is None else data_identities(train, val, model.head.num_classes, kind)
    prepare_int8(model, train, recipe)
    with backbone_of_run(model, recipe):
        return RunData(model, train, val, recipe).make_plan(directory, facts)


def recipe_for(recipe: Recipe, train: Any) -> Recipe:
    """Return the recipe with `min_steps` turned into epochs over these data (`Recipe.with_enough_steps`)."""
    return recipe.with_enough_steps(num_batches(train, recipe.batch_size, "train", merge_single=True))


def fit_in(
    directory: RunDirectory | None,
    model: PromptedViT,
    train: Any,
    val: Any,
    recipe: Recipe,
    resume: bool = True,
    progress: bool = True,
    files: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    announced: bool = False,
    options: Options | None = None,
) -> FitResult:
    """Run `fit` on a checked model in a directory that is already locked.

    Args:
        files: name -> text of files that a new run writes first, beside the recipe.
        data: result of `data_identities`; None computes it.
        announced: device, sizes and number of trained parameters have been printed already.
        options: what `fit` takes besides.
    """
    assert model.head is not None
    options, ranks = Options() if options is None else options, find_ranks(device_of(model))
    callbacks = make_callbacks(options.callbacks, None if directory is None else directory.path) if ranks.main else []
    probes = recipe.head_init == "probe" or options.compare_probe
    if probes and model.head.kind == "linear":
        from fastprompt.train.probe import logistic_regression

        logistic_regression()  # fail before anything is read or written
    if recipe.prompt_init == "data":
        check_prompts(model)
    before = rng_state()
    try:
        kind = kind_of_labels(recipe.loss, train)
        if probes and kind != "class":
            name = "compare_probe" if options.compare_probe else "head_init"
            raise ArgumentError(name, "must not ask for a linear probe unless labels are classes")
        data = data_identities(train, val, model.head.num_classes, kind) if data is None else data
        recipe = recipe_for(recipe, train)
        if options.compare_probe is None:
            compares = ranks.size == 1 and kind == "class" and is_worth_comparing(model, train, recipe)
            options = dataclasses.replace(options, compare_probe=compares)
        describe_data(model, train)
        model.predicts = kind
        prepare_int8(model, train, recipe, ranks)
        run = Run(model, train, val, recipe, directory, progress, data, announced, callbacks, options, ranks)
        saved = run.shared_state(resume)
        with (
            deterministic_algorithms(recipe.deterministic),
            backbone_of_run(model, recipe, run.backbone_dtype),
            activation_bits(model, recipe.activation_bits),
            synced_batch_norms(model, ranks),
            stopwatch.kept(run.state.choices),
        ):
            if saved is not None:
                run.recall_choices(saved[1])
                if run.is_finished(saved) and not run.extend:
                    return run.result(saved)
            run.agree_on_choices()
            if directory is not None and not directory.writable:
                raise OSError(errno.EROFS, f"out_dir {directory.path} cannot be written, and holds no finished run")
            run.prepare_data(data)
            if saved is None:
                run.start({**(files or {}), RECIPE_FILE: json.dumps(recipe.to_dict(), indent=2) + "\n"})
            else:
                run.go_on(saved, files or {})
            run.train_to_the_end()
            return run.result()
    finally:
        set_rng_state(*before)


def check_model(model: Any) -> None:
    """Raise `TypeError` or `ValueError` unless `model` can be trained and all trained parameters can be saved."""
    from fastprompt.model import PromptedViT

    if not isinstance(model, PromptedViT):
        raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
    if model.num_classes is None or model.head is None:
        raise ArgumentError("model", "must have a head to be trained: build it with num_classes=")
    model.check_all_saved()


def describe_data(model: PromptedViT, train: Any) -> None:
    """Call `PromptedViT.describe_data`; raise `ValueError` for a class name that cannot be saved after training."""
    model.describe_data(train)
    for index, name in enumerate(model.class_names or ()):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"class_names[{index}] must be text that UTF-8 can encode, got {name!r}; rename the class folder of "
                "that name"
            ) from None


def chosen_recipe(model: PromptedViT, recipe: Recipe | None, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `fit` takes: the method's own or the one given, with some fields changed."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ArgumentTypeError("recipe", f"must be a fastprompt Recipe or None, got {type(recipe).__name__}")
    known = [*Recipe.__dataclass_fields__]
    for name, value in fields.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ArgumentError(name, f"must be a field of the recipe ({', '.join(known)}), got {value!r}{hint}")
    if recipe is None:
        return adjusted_recipe(model.config, fields, train_backbone=model.full)
    if left_out := recipe.left_out(default_recipe(model.config, train_backbone=model.full)):
        said = ", ".join(f"{name}={mine!r} (its own: {own!r})" for name, (mine, own) in left_out.items())
        warnings.warn(
            f"recipe has the defaults of Recipe where {model.config.kind!r} has other ones: {said}. To change single "
            "fields of the method's recipe, pass them to fit, as in fp.fit(..., epochs=3)",
            stacklevel=3,
        )
    return recipe.replace(**fields)


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Context with PyTorch's deterministic algorithms; operators without one warn."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
