"""The command line: `fastprompt adapt | eval | predict | export | serve | info | report`, a thin shell over the API.

Exit codes: 0 done, 1 failed while working (disk, network, training that diverged), 2 wrong input, 130
interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastprompt.report.runs import METHODS, RunSettings

if TYPE_CHECKING:
    from fastprompt.generators import PromptConfig
    from fastprompt.model import PromptedViT
    from fastprompt.vit.weights import FrozenViT

KeyValues = Annotated[list[str], tyro.conf.arg(metavar="KEY=VALUE")]
WRONG_INPUT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


@dataclass
class Adapt:
    """Adapt a frozen backbone to a data set and write a run directory.

    The same command goes on where an interrupted run stopped. The test split is read only with --test, once,
    at the end.
    """

    data: str
    """Image folder, torchvision data set, mnist5k or fashion-mnist."""
    out: Path
    """Run directory: adapter, log, results."""
    method: Literal[tuple(METHODS)] = "pgn"  # type: ignore[valid-type]
    """What trains."""
    backbone: str = "clip-vit-b16"
    """clip-vit-b16, vit-s14 or any timm name."""
    image_size: int | None = None
    """Side in pixels; the backbone's own if not given."""
    num_prompts: int | None = None
    """Prompts, short for --set num_prompts=..."""
    set: KeyValues = field(default_factory=list)
    """Options of the method: --set library_size=128 kernel=3"""
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
    recipe: KeyValues = field(default_factory=list)
    """Other fields of the recipe: --recipe label_smoothing=0.1"""
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
    augment: str = "none"
    """Of training images: none, flip, crop or pgn."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    head: Literal["linear", "text", "label_map", "prototypes"] = "linear"
    """How features become classes."""
    class_embeddings: Path | None = None
    """(classes, width) array in a .npy file for --head text or prototypes."""
    readout: str | None = None
    """cls, patches, patches+prompts, prompts or map; the backbone's own if not given."""
    test: bool = False
    """Evaluate once on the test split after training."""
    resume: bool = True
    """Go on with what is in --out; --no-resume starts over."""
    progress: bool = True
    """Progress bar on standard error."""
    threads: int | None = None
    """Processor threads; all cores if not given."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Eval:
    """Evaluate an adapter: accuracy, mean per class, confusion matrix.

    For a run directory of `adapt`, backbone, data and split are those of the run unless given. Other data are split
    anew: how many images and with which seed is not taken from the run.
    """

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory."""
    data: str | None = None
    backbone: str | None = None
    image_size: int | None = None
    split: Literal["val", "test", "train"] = "val"
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    data_seed: int | None = None
    data_root: Path | None = None
    on_bad: Literal["error", "skip"] | None = None
    """What to do about image files that cannot be read."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    batch_size: int = 64
    out: Path | None = None
    """JSON file; otherwise only a summary is printed."""
    threads: int | None = None
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Predict:
    """Predict the classes of image files; CSV or JSON with the probability of every class."""

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory."""
    images: tyro.conf.Positional[list[Path]]
    """Image files, or folders that are searched for images."""
    backbone: str | None = None
    """Needed where the run directory does not say."""
    image_size: int | None = None
    out: Path | None = None
    """.csv or .json file; CSV on standard output if not given."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    batch_size: int = 32
    threads: int | None = None
    debug: bool = False
    """Show the traceback of an error."""


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
    resize: Literal["crop", "squash"] = "crop"
    """How the client brings images to the backbone's size: as in training, where `fastprompt adapt` crops."""
    backbone: str | None = None
    """Needed where the run directory does not say."""
    image_size: int | None = None
    threads: int | None = None
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Serve:
    """Serve a frozen backbone and adapters over HTTP: /v1/embeddings, /v1/classify, /v1/models, /health.

    API keys, if clients need one, stand in the environment variable FASTPROMPT_API_KEYS, separated by commas, or in
    --api-keys-file, one in a line. Clients send "Authorization: Bearer KEY" or "X-API-Key: KEY". Without TLS: put a
    proxy in front where the network is not yours.
    """

    adapter: Annotated[list[str], tyro.conf.arg(metavar="NAME=DIR"), tyro.conf.UseAppendAction] = field(
        default_factory=list)
    """Adapter or run directory and the name it is served under; once for each."""
    backbone: str | None = None
    """That of the first adapter's run if not given, else clip-vit-b16."""
    image_size: int | None = None
    """Side in pixels; that of the first adapter, else the backbone's own, if not given."""
    any_size: bool = False
    """Take pictures of any number of whole patches; clients with placement "extend" need it."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for the whole network."""
    port: int = 8000
    """0: any that is free; the host prints it."""
    api_keys_file: Path | None = None
    """One key in a line; lines that start with '#' are none."""
    allow_origin: Annotated[list[str], tyro.conf.arg(metavar="URL"), tyro.conf.UseAppendAction] = field(
        default_factory=list)
    """Origin of a web page whose scripts may ask, https://example.org; once for each, or '*'."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the backbone; auto: bfloat16 where the hardware multiplies it."""
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: int = 8
    """Images that are computed at once at most."""
    batch_wait_ms: float = 5.0
    """How long a request waits for others to join its batch."""
    max_body_mb: float = 8.0
    """Size of a request."""
    max_images: int = 32
    """Pictures of a request."""
    max_pixels: int | None = None
    """Pixels of a picture, at least the backbone's; four times those if not given."""
    body_timeout: float = 10.0
    """Seconds in which a request has to arrive."""
    timeout: float = 30.0
    """Seconds in which a request has to be answered."""
    max_waiting: int = 128
    """Requests that wait at once; others are answered 503."""
    threads: int | None = None
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Info:
    """Show a backbone, what each method would train and cost on it, and what an adapter directory holds."""

    adapter: tyro.conf.Positional[Path | None] = None
    """Adapter or run directory."""
    backbone: str | None = None
    """clip-vit-b16 if neither this nor an adapter is given."""
    image_size: int | None = None
    method: Literal[tuple(METHODS)] | None = None  # type: ignore[valid-type]
    """One method; all of them if not given."""
    num_prompts: int | None = None
    set: KeyValues = field(default_factory=list)
    """Options of --method: --set library_size=128"""
    num_classes: int = 10
    cost: bool = False
    """FLOPs, saved bytes and dispatches of each method, by formula: the papers' graph and the rewritten one."""
    readout: str | None = None
    """Of --cost: cls, patches, patches+prompts or prompts; the adapter's or backbone's own if not given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of --cost: number format of the backbone."""
    batch_size: int = 8
    """Of --cost: images per call."""
    rgb: bool = False
    """Whether prompts can be pixels on this backbone: what inversion would lose at each placement, of a PGN adapter's
    own tokens where one is given, with --num-prompts otherwise."""
    json: bool = False
    """Print JSON."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Report:
    """Build one self-contained HTML file from run directories."""

    runs: tyro.conf.Positional[list[Path]]
    """Run directories of `adapt`."""
    out: Path = Path("report.html")
    debug: bool = False
    """Show the traceback of an error."""


Command = (
    Annotated[Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)

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


def method_options(command: Adapt | Info) -> dict[str, Any]:
    """The options of --set and --num-prompts."""
    from fastprompt.report.runs import parse_options

    options = parse_options(command.set, "--set")
    if command.num_prompts is not None:
        if "num_prompts" in options:
            raise ValueError("--num-prompts: is given in --set as well")
        options["num_prompts"] = command.num_prompts
    return options


def adapt_settings(command: Adapt) -> RunSettings:
    """The flags as settings. A recipe field given both as a flag and in --recipe is an error."""
    from fastprompt.report.runs import parse_options

    recipe = parse_options(command.recipe, "--recipe")
    for name in RECIPE_FLAGS:
        value = getattr(command, name)
        if value is not None:
            if name in recipe:
                raise ValueError(f"--{name.replace('_', '-')}: is given in --recipe as well")
            recipe[name] = value
    return RunSettings(
        method=command.method,
        data=absolute(command.data),
        backbone=command.backbone,
        options=method_options(command),
        recipe=recipe,
        image_size=command.image_size,
        data_root=None if command.data_root is None else absolute(command.data_root),
        num_train=command.num_train,
        num_val=command.num_val,
        num_test=command.num_test,
        data_seed=command.data_seed,
        augment=command.augment,
        on_bad=command.on_bad,
        head=command.head,
        class_embeddings=None if command.class_embeddings is None else absolute(command.class_embeddings),
        readout=command.readout,
    )


def absolute(name: str | Path) -> str:
    """A path that exists as an absolute one, so that `eval` finds it from anywhere; another name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def set_threads(threads: int | None) -> None:
    """Use that many threads; None leaves PyTorch's choice."""
    if threads is not None:
        import torch

        if threads < 1:
            raise ValueError(f"--threads: takes a number from 1, got {threads}")
        torch.set_num_threads(threads)


def adapt(command: Adapt) -> None:
    """Run `fastprompt adapt`."""
    from fastprompt.report.runs import execute, results_table

    settings = adapt_settings(command)
    set_threads(command.threads)
    results = execute(settings, command.out, test=command.test, resume=command.resume, progress=command.progress)
    print(results_table([results]))
    print(f"\nadapter: {command.out / 'best'}\nresults: {command.out / 'results.json'}")


def load_adapter(command: Eval | Predict | Export, settings: RunSettings | None) -> PromptedViT:
    """The adapter on its backbone, which is the one of the run unless --backbone names it."""
    import torch

    import fastprompt as fp
    from fastprompt.model import read_adapter
    from fastprompt.report.runs import adapter_dir, backbone_at

    directory = adapter_dir(command.adapter)
    config, _ = read_adapter(directory)
    name = command.backbone or (settings.backbone if settings else None)
    if name is None:
        raise ValueError(f"--backbone: is needed, {command.adapter} does not say which backbone the adapter is for")
    image_size = command.image_size or stored_size(config)
    model = fp.PromptedViT.from_pretrained(backbone_at(name, image_size), directory)
    if not isinstance(command, Export) and command.dtype == "bfloat16":
        model.set_backbone_dtype(torch.bfloat16)
    return model.eval()


def stored_size(config: dict[str, Any]) -> int:
    """The image size that an adapter was trained at, in pixels."""
    return int(config["backbone"]["image_size"][0])


def evaluate_adapter(command: Eval) -> None:
    """Run `fastprompt eval`."""
    from dataclasses import replace

    from fastprompt.report.runs import (
        evaluation_record,
        load_run_data,
        read_settings,
        square_size,
        write_json,
    )
    from fastprompt.train.evaluate import evaluate

    set_threads(command.threads)
    settings = read_settings(command.adapter)
    if settings is None and command.data is None:
        raise ValueError(f"--data: is needed, {command.adapter} does not say which data the adapter is for")
    model = load_adapter(command, settings)
    if settings is None:
        settings = RunSettings(method="linear", data=str(command.data))
    changed = {
        name: getattr(command, name)
        for name in ("data", "num_train", "num_val", "num_test", "data_seed", "on_bad")
        if getattr(command, name) is not None
    }
    if command.data_root is not None:
        changed["data_root"] = str(command.data_root)
    if command.data is not None and absolute(command.data) != settings.data:
        settings = RunSettings(method=settings.method, data=command.data)
    settings = replace(settings, **changed, augment="none")
    splits = load_run_data(settings, square_size(model.backbone))
    names = list(splits.class_names)
    if model.class_names is not None and list(model.class_names) != names:
        raise ValueError(
            f"--data: {settings.data} has the classes {short(names)}, "
            f"the adapter was trained for {short(model.class_names)}"
        )
    record = evaluation_record(evaluate(model, getattr(splits, command.split), batch_size=command.batch_size))
    record |= {
        "adapter": str(command.adapter),
        "split": command.split,
        "data": splits.summary(),
        "class_names": names,
    }
    print(f"{settings.data} {command.split}: {record['num_images']} images, {record['seconds']:.1f} s")
    print(f"accuracy        {record['accuracy']:.4f}")
    print(f"mean per class  {record['mean_per_class']:.4f}")
    print("confusion (rows: true class, columns: predicted)")
    width = max(len(str(n)) for row in record["confusion"] for n in row) + 1
    label_width = min(24, max(map(len, names)))
    for name, row in zip(names, record["confusion"], strict=True):
        print(f"  {name[:label_width]:<{label_width}}" + "".join(f"{n:>{width}}" for n in row))
    if command.out is not None:
        write_json(command.out, record)
        print(f"written: {command.out}")


def short(names: Sequence[str]) -> str:
    """How many names and the first five of them."""
    return f"{len(names)}: " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def predict(command: Predict) -> None:
    """Run `fastprompt predict`."""
    import torch

    from fastprompt.data import list_images, read_images
    from fastprompt.data.images import bad_images, report_bad
    from fastprompt.files import atomic_write
    from fastprompt.report.runs import read_settings, square_size

    if command.out is not None and command.out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--out: takes a .csv or .json file, got {command.out}")
    if command.batch_size < 1:
        raise ValueError(f"--batch-size: takes a number from 1, got {command.batch_size}")
    set_threads(command.threads)
    files = list_images(command.images)
    bad = bad_images(files)
    report_bad([(files[i], reason) for i, reason in bad.items()], command.on_bad)
    files = [file for i, file in enumerate(files) if i not in bad]
    if not files:
        raise ValueError(f"images: none of the {len(bad)} files can be read")
    model = load_adapter(command, read_settings(command.adapter))
    image_size = square_size(model.backbone)
    rows: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(files), command.batch_size):
            images, _ = read_images(files[start : start + command.batch_size], image_size)
            rows += model(images).double().softmax(-1).tolist()
    names = list(model.class_names or [str(i) for i in range(len(rows[0]))])
    best = [max(range(len(row)), key=row.__getitem__) for row in rows]
    if command.out is not None and command.out.suffix.lower() == ".json":
        entries = [
            {
                "file": f,
                "class": names[b],
                "probability": row[b],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for f, b, row in zip(files, best, rows, strict=True)
        ]
        text = json.dumps({"class_names": names, "images": entries}, indent=1, ensure_ascii=False) + "\n"
        content = text.encode("utf-8", "backslashreplace")  # a byte that is no UTF-8 in a file name: "\udcff"
    else:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["file", "class", "probability", *(f"p({name})" for name in names)])
        for f, b, row in zip(files, best, rows, strict=True):
            writer.writerow([f, names[b], f"{row[b]:.6f}", *(f"{p:.6f}" for p in row)])
        text = buffer.getvalue()
        content = text.encode("utf-8", "surrogateescape")  # file names as the bytes they are
    if command.out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
    else:
        atomic_write(command.out, content)
        print(f"{len(files)} images -> {command.out}")


def export(command: Export) -> None:
    """Run `fastprompt export`."""
    from fastprompt.data.images import open_image, to_tensor
    from fastprompt.report.runs import read_settings
    from fastprompt.rgb.export import export_client, unnoticed
    from fastprompt.rgb.prompts import RGBPrompts

    if not command.client:
        raise ValueError("--client: is needed, a client's folder is the only kind of export there is")
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"--out: {command.out} is a file, a folder is needed")
    golden = None
    if command.golden is not None:
        try:
            golden = open_image(command.golden)
        except ValueError as error:
            raise ValueError(f"--golden: {error}") from error
    set_threads(command.threads)
    model = load_adapter(command, read_settings(command.adapter))
    if command.invert:
        model = RGBPrompts.invert(model, "extend", picture=True)
    picture = None if golden is None else to_tensor(golden, model.backbone.image_size, command.resize)
    manifest = export_client(model, command.out, picture, command.resize)
    height, width = manifest["picture_size"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(
        f"{command.out}: {len(manifest['files']) + 1} files, {size:,} bytes; pictures of {height} x {width} pixels "
        f"for {manifest['backbone']['name']}"
    )
    for mistake in unnoticed(manifest):
        print(f"hardly changes the golden picture's features, so that verify may miss it: {mistake}")


def info(command: Info) -> None:
    """Print facts about a backbone, about what each method would train on it, and about an adapter."""
    facts: dict[str, Any] = {}
    name, image_size = command.backbone, command.image_size
    options = method_options(command)
    if command.method is None and (command.set or (options and not command.rgb)):
        raise ValueError("--method: is needed with --set, or with --num-prompts without --rgb")
    if command.batch_size < 1:
        raise ValueError(f"--batch-size: takes a number from 1, got {command.batch_size}")
    if command.adapter is None:
        name = name or "clip-vit-b16"
    else:
        from fastprompt.report.runs import read_settings

        settings = read_settings(command.adapter)
        name = name or (settings.backbone if settings else None)
        facts["adapter"] = adapter_facts(command.adapter)
        image_size = image_size or stored_size(facts["adapter"]["config"])
    if name is not None:
        from fastprompt.report.runs import backbone_at
        from fastprompt.vit.assets import ASSETS

        known = command.rgb or "adapter" in facts or name in ASSETS or name.startswith("local-dir:")
        backbone = backbone_at(name, image_size, weights=known)
        facts["backbone"] = backbone_facts(name, backbone)
        if not known:
            facts["backbone"]["fingerprint"] = "not known without the weights, which info does not fetch"
        if "adapter" in facts:
            stored = facts["adapter"]["config"]["backbone"]["fingerprint"]
            facts["adapter"]["fits this backbone"] = stored == backbone.fingerprint
        configs = chosen_configs(command, facts.get("adapter"), options)
        facts["methods"] = methods_facts(command, facts.get("adapter"), configs, backbone)
        if command.cost:
            facts["cost"] = cost_facts(command, facts, configs, backbone)
        if command.rgb:
            facts["rgb"] = rgb_facts(command, facts.get("adapter"), options, backbone)
    elif command.cost or command.rgb:
        flag = "--cost" if command.cost else "--rgb"
        raise ValueError(f"--backbone: is needed with {flag}, the directory does not say which one its adapter is for")
    print(json.dumps(facts, indent=1, ensure_ascii=False) if command.json else info_text(facts))


def backbone_facts(name: str, backbone: FrozenViT) -> dict[str, Any]:
    """Size, structure and normalisation of a backbone."""
    return {
        "name": name,
        "architecture": backbone.spec.name,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "width": backbone.width,
        "depth": backbone.depth,
        "heads": backbone.num_heads,
        "patch size": backbone.patch_size,
        "image size": list(backbone.image_size),
        "patch grid": list(backbone.grid),
        "class and register tokens": backbone.num_prefix,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "fingerprint": backbone.fingerprint,
    }


def chosen_configs(
    command: Info, adapter: dict[str, Any] | None, options: dict[str, Any]
) -> dict[str, PromptConfig]:
    """By name: the method asked for, else the adapter's, else all."""
    from fastprompt.generators import config_from_dict
    from fastprompt.report.runs import TITLES, build_config

    if command.method is not None:
        return {TITLES[command.method]: build_config(command.method, options)}
    if adapter is not None:
        config = config_from_dict(adapter["config"]["method"])
        return {config.kind: config}
    # the other linear probe trains the same
    return {TITLES[method]: build_config(method, {}) for method in METHODS if method != "linear-sgd"}


def methods_facts(
    command: Info, adapter: dict[str, Any] | None, configs: dict[str, PromptConfig], backbone: FrozenViT
) -> dict[str, Any]:
    """Trained parameters of each method; of several, one that does not fit the backbone is listed with the reason."""
    stored = adapter is not None and command.method is None
    num_classes = adapter["config"]["num_classes"] if stored and adapter else command.num_classes
    facts: dict[str, Any] = {}
    for title, config in configs.items():
        try:
            facts[title] = method_facts(config, backbone, num_classes)
        except ValueError as error:
            if len(configs) == 1:
                raise
            facts[title] = {"does not fit": str(error)}
    return facts


def cost_facts(
    command: Info, facts: dict[str, Any], configs: dict[str, PromptConfig], backbone: FrozenViT
) -> dict[str, Any]:
    """What a forward and a training step of each method cost, by graph; of several, a reason where none is known."""
    from fastprompt.report.cost import GRAPHS, READOUTS, Sizes, cost

    stored = facts["adapter"]["config"] if "adapter" in facts else {}
    readout = command.readout or stored.get("readout") or backbone.spec.pool
    if readout not in READOUTS:
        raise ValueError(f"--readout: takes one of {READOUTS} with --cost, got {readout!r}")
    classes = command.num_classes if command.method is not None else stored.get("num_classes") or command.num_classes
    sizes = Sizes.of(backbone)
    methods: dict[str, Any] = {}
    for title, config in configs.items():
        if "does not fit" in facts["methods"][title]:
            continue
        try:
            graphs: dict[str, Any] = {}
            for graph in GRAPHS:
                forward, step = (
                    cost(sizes, config, readout, graph, training, command.dtype, command.batch_size, classes)
                    for training in (False, True)
                )
                graphs[graph] = {
                    "forward GFLOPs per image": round(forward.flops / 1e9, 4),
                    "training GFLOPs per image": round(step.flops / 1e9, 4),
                    "saved MiB per image": round(step.saved_bytes / 2**20, 4),
                    "forward dispatches": forward.dispatches,
                    "training dispatches": step.dispatches,
                }
            methods[title] = graphs
        except ValueError as error:
            if len(configs) == 1:
                raise
            methods[title] = {"no formula": str(error)}
    return {"readout": readout, "dtype": command.dtype, "batch size": command.batch_size, "methods": methods}


def method_facts(config: Any, backbone: FrozenViT, num_classes: int | None) -> dict[str, Any]:
    """Trained parameters by our count and by the paper's formula."""
    import fastprompt as fp

    model = fp.PromptedViT(backbone, config, num_classes=num_classes)
    return {
        **model.num_trainable(),
        "paper formula": model.paper_parameter_count(),
        "options": {key: value for key, value in config.to_dict().items() if key != "kind"},
    }


def adapter_facts(path: Path) -> dict[str, Any]:
    """What an adapter directory holds; the backbone is not needed."""
    from fastprompt.model import WEIGHTS_FILE, read_adapter
    from fastprompt.report.runs import adapter_dir

    directory = adapter_dir(path)
    config, tensors = read_adapter(directory)
    return {
        "directory": str(directory),
        "bytes": (directory / WEIGHTS_FILE).stat().st_size,
        "config": config,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def rgb_facts(command: Info, adapter: dict[str, Any] | None, options: dict[str, Any], backbone: FrozenViT
              ) -> dict[str, Any]:
    """`RGBPrompts.report` as facts, of a PGN adapter's tokens or of those at the start of training."""
    from fastprompt.model import read_adapter
    from fastprompt.rgb.prompts import RGBPrompts

    num_prompts, library = options.get("num_prompts"), None
    if adapter is not None and command.method is None and adapter["config"]["method"]["kind"] == "pgn":
        if num_prompts is not None:
            raise ValueError("--num-prompts: the adapter's own is reported")
        num_prompts = adapter["config"]["method"]["num_prompts"]
        library = read_adapter(adapter["directory"])[1]["generator.library"]
    report = RGBPrompts.report(backbone, num_prompts, library)
    placements = [{name: None if value != value else value for name, value in found._asdict().items()}
                  for found in report.placements]  # JSON has no NaN
    return {**dataclasses.asdict(report), "placements": placements, "text": str(report)}


def info_text(facts: dict[str, Any]) -> str:
    """The facts of `info` as text."""
    from fastprompt.report.runs import text_table

    lines: list[str] = []
    if "adapter" in facts:
        adapter = facts["adapter"]
        lines += [f"Adapter {adapter['directory']} ({adapter['bytes']:,} bytes)"]
        for key, value in adapter["config"].items():
            lines.append(f"  {key:<20} {json.dumps(value, ensure_ascii=False)}")
        if "fits this backbone" in adapter:
            lines.append(f"  {'fits this backbone':<20} {'yes' if adapter['fits this backbone'] else 'NO'}")
        lines.append("  tensors")
        for key, shape in adapter["tensors"].items():
            lines.append(f"    {key:<40} {' x '.join(map(str, shape)) or 'scalar'}")
    if "backbone" in facts:
        lines += ([""] if lines else []) + [f"Backbone {facts['backbone']['name']}"]
        lines += [f"  {key:<26} {value}" for key, value in facts["backbone"].items() if key != "name"]
        lines += [
            "",
            "Trained parameters: our count, and the generator's by the paper's formula where it prints one",
        ]
        rows = []
        for title, method in facts["methods"].items():
            if "does not fit" in method:
                rows.append([title, *["–"] * 5])
                continue
            counts = [f"{method[key]:,}" for key in ("generator", "head", "backbone", "total")]
            paper = method["paper formula"]
            rows.append([title, *counts, "–" if paper is None else f"{paper:,}"])
        lines.append(text_table(["method", "generator", "head", "backbone", "total", "by the paper"], rows))
        for title, method in facts["methods"].items():
            if "does not fit" in method:
                lines.append(f"{title} does not fit this backbone as it is: {method['does not fit']}")
    if "cost" in facts:
        lines += ["", *cost_text(facts["cost"])]
    if "rgb" in facts:
        lines += ["", "Prompts as pixels", facts["rgb"]["text"]]
    return "\n".join(lines)


def cost_text(facts: dict[str, Any]) -> list[str]:
    """The costs of `cost_facts` as lines of text."""
    from fastprompt.report.runs import text_table

    rows, reasons = [], []
    for title, graphs in facts["methods"].items():
        if "no formula" in graphs:
            reasons.append(f"{title}: {graphs['no formula']}")
            continue
        papers, rewritten, recompute = graphs["papers"], graphs["rewritten"], graphs["recompute"]
        row = [title]
        for key in papers:
            form = ",.2f" if isinstance(papers[key], float) else ",d"
            again = "" if key.startswith("forward") else f" ({recompute[key]:{form}})"
            row.append(f"{papers[key]:{form}} → {rewritten[key]:{form}}{again}")
        rows.append(row)
    header = ["method", "GFLOPs, forward", "GFLOPs, step", "saved MiB", "dispatches, forward", "dispatches, step"]
    return [
        f"Cost by formula, the papers' graph → the rewritten one (with gradient checkpointing): readout "
        f"{facts['readout']}, {facts['dtype']},",
        f"FLOPs and kept bytes per image; dispatches per call: {facts['batch size']} images, one thread",
        text_table(header, rows),
        *reasons,
    ]


def serve(command: Serve) -> None:
    """Run `fastprompt serve`."""
    from importlib.util import find_spec

    if find_spec("litserve") is None:
        raise ImportError("litserve is not installed: pip install 'fastprompt[serve]'")
    from fastprompt.serve import host
    from fastprompt.serve.protocol import Limits
    from fastprompt.serve.routes import read_keys
    from fastprompt.serve.tenants import HostSettings

    adapters: dict[str, Path] = {}
    for text in command.adapter:
        name, equals, directory = text.partition("=")
        if not name or not equals or not directory:
            raise ValueError(f"--adapter: takes NAME=DIR, got {text!r}")
        if name in adapters:
            raise ValueError(f"--adapter: {name!r} is given twice")
        adapters[name] = Path(directory)
    for flag in ("batch_wait_ms", "max_body_mb", "body_timeout", "timeout"):
        if not math.isfinite(getattr(command, flag)):
            raise ValueError(f"--{flag.replace('_', '-')}: takes a finite number, got {getattr(command, flag)}")
    settings = HostSettings(command.backbone, command.image_size, command.any_size, adapters, command.dtype,
                            command.batch_size, command.threads, command.device)
    limits = Limits(int(command.max_body_mb * 2**20), command.max_images, command.max_pixels, command.body_timeout,
                    command.timeout, command.max_waiting)
    host.run(settings, limits, read_keys(command.api_keys_file), command.host, command.port,
             command.batch_wait_ms / 1000, command.allow_origin)


def report(command: Report) -> None:
    """Run `fastprompt report`."""
    from fastprompt.report.html import build_report

    build_report(command.runs, command.out)
    print(f"written: {command.out}")


def run(command: Adapt | Eval | Predict | Export | Serve | Info | Report) -> None:
    """Run one command."""
    if isinstance(command, Adapt):
        adapt(command)
    elif isinstance(command, Eval):
        evaluate_adapter(command)
    elif isinstance(command, Predict):
        predict(command)
    elif isinstance(command, Export):
        export(command)
    elif isinstance(command, Serve):
        serve(command)
    elif isinstance(command, Info):
        info(command)
    else:
        report(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A usage error leaves with `SystemExit(2)`, `--help` with
    `SystemExit(0)`.
    """
    command = tyro.cli(
        Command,
        args=arguments,
        prog="fastprompt",
        description="Instance-conditioned visual prompts on frozen vision transformers.",
    )
    name = type(command).__name__.lower()
    try:
        run(command)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if isinstance(command, Adapt):
            print(f"\ninterrupted; the same command goes on with what is in {command.out}", file=sys.stderr)
        else:
            print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if command.debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (*WRONG_INPUT, OSError, RuntimeError, ArithmeticError, ImportError))
        print(
            f"fastprompt {name}: error: {text if known else f'{type(error).__name__}: {text}'}",
            file=sys.stderr,
        )
        return 2 if isinstance(error, WRONG_INPUT) else 1
