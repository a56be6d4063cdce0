"""Write the tables of the methods' pages from the registry: `python experiments/method_tables.py`, run by `make docs`.

In `docs/methods/*.md` it replaces the text between `<!-- method: NAME -->` and `<!-- /method -->`: options, recipes of
this library and as published, and the cost on a ViT-B/16.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from fastprompt.cli.words import fields_of
from fastprompt.cost import cost
from fastprompt.files import atomic_write
from fastprompt.generators import Geometry, get_method
from fastprompt.generators.accounting import Sizes
from fastprompt.generators.registry import Method
from fastprompt.train.recipes import COMMON_RECIPE, Recipe, default_recipe

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
PLACE = re.compile(r"(<!-- method: ([\w-]+) -->\n).*?(<!-- /method -->\n)", re.DOTALL)
VIT_B16 = Sizes(
    width=768,
    depth=12,
    heads=12,
    hidden=3072,
    patches=196,
    prefix=1,
    patch_size=16,
    image_size=(224, 224),
    grid=(14, 14),
)


def shown(value: Any) -> str:
    """Format a value as Python does, with numbers in their shortest form."""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!r}`"


def in_cell(text: str) -> str:
    """Put `text` on one line, escaping characters that would end a table cell or start a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def options(method: Method) -> list[str]:
    """List the options that the method's name does not fix, with their defaults and documentation."""
    hints, describe = fields_of(method.config_class, method.options)
    if not hints:
        return ["It has no options.", ""]
    lines = ["| Option | Default | Meaning |", "|---|---|---|"]
    for name in hints:
        said, _, default = describe(name).rpartition("(default: ")
        value = getattr(method.config_class, name)
        assert default == f"{value})"
        lines.append(f"| `{name}` | {shown(value)} | {in_cell(said)} |")
    return [*lines, ""]


def recipe(method: Method) -> list[str]:
    """List how the method trains: what differs from the common recipe, and what its authors published."""
    ours, common = default_recipe(method.name).to_dict(), Recipe.from_dict(COMMON_RECIPE).to_dict()
    own = {name: value for name, value in ours.items() if value != common[name]}
    lines = ["| Recipe | Settings |", "|---|---|"]
    lines.append(f"| `default_recipe` | {settings(own) or 'that of all methods'} |")
    if method.lrs:
        lines.append(f"| learning rates that `make table` tries | {', '.join(f'`{lr:g}`' for lr in method.lrs)} |")
    for name, published in method.published.items():
        fields = dict(published.recipe)
        rate = f"`lr={fields.pop('lr'):g}`" + (f" for {published.lr_per} images a step" if published.lr_per else "")
        rest = settings({k: v for k, v in fields.items() if v != getattr(Recipe(), k)})
        lines.append(f"| `{name}`: {in_cell(published.source)} | {rate}{', ' if rest else ''}{rest} |")
    return [*lines, ""]


def settings(fields: dict[str, Any]) -> str:
    """`name=value` of each."""
    return ", ".join(
        f"`{name}={value:g}`" if isinstance(value, float) else f"`{name}={value!r}`" for name, value in fields.items()
    )


def backbone_parameters() -> int:
    """Count the parameters of a ViT-B/16 at 224 px without its head."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    return sum(p.numel() for p in vit.parameters())


def costs(method: Method) -> list[str]:
    """Trained parameters and FLOPs on a ViT-B/16 at 224 px with the default options."""
    config = method.config()
    if method.generator_class is not None:
        try:
            generator = method.generator_class(config, Geometry())
        except TypeError:
            return ["Its parameters depend on the backbone: `fastprompt info` counts them, on any.", ""]
        count = sum(p.numel() for p in generator.parameters())
    else:
        count = backbone_parameters() if config.trains_backbone else 0
    lines = [
        "| On a ViT-B/16 at 224 px, default options | |",
        "|---|---:|",
        f"| trained parameters, without head | {count:,} |",
    ]
    try:
        flops = [cost(VIT_B16, config, graph=graph).flops / 1e9 for graph in ("papers", "rewritten")]
        steps = [cost(VIT_B16, config, graph=graph, training=True).flops / 1e9 for graph in ("papers", "rewritten")]
    except ValueError:
        return [*lines, ""]
    for job, (papers, rewritten) in (("forward", flops), ("training step", steps)):
        lines.append(f"| {job}, papers' graph → rewritten | {papers:.2f} → {rewritten:.2f} GFLOPs an image |")
    return [*lines, ""]


def tables(name: str) -> str:
    """Return the text for the page of one method."""
    method = get_method(name)
    parts = (("Options", options), ("Recipe", recipe), ("Cost", costs))
    lines = []
    for title, part in parts:
        found = part(method)
        lines += [f"## {title}", "", *found] if found else []
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return a page with up-to-date tables."""
    return PLACE.sub(lambda found: found[1] + "\n" + tables(found[2]) + "\n" + found[3], text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages that changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages")
    for page in sorted(parser.parse_args(arguments).pages.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            atomic_write(page, new)
            print(f"written: {page}")


if __name__ == "__main__":
    main()
