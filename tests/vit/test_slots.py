"""On a GPU no rows are concatenated: the graph that runs there, on a CPU, against the papers' graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_path
import pytest
import torch
from timm import layers as tl
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.engine import mixed
from fastprompt.generators import PromptConfig
from fastprompt.vit import forward
from fastprompt.vit.prompts import Apart
from fastprompt.vit.slots import LastRows, assembled, in_slots, sums

BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "pre-norm": {"pre_norm": True, "reg_tokens": 2},
    "all norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5},
    "post-norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "rms": {"norm_layer": tl.RmsNorm, "pre_norm": True, "class_token": False, "global_pool": "avg"},
    "pool prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "one block": {"depth": 1},
    "rotary": {"kind": Eva, "use_rot_pos_emb": True, "rope_type": "mixed", "qk_norm": True, "num_reg_tokens": 2},
    "rotary post-norm": {"kind": Eva, "use_rot_pos_emb": True, "use_post_norm": True, "global_pool": "token"},
    "relative bias": {"kind": Beit, "use_rel_pos_bias": True, "init_values": 0.5},
}
JOINING = ["pgn", "rgb-latent", "free", "vpt-shallow", "vapt", "v2apt"]
Take = Callable[..., gpu_path.NoConcatenation]


@pytest.fixture
def on_gpu_path(monkeypatch: pytest.MonkeyPatch) -> Take:
    """`on_gpu_path(model)`: take it from here on; to be entered around the calls."""

    def enter(model: fp.PromptedViT) -> gpu_path.NoConcatenation:
        block = model.backbone.blocks[0]
        mode = gpu_path.NoConcatenation(model.backbone.width, block.head_dim)
        gpu_path.take(monkeypatch, mode)
        return mode

    return enter


def model_of(
    make_vit: Callable[..., VisionTransformer], config: PromptConfig, backbone: str, readout: str | None, **options: Any
) -> fp.PromptedViT:
    vit = make_vit(**{"depth": 2, **BACKBONES[backbone]})
    model = fp.PromptedViT(fp.FrozenViT(vit).double(), config, readout=readout, **options)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def of_loss(out: Tensor, model: fp.PromptedViT) -> list[Tensor | None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True))


def compare(model: fp.PromptedViT, images: Tensor, mode: gpu_path.NoConcatenation) -> None:
    """Values and gradients of a training step and values at inference, beside the papers' graph."""
    draws = model.train().draw(len(images))
    with mode:
        ours = model(images, draws=draws)
    theirs = model.reference_forward(images, draws=draws)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for x, y in zip(of_loss(ours, model), of_loss(theirs, model), strict=True):
        if x is None or y is None:
            assert all(g is None or g.abs().max() == 0 for g in (x, y))
        else:
            assert (x - y).norm() <= 1e-10 * y.norm() + 1e-13
    model.eval()
    with torch.no_grad(), mode:
        ours = model(images)
    torch.testing.assert_close(ours, model.reference_forward(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", JOINING)
def test_equals_the_papers_graph_and_concatenates_nothing(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    on_gpu_path: Take,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    backbone: str,
) -> None:
    for readout in ("patches", "patches+prompts", "cls"):
        if readout == "cls" and backbone == "rms":
            continue
        with monkeypatch.context():
            model = model_of(make_vit, configs[method], backbone, readout)
            mode = on_gpu_path(model)
            compare(model, tiny_images[:2].double(), mode)
        fused = method.startswith("pgn") and (backbone != "one block" or "prompts" in readout)
        assert mode.whole == 2 * fused


@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1), (1, 2), (2,)])
def test_prompts_may_join_in_any_block(
    tiny_vit: VisionTransformer, tiny_images: Tensor, on_gpu_path: Take, layers: tuple[int, ...]
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit).double(), fp.VPTConfig(num_prompts=3), readout="patches+prompts")
    model.generator.layers = layers
    compare(model, tiny_images[:2].double(), on_gpu_path(model))


@pytest.mark.parametrize("method", ["pixel", "full", "linear"])
def test_methods_without_prompt_rows(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    on_gpu_path: Take,
    method: str,
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit(reg_tokens=2)).double(), configs[method], num_classes=3)
    compare(model, tiny_images[:2].double(), on_gpu_path(model))


@pytest.mark.parametrize("backbone", ["plain", "pre-norm"])
def test_pgn_on_a_backbone_that_trains_too(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    on_gpu_path: Take,
    backbone: str,
) -> None:
    model = model_of(make_vit, configs["pgn"], backbone, "cls", train_backbone=True)
    compare(model, tiny_images[:2].double(), on_gpu_path(model))


def test_raw_pixels_and_recomputed_blocks(
    make_vit: Callable[..., VisionTransformer], configs: dict[str, PromptConfig], on_gpu_path: Take
) -> None:
    model = model_of(make_vit, configs["pgn"], "pre-norm", "patches")
    model.set_grad_checkpointing()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    compare(model, raw, on_gpu_path(model))


@pytest.mark.parametrize("method", ["pgn", "free", "vpt-shallow"])
def test_the_first_block_needs_no_gradient_of_its_tokens(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    on_gpu_path: Take,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    model, rows = model_of(make_vit, configs[method], "plain", "patches").train(), []
    mode, block = on_gpu_path(model), forward.read_blocks(model.backbone, model.backbone.folded())[0]
    weight = block.qkv.weight

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names = ("mm", "addmm", "bmm", "matmul", "linear")
            if func.overloadpacket.__name__ in names and any(
                isinstance(x, Tensor) and x.shape == weight.shape and x.data_ptr() == weight.data_ptr() for x in args
            ):
                rows.append(max(x.numel() // x.shape[-1] for x in args if isinstance(x, Tensor) and x is not weight))
            return func(*args, **(kwargs or {}))

    with mode:
        out = model(tiny_images[:2].double())
    with Products():
        out.sum().backward()
    assert rows == [max(2 * 3, len(weight))] * len(rows)  # the prompts' rows of two images, or the weight itself
    assert all(p.grad is not None for p in model.generator.parameters())


def test_mixed_batches_keep_their_own_path(
    tiny_vit: VisionTransformer, configs: dict[str, PromptConfig], tiny_images: Tensor, on_gpu_path: Take
) -> None:
    backbone = fp.FrozenViT(tiny_vit).double()
    pgn, free = (fp.PromptedViT(backbone, configs[name], num_classes=3).eval() for name in ("pgn", "free"))
    images, models = tiny_images[:4].double(), [pgn, free, pgn, free]
    on_gpu_path(pgn)
    with torch.no_grad():
        for image, model, out in zip(images, models, mixed.outputs(images, models), strict=True):
            torch.testing.assert_close(out, model.reference_forward(image[None])[0], rtol=1e-10, atol=1e-10)


def test_one_graph_under_a_compiler(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "in_slots", lambda x: True)
    images = tiny_images[:2].double()
    for method in ("pgn", "vpt-shallow"):
        model = model_of(make_vit, configs[method], "pre-norm", "patches").train()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(
            of_loss(compiled(images), model), of_loss(model.reference_forward(images), model), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_on_a_cpu_the_graph_is_the_exporters(tiny_images: Tensor) -> None:
    assert not in_slots(tiny_images)
    assert in_slots(type("OnGPU", (), {"is_cuda": True})())


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize(("prefix", "position"), [(2, 2), (2, 0), (2, None), (0, 0), (0, None)])
def test_assembled_is_the_papers_order(prefix: int, position: int | None, room: int) -> None:
    """`position`: rows of the position embedding that are the prefix's."""
    patches = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    front = torch.randn(1, prefix, 4, dtype=torch.float64, requires_grad=True) if prefix else None
    pos = None if position is None else torch.randn(1, position + 5, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = assembled(Apart(patches, front, pos), room)
    ours = assembled(Apart(patches, front, pos), room)
    rows = [] if front is None else [(front if not position else front + pos[:, :position]).expand(3, -1, -1)]
    theirs = torch.cat([*rows, patches if pos is None else patches + pos[:, position:]], dim=1)
    assert ours.shape == (3, prefix + 5 + room, 4)
    for out in (ours, plain):
        torch.testing.assert_close(out[:, : prefix + 5], theirs, rtol=0, atol=0)
    weights = torch.randn_like(theirs)
    given = [x for x in (patches, front, pos) if x is not None]
    for x, y in zip(
        torch.autograd.grad((ours[:, : prefix + 5] * weights).sum(), given),
        torch.autograd.grad((theirs * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_sums_promote_and_take_only_the_gradients_asked_for() -> None:
    first, second = torch.randn(1, 2, 4, requires_grad=True), torch.randn(3, 5, 4, dtype=torch.float64)
    out = sums(first, None, second, second)
    assert out.dtype == torch.float64
    out.sum().backward()
    assert first.grad.dtype == torch.float32
    torch.testing.assert_close(first.grad, torch.full_like(first, 3))
    torch.testing.assert_close(out[:, 2:], 2 * second, rtol=0, atol=0)


def test_last_rows_pass_their_own_gradient_alone() -> None:
    rows, last = torch.randn(2, 5, 4), torch.randn(2, 2, 4, requires_grad=True)
    out, weights = LastRows.apply(rows, last), torch.randn(2, 5, 4)
    torch.testing.assert_close(out, rows, rtol=0, atol=0)
    (out * weights).sum().backward()
    torch.testing.assert_close(last.grad, weights[:, 3:], rtol=0, atol=0)


def test_with_the_kernels_themselves() -> None:
    """Triton's interpreter, which decides when a kernel is decorated, needs a process of its own."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests/support"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/support/interpreted_slots.py"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == ["library_prompts_assemble"] * 4 + ["library_prompts_into"]
