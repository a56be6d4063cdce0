"""Writes results/kernels.md, what is known of the Triton kernels without having run one on a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from capture import capture, capturing
from cost import methods, random_backbone
from spec import ROOT, Case, cast, load_spec
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt as fp
from fastprompt.kernels import dispatch

# bytes per second of the parts' memory, from their vendors' data sheets
BANDWIDTH = {"A100 80 GB": 2.04e12, "H100 SXM": 3.35e12, "B200": 8.0e12}
ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view")
MIX = ("matrix", "wide", "narrow")
HEAD = """# Triton kernels, as compiled

Written by `make kernels-report` with Triton {version}; nothing here was measured on a GPU. Registers, spilled bytes,
shared memory and instructions are read out of the machine code that Triton's compiler makes for each part; distinct
bytes are counted in Triton's interpreter; *bound* times are **computed**: the bytes that a launch must move
(`tests/kernels/gates/kernel_bytes.py`) over the published memory bandwidth ({rates}), so no launch can be faster from
memory, though small tensors may come out of a cache. They are no prediction. The first table counts what a forward of
one image with 10 prompts on ViT-B/16 launches; an operator of PyTorch is at least one launch.

* **row**: of the kernel's table of tile sizes. **occupancy**: resident warps over the most that a multiprocessor holds.
* **matrix**: matrix instructions in the code. **wide / narrow**: global accesses of 16 bytes / of fewer.
* **re-reads**: bytes loaded over distinct bytes touched, loaded or stored, at a small size; a cache serves the repeats.
"""


class Counter(TorchDispatchMode):
    """Counts the operators of PyTorch that do work: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and name not in ALLOCATIONS and not name.startswith("fastprompt::"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def gate(script: str, op: str) -> dict[str, Any]:
    """The output of one of the gates."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if script == "compile" else "1"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / f"{script}.py"), op],
        env=environment,
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def builds(rows: list[dict[str, Any]]) -> str:
    header = (
        "kernel",
        "row",
        "part",
        "dtype",
        "constants",
        "registers",
        "spilled B",
        "shared KiB",
        "warps",
        "occupancy",
        *MIX,
    )
    return table(
        header,
        (
            (
                f"`{row['kernel']}`",
                row["row"],
                row["part"],
                row["dtype"],
                ", ".join(
                    f"{name}={value}"
                    for name, value in row["constants"].items()
                    if not name.startswith(("stride", "BLOCK"))
                ),
                row["registers"],
                row["spilled"],
                f"{row['shared'] / 1024:.1f}",
                row["warps"],
                f"{row['occupancy']:.0%}",
                *(row[name] for name in MIX),
            )
            for row in rows
        ),
    )


def grids(launched: list[dict[str, Any]]) -> str:
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in launched:
        if row["part"] == "sm_90":
            found.setdefault((row["case"], row["kernel"]), {})[row["batch"]] = row
    header = (
        "case",
        "kernel",
        *(f"programs, B = {batch}" for batch in (1, 32, 128)),
        "MB, B = 32",
        *(f"bound on {part}, B = 32, µs (computed)" for part in BANDWIDTH),
    )
    rows = []
    for (case, kernel), by in found.items():
        programs = [by[batch]["programs"] if batch in by else "not launched" for batch in (1, 32, 128)]
        moved = by[32]["bytes"] if 32 in by else None
        bounds = ["" if moved is None else f"{moved / rate * 1e6:.2f}" for rate in BANDWIDTH.values()]
        rows.append((case, f"`{kernel}`", *programs, "" if moved is None else f"{moved / 1e6:.2f}", *bounds))
    few = [
        f"{case}, `{kernel}`, B = 32: {by[32]['few']}"
        for (case, kernel), by in found.items()
        if 32 in by and by[32]["programs"] < 132
    ]
    return table(header, rows) + "".join(f"\n{line}\n" for line in few)


def traffic(rows: list[dict[str, Any]]) -> str:
    return table(
        ("kernel", "case", "distinct bytes", "formula", "ratio", "re-reads"),
        (
            (
                f"`{row['kernel']}`",
                row["case"],
                row["distinct"],
                row["formula"],
                f"{row['distinct'] / row['formula']:.3f}",
                f"{row['loaded'] / row['distinct']:.2f}",
            )
            for row in rows
            if row["kernel"]
        ),
    )


def launches(case: Case, module: ModuleType) -> tuple[int, int, int, int]:
    """Kernels launched forward and backward, and operators that PyTorch runs for the reference."""
    forward = len(capture(dataclasses.replace(case, grads=()), module, torch.float32, "sm_90"))
    both = len(capture(case, module, torch.float32, "sm_90"))
    inputs = cast(case.inputs(lambda *shape: torch.zeros(*shape)), torch.float32, case.kept, case.grads)
    with Counter() as counter:
        outputs = [o for o in case.reference(inputs) if o.requires_grad]
        peer = counter.count
        torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    return forward, peer, both - forward, counter.count - peer


def of_a_method(model: fp.PromptedViT, modules: list[ModuleType]) -> tuple[int, int, int]:
    """A forward of one image: kernels launched and operators of PyTorch beside them; operators of the papers' graph."""
    images = torch.zeros(1, 3, *model.backbone.image_size, dtype=model.backbone.dtype)
    tables = {kernel: rows for module in modules for kernel, rows in module.TABLES.items()}
    with (
        torch.no_grad(),
        fp.use_backend("triton"),
        mock.patch.object(dispatch, "_obstacle", lambda op, device, unsupported: unsupported),
    ):
        with capturing(tables):
            model(images)  # constants are folded once
        with capturing(tables) as launched, Counter() as ours:
            model(images)
    with torch.no_grad(), Counter() as papers:
        model.reference_forward(images)
    return len(launched), ours.count, papers.count


def main() -> None:
    torch.set_num_threads(1)
    rates = ", ".join(f"{part} {rate / 1e12:.2f} TB/s" for part, rate in BANDWIDTH.items())
    text = HEAD.format(version=triton.__version__, rates=rates)
    ops = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
    modules, backbone = [importlib.import_module(load_spec(op).MODULE) for op in ops], random_backbone()
    models = {name: fp.PromptedViT(backbone, config, num_classes=10).eval() for name, config in methods(10).items()}
    header = ("method", "launches of kernels", "operators of PyTorch beside them", "operators of the papers' graph")
    text += "\n" + table(header, ((name, *of_a_method(model, modules)) for name, model in models.items()))
    for op in ops:
        spec, compiled, counted = load_spec(op), gate("compile", op), gate("interpret", op)
        module = importlib.import_module(spec.MODULE)
        header = (
            "case",
            "launches forward",
            "operators of the reference",
            "launches backward",
            "operators of the reference",
        )
        text += f"\n## `{op}`\n\n"
        text += table(header, ((case.name, *launches(case, module)) for case in spec.at_size(1))) + "\n"
        text += grids(compiled["grids"]) + "\n" + traffic(counted["traffic"]) + "\n" + builds(compiled["builds"])
    (ROOT / "results" / "kernels.md").write_text(text)


if __name__ == "__main__":
    main()
