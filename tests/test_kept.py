"""What is kept of tensors: every change is seen, in every mode and order, and nothing else is made again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_graphs import graphed_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.kept import Kept, SeenObjects, SeenValues, tensors_of
from fastprompt.vit import folding, forward

DEEP = fp.VPTConfig(num_prompts=3)


def assigned(tensor: Tensor) -> None:
    tensor.data = tensor.detach().clone()


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda t: t.detach().copy_(t.detach() + 1),
    "data.copy_": lambda t: t.data.copy_(t.data + 1),
    "data.mul_": lambda t: t.data.mul_(2),
    "data =": lambda t: setattr(t, "data", t.data + 1),
}
SAME_VALUES: dict[str, Callable[[Tensor], object]] = {
    "add_(0)": lambda t: t.detach().add_(0),
    "data =": assigned,
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("seen", [SeenValues, SeenObjects])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4, 4), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_change_is_seen(seen: Any, change: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [torch.ones(3), torch.ones(shape, dtype=dtype)]
    held = seen(tensors)
    assert held.same(tensors)
    IN_PLACE[change](tensors[1])
    if tensors[1].numel():
        assert not held.same(tensors)


@pytest.mark.parametrize("change", SAME_VALUES)
def test_values_are_compared_and_nothing_else(change: str) -> None:
    tensors = [torch.randn(3, 4)]
    held = SeenValues(tensors)
    SAME_VALUES[change](tensors[0])
    assert held.same(tensors)
    assert held.same([tensors[0].clone()])


@pytest.mark.parametrize("seen", [SeenValues, SeenObjects])
def test_other_tensors_are_seen(seen: Any) -> None:
    tensors = [torch.ones(2, 6), torch.ones(3)]
    held = seen(tensors, ("readout",))
    assert held.same(tensors, ("readout",))
    assert not held.same(tensors, ("other",))
    assert not held.same(tensors[:1], ("readout",))
    assert not held.same([*tensors, tensors[0]], ("readout",))
    for other in (tensors[0].double(), tensors[0].view(3, 4), tensors[0].to("meta")):
        assert not held.same([other, tensors[1]], ("readout",))


SIXTEENTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "first rows": lambda t: t[: len(t) // 16],
    "last rows": lambda t: t[-(len(t) // 16) :],
    "some rows": lambda t: t[37 : 37 + len(t) // 16],
    "first columns": lambda t: t[:, : t.shape[1] // 16],
    "last columns": lambda t: t[:, -(t.shape[1] // 16) :],
}


@pytest.mark.parametrize("part", SIXTEENTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("layout", ["rows", "columns", "with gaps"])
def test_samples_notice_a_sixteenth_of_a_large_tensor(part: str, dtype: torch.dtype, layout: str) -> None:
    """As where LoRA is merged into queries and values by `.data`."""
    tensor = torch.zeros(192, 96, dtype=dtype)
    if layout == "columns":
        tensor = torch.zeros(96, 192, dtype=dtype).T
    elif layout == "with gaps":
        tensor = torch.zeros(192, 200, dtype=dtype)[:, :96]
    held = SeenObjects([tensor])
    assert held.same([tensor])
    SIXTEENTHS[part](tensor.data).add_(1)
    assert not held.same([tensor])


@pytest.mark.parametrize("contents", [True, False])
def test_memory_that_is_used_again_is_other_memory(contents: bool) -> None:
    """CPython and the allocator give the same address and identity again; both are held weakly."""
    for _ in range(20):
        held, memory = SeenObjects([torch.zeros(1000)], contents=contents), weakref.ref(tensor := torch.zeros(1000))
        assert not held.same([tensor])
        del tensor
        assert memory() is None


def test_a_graph_sees_places_alone() -> None:
    tensor = torch.zeros(4)
    held = SeenObjects([tensor], contents=False)
    tensor.add_(1)
    assert held.same([tensor])
    assigned(tensor)
    assert not held.same([tensor])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))], ids=["copy", "pickle"])
def test_copies_keep_nothing(duplicate: Callable[[Any], Any]) -> None:
    kept: Kept[int] = Kept()
    assert kept.get(SeenValues, [torch.ones(1)], (), lambda: 7) == 7
    assert duplicate(kept).value is None
    assert kept.value == 7


def test_walk_finds_every_tensor(tiny_vit: VisionTransformer) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.PGNConfig(num_prompts=2, library_size=4), 3)
    found = {id(tensor) for tensor in tensors_of(model, None)}
    assert found == {id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}


@pytest.fixture
def backbone(randomised: Callable[..., nn.Module], tiny_vit: VisionTransformer) -> fp.FrozenViT:
    return fp.FrozenViT(randomised(tiny_vit))


@contextlib.contextmanager
def averaged(parameters: list[nn.Parameter], how: str) -> Iterator[None]:
    """Averaged weights, swapped in as published code does it."""
    kept = [p.detach().clone() for p in parameters]
    average = [torch.randn_like(p) for p in parameters]

    def swap(values: list[Tensor]) -> None:
        if how == "vector":
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(values), parameters)
        for p, value in zip(parameters, values, strict=True):
            if how == "data.copy_":
                p.data.copy_(value)
            elif how == "copy_":
                p.detach().copy_(value)
            elif how == "data =":
                p.data = value.clone()

    swap(average)
    yield
    swap(kept)


@pytest.mark.parametrize("how", ["data.copy_", "data =", "copy_", "vector"])
@pytest.mark.parametrize(
    "config",
    [
        DEEP,
        fp.VPTConfig(num_prompts=3, deep=False),
        fp.VPTConfig(num_prompts=3, project=5),
        fp.FreePromptsConfig(num_prompts=3),
        fp.PGNConfig(num_prompts=2, library_size=4, widths=(4, 8)),
        fp.VAPTConfig(num_prompts=3, hidden=4),
        fp.V2APTConfig(num_prompts=4, num_instance=2, latent=3, hidden=5),
    ],
    ids=lambda config: config.kind,
)
@torch.no_grad()
def test_averaged_weights_answer_and_are_gone_again(
    backbone: fp.FrozenViT, tiny_images: Tensor, config: Any, how: str
) -> None:
    model = fp.PromptedViT(backbone, config, 3).eval()
    engine = fp.Engine(model, dtype=torch.float32, backend="eager")
    raw, served = model(tiny_images), engine(tiny_images)
    with averaged(list(model.generator.parameters()), how):
        torch.testing.assert_close(model(tiny_images), model.reference_forward(tiny_images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(engine(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)
        assert (model(tiny_images) - raw).abs().max() > 1e-4
    assert torch.equal(model(tiny_images), raw)
    assert torch.equal(engine(tiny_images), served)


def replaced(vit: fp.FrozenViT) -> None:
    weight = vit.blocks[1].mlp.fc2.weight
    vit.blocks[1].mlp.fc2.weight = nn.Parameter(2 * weight.detach(), requires_grad=False)


def replaced_block(vit: fp.FrozenViT) -> None:
    vit.blocks[0] = copy.deepcopy(vit.blocks[1])


BACKBONE_CHANGES: dict[str, Callable[[fp.FrozenViT], object]] = {
    "data.copy_": lambda v: [p.data.copy_(1.1 * p.data) for p in v.parameters()],
    "one data.copy_": lambda v: v.blocks[1].qkv.weight.data.mul_(1.5),
    "mul_": lambda v: v.blocks[1].qkv.weight.mul_(1.5),
    "data =": lambda v: setattr(v.blocks[1].qkv.weight, "data", 1.5 * v.blocks[1].qkv.weight.data),
    "parameter": replaced,
    "block": replaced_block,
    "load": lambda v: v.load_state_dict({k: 1.1 * t for k, t in v.state_dict().items()}),
    "assign": lambda v: v.load_state_dict({k: 1.1 * t for k, t in v.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", BACKBONE_CHANGES)
@torch.no_grad()
def test_a_change_of_the_backbone_is_folded_again(backbone: fp.FrozenViT, tiny_images: Tensor, change: str) -> None:
    model, before = fp.PromptedViT(backbone.double(), DEEP).eval(), None
    for _ in range(3):
        found = model(tiny_images.double())
        torch.testing.assert_close(found, model.reference_forward(tiny_images.double()), rtol=1e-10, atol=1e-10)
        assert before is None or (found - before).abs().max() > 1e-4 or change == "block"
        before = found
        BACKBONE_CHANGES[change](backbone)


@torch.no_grad()
def test_refold_takes_over_what_nobody_can_see(backbone: fp.FrozenViT, tiny_images: Tensor) -> None:
    model = fp.PromptedViT(backbone.double(), DEEP).eval()
    images = tiny_images.double()
    model(images)
    backbone.blocks[1].qkv.weight.data[-1].add_(1)  # all but the first row
    backbone.refold()
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_mean_and_std_are_facts_of_the_fold(backbone: fp.FrozenViT) -> None:

    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model = fp.PromptedViT(backbone.double(), fp.LinearProbeConfig()).eval()
    before = model(raw)
    backbone.spec = dataclasses.replace(backbone.spec, mean=(0.1, 0.2, 0.3))
    assert not torch.allclose(model(raw), before)
    torch.testing.assert_close(model(raw), model.reference_forward(raw), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_nothing_is_made_again_without_a_change(
    backbone: fp.FrozenViT, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fp.PromptedViT(backbone, DEEP).eval()
    first = model(tiny_images)
    monkeypatch.setattr(folding, "fold_backbone", lambda vit: pytest.fail("folded again"))
    monkeypatch.setattr(forward, "prompt_keys", lambda *_: pytest.fail("computed again"))
    assert torch.equal(model(tiny_images), first)
    model.train()
    model.eval()
    assert torch.equal(model(tiny_images), first)


def no_grad(model: fp.PromptedViT) -> Any:
    return torch.no_grad()


def in_training_mode(model: fp.PromptedViT) -> Any:
    model.train()
    return torch.no_grad()


@contextlib.contextmanager
def under_autocast(model: fp.PromptedViT) -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


@contextlib.contextmanager
def inference_under_autocast(model: fp.PromptedViT) -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


def in_float64(model: fp.PromptedViT) -> Any:
    model.double()
    return torch.no_grad()


def in_float32(model: fp.PromptedViT) -> Any:
    model.float()
    return torch.no_grad()


def with_another_readout(model: fp.PromptedViT) -> Any:
    model.readout = "patches"
    return torch.no_grad()


def unfrozen(model: fp.PromptedViT) -> Any:
    model.backbone.blocks[0].requires_grad_(True)
    return torch.no_grad()


MODES: dict[str, Callable[[fp.PromptedViT], Any]] = {
    "grad": lambda model: contextlib.nullcontext(),
    "no grad": no_grad,
    "inference": lambda model: torch.inference_mode(),
    "autocast": under_autocast,
    "inference and autocast": inference_under_autocast,
    "training": in_training_mode,
    "float64": in_float64,
    "float32": in_float32,
    "readout": with_another_readout,
    "unfrozen": unfrozen,
}


@pytest.mark.parametrize("config", [DEEP, fp.VPTConfig(num_prompts=3, project=5)], ids=["deep", "projected"])
def test_every_mode_after_every_other(backbone: fp.FrozenViT, tiny_images: Tensor, config: Any) -> None:
    """In each mode the answer is, to the bit, that of a copy which has kept nothing from any other; engines follow."""
    model = fp.PromptedViT(backbone, config, 3, readout="cls").eval()
    for name in itertools.chain(*itertools.combinations(MODES, 2)):  # each of any two before the other
        model.eval()
        model.readout = "cls"
        model.backbone.requires_grad_(False)
        with MODES[name](model):
            images = tiny_images[:1].to(model.backbone.dtype)
            with torch.inference_mode(False):
                fresh = copy.deepcopy(model)
            assert torch.equal(model(images), fresh(images)), name


@pytest.mark.parametrize("runs", ["engine", "graphs"])
def test_engines_and_graphs_answer_alike_in_every_mode(backbone: fp.FrozenViT, tiny_images: Tensor, runs: str) -> None:
    """Whatever mode was on when a function was made, or an input of it was."""
    for first, second in itertools.permutations(
        ["grad", "no grad", "inference", "autocast", "inference and autocast"], 2
    ):
        model = fp.PromptedViT(backbone, DEEP, 3, readout="cls").eval()
        images, answers = tiny_images[:1], []
        for name in (first, second, first):
            with MODES[name](model):
                if not answers:
                    run = (
                        fp.Engine(model, (1,), dtype=torch.float32, backend="eager")
                        if runs == "engine"
                        else graphed_of(model, (1,))[0]
                    )
                answers.append(run(images).clone())
        assert all(torch.equal(answer, answers[0]) for answer in answers), (first, second)
        with torch.no_grad():
            torch.testing.assert_close(answers[0], model.reference_forward(images), rtol=1e-4, atol=1e-5)
            model.generator.static.embeddings.data.mul_(-1)  # by `.data`, and in the mode that made the function
        with MODES[first](model):
            changed = run(images).clone()
        with torch.no_grad():
            torch.testing.assert_close(changed, model.reference_forward(images), rtol=1e-4, atol=1e-5)


def test_tensors_made_in_inference_mode_are_followed(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    with torch.inference_mode():
        model = fp.PromptedViT(fp.FrozenViT(tiny_vit).double(), DEEP).eval()
        images = tiny_images.double()
        for _ in range(3):
            torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)
            model.generator.static.embeddings.add_(1)
            model.backbone.blocks[0].qkv.weight.mul_(1.5)


@pytest.mark.parametrize("change", ["load", "copy"])
def test_tensors_of_inference_mode_are_not_folded(backbone: fp.FrozenViT, tiny_images: Tensor, change: str) -> None:
    """PyTorch tells of no write to them, not even of one to a single value."""
    model, images = fp.PromptedViT(backbone.double(), DEEP).eval(), tiny_images.double()
    with torch.inference_mode():
        model(images)
        if change == "copy":
            model = copy.deepcopy(model)
        else:
            state = {name: tensor + 0 for name, tensor in backbone.state_dict().items()}
            backbone.load_state_dict(state, assign=True)
        for value in (1, 2, 3):
            model.backbone.blocks[0].qkv.weight[5, 7] = 100 * value
            torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_memory_that_moves_under_a_tensor_is_not_read(backbone: fp.FrozenViT, tiny_images: Tensor) -> None:
    """`resize_` and `share_memory` give the same storages other memory, and free what they had."""
    model, images = fp.PromptedViT(backbone.double(), DEEP).eval(), tiny_images.double()
    model(images)
    weight = backbone.blocks[0].qkv.weight
    values, storage = 2 * weight, weight.untyped_storage()
    storage.resize_(0)
    storage.resize_(values.nbytes)
    weight.data.copy_(values)
    expected = model.reference_forward(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    model.share_memory()
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_transforms_keep_nothing(backbone: fp.FrozenViT, tiny_images: Tensor) -> None:
    """Prompts of several adapters at once, by `torch.func`."""
    model = fp.PromptedViT(backbone.double(), DEEP).eval()
    images = tiny_images[:2].double()
    prompts = torch.randn(3, *model.generator.static.embeddings.shape, dtype=torch.float64)
    name = "generator.static.embeddings"
    with torch.no_grad():
        model(images)
        together = torch.func.vmap(lambda p: torch.func.functional_call(model, {name: p}, (images,)))(prompts)
        for own, found in zip(prompts, together, strict=True):
            expected = torch.func.functional_call(model, {name: own}, (images,))
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
            model.generator.static.embeddings.copy_(own)
            torch.testing.assert_close(found, model.reference_forward(images), rtol=1e-8, atol=1e-8)


def test_a_replaced_tensor_is_freed(backbone: fp.FrozenViT, tiny_images: Tensor) -> None:
    model = fp.PromptedViT(backbone, DEEP).eval()
    engine = fp.Engine(model, dtype=torch.float32, backend="eager")
    with torch.no_grad():
        model(tiny_images)
        engine(tiny_images)
        gone = weakref.ref(model.generator.static.embeddings)
        model.generator.static.embeddings = nn.Parameter(torch.randn(3, 3, 48))
        gc.collect()
        assert gone() is None
        torch.testing.assert_close(engine(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)
