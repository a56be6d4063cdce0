"""Each backend computes what the model does, in the engine's number format."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.engine import backends
from fastprompt.engine.backends import BACKENDS
from fastprompt.kernels import dispatch

Build = Callable[..., fp.PromptedViT]


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("compile", "vpt-deep"),
        *(("openvino", method) for method in ("vpt-deep", "pgn", "v2apt")),
        *(
            pytest.param("openvino", method, marks=pytest.mark.long)
            for method in ("vpt-shallow-project", "vapt", "pixel")
        ),
    ],
)
def test_computes_what_eager_does(
    build: Build, images: Tensor, backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count()
    monkeypatch.setattr(dispatch, "measured", {})
    monkeypatch.setattr(dispatch, "seconds_on_cpu", lambda step: next(times))  # what is timed first wins: the kernels
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = build(method)
    eager, other = (fp.Engine(model, (4,), torch.bfloat16, name) for name in ("eager", backend))
    assert_close(other(images[:3]), eager(images[:3]), torch.bfloat16)


def test_constants_are_made_again_and_raw_pixels_taken(build: Build) -> None:
    pytest.importorskip("openvino")
    model, raw = build("vpt-deep"), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    eager, other = (fp.Engine(model, (2,), torch.float32, name) for name in ("eager", "openvino"))
    before = other(raw)
    assert_close(before, eager(raw), torch.float32)
    with torch.no_grad():
        next(model.generator.parameters()).normal_()
    assert_close(other(raw), eager(raw), torch.float32)
    assert (other(raw) - before).norm() > 1e-2 * before.norm()


def test_a_missing_package_is_an_import_error_that_names_the_extra(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match=r"'openvino' cannot run: .*pip install 'fastprompt\[openvino\]'"):
        fp.Engine(build("vpt-deep"), backend="openvino")


def test_what_cannot_run_here_says_why(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"'compile' cannot run: torch\.compile needs a C\+\+ compiler"):
        fp.Engine(build("vpt-deep"), backend="compile")
    if importlib.util.find_spec("openvino"):
        with pytest.raises(RuntimeError, match="'openvino' cannot run: it computes in float32 and 16 bits"):
            fp.Engine(build("vpt-deep"), dtype=torch.float64, backend="openvino")


def test_eager_can_run_everywhere() -> None:
    assert next(iter(BACKENDS)) == "eager"
    assert BACKENDS["eager"].any_batch
