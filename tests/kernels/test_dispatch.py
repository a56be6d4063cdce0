from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastprompt as fp
from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import adaptive_prompts
from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.library_prompts import PreNorm, library_prompts
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.vae_prompts import Decoder, vae_prompts


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "measured", {})


class Timer:
    """Stands in for the GPU's clock: `slow` of the two implementations takes 20 µs, the other 10 µs. It runs each step
    that it times, the kernels' by the reference; `calls` are their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
        self.calls: list[str] = []
        build = dispatch._step

        def step(op: str, backend: str, arguments: tuple[Any, ...], trains: bool) -> Callable[[], None]:
            self.calls.append(backend)
            return build(op, "reference", arguments, trains)

        def seconds(call: Callable[[], None]) -> float:
            call()
            return 2e-5 if self.calls[-1] == slow else 1e-5

        monkeypatch.setattr(dispatch, "_step", step)
        monkeypatch.setattr(dispatch, "seconds", seconds)


def test_the_faster_implementation_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (torch.randn(2, 3, 4), torch.randn(4, 5), "softmax")
    timer = Timer(monkeypatch, slow="triton")
    assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == "reference"
    assert dispatch.choices["library_prompts"] == (
        "reference",
        "the Triton kernels are slower: they took 20.0 µs, PyTorch 10.0 µs at this shape",
    )
    assert sorted(timer.calls) == ["reference", "triton"]
    timer = Timer(monkeypatch, slow="reference")
    assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == "reference"
    assert timer.calls == []  # remembered
    monkeypatch.setattr(dispatch, "measured", {})
    assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == "triton"
    assert dispatch.choices["library_prompts"].reason == "the kernels took 10.0 µs, PyTorch 20.0 µs at this shape"


def test_each_shape_dtype_and_mode_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, slow="triton")
    logits, library = torch.randn(2, 3, 4), torch.randn(4, 5)
    cases = [
        (logits, library, "softmax"),
        (logits, library, "sigmoid"),
        (logits[:1], library, "softmax"),
        (logits, library.bfloat16(), "softmax"),
        (logits, library.clone().requires_grad_(), "softmax"),
    ]
    for _ in range(2):
        for inputs in cases:
            dispatch.choose("library_prompts", "cuda", arguments=inputs)
        with torch.no_grad():  # the library does not train here: another measurement than with it
            dispatch.choose("library_prompts", "cuda", arguments=cases[-1])
        assert len(timer.calls) == 2 * (len(cases) + 1)


def test_kernels_run_where_both_take_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bits do not change from call to call."""
    inputs = (torch.randn(2, 3, 4), torch.randn(4, 5), "softmax")
    for of_kernels, chosen in ((1.01e-5, "triton"), (1.05e-5, "reference")):
        times = iter([of_kernels, 1e-5])
        monkeypatch.setattr(dispatch, "seconds", lambda step, times=times: next(times))
        monkeypatch.setattr(dispatch, "measured", {})
        assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == chosen


def test_calls_that_graphs_replay_are_timed_replayed_and_remembered_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (torch.randn(2, 3, 4), torch.randn(4, 5), "softmax")
    monkeypatch.setattr(dispatch, "BEYOND_CACHE", 1000)  # the arguments have 176 bytes
    launched, replayed = iter([2e-5, 1e-5]), iter([1e-6, 2e-6])
    steps: list[int] = []
    monkeypatch.setattr(dispatch, "seconds", lambda step: next(launched))
    monkeypatch.setattr(dispatch, "seconds_replayed", lambda of: steps.append(len(of)) or next(replayed))

    def chosen() -> str:
        return dispatch.choose("library_prompts", "cuda", arguments=inputs)

    for _ in range(2):
        assert chosen() == "reference"
        with dispatch.for_graphs():
            assert chosen() == "triton"
    assert steps == [5, 5]


def test_a_replayed_measurement_takes_turns_among_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    steps = [lambda i=i: ran.append(i) for i in range(3)]

    class Graph:
        def replay(self) -> None:
            ran.append(-1)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(ran)

        def synchronize(self) -> None:
            ran.append(-2)

        def elapsed_time(self, end: Any) -> float:
            return 32.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())
    assert dispatch.seconds_replayed(steps) == pytest.approx(0.032 / dispatch.CALLS)
    assert ran[2 : 2 + dispatch.CALLS] == [i % 3 for i in range(dispatch.CALLS)]
    assert ran[2 + dispatch.CALLS :] == [-1] + 5 * [-1, -2]

    def refused(graph: Any, capture_error_mode: str) -> Any:
        raise RuntimeError("it cannot be captured")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    ran.clear()
    assert dispatch.seconds_replayed(steps) == pytest.approx(0.032)  # a call is a count there
    assert len(ran) == 2 + 6 * dispatch.CALLS + 5


def test_a_measurement_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    Timer(monkeypatch, slow="triton")
    logits, library = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    scaled = 2 * logits
    dispatch.choose("library_prompts", "cuda", arguments=(scaled, library, "softmax"))
    assert logits.grad is None
    assert library.grad is None
    scaled.sum().backward()  # its graph is still there


def test_every_op_says_what_the_implementations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op is called as on a GPU; the timer runs forward and backward of its reference on what `choose` got."""
    timer, decide = Timer(monkeypatch, slow="triton"), dispatch._decide
    monkeypatch.setattr(dispatch, "_decide", lambda op, wanted, device, *rest: decide(op, wanted, "cuda", *rest))
    sizes = ((2, 3, 4), (4, 5), (2, 7, 5), (2, 1, 6, 8), (3, 4), (10, 3))
    x = [torch.randn(size, requires_grad=True) for size in sizes]
    norm = PreNorm(torch.ones(5), torch.zeros(5), 1e-5)
    calls = {
        "add_norm": lambda: add_norm(2 * x[2], x[2], 1e-5)[1],
        "library_prompts": lambda: library_prompts(x[0], x[1], out=2 * x[2], slot=1, pre_norm=norm),
        "prefix_attention": lambda: prefix_attention(x[3], x[3], x[3], x[3][:1], x[3][:1]),
        "adaptive_prompts": lambda: adaptive_prompts(x[2], norm.weight, norm.bias, torch.ones(3, 7), torch.ones(3)),
        "vae_prompts": lambda: vae_prompts(
            torch.ones(2, 8), [Decoder(x[4], torch.ones(3), x[5], torch.ones(10))], torch.zeros(2, 1, 5)
        )[0],
    }
    for op, call in calls.items():
        timer.calls.clear()
        found = call()
        assert timer.calls == ["triton", "reference"]
        assert "slower" in dispatch.choices[op].reason
        monkeypatch.setattr(dispatch, "measured", {})
        with fp.use_backend("reference"):
            assert torch.equal(call(), found)
    assert {path.parent.name for path in Path(dispatch.__file__).parent.glob("*/triton.py")} == set(calls)


def test_what_cannot_be_timed_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, slow="triton")
    inputs = (torch.randn(2, 3, 4), torch.randn(4, 5), "softmax")

    def choice() -> str:
        return dispatch.choose("library_prompts", "cuda", arguments=inputs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choice() == "triton"
    with monkeypatch.context() as patch:  # a graph is being captured
        patch.setattr(dispatch, "_can_be_timed", lambda tensors: False)
        assert choice() == "triton"
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        assert dispatch.choose("library_prompts", "cuda", arguments=fakes) == "triton"
    seen = []
    torch.func.vmap(lambda x: seen.append(choice()) or x)(torch.zeros(1))
    assert seen == ["triton"]
    with fp.use_backend("triton"):
        assert choice() == "triton"
    assert timer.calls == []
    assert choice() == "reference"
    with monkeypatch.context() as patch:  # known by now
        patch.setattr(dispatch, "_can_be_timed", lambda tensors: False)
        assert choice() == "reference"


def test_an_implementation_that_runs_out_of_memory_loses() -> None:
    def step() -> None:
        raise torch.OutOfMemoryError

    assert dispatch.seconds(step) == float("inf")


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


def test_an_op_without_kernels_of_that_kind_runs_in_pytorch() -> None:
    """So that a whole model can be asked to run by one kind."""
    with fp.use_backend("triton"):
        assert dispatch.choose("product", "cuda") == "reference"
    assert dispatch.choices["product"].reason == "it has no Triton kernels"
    with fp.use_backend("native"):
        assert dispatch.choose("library_prompts", "cuda") == "reference"
        assert dispatch.choose("library_prompts", "cpu") == "reference"
    assert dispatch.choices["library_prompts"].reason == "it has no native kernels"


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory\nRequired: 300000"), ValueError()])
def test_kernels_that_raise_give_way_with_one_warning(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def step(op: str, backend: str, arguments: tuple[Any, ...], trains: bool) -> Callable[[], None]:
        def fails() -> None:
            raise error

        return fails if backend == "triton" else lambda: None

    monkeypatch.setattr(dispatch, "failures", {})
    monkeypatch.setattr(dispatch, "_step", step)
    monkeypatch.setattr(dispatch, "seconds", lambda call: call() or 1.0)
    said = "RuntimeError: out of resource: shared memory" if str(error) else "ValueError: no message"
    inputs = (torch.randn(2, 3, 4), torch.randn(4, 5), "softmax")
    with pytest.warns(UserWarning, match=f"library_prompts runs in PyTorch: the Triton kernels failed: {said}"):
        assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("library_prompts", "cuda", arguments=inputs) == "reference"
    assert dispatch.choices["library_prompts"].reason == f"the Triton kernels failed: {said}"


def test_an_empty_batch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, slow="triton")
    assert dispatch.choose("library_prompts", "cuda", arguments=(torch.randn(0, 3, 4), torch.randn(4, 5))) == "triton"
    assert timer.calls == []


def test_an_older_compiler_reads_what_was_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot read a ContextVar, and guards what it reads instead."""
    monkeypatch.setattr(dispatch, "COMPILES_CONTEXTS", False)
    test_a_compiled_graph_follows_use_backend()


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


def test_the_package_trains_and_predicts_with_triton_absent() -> None:
    code = """
import sys
sys.modules["triton"] = None
import timm, torch, fastprompt as fp
vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, pre_norm=True)
for config in (fp.PGNConfig(3, 5, widths=(4,)), fp.V2APTConfig(3, 2, 4, 4), fp.VAPTConfig(3)):
    model = fp.PromptedViT(fp.FrozenViT(vit), config, num_classes=2).train()
    images = torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    torch.testing.assert_close(model.eval()(images), model.reference_forward(images), rtol=1e-4, atol=1e-4)
    found = [c for c in fp.explain(model).ops.values() if c.backend != "native" and "native kernels" not in c.reason]
    print({choice.reason for choice in found} <= {"Triton is not installed"})
try:
    with fp.use_backend("triton"):
        model(images)
except RuntimeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    *without, refused = ran.stdout.splitlines()
    assert without == ["True"] * 3, ran.stderr
    assert refused.endswith("cannot run, Triton is not installed")
