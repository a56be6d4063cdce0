"""One method on one data set: from a method's name to a run directory with its results.

The command line, the demo and the table all run methods through `execute`, so they agree on what a run is. A
run directory holds

    run.json       what was asked for (`RunSettings`)
    results.json   what came out: trained parameters, history, validation and test record, speed, memory
    best/          the adapter that was best on validation (`PromptedViT.save_pretrained`)
    log.jsonl ...  what `fastprompt.fit` writes
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastprompt.data import DataSplits
    from fastprompt.model import PromptedViT
    from fastprompt.train.evaluate import Evaluation
    from fastprompt.train.recipes import Recipe
    from fastprompt.vit.weights import FrozenViT

# Method name -> configuration class and the options that the name itself fixes.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgn": ("PGNConfig", {}),
    "rgb-pgn": ("RGBPGNConfig", {}),
    "v2apt": ("V2APTConfig", {}),
    "vapt": ("VAPTConfig", {}),
    "vpt-deep": ("VPTConfig", {"deep": True}),
    "vpt-shallow": ("VPTConfig", {"deep": False}),
    "free": ("FreePromptsConfig", {}),
    "pixel": ("PixelPromptConfig", {}),
    "linear": ("LinearProbeConfig", {}),
    "linear-sgd": ("LinearProbeConfig", {}),
    "full": ("FullFineTuneConfig", {}),
}

# Augmented views of each training image that the L-BFGS probe is fitted to.
PROBE_VIEWS = 4

# What a method's name says about the recipe.
METHOD_RECIPES: dict[str, dict[str, Any]] = {"linear-sgd": {"optimizer": "sgd", "lr": 0.01}}

TITLES: dict[str, str] = {
    "pgn": "PGN",
    "rgb-pgn": "PGN in pixels",
    "v2apt": "V²APT",
    "vapt": "VAPT",
    "vpt-deep": "VPT-deep",
    "vpt-shallow": "VPT-shallow",
    "free": "Free prompts",
    "pixel": "Pixel prompt",
    "linear": "Linear probe (L-BFGS)",
    "linear-sgd": "Linear probe (SGD)",
    "full": "Full fine-tuning",
}


@dataclass(frozen=True)
class RunSettings:
    """What one run is: method, backbone, data, head and the recipe's departures from the method's default.

    `options` are the method's configuration options (`fp.PGNConfig` and so on); `recipe` holds only the
    fields of `fastprompt.train.recipes.Recipe` that differ from `default_recipe`. `image_size` None is the
    backbone's own.
    """

    method: str
    data: str
    backbone: str = "clip-vit-b16"
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    data_root: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    data_seed: int = 0
    augment: str = "none"
    on_bad: str = "error"
    head: str = "linear"
    class_embeddings: str | None = None
    readout: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is none of {', '.join(METHODS)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """Raises `ValueError` for a key that is no setting, and without method or data."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"run.json: unknown key {key!r}; known are {', '.join(sorted(known))}")
        for key in ("method", "data"):
            if key not in values:
                raise ValueError(f"run.json: has no {key!r}")
        return cls(**values)


def parse_options(items: Sequence[str], flag: str) -> dict[str, Any]:
    """`["num_prompts=8", "widths=(16, 32)"]` -> `{"num_prompts": 8, "widths": (16, 32)}`; words that are no
    literal stay text.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise ValueError(f"{flag}: got {item!r}, takes key=value")
        if key in options:
            raise ValueError(f"{flag}: {key!r} is given twice")
        if text.strip().lower() in ("true", "false", "none"):
            options[key] = {"true": True, "false": False, "none": None}[text.strip().lower()]
            continue
        try:
            options[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def build_config(method: str, options: Mapping[str, Any]) -> Any:
    """The configuration object of a method. An option that it does not have is a `ValueError` listing those
    it has.
    """
    import fastprompt as fp

    if method not in METHODS:
        raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
    class_name, fixed = METHODS[method]
    config_class = getattr(fp, class_name)
    known = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in fixed]
    for key in options:
        if key not in known:
            has = ", ".join(known) if known else "no options"
            raise ValueError(f"{key}: method {method!r} has no such option; it has {has}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return config_class(**{**values, **fixed})


def build_recipe(method: str, config: Any, overrides: Mapping[str, Any]) -> Recipe:
    """The method's default recipe with `overrides`; an unknown field is a `ValueError` listing the fields.

    Where the number of epochs is given and the warm-ups are not, they keep their share of the epochs.
    """
    from fastprompt.train.recipes import default_recipe

    recipe = default_recipe(config)
    changes = METHOD_RECIPES.get(method, {}) | dict(overrides)
    epochs = changes.get("epochs")
    if isinstance(epochs, int) and epochs > 0:
        for warmup in ("warmup_epochs", "kl_warmup_epochs"):
            changes.setdefault(warmup, getattr(recipe, warmup) * epochs / recipe.epochs)
    return recipe.replace(**changes)


def load_run_data(settings: RunSettings, image_size: int) -> DataSplits:
    """The run's train, validation and test images at `image_size` pixels."""
    from fastprompt.data import load_data

    with renamed(name="data", root="data_root", seed="data_seed"):
        return load_data(
            settings.data,
            image_size=image_size,
            num_train=settings.num_train,
            num_val=settings.num_val,
            num_test=settings.num_test,
            seed=settings.data_seed,
            root=settings.data_root,
            augment=settings.augment,
            on_bad=settings.on_bad,
        )


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors about an argument of the function called inside name the setting that the argument came from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        argument, colon, rest = str(error).partition(":")
        if colon and argument in names:
            raise type(error)(f"{names[argument]}:{rest}") from error
        raise


def reset_peak_memory() -> None:
    """Start measuring `peak_memory_mib` from here, where Linux lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """Peak resident memory of this process in MiB.

    `VmHWM` belongs to the program that runs now; `ru_maxrss` starts at the parent's peak in a process that
    was spawned, which would charge a method with the memory of whoever started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    from fastprompt.files import atomic_write

    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` naming the file where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a JSON object")
    return found


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """An `Evaluation` as JSON values. Mean per class is over the classes that occur."""
    confusion = [[int(n) for n in row] for row in evaluation.confusion]
    return {
        "accuracy": float(evaluation.accuracy),
        "mean_per_class": float(evaluation.mean_per_class),
        "loss": float(evaluation.loss),
        "calibration_error": float(evaluation.ece),
        "per_class": [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)],
        "confusion": confusion,
        "num_images": len(evaluation.labels),
        "labels": [int(label) for label in evaluation.labels],
        "predictions": [int(prediction) for prediction in evaluation.predictions],
        "seconds": float(evaluation.seconds),
    }


def library_usage(model: PromptedViT, dataset: Any, batch_size: int = 64) -> dict[str, Any]:
    """How a PGN uses its library over a data set.

    `mean_weight` (M,) is each token's mixture weight averaged over images and prompts. `entropy` (nats) is
    the mean entropy of one mixture and `effective_tokens` = exp(entropy) the number of tokens one prompt is
    made of; `effective_library` is the same of `mean_weight`: the number of tokens in use over all images.
    Sigmoid mixtures are normalised to sum to 1 first.
    """
    import torch

    from fastprompt.generators import PGN

    if not isinstance(model.generator, PGN):
        raise TypeError(f"model: only a PGN has a library, this one has {type(model.generator).__name__}")
    was_training = model.training
    model.eval()
    total: torch.Tensor | None = None
    entropy, mixtures = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(dataset), batch_size):
            images = torch.stack([dataset[i][0] for i in range(start, min(start + batch_size, len(dataset)))])
            pixels = model.backbone.normalise(images.to(model.backbone.device)).float()
            weights = model.generator.mixture(pixels).double()  # (B, K, M)
            weights = weights / weights.sum(-1, keepdim=True)
            entropy += float(-(weights * weights.clamp_min(1e-300).log()).sum())
            mixtures += weights.shape[0] * weights.shape[1]
            batch_total = weights.sum((0, 1))
            total = batch_total if total is None else total + batch_total
    model.train(was_training)
    if total is None:
        raise ValueError("dataset: is empty, library usage needs at least one image")
    mean_weight = total / mixtures  # (M,)
    spread = float(-(mean_weight * mean_weight.clamp_min(1e-300).log()).sum())
    return {
        "mean_weight": [float(w) for w in mean_weight],
        "entropy": entropy / mixtures,
        "effective_tokens": float(torch.tensor(entropy / mixtures).exp()),
        "effective_library": float(torch.tensor(spread).exp()),
        "num_images": len(dataset),
    }


def build_model(settings: RunSettings, backbone: FrozenViT, class_names: Sequence[str], seed: int) -> PromptedViT:
    """The model before training; `seed` sets its initial values."""
    import torch

    import fastprompt as fp

    config = build_config(settings.method, settings.options)
    arguments: dict[str, Any] = {}
    if settings.class_embeddings is not None:
        import numpy as np

        path = Path(settings.class_embeddings)
        argument = {"text": "class_embeddings", "prototypes": "prototypes"}.get(settings.head)
        if argument is None:
            raise ValueError(f"class_embeddings: are for head 'text' or 'prototypes', the head is {settings.head!r}")
        if not path.is_file():
            raise FileNotFoundError(f"class_embeddings: no file {path}")
        try:
            arguments[argument] = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except (ValueError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(f"class_embeddings: {path} is no .npy file with one array of numbers ({error})") from error
    torch.manual_seed(seed)
    return fp.PromptedViT(
        backbone,
        config,
        num_classes=len(class_names),
        head=settings.head,
        readout=settings.readout,
        class_names=list(class_names),
        **arguments,
    )


def backbone_at(name: str, image_size: int | None, weights: bool = True) -> FrozenViT:
    """The named backbone for square images of `image_size` pixels, None: its own size.

    Without `weights` those of a hub are left random, where only sizes are asked for.
    """
    from fastprompt.vit.assets import backbone_structure, load_backbone

    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: takes a number of pixels from 1, got {image_size}")
    with renamed(name="backbone"):
        return (load_backbone if weights else backbone_structure)(name, image_size)


def square_size(backbone: FrozenViT) -> int:
    """The side of the backbone's input in pixels; data are read at one square size."""
    height, width = backbone.image_size
    if height != width:
        raise ValueError(f"image_size: the backbone takes {height} x {width} images, data are read as squares")
    return height


def adapter_dir(run_dir: Path) -> Path:
    """The directory with the adapter's two files: the one given, or its `best/`."""
    run_dir = Path(run_dir)
    for candidate in (run_dir, run_dir / "best"):
        if (candidate / "adapter_config.json").exists():
            return candidate
    raise FileNotFoundError(f"adapter: neither {run_dir} nor {run_dir / 'best'} holds adapter_config.json")


def read_settings(run_dir: Path) -> RunSettings | None:
    """The settings of the run that a directory (or a run's `best/`) belongs to; None: none are recorded."""
    for candidate in (Path(run_dir), Path(run_dir).parent):
        if (candidate / "run.json").exists():
            return RunSettings.from_dict(read_json(candidate / "run.json"))
    return None


def finished_results(settings: RunSettings, out_dir: Path, resume: bool) -> dict[str, Any] | None:
    """The results of a run with these settings that is already finished in `out_dir`; None: there is none.

    Raises `ValueError` where `out_dir` is a file, or holds a run with other settings and `resume` is set.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file, a directory is needed")
    wanted = json.loads(json.dumps(settings.to_dict()))
    run_file, result_file = out_dir / "run.json", out_dir / "results.json"
    if resume and run_file.exists():
        there = {"on_bad": "error", **read_json(run_file)}  # runs from before there was a choice
        different = [k for k in sorted({*wanted, *there}) if wanted.get(k) != there.get(k)]
        if different:
            said = "; ".join(f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} now" for k in different)
            raise ValueError(
                f"out: {out_dir} holds a run with other settings ({said}); take another directory or --no-resume"
            )
        if result_file.exists():
            return read_json(result_file)
    return None


@contextlib.contextmanager
def claimed(settings: RunSettings, out_dir: Path) -> Iterator[None]:
    """`out_dir` is these settings' from here on, unless wrong input ends the run before it wrote anything."""
    made = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "run.json", settings.to_dict())
    (out_dir / "results.json").unlink(missing_ok=True)
    try:
        yield
    except (ValueError, TypeError):
        if [path.name for path in out_dir.iterdir()] == ["run.json"]:
            (out_dir / "run.json").unlink()
            if made:
                out_dir.rmdir()
        raise


def execute(
    settings: RunSettings,
    out_dir: Path | str,
    *,
    test: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Adapt, evaluate on validation and with `test` once on the test split; returns what is written to
    results.json.

    A finished run in `out_dir` with the same settings is not run again; an interrupted one goes on where it
    stopped. With `test` the test split is read after training, from the adapter that was best on validation,
    and only where the results have no test record yet.
    """
    import torch

    import fastprompt as fp
    from fastprompt.model import CONFIG_FILE
    from fastprompt.train.evaluate import evaluate
    from fastprompt.train.fit import fit

    out_dir = Path(out_dir)
    config = build_config(settings.method, settings.options)
    recipe = build_recipe(settings.method, config, settings.recipe)
    results = finished_results(settings, out_dir, resume)
    if results is not None and (not test or results.get("test") is not None):
        return results
    if results is not None and not any((out_dir / p / CONFIG_FILE).is_file() for p in (".", "best")):
        results = None  # only the record was kept, not the adapter: train it again

    backbone = backbone_at(settings.backbone, settings.image_size)
    image_size = square_size(backbone)
    splits = load_run_data(settings, image_size)
    if results is None:
        model = build_model(settings, backbone, splits.class_names, recipe.seed)
        with claimed(settings, out_dir):
            if settings.method == "linear":
                training = run_probe(model, splits, recipe, out_dir)
            else:
                fitted = fit(
                    model,
                    splits.train,
                    splits.val,
                    recipe=recipe,
                    out_dir=out_dir,
                    resume=resume,
                    progress=progress,
                )
                training = {
                    "best_epoch": fitted.best_epoch,
                    "best_val_loss": fitted.best_val_loss,
                    "history": fitted.history,
                    "seconds": fitted.seconds,
                    "images_per_second": fitted.images_per_second,
                    "peak_memory_mib": fitted.peak_memory_mib,
                }
        trainable = model.num_trainable()
        paper_count = model.paper_parameter_count()
        model = load_best(backbone, out_dir, recipe)
        results = {
            "fastprompt_version": fp.__version__,
            "torch_version": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "method": settings.method,
            "title": TITLES[settings.method],
            "config": config.to_dict(),
            "recipe": recipe.to_dict(),
            "backbone": settings.backbone,
            "backbone_fingerprint": backbone.fingerprint,
            "image_size": image_size,
            "data": splits.summary(),
            "class_names": list(splits.class_names),
            "head": settings.head,
            "trained_parameters": trainable,
            "paper_parameter_count": paper_count,
            **training,
            "validation": evaluation_record(evaluate(model, splits.val)),
            "test": None,
        }
        if config.kind == "pgn":
            results["library"] = library_usage(model, splits.val)
        write_json(out_dir / "results.json", results)
    if test:
        model = load_best(backbone, out_dir, recipe)
        results["test"] = evaluation_record(evaluate(model, splits.test))
        write_json(out_dir / "results.json", results)
    return results


def run_probe(model: PromptedViT, splits: DataSplits, recipe: Recipe, out_dir: Path) -> dict[str, Any]:
    """The L-BFGS probe, saved to `best/`. Its speed is images encoded over encoding and fitting.

    With an augmentation it fits `PROBE_VIEWS` augmented views of every training image.
    """
    import torch

    from fastprompt.train.evaluate import backbone_precision
    from fastprompt.train.probe import extract_features, fit_linear_probe

    reset_peak_memory()
    began = time.perf_counter()
    views = 1 if splits.train.augment is None else PROBE_VIEWS
    with backbone_precision(model, backbone_dtype(recipe, model.backbone)):
        train = [extract_features(model, splits.train, epoch=view) for view in range(views)]
        val = extract_features(model, splits.val)
    features, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    probe = fit_linear_probe(model, (features, labels), val)
    seconds = time.perf_counter() - began
    model.save_pretrained(out_dir / "best")
    return {
        "best_epoch": None,
        "best_val_loss": probe.best_val_loss,
        "history": [],
        "seconds": seconds,
        "images_per_second": (len(features) + len(val[0])) / seconds,
        "peak_memory_mib": peak_memory_mib(),
        "probe": {"C": probe.C, "at_edge": probe.at_edge, "grid": probe.grid},
    }


def backbone_dtype(recipe: Recipe, backbone: FrozenViT) -> torch.dtype:
    """The number format that `fastprompt.fit` computes the backbone in."""
    from fastprompt.train.fit import compute_dtype

    return compute_dtype(recipe.dtype, backbone.device)


def load_best(backbone: FrozenViT, out_dir: Path, recipe: Recipe) -> PromptedViT:
    """The adapter that was best on validation, computing in the number format of its training."""
    import fastprompt as fp

    model = fp.PromptedViT.from_pretrained(backbone, adapter_dir(out_dir))
    model.set_backbone_dtype(backbone_dtype(recipe, backbone))
    return model


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text: the first flush left, the others flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        columns = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(columns).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a run: method, trained parameters, validation and test accuracy, images per second, peak
    memory.
    """
    rows = [
        [
            r["title"],
            f"{r['trained_parameters']['total']:,}",
            f"{r['validation']['accuracy']:.4f}",
            "–" if r["test"] is None else f"{r['test']['accuracy']:.4f}",
            f"{r['images_per_second']:.1f}",
            f"{r['peak_memory_mib']:,.0f}",
        ]
        for r in results
    ]
    return text_table(["method", "trained parameters", "val accuracy", "test accuracy", "img/s", "peak MiB"], rows)
