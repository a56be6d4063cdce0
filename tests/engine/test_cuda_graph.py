"""The rules of the capture manager on a CPU: a capturer records operations and replays them on the same memory."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import itertools
import json
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastprompt as fp
from fastprompt.engine import cuda_graph, engine as engine_module
from fastprompt.engine.backends import BACKENDS
from fastprompt.engine.cuda_graph import MAX_FORMS, WARM_UPS, GraphedForward, GraphedTrainStep, method_shape
from fastprompt.generators import PromptConfig
from fastprompt.train.evaluate import latent_samples

aten = torch.ops.aten
HOST = {
    aten._local_scalar_dense,
    aten.lift_fresh,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.repeat_interleave,
}  # read a tensor on the host, or copy one from there
METHODS: dict[str, PromptConfig] = {
    "vpt-deep": fp.VPTConfig(num_prompts=3),
    "vpt-project": fp.VPTConfig(num_prompts=3, project=5),
    "vpt-shallow": fp.VPTConfig(num_prompts=3, deep=False),
    "free": fp.FreePromptsConfig(num_prompts=3),
    "pgn": fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8)),
    "v2apt": fp.V2APTConfig(num_prompts=3, num_instance=1, latent=4, hidden=4),
    "v2apt-samples": fp.V2APTConfig(num_prompts=3, num_instance=1, latent=4, hidden=4, inference_samples=2),
    "vapt": fp.VAPTConfig(num_prompts=3, hidden=4),
    "pixel": fp.PixelPromptConfig(border=4),
    "rgb-pgn": fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8)),
    "linear": fp.LinearProbeConfig(),
    "full": fp.FullFineTuneConfig(),
}
V2APT = METHODS["v2apt-samples"]


class Recording(TorchDispatchMode):
    """Runs operations, and keeps them with the tensors they read and wrote, as a graph keeps addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, Tensor] = {}  # storages that were there before, by address
        self.before: dict[int, torch.UntypedStorage] = {}  # what was in those of them that were written to
        self.inside: dict[int, torch.UntypedStorage] = {}
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.overloadpacket is aten.index and any(t.dtype == torch.bool for t in tensors_of(args[1]))
        if (masks or func.overloadpacket in HOST) and not happens_on_cpus_alone():
            raise RuntimeError(f"{func} is not permitted while a stream is capturing")
        for tensor in tensors_of((args, kwargs)):
            if address(tensor) not in self.inside:
                self.outside.setdefault(address(tensor), tensor)
        for tensor in written_by(func, args, kwargs):
            if address(tensor) in self.outside:
                self.written.append(tensor)
                self.before.setdefault(address(tensor), tensor.untyped_storage().clone())
        outputs = func(*args, **kwargs)
        for tensor in tensors_of(outputs):
            if address(tensor) and address(tensor) not in self.outside:
                self.inside[address(tensor)] = tensor.untyped_storage()
        self.calls.append((func, args, kwargs, outputs))
        return outputs

    def undo(self) -> None:
        """A capture runs nothing: what was written gets its values back, what was made is garbage."""
        for place, values in self.before.items():
            self.outside[place].untyped_storage().copy_(values)
        for storage in self.inside.values():
            storage.fill_(255)


class RecordedGraph:
    def __init__(self, recording: Recording, pool: list[RecordedGraph], pause: Callable[[], None]) -> None:
        self.calls, self.written, self.pause = recording.calls, recording.written, pause
        self.pool, self.replays = pool, 0
        pool.append(self)

    def replay(self) -> None:
        assert self.calls, "this graph was reset"
        self.replays += 1
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.written)):
            for i, (func, args, kwargs, outputs) in enumerate(self.calls):
                if i == len(self.calls) // 2:
                    self.pause()
                for kept, fresh in zip(tensors_of(outputs), tensors_of(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != fresh.data_ptr():
                        kept.copy_(fresh)

    def reset(self) -> None:
        self.calls, self.written = [], []
        self.pool.remove(self)


class RecordingCapturer:
    """A `Capturer` of a CPU. Each thread is a stream of its own.

    failures: what capture number i raises. pause: runs in the middle of each replay.
    """

    def __init__(self, failures: dict[int, Exception] | None = None, pause: Callable[[], None] = lambda: None) -> None:
        self.failures, self.pause = failures or {}, pause
        self.pools: list[list[RecordedGraph]] = []
        self.graphs: list[RecordedGraph] = []
        self.attempts = self.warm_ups = self.synchronized = 0
        self.followed: list[tuple[int, int]] = []  # stream, and the one it continues behind

    def pool(self) -> Any:
        self.pools.append([])
        return self.pools[-1]

    def warm_up(self, function: Callable[[], None]) -> None:
        self.warm_ups += 1
        function()

    def capture(self, function: Callable[[], None], pool: Any) -> RecordedGraph:
        self.attempts += 1
        recording, rng = Recording(), torch.get_rng_state()
        try:
            with recording:
                function()
            if self.attempts - 1 in self.failures:
                raise self.failures[self.attempts - 1]
        finally:
            torch.set_rng_state(rng)
            with torch.no_grad():
                recording.undo()
        self.graphs.append(RecordedGraph(recording, pool, self.pause))
        return self.graphs[-1]

    def addresses(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in tensors)

    def mark(self) -> Any:
        return threading.get_ident()

    def follow(self, mark: Any) -> None:
        if mark != threading.get_ident():
            self.followed.append((threading.get_ident(), mark))

    def synchronize(self) -> None:
        self.synchronized += 1


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes; batch norm's statistics are not marked in its schema."""
    if func.overloadpacket is aten.native_batch_norm:
        return tensors_of(args[3:5])
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return tensors_of(
        [
            given.get(argument.name)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )


def happens_on_cpus_alone() -> bool:
    """`check_images` looks for NaN, and AdamW makes the number 1, only for tensors on a CPU, as they are here."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_name not in ("check_images", "_multi_tensor_adam"):
        frame = frame.f_back
    return frame is not None


def graphed_of(
    model: fp.PromptedViT, batch_sizes: tuple[int, ...] = (1, 2, 4), **options: Any
) -> tuple[GraphedForward, RecordingCapturer]:
    capturer = RecordingCapturer(**{k: options.pop(k) for k in ("failures", "pause") if k in options})
    return GraphedForward(model, batch_sizes, capturer=capturer, **options), capturer


def eager(model: fp.PromptedViT, images: Tensor, draws: dict[str, Tensor] | None = None) -> Tensor:
    """The model's own output, without anything it kept, by the operators that the recording double sees."""
    model.eval()
    with torch.no_grad(), fp.use_backend("reference" if images.device.type == "cpu" else "auto"):
        return model(images, draws=draws)


@pytest.fixture
def build(tiny_vit: VisionTransformer, randomised: Callable[..., nn.Module]) -> Callable[..., fp.PromptedViT]:
    """`build(config, seed=0, **options)`: a model in float64 with random parameters, in eval mode, on one backbone."""
    backbone = fp.FrozenViT(tiny_vit).double()

    def make(config: PromptConfig, seed: int = 0, **options: Any) -> fp.PromptedViT:
        model = fp.PromptedViT(backbone, config, **{"num_classes": 3, **options})
        for i, part in enumerate((model.generator, model.head)):
            if part is not None:
                randomised(part, 2 * seed + i)
        return model.eval()

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def change(model: fp.PromptedViT, seed: int = 7) -> None:
    """Every parameter of generator and head, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


class TestTheDouble:
    """What the other tests rely on."""

    def test_a_capture_runs_nothing(self) -> None:
        x, y, capturer = torch.ones(3), torch.zeros(3), RecordingCapturer()
        graph = capturer.capture(lambda: y.copy_(x * 2), capturer.pool())
        assert y.eq(0).all()
        graph.replay()
        assert y.eq(2).all()

    def test_a_replay_reads_memory_and_not_names(self) -> None:
        x, y, capturer = torch.ones(3), torch.zeros(3), RecordingCapturer()
        holder = {"x": x}
        graph = capturer.capture(lambda: y.copy_(holder["x"] * 2), capturer.pool())
        holder["x"] = torch.full((3,), 50.0)
        x.fill_(4)
        graph.replay()
        assert y.eq(8).all()

    def test_what_a_capture_made_is_garbage_until_a_replay(self) -> None:
        x, capturer, made = torch.ones(3), RecordingCapturer(), []
        graph = capturer.capture(lambda: made.append(x * 2), capturer.pool())
        assert made[0].isnan().all()
        graph.replay()
        assert made[0].eq(2).all()

    def test_a_replay_leaves_versions_alone(self) -> None:
        x, capturer = torch.ones(3), RecordingCapturer()
        graph = capturer.capture(lambda: x.add_(1), capturer.pool())
        before = x._version
        graph.replay()
        assert x.eq(2).all()
        assert x._version == before

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.sum().item(),
            lambda x: torch.tensor([1.0]) + x,
            lambda x: x[x > 0],
            lambda x: bool((x > 0).all()),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_the_host_is_not_read(self, function: Callable[[Tensor], Any]) -> None:
        capturer, x = RecordingCapturer(), torch.ones(3)
        with pytest.raises(RuntimeError, match="not permitted while a stream is capturing"):
            capturer.capture(lambda: function(x), capturer.pool())


class TestForward:
    @pytest.mark.parametrize("method", METHODS)
    def test_equals_eager_at_every_batch_size(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str
    ) -> None:
        model = build(METHODS[method])
        graphed, capturer = graphed_of(model)
        for count in (3, 4, 1, 2, 0, 5, 11, 4):
            close(graphed(images[:count]), eager(model, images[:count]))
        assert not graphed.eager
        assert len(capturer.graphs) == graphed.captures == 3

    def test_a_batch_size_that_was_captured_gives_the_same_bits(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        assert torch.equal(graphed(images[:4]), eager(model, images[:4]))

    @pytest.mark.parametrize("method", ["vpt-deep", "pgn", "v2apt"])
    def test_raw_pixels(self, build: Callable[..., fp.PromptedViT], method: str) -> None:
        model = build(METHODS[method])
        raw = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        graphed, _ = graphed_of(model)
        close(graphed(raw), eager(model, raw))
        assert not graphed.eager

    @pytest.mark.parametrize("method", ["vpt-deep", "v2apt"])
    def test_swin(
        self, tiny_swin: Callable[..., nn.Module], images: Tensor, randomised: Callable[..., nn.Module], method: str
    ) -> None:
        model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), METHODS[method], num_classes=3).double().eval()
        randomised(model.generator)
        graphed, _ = graphed_of(model)
        close(graphed(images[:3]), eager(model, images[:3]))
        change(model)
        close(graphed(images[:3]), eager(model, images[:3]))
        assert not graphed.eager
        assert graphed.captures == 3

    def test_without_head_and_with_a_readout_of_prompts(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        for options in ({"num_classes": None}, {"readout": "patches+prompts"}):
            model = build(METHODS["vpt-deep"], **options)
            graphed, _ = graphed_of(model)
            close(graphed(images[:3]), eager(model, images[:3]))

    def test_largest_first_into_one_pool(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        graphed, capturer = graphed_of(build(METHODS["vapt"]), (2, 8, 1, 2))
        graphed(images[:1])
        assert graphed.batch_sizes == (8, 2, 1)
        assert len(capturer.pools) == 1
        assert [len(graph.calls) > 0 for graph in capturer.pools[0]] == [True] * 3
        assert [largest_batch(graph) for graph in capturer.graphs] == [8, 2, 1]
        assert capturer.warm_ups == 3 * WARM_UPS

    def test_the_smallest_graph_that_fits_runs(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        graphed, capturer = graphed_of(build(METHODS["vpt-deep"]))
        for count in (3, 2, 11):
            graphed(images[:count])
        assert [graph.replays for graph in capturer.graphs] == [1 + 3, 1, 0]  # 11 = 4 + 4 + 3

    def test_rows_behind_the_batch_do_not_matter(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(METHODS["pgn"])
        graphed, _ = graphed_of(model, (4,))
        expected = graphed(images[:2])
        graphed(1e6 * images[4:8])
        assert torch.equal(graphed(images[:2]), expected)

    def test_an_output_is_a_copy_unless_it_is_borrowed(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, _ = graphed_of(build(METHODS["vpt-deep"]))
        own = graphed(images[:2])
        kept = own.clone()
        borrowed = graphed(images[:2], borrow=True)
        again = graphed(images[2:4], borrow=True)
        assert torch.equal(own, kept)
        assert borrowed.data_ptr() == again.data_ptr() != own.data_ptr()
        assert torch.equal(borrowed, again)
        assert not torch.equal(borrowed, kept)
        close(graphed(images[:6], borrow=True), graphed(images[:6]))

    def test_inputs_are_left_alone_and_may_be_strided(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        strided = images[:4].to(memory_format=torch.channels_last)[::2]
        before = strided.clone()
        close(graphed(strided), eager(model, strided))
        assert torch.equal(strided, before)

    def test_modes_of_torch_around_a_call(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model, x = build(METHODS["vpt-deep"]).float(), images[:2].float()
        graphed, _ = graphed_of(model)
        expected = eager(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            first = graphed(x)
        with torch.inference_mode():
            second = graphed(x.clone())
        for output in (first, second, graphed(x.clone().requires_grad_())):
            assert torch.equal(output, expected)
            assert not output.requires_grad
            assert not output.is_inference()

    def test_kinds_of_images_and_kernel_backends_have_graphs_of_their_own(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["pgn"])
        graphed, capturer = graphed_of(model, (2,))
        graphed(images[:2])
        close(graphed(images[:2].float()), eager(model, images[:2].float()))
        assert graphed.captures == 2
        with fp.use_backend("reference"):
            graphed(images[:2])
        graphed(images[:2])
        assert graphed.captures == 3
        assert len(capturer.pools) == 1

    def test_only_so_many_kinds_of_images(self, images: Tensor) -> None:
        vit = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
        ).eval()
        model = fp.PromptedViT(fp.FrozenViT(vit).double(), METHODS["vpt-deep"], num_classes=3).eval()
        graphed, _ = graphed_of(model, (2,))
        for i in range(MAX_FORMS):
            graphed(images[:2, :, : 8 * (i + 1)])
        last = images[:2, :, :, :8]
        with pytest.warns(UserWarning, match="batch 2 of 32 x 8 images in torch.float64.*4 kinds of images"):
            close(graphed(last), eager(model, last))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close(graphed(last), eager(model, last))
            graphed(images[:2])
        assert graphed.captures == MAX_FORMS

    def test_prepare_captures_ahead(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        graphed, _ = graphed_of(build(METHODS["vpt-deep"]))
        graphed.prepare(images)
        assert graphed.captures == 3
        graphed(images)
        assert graphed.captures == 3
        with pytest.raises(ValueError, match="images must hold at least one image"):
            graphed.prepare(images[:0])


def largest_batch(graph: RecordedGraph) -> int:
    return max(
        tensor.shape[0]
        for _, _, _, outputs in graph.calls
        for tensor in tensors_of(outputs)
        if tensor.ndim == 4 and tensor.shape[1] == 3
    )


class TestParameters:
    @pytest.mark.parametrize("method", METHODS)
    def test_changed_in_place(self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str) -> None:
        model = build(METHODS[method])
        graphed, _ = graphed_of(model)
        before = graphed(images[:3])
        change(model)
        found = graphed(images[:3])
        assert not torch.allclose(found, before)
        close(found, eager(model, images[:3]))
        assert graphed.captures == 3

    def test_an_optimizer_and_a_loaded_adapter_change_in_place(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model, other = build(METHODS["vpt-deep"]), build(METHODS["vpt-deep"], seed=5)
        graphed, _ = graphed_of(model)
        graphed(images[:2])
        optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
        F.cross_entropy(model(images[:2]), torch.tensor([0, 1])).backward()
        optimizer.step()
        close(graphed(images[:2]), eager(model, images[:2]))
        model.load_adapter_state_dict(other.adapter_state_dict())
        close(graphed(images[:2]), eager(other, images[:2]))
        assert graphed.captures == 3

    def test_prompts_get_keys_and_values_once_for_an_adapter(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, plain, calls = build(METHODS["vpt-deep"]), fp.PromptedViT.static_prefixes, []
        monkeypatch.setattr(fp.PromptedViT, "static_prefixes", lambda self: calls.append(self) or plain(self))
        graphed, _ = graphed_of(model)
        for expected in (1, 2):
            for count in (2, 4, 2, 11):
                graphed(images[:count])
                assert len(calls) == expected
            change(model)

    def test_written_through_data_needs_a_refresh(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        before = graphed(images[:2])
        model.generator.static.embeddings.data[1].copy_(torch.randn(3, 48))
        assert torch.equal(graphed(images[:2]), before)
        graphed.refresh()
        close(graphed(images[:2]), eager(model.train(), images[:2]))
        assert graphed.captures == 3

    @pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt", "v2apt", "linear"])
    @pytest.mark.parametrize("how", ["data", "assign", "setattr"])
    def test_rebound(self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str, how: str) -> None:
        model = build(METHODS[method])
        graphed, capturer = graphed_of(model)
        graphed(images[:2])
        old = list(capturer.graphs)
        state = {
            name: 1.5 * tensor + 0.1 if tensor.is_floating_point() else tensor.clone()
            for name, tensor in model.adapter_state_dict().items()
        }
        if how == "data":
            for name, parameter in model.trainable_parameters():
                parameter.data = state[name]
        elif how == "assign":
            model.load_state_dict(state, strict=False, assign=True)
        else:
            for name, tensor in state.items():
                if name.startswith("head."):
                    setattr(model.head, name.removeprefix("head."), nn.Parameter(tensor))
        found = graphed(images[:2])
        close(found, eager(model.train(), images[:2]))
        assert graphed.captures == 6
        assert not any(graph.calls for graph in old)
        assert capturer.synchronized == 1
        assert len(capturer.pools) == 2
        graphed(images[:2])
        assert graphed.captures == 6

    def test_statistics_of_a_batch_norm_are_read_like_parameters(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["pgn"])
        graphed, _ = graphed_of(model)
        graphed(images[:2])
        norm = next(module for module in model.generator.modules() if isinstance(module, nn.BatchNorm2d))
        norm.running_mean.add_(0.5)
        close(graphed(images[:2]), eager(model, images[:2]))
        assert graphed.captures == 3
        norm.running_mean = norm.running_mean + 1
        close(graphed(images[:2]), eager(model, images[:2]))
        assert graphed.captures == 6

    def test_a_parameter_that_goes_and_comes(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(METHODS["linear"])
        graphed, _ = graphed_of(model)
        graphed(images[:2])
        model.head.bias = None
        close(graphed(images[:2]), eager(model, images[:2]))
        model.head.bias = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
        close(graphed(images[:2]), eager(model, images[:2]))

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_backbone_that_is_loaded_is_folded_and_captured_again(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, assign: bool
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        before = graphed(images[:2])
        state = {name: 1.1 * tensor for name, tensor in model.backbone.state_dict().items()}
        model.backbone.load_state_dict(state, assign=assign)
        found = graphed(images[:2])
        assert not torch.allclose(found, before)
        with torch.no_grad():
            close(found, model.reference_forward(images[:2]))

    def test_another_head_and_another_number_of_samples(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model, (2,))
        graphed(images[:2])
        assert model.head is not None
        model.head = copy.deepcopy(model.head)
        change(model)
        close(graphed(images[:2]), eager(model, images[:2]))
        with latent_samples(model, 5):
            close(graphed(images[:2]), eager(model, images[:2]))
            assert graphed.captures == 3

    def test_another_dtype(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model, (2,))
        with fp.use_backend("reference"):  # as what is recorded: in these dtypes a CPU may have faster kernels
            graphed(images[:2].float())
            model.float()
            close(graphed(images[:2].float()), eager(model, images[:2].float()))
            model.set_backbone_dtype(torch.bfloat16)
            close(graphed(images[:2].float()), eager(model, images[:2].float()))
        assert graphed.captures == 3

    def test_a_model_whose_parameters_keep_moving_is_told_once(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["linear"])
        graphed, _ = graphed_of(model, (2,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(6):
                graphed(images[:2])
                model.head.weight.data = model.head.weight.data.clone()
        assert [str(w.message) for w in caught if "captured again 3 times" in str(w.message)].__len__() == 1


class TestAdapters:
    @pytest.mark.parametrize("method", METHODS)
    def test_swap_without_capture(self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str) -> None:
        models = [build(METHODS[method], seed=seed) for seed in (1, 2, 3)]
        graphed, _ = graphed_of(build(METHODS[method]))
        for model in (models[0], models[1], models[2], models[0]):
            graphed.load_adapter(model)
            close(graphed(images[:3]), eager(model, images[:3]))
            state = models[1].adapter_state_dict()
            graphed.load_adapter(state)
            close(graphed(images[:3]), eager(models[1], images[:3]))
        assert graphed.captures == 3

    def test_options_of_training_do_not_separate_adapters(self, build: Callable[..., fp.PromptedViT]) -> None:
        same = fp.VAPTConfig(num_prompts=3, hidden=4, channel_dropout=0.3, hidden_dropout=0.2, prompt_dropout=0.1)
        assert method_shape(build(METHODS["vapt"])) == method_shape(build(same))
        assert hash(method_shape(build(same)))

    @pytest.mark.parametrize(
        ("config", "options"),
        [
            (fp.VPTConfig(num_prompts=4), {}),
            (fp.VPTConfig(num_prompts=3, deep=False), {}),
            (METHODS["vapt"], {}),
            (METHODS["vpt-deep"], {"num_classes": 4}),
            (METHODS["vpt-deep"], {"readout": "patches"}),
        ],
    )
    def test_another_method_shape_is_refused(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, config: PromptConfig, options: dict[str, Any]
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        before = graphed(images[:2])
        with pytest.raises(ValueError, match="adapter has another method shape"):
            graphed.load_adapter(build(config, seed=1, **options))
        assert torch.equal(graphed(images[:2]), before)

    def test_options_that_no_tensor_shows_are_part_of_the_shape(self, build: Callable[..., fp.PromptedViT]) -> None:
        graphed, _ = graphed_of(build(METHODS["pgn"]))
        sigmoid = fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8), activation="sigmoid")
        with pytest.raises(ValueError, match="adapter has another method shape"):
            graphed.load_adapter(build(sigmoid))

    def test_constants_of_a_head_are_part_of_the_shape(self, build: Callable[..., fp.PromptedViT]) -> None:
        texts = torch.randn(3, 48)
        model, other = (
            build(METHODS["vpt-deep"], head="text", class_embeddings=texts, logit_scale=scale)
            for scale in (100.0, 50.0)
        )
        graphed, _ = graphed_of(model)
        with pytest.raises(ValueError, match="adapter has another method shape"):
            graphed.load_adapter(other)

    def test_another_backbone_or_an_incomplete_state_is_refused(self, build: Callable[..., fp.PromptedViT]) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
        other = fp.PromptedViT(fp.FrozenViT(vit), METHODS["vpt-deep"], num_classes=3)
        with pytest.raises(ValueError, match="adapter is of another backbone"):
            graphed.load_adapter(other)
        with pytest.raises(ValueError, match="missing"):
            graphed.load_adapter({})


class TestNoise:
    def test_every_replay_draws_anew_and_a_seed_repeats_it(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, _ = graphed_of(build(V2APT), seed=3)
        first = [graphed(images[:2]) for _ in range(4)]
        assert all(not torch.allclose(a, b) for a, b in itertools.combinations(first, 2))
        graphed.manual_seed(3)
        assert all(torch.equal(graphed(images[:2]), expected) for expected in first)
        graphed.manual_seed(4)
        assert not torch.allclose(graphed(images[:2]), first[0])
        other, _ = graphed_of(build(V2APT), seed=3)
        assert torch.equal(other(images[:2]), first[0])

    def test_it_is_the_stream_of_seed_and_offset(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model, seed=11)
        for call in range(3):
            samples = [
                eager(model, images[:3], {"noise": torch.tensor([11, 2 * call + k])}).softmax(-1) for k in range(2)
            ]
            close(graphed(images[:3]), torch.stack(samples).mean(0).log())

    def test_neither_padding_nor_capturing_disturbs_it(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model, (4,), seed=3)
        exact, _ = graphed_of(model, (2,), seed=3)
        graphed(images[:2])
        exact(images[:2])
        close(graphed(images[:2]), exact(images[:2]))
        graphed(images[:2].float())  # another kind of images is captured
        exact(images[:2])
        model.head.weight.data = model.head.weight.data.clone()
        close(graphed(images[:2]), exact(images[:2]))

    def test_eager_calls_draw_from_it_too(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model, (2,), seed=3)
        fallen, _ = graphed_of(model, (2,), seed=3, failures={0: RuntimeError("no")})
        with pytest.warns(UserWarning, match="no CUDA graph"):
            fallen(images[:2])
        graphed(images[:2])
        close(fallen(images[:2]), graphed(images[:2]))

    def test_without_a_seed_a_call_repeats_the_model(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model)
        assert torch.equal(graphed(images[:2]), graphed(images[:2]))
        close(graphed(images[:2]), eager(model, images[:2]))

    def test_a_seed_needs_a_method_that_draws(self, build: Callable[..., fp.PromptedViT]) -> None:
        for method in ("vpt-deep", "v2apt"):
            with pytest.raises(ValueError, match="seed is for a V2APT with inference_samples"):
                graphed_of(build(METHODS[method]), seed=1)
        graphed, _ = graphed_of(build(V2APT))
        with pytest.raises(ValueError, match="seed must be given when"):
            graphed.manual_seed(1)
        with pytest.raises(ValueError, match="seed must be an integer"):
            graphed.manual_seed(1.5)
        with pytest.raises(ValueError, match="seed must be an integer"):
            graphed_of(build(V2APT), seed=-1)


class TestFallback:
    def test_one_signature_runs_eagerly_with_one_warning(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, capturer = graphed_of(model, failures={1: RuntimeError("operation not permitted")})
        with pytest.warns(UserWarning, match="no CUDA graph") as caught:
            found = [graphed(images[:count]) for count in (2, 4, 1, 2)]
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "batch 2 of 32 x 32 images in torch.float64, backbone in torch.float64" in message
        assert "VPTConfig(num_prompts=3" in message
        assert "RuntimeError: operation not permitted" in message
        for output, count in zip(found, (2, 4, 1, 2), strict=True):
            close(output, eager(model, images[:count]))
        assert [graph.replays for graph in capturer.graphs] == [1, 1]
        ((signature, reason),) = graphed.eager.items()
        assert signature.batch == 2
        assert reason == "RuntimeError: operation not permitted"

    def test_a_pool_that_a_failure_may_have_spoilt_is_left(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, capturer = graphed_of(build(METHODS["vpt-deep"]), failures={1: RuntimeError("no")})
        with pytest.warns(UserWarning, match="no CUDA graph"):
            graphed(images[:2])
        assert [len(pool) for pool in capturer.pools] == [1, 1]

    def test_it_is_remembered_when_the_others_are_captured_again(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, capturer = graphed_of(model, failures={0: RuntimeError("no")})
        with pytest.warns(UserWarning, match="no CUDA graph"):
            graphed(images[:4])
        model.head.weight.data = 2 * model.head.weight.data
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for count in (4, 2):
                close(graphed(images[:count]), eager(model, images[:count]))
        assert capturer.attempts == 5

    def test_a_model_that_reads_the_host(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = build(METHODS["linear"])
        head = type(model.head)
        plain = head.forward

        def peeks(self: Any, features: Tensor) -> Tensor:
            return plain(self, features) if float(features.sum()) else features

        monkeypatch.setattr(head, "forward", peeks)
        graphed, _ = graphed_of(model, (2,))
        with pytest.warns(UserWarning, match="_local_scalar_dense.* is not permitted while a stream is capturing"):
            close(graphed(images[:2]), eager(model, images[:2]))

    def test_a_warm_up_without_memory(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = build(METHODS["vpt-deep"])
        plain = fp.PromptedViT.predict

        def runs_out(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
            if len(images) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(self, images, *arguments, **options)

        monkeypatch.setattr(fp.PromptedViT, "predict", runs_out)
        graphed, _ = graphed_of(model)
        with pytest.warns(UserWarning, match="batch 4 .*OutOfMemoryError: CUDA out of memory"):
            close(graphed(images[:3]), eager(model, images[:3]))
        assert graphed.captures == 2

    def test_wrong_images_are_an_error_and_no_fallback(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, capturer = graphed_of(build(METHODS["vpt-deep"]))
        with pytest.raises(ValueError, match="images must have shape"):
            graphed(images[0])
        with pytest.raises(ValueError, match="images must be 32 x 32"):
            graphed(images[:, :, :16])
        with pytest.raises(TypeError, match="images must be"):
            graphed(None)
        assert capturer.warm_ups == 0
        assert not graphed.eager

    def test_training_mode_is_an_error(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(METHODS["vpt-deep"])
        graphed, _ = graphed_of(model)
        model.train()
        with pytest.raises(RuntimeError, match=r"training mode.*model\.eval"):
            graphed(images[:2])

    def test_wrong_arguments(self, build: Callable[..., fp.PromptedViT], tiny_vit: VisionTransformer) -> None:
        model = build(METHODS["vpt-deep"])
        with pytest.raises(TypeError, match="model must be a PromptedViT"):
            GraphedForward(tiny_vit, capturer=RecordingCapturer())
        for sizes in ((), (0,), (1, -2), (True,), (1.5,)):
            with pytest.raises(ValueError, match="batch_sizes must be positive integers"):
                graphed_of(model, sizes)
        with pytest.raises(TypeError, match="batch_sizes must be positive integers"):
            graphed_of(model, 8)
        with pytest.raises(ValueError, match="model must be on a CUDA or ROCm device to be captured, it is on cpu"):
            GraphedForward(model)


class TestRelease:
    def test_frees_graphs_pool_and_buffers(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        graphed, capturer = graphed_of(build(METHODS["vpt-deep"]))
        borrowed = graphed(images[:2], borrow=True)
        static = weakref.ref(borrowed.untyped_storage()._cdata and borrowed._base)
        assert static() is not None
        del borrowed
        graphed.release()
        gc.collect()
        assert static() is None
        assert capturer.synchronized == 1
        assert capturer.pools == [[]]
        assert not any(graph.calls for graph in capturer.graphs)
        graphed.release()

    def test_a_released_manager_raises(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model = build(V2APT)
        graphed, _ = graphed_of(model, seed=1)
        graphed.release()
        for call in (
            lambda: graphed(images[:1]),
            lambda: graphed.prepare(images),
            lambda: graphed.load_adapter(model),
            graphed.refresh,
            lambda: graphed.manual_seed(1),
        ):
            with pytest.raises(RuntimeError, match="this GraphedForward was released; make a new one"):
                call()


class TestThreads:
    def test_results_are_right_while_threads_and_adapters_mix(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        models = [build(METHODS["vpt-deep"], seed=seed) for seed in (1, 2)]
        expected = [eager(model, images) for model in models]
        graphed, _ = graphed_of(build(METHODS["vpt-deep"], seed=1), pause=lambda: time.sleep(0))
        graphed.prepare(images)
        wrong: list[str] = []
        deadline = time.monotonic() + 2

        def hammer(me: int) -> None:
            for turn in itertools.count():
                if time.monotonic() > deadline or wrong:
                    return
                if me == 0:
                    graphed.load_adapter(models[turn % 2])
                start, count = (me + turn) % 6, (me * turn) % 6
                found = graphed(images[start : start + count])
                if not any(torch.allclose(found, e[start : start + count], rtol=1e-9, atol=1e-9) for e in expected):
                    wrong.append(f"thread {me}, turn {turn}, images {start} to {start + count}")

        run_threads(hammer, 8)
        assert not wrong

    def test_a_call_waits_for_the_one_before_on_another_stream(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, capturer = graphed_of(build(METHODS["vpt-deep"]))
        graphed(images[:1])
        graphed(images[:1])
        assert not capturer.followed
        run_threads(lambda _: graphed(images[:1]), 1)
        ((after, before),) = capturer.followed
        assert before == threading.get_ident() != after

    def test_a_borrowed_output_is_safe_from_other_threads(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        graphed, _ = graphed_of(build(METHODS["vpt-deep"]))
        borrowed = graphed(images[:2], borrow=True)
        kept = borrowed.clone()
        caught: list[Exception] = []

        def other(_: int) -> None:
            try:
                graphed(images[2:4])
            except RuntimeError as error:
                caught.append(error)

        run_threads(other, 1)
        assert "another thread holds the output that it borrowed" in str(caught[0])
        assert torch.equal(borrowed, kept)
        graphed(images[:2])
        run_threads(other, 1)
        assert len(caught) == 1


def run_threads(function: Callable[[int], Any], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def sgd(model: fp.PromptedViT, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in model.trainable_parameters()], **{"lr": 0.125, **options})


def adamw(model: fp.PromptedViT, **options: Any) -> torch.optim.Optimizer:
    """With a tensor as learning rate, as the graph has it: the same arithmetic."""
    parameters = [p for _, p in model.trainable_parameters()]
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.125), capturable=True, **options)


@pytest.fixture
def capturable_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the capturable step from CPUs; it runs there all the same."""
    for module in ("torch.optim.adam", "torch.optim.adamw"):
        monkeypatch.setattr(
            importlib.import_module(module),
            "_get_capturable_supported_devices",
            lambda *args, **kwargs: ["cpu", "cuda"],
            raising=False,
        )


def plain_step(model: fp.PromptedViT, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """The step as anybody writes it."""
    optimizer.zero_grad()
    logits, aux = model(images, return_aux=True)
    loss = F.cross_entropy(logits, labels)
    if "kl" in aux:
        loss = loss + model.config.beta * aux["kl"].mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])


class TestTrainStep:
    @pytest.mark.parametrize("method", METHODS)
    def test_trains_as_eager_does(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor, method: str
    ) -> None:
        config = {"vpt-deep": fp.VPTConfig(num_prompts=3, prompt_dropout=0.2)}.get(method, METHODS[method])
        model = build(config).train()
        plain = copy.deepcopy(model)
        optimizer = sgd(plain, momentum=0.9, weight_decay=0.01)
        step = GraphedTrainStep(model, sgd(model, momentum=0.9, weight_decay=0.01), capturer=RecordingCapturer())
        losses: list[list[Tensor]] = []
        for run in (step, lambda x, y: plain_step(plain, optimizer, x, y)):
            torch.manual_seed(5)
            losses.append([run(images[i : i + 4], labels[i : i + 4]) for i in range(WARM_UPS + 4)])
        for found, wanted in zip(*losses, strict=True):
            close(found, wanted)
        for (name, found), wanted in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)
        assert step.captures == 1
        assert not step.eager

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"momentum": 0.5, "dampening": 0.25},
            {"momentum": 0.5, "nesterov": True},
            {"momentum": 0.5, "maximize": True, "foreach": True},
        ],
    )
    def test_sgd(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor, options: dict[str, Any]
    ) -> None:
        self.compare(build, images, labels, lambda model: sgd(model, **options))

    @pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"amsgrad": True}])
    @pytest.mark.usefixtures("capturable_on_cpu")
    def test_adamw(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor, options: dict[str, Any]
    ) -> None:
        self.compare(build, images, labels, lambda model: adamw(model, **options))

    def compare(
        self,
        build: Callable[..., fp.PromptedViT],
        images: Tensor,
        labels: Tensor,
        make: Callable[[fp.PromptedViT], torch.optim.Optimizer],
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        plain = copy.deepcopy(model)
        optimizer = make(plain)
        step = GraphedTrainStep(model, make(model), capturer=RecordingCapturer())
        for i in range(WARM_UPS + 3):
            x, y = images[i : i + 4], labels[i : i + 4]
            close(step(x, y), plain_step(plain, optimizer, x, y))
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert step.captures == 1

    def test_the_first_steps_are_eager_and_each_batch_size_has_its_graph(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        capturer = RecordingCapturer()
        step = GraphedTrainStep(model, sgd(model, momentum=0.5), capturer=capturer)
        counts = []
        for size in (4, 4, 4, 4, 4, 3, 3, 3, 3, 4):
            step(images[:size], labels[:size])
            counts.append((step.captures, capturer.warm_ups))
        assert counts == [(0, 1), (0, 2), (0, 3), (1, 3), (1, 3), (1, 4), (1, 5), (1, 6), (2, 6), (2, 6)]
        assert len(capturer.pools) == 1
        assert [graph.replays for graph in capturer.graphs] == [3, 1]

    def test_gradients_stay_in_place(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
        step(images[:4], labels[:4])
        places = [p.grad.data_ptr() for _, p in model.trainable_parameters()]
        for i in range(6):
            before = copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.grad = None  # what a loop's own zero_grad() does
            step(images[i : i + 4], labels[i : i + 4])
            assert [p.grad.data_ptr() for _, p in model.trainable_parameters()] == places
            F.cross_entropy(before(images[i : i + 4]), labels[i : i + 4]).backward()
        for (_, found), (_, wanted) in zip(model.trainable_parameters(), before.trainable_parameters(), strict=True):
            close(found.grad, wanted.grad)
        assert step.captures == 1

    def test_gradients_outside_of_the_optimizer_stay_too(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        optimizer = torch.optim.SGD(model.generator.parameters(), lr=0.1)
        step = GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
        step(images[:4], labels[:4])
        place = model.head.weight.grad.data_ptr()
        for _ in range(5):
            model.head.weight.grad = None
            step(images[:4], labels[:4])
            assert model.head.weight.grad.data_ptr() == place

    def test_the_loss_is_a_copy_and_its_function_the_caller_s(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        model = build(METHODS["linear"]).train()
        targets = torch.randn(4, 3, dtype=torch.float64)

        def loss(logits: Tensor, labels: Tensor, aux: dict[str, Tensor]) -> Tensor:
            return (logits - labels).square().mean()

        step = GraphedTrainStep(model, sgd(model, lr=0.01), loss, capturer=RecordingCapturer())
        losses = [step(images[:4], targets) for _ in range(8)]
        assert len(set(map(float, losses))) == 8
        assert all(b < a for a, b in itertools.pairwise(losses))

    def test_learning_rates_are_read_at_replay(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        plain = copy.deepcopy(model)
        optimizers = [sgd(m, momentum=0.5) for m in (model, plain)]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
        step = GraphedTrainStep(model, optimizers[0], capturer=RecordingCapturer())
        for i in range(8):
            if i == 6:
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = 0.75
            step(images[:4], labels[:4])
            plain_step(plain, optimizers[1], images[:4], labels[:4])
            for scheduler in schedulers:
                scheduler.step()
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert step.captures == 1

    @pytest.mark.parametrize("what", ["weight decay", "state", "data", "frozen"])
    def test_what_was_captured_and_changes_is_captured_again(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor, what: str
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        plain = copy.deepcopy(model)
        models, optimizers = (model, plain), (sgd(model, momentum=0.5), sgd(plain, momentum=0.5))
        step = GraphedTrainStep(model, optimizers[0], capturer=RecordingCapturer())
        for i in range(12):
            if i == 5:
                for m, optimizer in zip(models, optimizers, strict=True):
                    if what == "weight decay":
                        optimizer.param_groups[0]["weight_decay"] = 0.1
                    elif what == "state":
                        state = copy.deepcopy(optimizer.state_dict())
                        for values in state["state"].values():
                            values["momentum_buffer"].mul_(2)
                        optimizer.load_state_dict(state)
                        optimizer.param_groups[0]["lr"] = 0.125
                    elif what == "data":
                        m.head.weight.data = 2 * m.head.weight.data
                    else:
                        m.head.weight.requires_grad_(False)
                        m.head.weight.grad = None
            step(images[:4], labels[:4])
            plain_step(plain, optimizers[1], images[:4], labels[:4])
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert step.captures == 2

    def test_what_was_made_of_parameters_notices_a_replay(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"])  # in eval mode, so that nothing else drops what the model keeps
        graphed, _ = graphed_of(model)
        step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
        for _ in range(WARM_UPS + 3):
            step(images[:4], labels[:4])
            with torch.no_grad():
                expected = model.reference_forward(images[:2])
                close(model(images[:2]), expected)
            close(graphed(images[:2]), expected)
        assert step.captures == 1
        assert graphed.captures == 3

    def test_a_step_that_cannot_be_captured_goes_on_eagerly(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        plain = copy.deepcopy(model)
        optimizer = sgd(plain)
        step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer({0: RuntimeError("no")}))
        with pytest.warns(UserWarning, match="no CUDA graph") as caught:
            losses = [step(images[:4], labels[:4]) for _ in range(WARM_UPS + 3)]
        for loss in losses:
            close(loss, plain_step(plain, optimizer, images[:4], labels[:4]))
        assert len(caught) == 1
        assert "batch 4 of 32 x 32 images" in str(caught[0].message)
        assert "RuntimeError: no" in str(caught[0].message)

    def test_a_loss_that_reads_the_host_is_named(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["linear"]).train()

        def loss(logits: Tensor, labels: Tensor, aux: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(logits, labels) / max(1.0, float(logits.detach().abs().max()))

        step = GraphedTrainStep(model, sgd(model), loss, capturer=RecordingCapturer())
        for _ in range(WARM_UPS):
            step(images[:4], labels[:4])
        with pytest.warns(UserWarning, match="_local_scalar_dense.* is not permitted"):
            step(images[:4], labels[:4])

    def test_optimizers_that_cannot_be_captured_are_refused(self, build: Callable[..., fp.PromptedViT]) -> None:
        model = build(METHODS["linear"]).train()
        parameters = [p for _, p in model.trainable_parameters()]
        for optimizer, message in (
            (torch.optim.AdamW(parameters), "optimizer AdamW must be made with capturable=True"),
            (torch.optim.LBFGS(parameters), "optimizer LBFGS has no step that a CUDA graph can hold"),
            (torch.optim.SGD(parameters, lr=0.1, differentiable=True), "optimizer must not be differentiable"),
            (torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), "optimizer must be over parameters"),
        ):
            with pytest.raises(ValueError, match=message):
                GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
        with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
            GraphedTrainStep(model, parameters, capturer=RecordingCapturer())
        with pytest.raises(TypeError, match="loss must be a function"):
            GraphedTrainStep(model, sgd(model), "cross_entropy", capturer=RecordingCapturer())

    def test_wrong_batches(self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor) -> None:
        model = build(METHODS["linear"]).train()
        step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
        with pytest.raises(ValueError, match="labels must be"):
            step(images[:4], labels[:3])
        with pytest.raises(ValueError, match="labels must be"):
            step(images[:0], labels[:0])
        with pytest.raises(TypeError, match="labels must be a tensor"):
            step(images[:4], [0, 1, 2, 0])
        with pytest.raises(ValueError, match="images must have shape"):
            step(images[0], labels[:1])

    def test_another_parameter_group_is_an_error(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor
    ) -> None:
        model = build(METHODS["vpt-deep"]).train()
        optimizer = torch.optim.SGD(model.generator.parameters(), lr=0.1)
        step = GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
        optimizer.add_param_group({"params": list(model.head.parameters())})
        with pytest.raises(RuntimeError, match="optimizer has got another parameter group"):
            step(images[:4], labels[:4])

    def test_release(self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor) -> None:
        model = build(METHODS["linear"]).train()
        capturer = RecordingCapturer()
        step = GraphedTrainStep(model, sgd(model), capturer=capturer)
        for _ in range(WARM_UPS + 1):
            step(images[:4], labels[:4])
        step.release()
        assert capturer.pools == [[]]
        with pytest.raises(RuntimeError, match="this GraphedTrainStep was released"):
            step(images[:4], labels[:4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
class TestOnTheDevice:
    """What the double cannot show: that a device records these forwards, and that memory and streams hold."""

    @pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
    def test_replay_equals_eager(self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str) -> None:
        model, x = build(METHODS[method]).float().cuda().eval(), images.float().cuda()
        graphed = GraphedForward(model, (1, 4))
        assert torch.equal(graphed(x[:4]), eager(model, x[:4]))
        change_on_device(model)
        assert torch.equal(graphed(x[:4]), eager(model, x[:4]))
        torch.testing.assert_close(graphed(x[:3]), eager(model, x[:3]), rtol=1e-4, atol=1e-4)
        raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
        assert torch.equal(graphed(raw), eager(model, raw))
        assert not graphed.eager
        graphed.release()

    def test_noise_advances(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        graphed = GraphedForward(build(V2APT).float().cuda().eval(), (4,), seed=3)
        x = images[:4].float().cuda()
        first = [graphed(x) for _ in range(3)]
        graphed.manual_seed(3)
        assert all(torch.equal(graphed(x), expected) for expected in first)
        assert not torch.equal(first[0], first[1])

    def test_a_failed_capture_leaves_the_device_usable(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = build(METHODS["vpt-deep"]).float().cuda().eval(), images.float().cuda()
        plain, calls = fp.PromptedViT.predict, []

        def synchronizes(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
            output = plain(self, images, *arguments, **options)
            if len(images) == 4:
                calls.append(float(output[0].sum()))
            return output

        monkeypatch.setattr(fp.PromptedViT, "predict", synchronizes)
        stream = torch.cuda.current_stream()
        graphed = GraphedForward(model, (1, 2, 4))
        with pytest.warns(UserWarning, match="no CUDA graph for batch 4"):
            graphed(x[:4])
        assert torch.cuda.current_stream() == stream
        assert graphed.captures == 2
        for count in (1, 2, 4):
            torch.testing.assert_close(graphed(x[:count]), eager(model, x[:count]), rtol=1e-4, atol=1e-4)
        torch.randn(4, device="cuda")  # the generator is not left capturing
        graphed.release()

    def test_memory_comes_back_and_threads_agree(self, build: Callable[..., fp.PromptedViT], images: Tensor) -> None:
        model, x = build(METHODS["vapt"]).float().cuda().eval(), images.float().cuda()
        expected = eager(model, x)
        sizes = []
        for _ in range(3):
            graphed = GraphedForward(model, (1, 2, 4))
            graphed.prepare(x)

            def hammer(me: int, graphed: GraphedForward = graphed) -> None:
                with torch.cuda.stream(torch.cuda.Stream()):
                    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                    for turn in range(50):
                        start, count = (me + turn) % 6, (me * turn) % 6
                        found = graphed(x[start : start + count])
                        torch.testing.assert_close(found, expected[start : start + count], rtol=1e-4, atol=1e-4)

            run_threads(hammer, 8)
            graphed.release()
            del graphed
            gc.collect()
            torch.cuda.empty_cache()
            sizes.append(torch.cuda.memory_reserved())
        assert sizes[2] <= sizes[1]

    @pytest.mark.parametrize("method", ["vpt-deep", "pgn", "v2apt", "vapt"])
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_train_step(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, labels: Tensor, method: str, name: str
    ) -> None:
        model = build(METHODS[method]).float().cuda().train()
        plain = copy.deepcopy(model)
        make = {
            "sgd": lambda m: sgd(m, lr=0.01, momentum=0.9),
            "adamw": lambda m: torch.optim.AdamW([p for _, p in m.trainable_parameters()], lr=1e-3, capturable=True),
        }[name]
        optimizer, step = make(plain), GraphedTrainStep(model, make(model))
        x, y = images[:8].float().cuda(), labels[:8].cuda()
        losses: list[list[Tensor]] = []
        for run in (step, lambda a, b: plain_step(plain, optimizer, a, b)):
            torch.manual_seed(5)
            losses.append([run(x, y) for _ in range(WARM_UPS + 5)])
        torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-3)
        assert step.captures == 1


class TestTheEngine:
    """`fp.Engine(backend="cuda_graph")`, by the double in place of a device."""

    @pytest.fixture(autouse=True)
    def capturers(self, monkeypatch: pytest.MonkeyPatch) -> list[RecordingCapturer]:
        """Those that engines have made, in order."""
        made: list[RecordingCapturer] = []
        self.failures: dict[int, Exception] = {}

        def capturer(device: torch.device) -> RecordingCapturer:
            made.append(RecordingCapturer(self.failures))
            return made[-1]

        for name in ("compile", "openvino"):
            monkeypatch.delitem(BACKENDS, name)
        monkeypatch.setattr(cuda_graph, "CudaCapturer", capturer)
        monkeypatch.setitem(BACKENDS, "cuda_graph", BACKENDS["cuda_graph"]._replace(obstacle=lambda model: ""))
        return made

    @pytest.mark.parametrize("method", METHODS)
    def test_replays_a_graph_of_each_size(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, method: str, capturers: list[RecordingCapturer]
    ) -> None:
        model = build(METHODS[method])
        engine = fp.Engine(model, (2, 4), torch.float64, "cuda_graph")
        for count in (4, 1, 3, 7, 2):
            close(engine(images[:count]), eager(model, images[:count]))
        replays = [[graph.replays for graph in capturer.graphs] for capturer in capturers]
        assert replays == [[1 + 1 + 1 + 2], [1 + 2]]  # the first readies the graph; 7 images are two batches of 4

    def test_sees_what_changes_without_a_new_capture(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, capturers: list[RecordingCapturer]
    ) -> None:
        model = build(METHODS["vpt-deep"])
        engine = fp.Engine(model, (2,), torch.float64, "cuda_graph")
        before = engine(images[:2])
        change(model)
        close(engine(images[:2]), eager(model, images[:2]))
        assert not torch.allclose(engine(images[:2]), before)
        assert [capturer.attempts for capturer in capturers] == [1]
        model.head = copy.deepcopy(model.head)
        change(model)
        close(engine(images[:2]), eager(model, images[:2]))

    def test_auto_measures_it(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        durations = {"GraphedForward": 1.0, "PromptedViT": 2.0}
        monkeypatch.setattr(engine_module, "_seconds", lambda run, device: durations[type(run.func).__name__])
        engine = fp.Engine(build(METHODS["pgn"]), (2,), torch.float64)
        engine(images[:2])
        (measured,) = engine.measured.values()
        assert measured.chosen == "cuda_graph"
        assert measured.seconds == {"eager": 2.0, "cuda_graph": 1.0}
        assert "float64: cuda_graph (cuda_graph 1e+03 ms, eager 2e+03 ms)" in str(fp.explain(engine))

    def test_what_cannot_be_captured_is_said_and_not_run(
        self, build: Callable[..., fp.PromptedViT], images: Tensor
    ) -> None:
        self.failures[0] = RuntimeError("operation not permitted")
        model = build(METHODS["vpt-deep"])
        engine = fp.Engine(model, (2,), torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close(engine(images[:2]), eager(model, images[:2]))
            (measured,) = engine.measured.values()
            assert measured.chosen == "eager"
            assert measured.reasons["cuda_graph"].startswith("it failed: RuntimeError: the forward cannot be captured")
            with pytest.raises(RuntimeError, match=r"backend 'cuda_graph' failed: .*operation not permitted"):
                fp.Engine(model, (2,), torch.float64, "cuda_graph")(images[:2])

    def test_a_released_engine_keeps_no_graph(
        self, build: Callable[..., fp.PromptedViT], images: Tensor, capturers: list[RecordingCapturer]
    ) -> None:
        engine = fp.Engine(build(METHODS["vpt-deep"]), (2,), torch.float64, "cuda_graph")
        engine(images[:2])
        (run,) = engine._runs.values()
        kept = weakref.ref(run)
        del run
        engine.release()
        gc.collect()
        assert kept() is None

    def test_needs_a_device(self, build: Callable[..., fp.PromptedViT], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="backend 'cuda_graph' cannot run: CUDA graphs need a CUDA or"):
            fp.Engine(build(METHODS["linear"]), (1,), torch.float64, "cuda_graph")


def change_on_device(model: fp.PromptedViT) -> None:
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.mul_(1.25)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "bench" / "gpu_graphs.py"
    spec = importlib.util.spec_from_file_location("gpu_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class TestTheReport:
    """`bench/gpu_graphs.py` runs on a device alone; here its control flow does, by the double."""

    def test_has_parity_and_times_of_every_method_and_batch(
        self, bench: ModuleType, tiny_vit: VisionTransformer, capturable_on_cpu: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench, "ROUNDS", 2)
        monkeypatch.setattr(bench, "CALLS", 1)
        monkeypatch.setattr(bench, "ADAPTERS", 3)
        kept: list[int] = []
        report = bench.measure(
            fp.FrozenViT(tiny_vit),
            batches=(2, 4),
            capturer=RecordingCapturer,
            compiler=lambda model, dynamic: model,
            keep=lambda report: kept.append(len(report["methods"])),
        )
        json.dumps(report)
        assert kept == [4, 4, 4, 4, 4]
        assert set(report["mixed batch"]["microseconds"]) == {
            "mixed batch",
            "one adapter",
            "batch 1, eager",
            "batch 1, graph",
        }
        assert report["mixed batch"]["times of a mixed batch"]["mixed batch"] == 1
        assert set(report["methods"]) == {"vpt-deep", "pgn", "v2apt", "vapt"}
        for found in report["methods"].values():
            assert [row["batch"] for row in found["parity"]] == [3, 4, 3, 4]
            assert all(row["error"] <= row["budget"] for row in found["parity"])
            for batch in ("2", "4"):
                assert set(found["inference"][batch]) == {"eager", "compile", "graph", "graph, borrowed"}
                assert set(found["training step"][batch]) == {"eager", "compile", "graph"}
                for times in (*found["inference"][batch].values(), *found["training step"][batch].values()):
                    assert times["latency"]["median"] > 0
                    assert times["throughput"]["low"] <= times["throughput"]["high"]

    def test_a_deadline_cuts_times_short_and_no_parity(
        self, bench: ModuleType, tiny_vit: VisionTransformer, capturable_on_cpu: None
    ) -> None:
        found = bench.measure(
            fp.FrozenViT(tiny_vit), ["pgn"], (2,), RecordingCapturer, lambda model, dynamic: model, deadline=0.0
        )["methods"]["pgn"]
        assert len(found["parity"]) == 4
        for times in (found["inference"]["2"], found["training step"]["2"]):
            assert times.pop("compile") is None
            for way in times.values():
                assert way["throughput"]["low"] == way["throughput"]["high"]  # one round

    @pytest.mark.parametrize(("broken", "error"), [("replay", SystemExit), ("capture", UserWarning)])
    def test_a_wrong_replay_and_a_failed_capture_end_it(
        self,
        bench: ModuleType,
        tiny_vit: VisionTransformer,
        broken: str,
        error: type[BaseException],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if broken == "replay":
            monkeypatch.setattr(RecordedGraph, "replay", lambda self: None)
        failures = {0: RuntimeError("no")} if broken == "capture" else {}
        with pytest.raises(error, match=r"error of a replay|no CUDA graph"):
            bench.measure(
                fp.FrozenViT(tiny_vit),
                ["vpt-deep"],
                (1, 2),
                lambda: RecordingCapturer(failures),
                lambda model, dynamic: model,
            )
