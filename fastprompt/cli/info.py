"""`fastprompt info`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import METHOD, Plugins, method_options, stored_size
from fastprompt.terminal import printable_json, say

if TYPE_CHECKING:
    from fastprompt.generators import PromptConfig
    from fastprompt.vit import FrozenViT


@dataclass
class Info:
    """Show a backbone, what each method would train and cost on it, and the contents of an adapter directory.

    With --method, --set KEY=VALUE ... is short for --options.KEY VALUE.
    """

    adapter: tyro.conf.Positional[Path | None] = None
    """Adapter or run directory, or repository of the Hugging Face Hub, as owner/name."""
    backbone: str | None = None
    """Backbone; if not given, the adapter's, else clip-vit-b16."""
    image_size: int | None = None
    """Image side in pixels; if not given, the one the adapter was trained at, else the backbone's own."""
    method: Annotated[str | None, METHOD] = None
    """Show this method only; all of them if not given."""
    num_prompts: int | None = None
    """Number of prompts; short for --options.num-prompts."""
    options: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 10
    """Number of classes of the head; an adapter's own number takes precedence."""
    cost: bool = False
    """Show FLOPs, saved bytes and dispatches of each method by formula, for the papers' and the rewritten graph."""
    readout: str | None = None
    """Readout for --cost: cls, patches, patches+prompts or prompts; the adapter's or backbone's own if not given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the backbone for --cost."""
    batch_size: int = 8
    """Images per call for --cost."""
    rgb: bool = False
    """Show whether prompts can be pixels on this backbone, and what inversion would lose at each placement: for the
    tokens of a PGN adapter if one is given, else for --num-prompts."""
    json: bool = False
    """Print JSON."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def info(command: Info) -> None:
    """Print facts about a backbone, about what each method would train on it, and about an adapter."""
    facts: dict[str, Any] = {}
    name, image_size = command.backbone, command.image_size
    options = method_options(command)
    if command.method is None and (command.options or (options and not command.rgb)):
        raise ArgumentError("method", "is required with --set, or with --num-prompts without --rgb")
    if command.batch_size < 1:
        raise ArgumentError("batch_size", f"must be at least 1, got {command.batch_size}")
    if command.adapter is None:
        name = name or "clip-vit-b16"
    else:
        from fastprompt.adapters import source_of
        from fastprompt.runs.directory import read_settings

        settings = read_settings(command.adapter)
        name = name or (settings.backbone if settings else None)
        facts["adapter"] = adapter_facts(command.adapter)
        if name is None and (command.cost or command.rgb):  # only these need the backbone, which may be a download
            source = source_of(facts["adapter"]["config"])
            name = None if source is None else source.backbone_name
        image_size = image_size or stored_size(facts["adapter"]["config"])
    if name is not None:
        from fastprompt.runs.execute import backbone_at
        from fastprompt.vit.assets import ASSETS, is_cached
        from fastprompt.vit.source import split_local

        here = is_cached(name) if name in ASSETS else split_local(name) is not None
        known = command.rgb or "adapter" in facts or here
        backbone = backbone_at(name, image_size, weights=known)
        facts["backbone"] = backbone_facts(name, backbone)
        if not known:
            facts["backbone"]["fingerprint"] = "unknown without the weights, which info does not download"
        if "adapter" in facts:
            from fastprompt.adapters import read_adapter, without_resampled

            stored = facts["adapter"]["config"]["backbone"]["fingerprint"]
            _, resampled = without_resampled(read_adapter(facts["adapter"]["directory"])[1])
            facts["adapter"]["fits this backbone"] = backbone.fits(stored, resampled)
        configs = chosen_configs(command, facts.get("adapter"), options)
        facts["methods"] = methods_facts(command, facts.get("adapter"), configs, backbone)
        if command.cost:
            facts["cost"] = cost_facts(command, facts, configs, backbone)
        if command.rgb:
            facts["rgb"] = rgb_facts(command, facts.get("adapter"), options, backbone)
    elif command.cost or command.rgb:
        flag = "--cost" if command.cost else "--rgb"
        raise ArgumentError("backbone", f"is required with {flag}: the adapter directory does not name its backbone")
    facts["software"] = software_facts()
    say(printable_json(facts) if command.json else info_text(facts))


def software_facts() -> dict[str, str]:
    """Return versions, devices and whether the C++ kernels are available."""
    import torch

    import fastprompt as fp
    from fastprompt.kernels import native

    devices = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    missing = native.obstacle()
    return {
        "fastprompt": fp.__version__,
        "torch": torch.__version__,
        "devices": ", ".join([*devices, "cpu"]),
        "C++ kernels": missing or f"in use, with {native.level()} instructions",
    }


def backbone_facts(name: str, backbone: FrozenViT) -> dict[str, Any]:
    """Return size, structure and normalisation of a backbone, and the notice that comes with bundled weights."""
    from fastprompt.vit.assets import ASSETS

    return {
        "name": name,
        **({"weights": ASSETS[name].notice} if name in ASSETS else {}),
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


def chosen_configs(command: Info, adapter: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, PromptConfig]:
    """Return configurations by name: that of --method, else the adapter's, else those of all methods."""
    from fastprompt.adapters import config_from
    from fastprompt.generators import get_method, list_methods

    if command.method is not None:
        method = get_method(command.method)
        return {method.title: method.config(options)}
    if adapter is not None:
        config = config_from(adapter["config"])
        return {config.kind: config}
    configs: dict[str, PromptConfig] = {}
    for method in map(get_method, list_methods()):
        config = method.config()
        if config not in configs.values():  # two names of the linear probe share a configuration
            configs[method.title] = config
    return configs


def methods_facts(
    command: Info, adapter: dict[str, Any] | None, configs: dict[str, PromptConfig], backbone: FrozenViT
) -> dict[str, Any]:
    """Return trained parameters of each method, or the reason why it does not fit the backbone.

    A single method that does not fit raises instead.
    """
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
    """Return the cost of a forward and of a training step of each method, by graph, or why there is no formula.

    A single method without a formula raises instead.
    """
    from fastprompt.cost import GRAPHS, READOUTS, Sizes, cost

    stored = facts["adapter"]["config"] if "adapter" in facts else {}
    readout = command.readout or stored.get("readout") or backbone.spec.pool
    if readout not in READOUTS:
        raise ArgumentError("readout", f"must be one of {READOUTS} with --cost, got {readout!r}")
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
    """Return trained parameters, counted and by the paper's formula."""
    import fastprompt as fp

    model = fp.PromptedViT(backbone, config, num_classes=num_classes)
    return {
        **model.num_trainable(),
        "paper formula": model.paper_parameter_count(),
        "options": {key: value for key, value in config.to_dict().items() if key != "kind"},
    }


def adapter_facts(path: Path) -> dict[str, Any]:
    """Return the contents of an adapter directory; needs no backbone."""
    from fastprompt.adapters import WEIGHTS_FILE, read_adapter
    from fastprompt.runs.directory import adapter_dir

    directory = adapter_dir(path)
    config, tensors = read_adapter(directory)
    return {
        "directory": str(directory),
        "bytes": (directory / WEIGHTS_FILE).stat().st_size,
        "config": config,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def has_token_library(method: dict[str, Any]) -> bool:
    """Whether an adapter's method mixes its prompts from a library of tokens, which can be inverted to pixels."""
    from fastprompt.generators import PGNConfig, config_from_dict

    config = config_from_dict(method)
    return isinstance(config, PGNConfig) and config.library_size is not None


def rgb_facts(
    command: Info, adapter: dict[str, Any] | None, options: dict[str, Any], backbone: FrozenViT
) -> dict[str, Any]:
    """Return `RGBPrompts.report` as facts, for a PGN adapter's tokens or for freshly initialised ones."""
    from fastprompt.adapters import read_adapter
    from fastprompt.pixels.prompts import RGBPrompts

    num_prompts, library = options.get("num_prompts"), None
    if adapter is not None and command.method is None and has_token_library(adapter["config"]["method"]):
        if num_prompts is not None:
            raise ArgumentError("num_prompts", "must not be given with --rgb and a PGN adapter, which has its own")
        num_prompts = adapter["config"]["method"]["num_prompts"]
        library = read_adapter(adapter["directory"])[1]["generator.library"]
    report = RGBPrompts.report(backbone, num_prompts, library)
    placements = [
        {name: None if value != value else value for name, value in found._asdict().items()}
        for found in report.placements
    ]  # JSON has no NaN
    return {**dataclasses.asdict(report), "placements": placements, "text": str(report)}


def info_text(facts: dict[str, Any]) -> str:
    """Format the facts of `info` as text."""
    from fastprompt.runs.tables import text_table

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
            "Trained parameters as counted, and the generator's by the paper's formula if it prints one",
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
                lines.append(f"{title} does not fit this backbone: {method['does not fit']}")
    if "cost" in facts:
        lines += ["", *cost_text(facts["cost"])]
    if "rgb" in facts:
        lines += ["", "Prompts as pixels", facts["rgb"]["text"]]
    lines += ["", "Software", *(f"  {key:<20} {value}" for key, value in facts["software"].items())]
    return "\n".join(lines)


def cost_text(facts: dict[str, Any]) -> list[str]:
    """Format the costs of `cost_facts` as lines of text."""
    from fastprompt.runs.tables import text_table

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
