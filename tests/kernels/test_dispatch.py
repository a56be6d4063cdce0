from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch

import fastprompt as fp
from fastprompt.kernels import dispatch
from fastprompt.kernels.library_prompts import library_prompts
from fastprompt.kernels.vae_prompts import Decoder, vae_prompts


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())


def test_takes_the_kernels_on_the_gpu_and_the_reference_elsewhere() -> None:
    assert dispatch.choose("library_prompts", "cuda") == "triton"
    assert dispatch.choices["library_prompts"] == ("triton", "")
    assert dispatch.choose("library_prompts", "cpu") == "reference"
    assert "on cpu" in dispatch.choices["library_prompts"].reason


def test_a_fallback_on_the_gpu_warns_once_and_is_recorded() -> None:
    with pytest.warns(UserWarning, match=r"library_prompts runs its PyTorch reference on the GPU: float64"):
        assert dispatch.choose("library_prompts", "cuda", "float64 is left to PyTorch") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("library_prompts", "cuda", "float64 is left to PyTorch") == "reference"
        assert dispatch.choose("library_prompts", "cpu") == "reference"
    assert dispatch.choose("library_prompts", "cuda") == "triton"


def test_what_is_asked_for_runs_or_raises() -> None:
    with fp.use_backend("reference"):
        assert dispatch.choose("library_prompts", "cuda") == "reference"
    with fp.use_backend("triton"):
        assert dispatch.choose("library_prompts", "cuda") == "triton"
        with pytest.raises(RuntimeError, match=r"library_prompts cannot run, .* on cpu \(TRITON_INTERPRET=1"):
            library_prompts(torch.zeros(1, 1, 2), torch.zeros(2, 1))
        with pytest.raises(RuntimeError, match="float64 is left to PyTorch"):
            dispatch.choose("library_prompts", "cuda", "float64 is left to PyTorch")
        with pytest.raises(RuntimeError, match="no_such_op cannot run, it has no Triton kernels"):
            dispatch.choose("no_such_op", "cuda")
    with fp.use_backend("native"), pytest.raises(RuntimeError, match="no_such_op has no native implementation"):
        dispatch.choose("no_such_op", "cpu")


def test_the_interpreter_runs_kernels_on_cpu_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("library_prompts", "cpu") == "reference"
    with fp.use_backend("triton"):
        assert dispatch.choose("library_prompts", "cpu") == "triton"


def test_what_the_kernels_cannot_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weights = Decoder(torch.zeros(3, 2), torch.zeros(3, 2)[:, 0], torch.zeros(4, 3), torch.zeros(4))
    with fp.use_backend("triton"):
        with pytest.raises(RuntimeError, match="float64 is left to PyTorch"):
            library_prompts(torch.zeros(1, 1, 2).double(), torch.zeros(2, 1))
        with pytest.raises(RuntimeError, match="the library is empty"):
            library_prompts(torch.zeros(1, 1, 0), torch.zeros(0, 1))
        with pytest.raises(RuntimeError, match="biases and seed must be contiguous"):
            vae_prompts(torch.zeros(1, 4), [weights], torch.zeros(1, 1, 4))


def test_use_backend_ends_with_its_context_and_its_thread() -> None:
    seen = []
    with fp.use_backend("reference"):
        with fp.use_backend("auto"):
            assert dispatch.choose("library_prompts", "cuda") == "triton"
        thread = threading.Thread(target=lambda: seen.append(dispatch.choose("library_prompts", "cuda")))
        thread.start()
        thread.join()
        assert dispatch.choose("library_prompts", "cuda") == "reference"
    assert seen == ["triton"]
    with contextlib.suppress(KeyError), fp.use_backend("reference"):
        raise KeyError
    assert dispatch.choose("library_prompts", "cuda") == "triton"
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"), fp.use_backend("cuda"):
        pass


def test_a_compiled_graph_follows_use_backend() -> None:
    compiled = torch.compile(library_prompts, fullgraph=True, backend="eager")
    logits, library = torch.randn(1, 2, 3), torch.randn(3, 4)
    assert torch.equal(compiled(logits, library), library_prompts(logits, library))
    with fp.use_backend("triton"), pytest.raises(Exception, match="cannot run"):
        compiled(logits, library)
    assert dispatch.choices["library_prompts"].backend == "reference"
