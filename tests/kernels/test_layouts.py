"""Kernels read what their forward saved for their backward, in whatever layout it comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import contextlib, importlib
import torch
from parity import cotangents_of, drawn
from spec import cast, load_spec

CASES = {
    "adaptive_prompts": [dict(args=(2, 3, 2, 16, 2))],
    "add_norm": [dict(args=(2, 3, 16))],
    "library_prompts": [dict(args=(2, 2, 5, 16)), dict(args=(2, 2, 5, 16), norm=True)],
    "prefix_attention": [dict(args=(2, 2, 2, 3, 2, 16)), dict(args=(2, 2, 3, 3, 2, 16), packed=True)],
    "vae_prompts": [dict(args=(2, 2, 1, 1, 16, 3, 4)), dict(args=(2, 2, 1, 1, 16, 3, 4, 2))],
}

def spread(x):  # the same numbers, none beside another
    changed.append(x.shape)
    return torch.stack([x.detach(), torch.full_like(x.detach(), 7)], dim=-1)[..., 0]

for op, cases in CASES.items():
    spec = load_spec(op)
    module = importlib.import_module(spec.MODULE)
    for i, options in enumerate(cases):
        case = spec.case("tiny", *options.pop("args"), **options)
        found = []
        for hooked in (False, True):
            changed = []
            hooks = torch.autograd.graph.saved_tensors_hooks(spread, lambda x: x)
            inputs = cast(drawn(case), torch.float32, case.kept, case.grads)
            with hooks if hooked else contextlib.nullcontext():
                outputs = [o for o in case.kernel(module, inputs) if o.requires_grad]
            leaves = [inputs[name] for name in case.grads]
            found.append(torch.autograd.grad(outputs, leaves, cotangents_of(outputs)))
        same = all(map(torch.equal, *found))
        print(op, i, "the same" if same and len(changed) > 1 else "different")
"""


def test_saved_tensors_come_back_with_other_strides() -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests/kernels/gates", ".", "bench"))
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == [
        "adaptive_prompts 0 the same",
        "add_norm 0 the same",
        "library_prompts 0 the same",
        "library_prompts 1 the same",
        "prefix_attention 0 the same",
        "prefix_attention 1 the same",
        "vae_prompts 0 the same",
        "vae_prompts 1 the same",
    ], ran.stdout + ran.stderr[-3000:]
