"""Pages of the documentation as programs: their Python blocks run in order, in one namespace, as a reader runs them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from fastprompt.engine import backends
from fastprompt.train import recipes
from fastprompt.vit import assets

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first line in the page, from 1."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order; those within lists and notes lose their indentation."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(found["language"], textwrap.dedent(found["text"]), line)


def run_page(page: Path) -> int:
    """Run the page's Python blocks in one module; returns how many. A `text` block behind one is what that prints.

    Raises:
        AssertionError: a block prints something else. Whatever a block raises, with the page's line in the traceback.
    """
    printed, count, module = None, 0, ModuleType("documented_page")
    sys.modules[module.__name__] = module  # dataclasses look there for the types that a page names
    try:
        for block in blocks(page):
            if block.language == "text" and printed is not None:
                assert printed == block.text, f"{page}:{block.line}"
            printed = None
            if block.language == "python":
                count += 1
                output = io.StringIO()
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
                with contextlib.redirect_stdout(output):
                    exec(code, module.__dict__)
                printed = output.getvalue()
    finally:
        del sys.modules[module.__name__]
    return count


def commands(page: Path, program: str = "fastprompt") -> Iterator[tuple[int, list[str]]]:
    """(line, words) of each call of `program` in the page's shell blocks, without what follows a pipe or `&`."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        for number, command in enumerate(block.text.replace("\\\n", "  ").splitlines()):
            words = shlex.split(command, comments=True)
            if words and words[0] == program:
                yield block.line + number, words[1:]


def prepare(folder: Path) -> None:
    """What pages find in the working directory: `birds`, a folder of pictures by class, and `owl.png`."""
    generator = torch.Generator().manual_seed(0)
    for shade, name in ((40, "owl"), (170, "robin")):
        (folder / "birds" / name).mkdir(parents=True)
        for number in range(6):
            noise = torch.randint(0, 60, (64, 80, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray((noise + shade).numpy()).save(folder / "birds" / name / f"{number}.png")
    Image.open(folder / "birds" / "owl" / "0.png").save(folder / "owl.png")


def offline(monkeypatch: pytest.MonkeyPatch, *, tiny: bool) -> None:
    """Random weights in place of published ones, one epoch where no other number is given, engines run eagerly.

    With `tiny` every timm model and the two of `load_backbone` are small ones of the same patch size.
    """
    create = timm.create_model

    def random_weights(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return create(name, pretrained=False, **({**TINY, **options} if tiny and name.startswith("vit_") else options))

    def wheel(name: str, image_size: int | tuple[int, int] | None) -> torch.nn.Module:
        model = {"clip-vit-b16": "vit_base_patch16_clip_quickgelu_224", "vit-s14": "vit_small_patch14_dinov2"}[name]
        return random_weights(model, img_size=image_size or 224).eval()

    monkeypatch.setattr(timm, "create_model", random_weights)
    monkeypatch.setattr(assets, "_module", wheel)
    monkeypatch.setitem(recipes.COMMON_RECIPE, "epochs", 1)
    monkeypatch.setitem(recipes.COMMON_RECIPE, "min_steps", 0)
    for name in set(backends.BACKENDS) - {"eager"}:
        monkeypatch.delitem(backends.BACKENDS, name)
