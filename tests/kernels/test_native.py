"""The C++ kernels on every instruction set that this CPU has, against float64."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import FlopCounterMode

import fastprompt as fp
from fastprompt.kernels import dispatch, native
from fastprompt.kernels.adaptive_prompts import adaptive_prompts
from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.prefix_attention import prefix_attention, reference as attention_reference

COMPILER = shutil.which(os.environ.get("CXX") or "g++")
DTYPES = (torch.float32, torch.bfloat16)

NO_HEADS = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 11), reason="PyTorch's own attention without heads ends the process"
)
needs_library = pytest.mark.skipif(COMPILER is None and bool(native.obstacle()), reason="there is no C++ compiler")


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, where the CPU has it."""
    assert not native.obstacle()  # loads the library
    before = native.level()
    if native.set_level(request.param) != request.param:
        native.set_level(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.set_level(before)


def within_tolerance(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`found` is in the dtype of PyTorch's `plain`, and at most twice as far from float64, and a rounding."""
    assert found.dtype == plain.dtype
    assert found.shape == exact.shape
    if exact.numel():
        bound = 2 * (plain.double() - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound


def attention_inputs(b: int, h: int, r: int, t: int, p: int, d: int, n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Views of a packed product as the forward has them; p = 0: an empty prefix, n = 0: none."""
    packed = (2 * torch.randn(b, max(r, t), 3, h, d)).to(dtype).permute(2, 0, 3, 1, 4)
    prefix = (2 * torch.randn(2, n, p, h, d)).to(dtype).transpose(2, 3) if n else (None, None)
    return packed[0][:, :, :r], packed[1][:, :, :t], packed[2][:, :, :t], *prefix


@needs_library
def test_the_library_is_built_and_loaded() -> None:
    assert native.obstacle() == ""
    assert native.level() in native.LEVELS


@needs_library
class TestPrefixAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "sizes",
        [
            (2, 3, 197, 197, 50, 64, 1),
            (2, 2, 33, 31, 7, 64, 2),
            (4, 1, 5, 70, 3, 48, 2),
            (1, 12, 1, 16, 1, 64, 1),
            (3, 2, 64, 64, 0, 32, 1),
            (2, 3, 20, 17, 0, 64, 0),
            (2, 1, 7, 1, 0, 8, 0),
            (1, 2, 40, 130, 10, 80, 1),
            (2, 2, 3, 5, 4, 13, 1),
            (1, 1, 2, 1500, 0, 8, 0),
            (0, 3, 5, 5, 2, 16, 1),
            pytest.param((2, 0, 5, 5, 2, 16, 1), marks=NO_HEADS),
        ],
        ids=str,
    )
    def test_matches_float64(self, level: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs = attention_inputs(*sizes, dtype)
        with fp.use_backend("native"):
            found = prefix_attention(*inputs)
        assert dispatch.choices["prefix_attention"].backend == "native"
        plain = attention_reference.prefix_attention(*inputs, scale=sizes[5] ** -0.5)
        exact = attention_reference.prefix_attention(
            *(x if x is None else x.double() for x in inputs), scale=sizes[5] ** -0.5
        )
        within_tolerance(found, plain, exact)
        assert found.numel() == 0 or found.transpose(1, 2).flatten(2).data_ptr() == found.data_ptr()

    def test_a_batch_of_0_with_prefixes_of_its_own(self, level: str) -> None:
        q, k, v, prefix_k, prefix_v, *_ = attention_inputs(2, 3, 5, 5, 2, 16, 2, torch.float32)
        with fp.use_backend("native"):
            found = prefix_attention(q[:0], k[:0], v[:0], prefix_k[:0], prefix_v[:0])
            assert found.shape == (0, 3, 5, 16)
            with pytest.raises((RuntimeError, ValueError)):
                prefix_attention(q, k, v, prefix_k[:0], prefix_v[:0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_and_equal_scores(self, level: str, dtype: torch.dtype) -> None:
        q, k, v, *_ = attention_inputs(1, 1, 3, 40, 0, 16, 0, dtype)
        with fp.use_backend("native"):
            sharp = prefix_attention(100 * q, 100 * k, v, scale=1.0)
            uniform = prefix_attention(0 * q, k, v)
        best = (q.double() @ k.double().mT).argmax(-1)
        mean = v.double().mean(2, keepdim=True)
        for found, expected in ((sharp[0, 0], v[0, 0][best[0, 0]]), (uniform, mean)):
            assert (found.double() - expected).abs().max() <= torch.finfo(dtype).eps * v.abs().max()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_no_number_stays_where_it_is(self, level: str, dtype: torch.dtype) -> None:
        q, k, v, *_ = attention_inputs(1, 2, 40, 40, 0, 32, 0, dtype)
        q = q.clone()
        q[0, 1, 3, 5] = float("nan")
        with fp.use_backend("native"):
            found = prefix_attention(q, k, v)
        wrong = found.isnan().any(-1)
        assert wrong[0, 1, 3]
        assert wrong.sum() == 1

    def test_threads_share_the_work_and_change_no_bit(self, level: str) -> None:
        for dtype, b in ((torch.float32, 1), (torch.bfloat16, 5)):
            inputs, found = attention_inputs(b, 1, 197, 100, 5, 64, 1, dtype), []
            for threads in (1, 3, 4):
                torch.set_num_threads(threads)
                try:
                    with fp.use_backend("native"):
                        found.append(prefix_attention(*inputs))
                finally:
                    torch.set_num_threads(1)
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])

    def test_passes_opcheck(self) -> None:
        from fastprompt.kernels.prefix_attention import native as bound

        for dtype in DTYPES:
            for p, n in ((4, 1), (0, 0)):
                inputs = attention_inputs(2, 3, 5, 6, p, 16, n, dtype)
                torch.library.opcheck(bound.OPERATOR, (*inputs, 0.25))

    def test_compiles_in_one_graph(self) -> None:
        def layer(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
            return 2 * prefix_attention(q, k, v, prefix, prefix).transpose(1, 2).flatten(2)

        q, k, v, prefix, _ = attention_inputs(2, 3, 5, 6, 4, 16, 1, torch.float32)
        with fp.use_backend("native"):
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(q, k, v, prefix), layer(q, k, v, prefix))

    def test_says_what_it_cannot_take(self) -> None:
        q = torch.randn(2, 3, 4, 16)
        wrong: dict[str, Callable[[], Tensor]] = {
            "float32 and bfloat16 without autocast, not torch.float64": lambda: prefix_attention(*3 * [q.double()]),
            "no bias": lambda: prefix_attention(q, q, q, bias=torch.zeros(1, 3, 4, 4)),
            "positive scale": lambda: prefix_attention(q, q, q, scale=-1.0),
            "take 1 to 8192 keys, not 0": lambda: prefix_attention(q, q[:, :, :0], q[:, :, :0]),
            "rows of adjacent numbers": lambda: prefix_attention(*3 * [q.mT]),
            "no backward": lambda: prefix_attention(q.clone().requires_grad_(), q, q),
        }
        for message, call in wrong.items():
            with fp.use_backend("native"), pytest.raises(RuntimeError, match=f"cannot run, .*{message}"):
                call()
            call()  # PyTorch takes it


@needs_library
class TestPrefixAttentionBackward:
    """Training on a CPU: `recompute.py` with the C++ kernels."""

    SIZES = (
        (2, 3, 197, 197, 50, 64, 1),
        (4, 2, 33, 31, 7, 64, 4),
        (1, 12, 1, 16, 1, 64, 1),
        (3, 2, 64, 64, 0, 32, 1),
        (2, 3, 100, 17, 0, 64, 0),
        (2, 1, 7, 1, 0, 8, 0),
        (1, 2, 130, 130, 10, 80, 1),
        (2, 2, 3, 5, 4, 13, 1),
        (1, 1, 2, 1500, 0, 8, 0),
        (0, 3, 5, 5, 2, 16, 1),
        (2, 3, 0, 5, 2, 16, 1),
        (2, 3, 5, 0, 2, 16, 2),
    )

    @staticmethod
    def gradients(inputs: tuple[Any, ...], wanted: tuple[bool, ...], backend: fp.Backend) -> tuple[Tensor, ...]:
        """Gradients of a weighted sum of the outputs, those `wanted`."""
        x = [t if t is None else t.detach().requires_grad_(wants) for t, wants in zip(inputs, wanted, strict=True)]
        with fp.use_backend(backend):
            out = prefix_attention(*x)
        out = out.transpose(1, 2).flatten(2)  # as the projection reads it
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
        return torch.autograd.grad((out * weights).sum(), [t for t in x if t is not None and t.requires_grad])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_matches_float64(
        self, level: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastprompt.kernels.prefix_attention import native as bound

        calls: list[int] = []
        run = bound.BACKWARD
        monkeypatch.setattr(bound, "BACKWARD", lambda *arguments: calls.append(1) or run(*arguments))
        inputs = tuple(x if x is None else x / 2 for x in attention_inputs(*sizes, dtype))
        exact = tuple(x if x is None else x.double() for x in inputs)
        prefix = sizes[-1] > 0 and sizes[4] > 0
        for wanted in (
            (True, True, True, prefix, prefix),
            (True, False, False, False, False),
            (False, True, True, False, False),
            (False, False, False, prefix, prefix),
            (True, False, True, False, prefix),
        ):
            if not any(wants and x is not None for wants, x in zip(wanted, inputs, strict=True)):
                continue
            calls.clear()
            found = self.gradients(inputs, wanted, "auto")
            assert dispatch.choices["prefix_attention"].backend == "recompute"
            assert calls == ([] if (level, dtype) == ("amx", torch.bfloat16) else [1])
            plain, best = (self.gradients(x, wanted, "reference") for x in (inputs, exact))
            for ours, theirs, right in zip(found, plain, best, strict=True):
                within_tolerance(ours, theirs, right)

    def test_packed_inputs_get_packed_gradients(self, level: str) -> None:
        whole, (pk, pv) = torch.randn(2, 9, 3, 4, 16), torch.randn(2, 1, 4, 3, 16)
        for given in ((whole, None, None), (torch.randn(2, 4, 7, 16), whole[:, :, :2].contiguous(), None)):
            x = [t if t is None else t.detach().requires_grad_() for t in (*given, pk, pv)]
            grads = []
            for backend in ("auto", "reference"):
                with fp.use_backend(backend):
                    loss = prefix_attention(*x).square().sum()
                grads.append(torch.autograd.grad(loss, [t for t in x if t is not None]))
            assert grads[0][given.index(None) - 1].is_contiguous()
            for ours, plain in zip(*grads, strict=True):
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)

    def test_large_scores(self, level: str) -> None:
        inputs = tuple(None if x is None else 30 * x for x in attention_inputs(1, 2, 70, 40, 3, 16, 1, torch.float32))
        exact = tuple(x if x is None else x.double() for x in inputs)
        wanted = (True,) * 5
        for ours, right in zip(
            *(self.gradients(x, wanted, b) for x, b in ((inputs, "auto"), (exact, "reference"))), strict=True
        ):
            torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-3)  # of values up to 100

    def test_what_is_no_number_stays_where_it_is(self, level: str) -> None:
        q, k, v, *_ = attention_inputs(2, 2, 60, 60, 0, 32, 0, torch.float32)
        q = q.clone()
        q[0, 1, 3, 5] = float("nan")
        of_q, of_k, of_v = self.gradients((q, k, v, None, None), (True, True, True, False, False), "auto")
        assert of_q[0, 1, 3].isnan().all()
        assert of_q.isnan().any(-1).sum() == 1
        for x in (of_k, of_v):
            assert x.isnan().flatten(2).any(-1).tolist() == [[False, True], [False, False]]

    def test_threads_share_the_work_and_change_no_bit(self, level: str) -> None:
        inputs, found = attention_inputs(3, 2, 97, 60, 5, 64, 1, torch.float32), []
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            try:
                found.append(self.gradients(inputs, (True,) * 5, "auto"))
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    def test_passes_opcheck(self) -> None:
        from fastprompt.kernels.prefix_attention import native as bound

        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, *prefix = attention_inputs(2, 3, 5, 6, 4, 16, 1, dtype)
            like = [torch.empty(2, 3, n, 16, dtype=dtype) for n in (5, 6, 6)]
            of_prefix, grad = [torch.empty(2, 3, 4, 16) for _ in range(2)], torch.randn(2, 3, 5, 16).to(dtype)
            torch.library.opcheck(bound.BACKWARD, (grad, q, k, v, *prefix, 0.25, *like, *of_prefix))
            torch.library.opcheck(bound.BACKWARD, (grad, q, k, v, None, None, 0.25, like[0], *[None] * 4))


def adaptive_inputs(b: int, n: int, p: int, d: int, r: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Patch rows of a sequence, of a mean and spread of their own each."""
    sequence = torch.randn(b, n + 1, d) * (0.1 + torch.rand(b, n + 1, 1)) + torch.randn(b, n + 1, 1)
    made = {
        "norm_weight": torch.randn(d),
        "norm_bias": torch.randn(d),
        "mix": torch.randn(p, n),
        "bias": torch.randn(p),
    }
    hidden = {"w1": torch.randn(r, d) / d**0.5, "w2": torch.randn(d, r)} if r else {"w1": None, "w2": None}
    return {"tokens": sequence.to(dtype)[:, 1:], **made, **hidden}


@needs_library
class TestAdaptivePrompts:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "sizes",
        [
            (2, 196, 50, 768, 8),
            (2, 17, 33, 48, 5),
            (1, 4, 1, 16, 1),
            (3, 49, 5, 100, 0),
            (1, 1, 2, 7, 3),
            (2, 64, 32, 32, 64),
            (0, 9, 2, 16, 4),
            (2, 9, 0, 16, 4),
        ],
        ids=str,
    )
    def test_matches_float64(self, level: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs = adaptive_inputs(*sizes, dtype)
        with fp.use_backend("native"):
            found = adaptive_prompts(**inputs)
        assert dispatch.choices["adaptive_prompts"].backend == "native"
        with fp.use_backend("reference"):
            plain = adaptive_prompts(**inputs)
            exact = adaptive_prompts(**{name: x if x is None else x.double() for name, x in inputs.items()})
        within_tolerance(found, plain, exact)

    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid"])
    def test_every_activation_and_a_learned_scale(self, level: str, activation: str) -> None:
        inputs, scale = adaptive_inputs(2, 9, 3, 40, 6, torch.float32), torch.tensor(0.3)
        with fp.use_backend("native"):
            found = adaptive_prompts(**inputs, activation=activation, scale=scale, eps=1e-2)
        with fp.use_backend("reference"):
            plain = adaptive_prompts(**inputs, activation=activation, scale=scale, eps=1e-2)
            exact = adaptive_prompts(
                **{name: x.double() for name, x in inputs.items()},
                activation=activation,
                scale=scale.double(),
                eps=1e-2,
            )
        within_tolerance(found, plain, exact)

    def test_threads_share_the_work_and_change_no_bit(self, level: str) -> None:
        for dtype in DTYPES:
            inputs, found = adaptive_inputs(1, 49, 5, 200, 4, dtype), []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                try:
                    with fp.use_backend("native"):
                        found.append(adaptive_prompts(**inputs))
                finally:
                    torch.set_num_threads(1)
            assert torch.equal(*found)

    def test_passes_opcheck_and_compiles_in_one_graph(self) -> None:
        from fastprompt.kernels.adaptive_prompts import native as bound

        inputs = adaptive_inputs(2, 9, 3, 16, 4, torch.bfloat16)
        w1, w2 = inputs.pop("w1"), inputs.pop("w2")
        assert w2 is not None
        torch.library.opcheck(bound.OPERATOR, (*inputs.values(), w1, w2.t().contiguous(), 1, 1e-5))
        torch.library.opcheck(bound.OPERATOR, (*inputs.values(), None, None, 0, 1e-5))
        with fp.use_backend("native"):
            compiled = torch.compile(adaptive_prompts, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(**inputs, w1=w1, w2=w2), adaptive_prompts(**inputs, w1=w1, w2=w2))

    def test_says_what_it_cannot_take(self) -> None:
        inputs = adaptive_inputs(2, 9, 3, 16, 4, torch.float32)
        wrong: dict[str, dict[str, Any]] = {
            "parameters in float32": {name: x.double() for name, x in inputs.items()},
            "no masks": {**inputs, "channel_mask": torch.ones(2, 16)},
            "rows of adjacent numbers": {**inputs, "tokens": torch.randn(2, 16, 9).mT},
            "at most 64 hidden units": {**inputs, "w1": torch.randn(65, 16), "w2": torch.randn(16, 65)},
        }
        for message, arguments in wrong.items():
            with fp.use_backend("native"), pytest.raises(RuntimeError, match=f"cannot run, .*{message}"):
                adaptive_prompts(**arguments)
            adaptive_prompts(**arguments)  # PyTorch takes it


@needs_library
class TestAddNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape", [(8, 197, 768), (3, 100), (5, 1), (2, 7, 13), (0, 4, 16), (2, 0, 16), (16,)], ids=str
    )
    def test_matches_float64(self, level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x, branch = (torch.randn(2, *shape) + torch.randn(2, *shape[:-1], 1)).to(dtype).unbind(0)
        with fp.use_backend("native"):
            added, normed = add_norm(x, branch, 1e-6)
        assert torch.equal(added, x + branch)
        plain, exact = (torch.nn.functional.layer_norm(y, shape[-1:], eps=1e-6) for y in (added, added.double()))
        within_tolerance(normed, plain, exact)

    def test_what_is_no_number_stays_in_its_row(self, level: str) -> None:
        x = torch.randn(4, 40).bfloat16()
        for value in (float("nan"), float("inf")):
            x[2, 3] = value
            with fp.use_backend("native"):
                added, normed = add_norm(x, x, 1e-6)
            assert torch.equal(added.isfinite().all(1), torch.tensor([True, True, False, True]))
            assert torch.equal(normed.isfinite().all(1), torch.tensor([True, True, False, True]))

    def test_passes_opcheck_and_says_what_it_cannot_take(self) -> None:
        from fastprompt.kernels.add_norm import native as bound

        x = torch.randn(3, 5, 16)
        torch.library.opcheck(bound.OPERATOR, (x, x, 1e-6))
        for message, y in (("contiguous tensors", x.mT), ("not torch.float16", x.half())):
            with fp.use_backend("native"), pytest.raises(RuntimeError, match=f"cannot run, .*{message}"):
                add_norm(y, y, 1e-6)
        with fp.use_backend("native"):
            compiled = torch.compile(add_norm, fullgraph=True, backend="aot_eager")
            assert all(map(torch.equal, compiled(x, x, 1e-6), add_norm(x, x, 1e-6)))


@needs_library
class TestAuto:
    """By measurement, at inference alone."""

    @pytest.fixture(autouse=True)
    def timer(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Records which implementations were timed; `native` takes 1 µs, PyTorch what `self.plain` says."""
        calls: list[str] = []
        build = dispatch._step

        def step(op: str, backend: str, arguments: Any, trains: bool) -> Callable[[], None]:
            calls.append(backend)
            return build(op, backend, arguments, trains)

        def seconds(call: Callable[[], None]) -> float:
            call()
            return 1e-6 if calls[-1] == "native" else self.plain

        self.plain = 2e-6
        monkeypatch.setattr(dispatch, "_step", step)
        monkeypatch.setattr(dispatch, "seconds_on_cpu", seconds)
        monkeypatch.setattr(dispatch, "measured", {})
        return calls

    def test_the_faster_runs_is_remembered_and_said(self, timer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = attention_inputs(1, 2, 4, 5, 3, 16, 1, torch.float32)
        for _ in range(2):
            prefix_attention(*inputs)
            assert dispatch.choices["prefix_attention"] == (
                "native",
                f"the kernels took 1.0 µs, PyTorch 2.0 µs at this shape, {native.level()}",
            )
        assert timer == ["native", "reference"]
        monkeypatch.setattr(dispatch, "measured", {})
        self.plain = 1e-7
        prefix_attention(*inputs)
        assert dispatch.choices["prefix_attention"] == (
            "reference",
            f"the native kernels are slower: they took 1.0 µs, PyTorch 0.1 µs at this shape, {native.level()}",
        )

    def test_training_compilers_and_observers_get_pytorch(self, timer: list[str]) -> None:
        q, k, v, p, _ = attention_inputs(1, 2, 4, 5, 3, 16, 1, torch.float32)
        q.requires_grad_()
        prefix_attention(q, k, v, p, p).sum().backward()
        assert dispatch.choices["prefix_attention"].backend == "recompute"
        with torch.no_grad(), FlopCounterMode(display=False):
            prefix_attention(q, k, v, p, p)
            assert dispatch.choices["prefix_attention"] == (
                "reference",
                "a dispatch mode or a tracer reads PyTorch's operators",
            )
        with torch.no_grad():
            exported = torch.export.export(Attention(), (q.detach(), k, v))
        assert "fastprompt" not in str(exported.graph)
        assert timer == []
        with torch.no_grad():
            prefix_attention(q, k, v, p, p)
        assert dispatch.choices["prefix_attention"].backend == "native"

    def test_a_graph_calls_it_where_that_is_allowed_and_it_was_the_faster(
        self, timer: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = attention_inputs(2, 2, 4, 5, 0, 16, 0, torch.float32)[:3]

        def exported() -> torch.export.ExportedProgram:
            with dispatch.native_in_graphs():
                return torch.export.export(Attention(), inputs)

        with torch.no_grad():
            assert "native" not in str(exported().graph)  # nothing is timed while a graph is traced
            assert timer == []
            expected = prefix_attention(*inputs)
            program = exported()
            assert "fastprompt.prefix_attention_native" in str(program.graph)
            assert torch.equal(program.module()(*inputs), expected)
            with dispatch.native_in_graphs():
                batches = torch.export.export(Attention(), inputs, dynamic_shapes=3 * [{0: torch.export.Dim.DYNAMIC}])
                compiled = torch.compile(Attention(), fullgraph=True, backend="eager")
                torch.testing.assert_close(compiled(*inputs), expected)
            assert "native" not in str(batches.graph)
            monkeypatch.setattr(dispatch, "measured", {})
            self.plain = 1e-7
            prefix_attention(*inputs)
            assert "native" not in str(exported().graph)

    def test_the_compile_backend_of_an_engine_calls_it(
        self, timer: list[str], monkeypatch: pytest.MonkeyPatch, tiny_vit: VisionTransformer, tiny_images: Tensor
    ) -> None:
        model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=3), num_classes=5).eval()
        given: list[torch.fx.GraphModule] = []
        monkeypatch.setattr(torch, "compile", lambda program, dynamic: given.append(program) or program)
        found = fp.Engine(model, (4,), torch.float32, "compile")(tiny_images)
        assert given[0].code.count("fastprompt.prefix_attention_native") == len(tiny_vit.blocks) - 1
        with torch.no_grad():
            torch.testing.assert_close(found, model(tiny_images), rtol=1e-4, atol=1e-5)

    def test_a_model_and_an_engine_run_it_and_say_so(self, tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
        model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=3), num_classes=5).eval()
        with torch.no_grad():
            next(model.generator.parameters()).normal_()
            with fp.use_backend("reference"):
                expected = model(tiny_images)
            found = model(tiny_images)
        assert dispatch.choices["prefix_attention"].backend == "native"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert fp.explain(model).ops["prefix_attention"].backend == "native"
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            engine = fp.Engine(model, (4,), dtype, "eager")
            assert (engine(tiny_images) - expected).norm() <= tolerance * expected.norm()
            for op in ("prefix_attention", "add_norm        "):
                assert f"{op}  native: the kernels took 1.0 µs" in str(fp.explain(engine))


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q, k, v)


class TestWithoutTheLibrary:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(dispatch, "_warned", set())
        native.obstacle.cache_clear()
        yield
        monkeypatch.undo()
        native.obstacle.cache_clear()
        native.obstacle()

    def check(self, message: str) -> None:
        q = torch.randn(1, 2, 3, 16)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # training has no native kernels, so nothing is amiss
            prefix_attention(q.clone().requires_grad_(), q, q)
        with pytest.warns(UserWarning, match=re.escape(message)) as warned:
            prefix_attention(q, q, q)
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once for all shapes, dtypes and ops
            assert torch.equal(prefix_attention(q, q, q), expected)
            add_norm(q[0, 0], q[0, 0], 1e-6)
        backend, reason = dispatch.choices["prefix_attention"]
        assert backend == "reference"
        assert message in reason
        with fp.use_backend("native"), pytest.raises(RuntimeError, match="prefix_attention cannot run, "):
            prefix_attention(q, q, q)

    def test_it_was_not_built(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_vit: VisionTransformer
    ) -> None:
        monkeypatch.setattr(native, "PATH", tmp_path / "_native.abi3.so")
        self.check("the C++ kernels were not built; to build them, with torch and g++ 11 or newer installed, run `pip")
        model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=2), num_classes=3)
        assert "prefix_attention  reference: the C++ kernels were not built" in str(fp.explain(model))

    def test_it_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "_native.abi3.so"
        broken.write_bytes(b"no library")
        monkeypatch.setattr(native, "PATH", broken)
        self.check(f"the C++ kernels cannot be loaded with torch {torch.__version__}: {broken}: file too short")

    def test_an_unknown_level_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(native, "PATH", Path(__file__))
        monkeypatch.setenv(native.VARIABLE, "sse9")
        self.check("FASTPROMPT_NATIVE_LEVEL must be one of")


@needs_library
@pytest.mark.parametrize("wanted", native.LEVELS)
def test_the_environment_lowers_the_level_and_never_raises_it(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.level()
    monkeypatch.setenv(native.VARIABLE, wanted)
    native.obstacle.cache_clear()
    assert native.obstacle() == ""
    assert native.LEVELS.index(native.level()) == min(native.LEVELS.index(wanted), native.LEVELS.index(highest()))
    native.set_level(before)


def highest() -> str:
    """The CPU's own level."""
    before = native.level()
    found = native.set_level(native.LEVELS[-1])
    native.set_level(before)
    return found
