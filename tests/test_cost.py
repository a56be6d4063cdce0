"""The formulas against what runs, on a ViT of three blocks, width 192, 3 heads, 64 px."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastprompt as fp
from fastprompt.cost import GRAPHS, Sizes, cost
from fastprompt.generators import PromptConfig
from fastprompt.vit import compressed, recomputed

SMALL: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 64, "patch_size": 16, "depth": 3}
METHODS = [
    "pgn",
    "v2apt",
    "v2apt-per-layer",
    "vapt",
    "vpt-deep",
    "vpt-dropout",
    "vpt-shallow",
    "vqt",
    "cvpt",
    "free",
    "pixel",
    "linear",
]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "bench" / "cost.py"
    spec = importlib.util.spec_from_file_location("bench_cost", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(bench: ModuleType) -> fp.FrozenViT:
    return bench.random_backbone(**SMALL)


@pytest.fixture(scope="module")
def base(bench: ModuleType) -> fp.FrozenViT:
    return bench.random_backbone()


def compare(
    bench: ModuleType,
    backbone: fp.FrozenViT,
    config: PromptConfig,
    readout: str = "cls",
    batch: int = 2,
    dtype: str = "bfloat16",
    graphs: tuple[str, ...] = GRAPHS,
    activation_bits: int | None = None,
) -> None:
    """FLOPs within 1 %, bytes within 5 % and dispatches exact, for a forward and a training step of every graph."""
    model = fp.PromptedViT(backbone, config, num_classes=10, readout=readout)
    images = torch.randn(batch, 3, *model.backbone.image_size)
    for graph in graphs:
        measured = bench.measure(model, images, graph, activation_bits)
        for training, found in ((False, measured.inference), (True, measured.training)):
            formula = cost(
                model.backbone, config, readout, graph, training, dtype, batch, activation_bits=activation_bits
            )
            job = f"{graph}, {'training' if training else 'inference'}"
            assert formula.flops == pytest.approx(found.flops, rel=0.01), job
            assert formula.saved_bytes == pytest.approx(found.saved_bytes, rel=0.05), job
            assert formula.dispatches == found.dispatches, job


@pytest.mark.parametrize(
    ("method", "readout"),
    [
        (method, readout)
        for method in METHODS
        for readout in ("cls", "patches", "patches+prompts")
        if readout != "patches+prompts" or method not in ("pixel", "linear", "vqt", "cvpt")
    ]
    + [("vpt-deep", "prompts"), ("pgn", "prompts")],
)
def test_formula_is_what_runs(
    configs: dict[str, PromptConfig], bench: ModuleType, small: fp.FrozenViT, method: str, readout: str
) -> None:
    compare(bench, small, configs[method], readout)


@pytest.mark.parametrize(
    ("config", "readout", "sizes"),
    [
        (fp.VPTConfig(5), "cls", {"reg_tokens": 2, "init_values": 0.1}),
        (fp.V2APTConfig(5, 5), "cls", {"pre_norm": True, "act_layer": "quick_gelu"}),
        (fp.PGNConfig(3, 16, resolution=48, stem_pool=False, widths=(8, 16)), "cls", {"pre_norm": True}),
        (fp.VPTConfig(5, deep_layers=2), "cls", {}),
        (fp.VPTConfig(5, prompt_dropout=0.1, first_block=1), "cls", {}),
        (fp.VPTConfig(5, deep=False, first_block=2), "patches+prompts", {}),
        (fp.PGNConfig(3, 16, widths=(8,), first_block=1), "cls", {"pre_norm": True}),
        (fp.V2APTConfig(5, 3, share="per_layer", first_block=1), "patches", {}),
        (fp.VAPTConfig(5, first_block=1), "cls", {}),
        (fp.VQTConfig(3, first_block=1), "cls", {"pre_norm": True, "init_values": 0.1, "act_layer": "quick_gelu"}),
        (fp.VQTConfig(3, normalise=False), "patches", {"global_pool": "avg", "qkv_bias": False, "reg_tokens": 2}),
        (fp.CVPTConfig(3, first_block=1), "cls", {"pre_norm": True, "init_values": 0.1, "act_layer": "quick_gelu"}),
        (fp.CVPTConfig(3), "patches", {"global_pool": "avg", "qkv_bias": False, "reg_tokens": 2}),
        (fp.FreePromptsConfig(5), "patches+prompts", {"pre_norm": True, "act_layer": "quick_gelu"}),
        (fp.VAPTConfig(5, kernel=3, padding=1, prompt_dropout=0.1, static_layers=2), "patches", {"global_pool": "avg"}),
        (
            fp.VAPTConfig(5, channel_dropout=0.0, hidden_dropout=0.0, static_layers=0),
            "patches",
            {"class_token": False, "global_pool": "avg", "qkv_bias": False},
        ),
    ],
    ids=[
        "registers, LayerScale",
        "pre-norm, quick-GELU",
        "small trunk",
        "partial depth",
        "late VPT",
        "late shallow VPT",
        "late PGN",
        "late V2APT",
        "late VAPT",
        "late VQT",
        "VQT, pooled norm",
        "late CVPT",
        "CVPT, pooled norm",
        "free, pre-norm",
        "pooled norm",
        "no class token",
    ],
)
def test_formula_is_what_runs_on_other_backbones(
    bench: ModuleType, config: PromptConfig, readout: str, sizes: dict[str, Any]
) -> None:
    compare(bench, bench.random_backbone(**SMALL, **sizes), config, readout, batch=3)


ROTARY: dict[str, Any] = {**SMALL, "name": "vit_small_patch16_dinov3", "embed_dim": 192, "num_heads": 3}


@pytest.mark.parametrize(
    ("method", "readout"),
    [
        ("vpt-deep", "cls"),
        ("vpt-deep", "patches+prompts"),
        ("vapt", "cls"),
        ("pgn", "cls"),
        ("pgn", "patches"),
        ("cvpt", "cls"),
        ("vqt", "cls"),
    ],
)
def test_formula_is_what_runs_with_a_rotary_embedding(
    configs: dict[str, PromptConfig], bench: ModuleType, method: str, readout: str
) -> None:
    compare(bench, bench.random_backbone(**ROTARY), configs[method], readout)


@pytest.mark.parametrize(
    ("method", "readout"), [("vpt-deep", "cls"), ("vpt-deep", "patches+prompts"), ("pgn", "patches"), ("vqt", "cls")]
)
def test_formula_is_what_runs_with_a_rotary_embedding_in_float32(
    configs: dict[str, PromptConfig], bench: ModuleType, method: str, readout: str
) -> None:
    compare(bench, bench.random_backbone(**ROTARY).float(), configs[method], readout, dtype="float32")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "beit_base_patch16_224", "embed_dim": 192, "num_heads": 3}, "a relative position bias"),
        ({"name": "vit_small_patch16_rope_mixed_224", "embed_dim": 192, "num_heads": 3}, "frequencies of each block"),
    ],
)
def test_other_positions_have_no_formula(bench: ModuleType, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cost(bench.random_backbone(**{**SMALL, **options}), fp.VPTConfig(5))


@pytest.mark.parametrize("method", ["pgn", "v2apt", "vapt", "vpt-dropout", "vqt", "cvpt"])
def test_formula_is_what_runs_in_float32(configs: dict[str, PromptConfig], bench: ModuleType, method: str) -> None:
    compare(bench, bench.random_backbone(**SMALL).float(), configs[method], dtype="float32")


@pytest.mark.long
def test_formula_is_what_runs_where_attention_works_in_chunks(bench: ModuleType) -> None:
    backbone = bench.random_backbone(**{**SMALL, "img_size": 448, "depth": 1})
    compare(bench, backbone, fp.VPTConfig(5), "patches", graphs=("papers", "rewritten"))


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("readout", ["cls", "patches"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_and_bytes_hold_where_onednn_multiplies(
    configs: dict[str, PromptConfig], bench: ModuleType, readout: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 for oneDNN")
    for name in ("onednn_is_faster", "onednn_has_bfloat16"):
        monkeypatch.setattr(f"fastprompt.vit.linear.{name}", lambda: True)
    backbone = bench.random_backbone(**SMALL).to(getattr(torch, dtype))
    model = fp.PromptedViT(backbone, configs["vapt"], num_classes=10, readout=readout)
    measured = bench.measure(model, torch.randn(2, 3, 64, 64), "rewritten")
    for training, found in ((False, measured.inference), (True, measured.training)):
        formula = cost(model.backbone, configs["vapt"], readout, "rewritten", training, dtype, 2)
        assert formula.flops == pytest.approx(found.flops, rel=0.01)
        assert formula.saved_bytes == pytest.approx(found.saved_bytes, rel=0.05)
        assert found.dispatches == formula.dispatches  # which see PyTorch's Linear


@pytest.mark.long
def test_threads_change_the_parts_that_attention_works_through(bench: ModuleType) -> None:
    model = fp.PromptedViT(bench.random_backbone(**{**SMALL, "img_size": 448, "depth": 2}), fp.VPTConfig(5), 10)
    images = torch.randn(2, 3, 448, 448)
    model(images).sum().backward()
    costs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            measured = bench.measure(model, images, "rewritten").training.dispatches
        finally:
            torch.set_num_threads(1)
        costs.append(cost(model.backbone, fp.VPTConfig(5), training=True, batch=2, threads=threads).dispatches)
        assert costs[-1] == measured
    assert costs[0] > costs[1]


def test_flops_and_bytes_hold_for_one_image(
    configs: dict[str, PromptConfig], bench: ModuleType, small: fp.FrozenViT
) -> None:
    config = configs["vpt-deep"]
    model = fp.PromptedViT(small, config, num_classes=10)
    for graph in GRAPHS:
        measured = bench.measure(model, torch.randn(1, 3, 64, 64), graph).training
        formula = cost(model.backbone, config, "cls", graph, True)
        assert formula.flops == pytest.approx(measured.flops, rel=0.01)
        assert formula.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.05)


B16 = Sizes(768, 12, 12, 3072, 196, 1, 16, (224, 224), (14, 14))
MIB = 2**20


GOALS = {
    ("VPT-deep", "rewritten"): (fp.VPTConfig(50), 34),
    ("V2APT", "rewritten"): (fp.V2APTConfig(50, 25), 37),
    ("VAPT", "rewritten"): (fp.VAPTConfig(50), 37),
    ("VPT-deep", "recompute"): (fp.VPTConfig(50), 4.5),
    ("V2APT", "recompute"): (fp.V2APTConfig(50, 25), 4.5),
    ("VAPT", "recompute"): (fp.VAPTConfig(50), 4.5),
}
"""MiB that a training step of ViT-B/16 may save for an image, by method and graph."""


@pytest.mark.parametrize(("method", "graph"), GOALS)
def test_training_memory_of_vit_b16_by_formula(method: str, graph: str) -> None:
    config, limit = GOALS[method, graph]
    assert cost(B16, config, "cls", graph, training=True).saved_bytes <= limit * MIB


@pytest.mark.parametrize(("method", "graph"), [("VAPT", "rewritten"), ("VPT-deep", "recompute")])
def test_training_memory_of_vit_b16(bench: ModuleType, base: fp.FrozenViT, method: str, graph: str) -> None:
    """As measured, at batch 1, where nothing is shared by images; `make cost` measures the other methods."""
    config, limit = GOALS[method, graph]
    model = fp.PromptedViT(base, config, num_classes=10)
    model.set_grad_checkpointing(graph == "recompute")
    model.train()
    images = torch.randn(1, 3, 224, 224)
    model(images)
    gc.collect()
    saved = bench.count_saved(lambda: model(images))
    formula = cost(model.backbone, config, "cls", graph, training=True).saved_bytes
    assert formula == cost(B16, config, "cls", graph, training=True).saved_bytes
    assert saved <= limit * MIB
    assert formula == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(("bits", "config"), [(8, fp.VPTConfig(5, first_block=1)), (2, fp.CVPTConfig(3))])
@pytest.mark.parametrize("size", [2**20, 4000])
def test_activations_in_few_bits(
    bench: ModuleType,
    small: fp.FrozenViT,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    config: PromptConfig,
    size: int,
) -> None:
    """Rounded at once, and a few rows at a time."""
    monkeypatch.setattr(compressed, "CHUNK", size)
    compare(bench, small, config, graphs=("rewritten", "recompute"), activation_bits=bits)


@pytest.mark.parametrize("config", [fp.VPTConfig(5, first_block=1), fp.CVPTConfig(3), fp.PixelPromptConfig(4)])
@pytest.mark.parametrize("size", [2**22, 4000])
def test_no_activations_kept(
    bench: ModuleType, small: fp.FrozenViT, monkeypatch: pytest.MonkeyPatch, config: PromptConfig, size: int
) -> None:
    """All rows at once, and a few at a time."""
    monkeypatch.setattr(recomputed, "CHUNK", {"cpu": size})
    compare(bench, small, config, graphs=("rewritten", "recompute"), activation_bits=0)
    compare(bench, small, config, graphs=("recompute",))


@pytest.mark.parametrize(("bits", "goal"), [(8, 0.80), (2, 0.65), (0, 0.57)])
def test_what_activations_in_few_bits_save_of_vit_b16(bits: int, goal: float) -> None:
    plain, fewer = (
        cost(B16, fp.VPTConfig(50), training=True, batch=32, activation_bits=kept).saved_bytes for kept in (None, bits)
    )
    assert fewer <= goal * plain


def test_the_rewritten_graph_costs_less() -> None:
    for config in (fp.VPTConfig(50), fp.V2APTConfig(50, 25), fp.VAPTConfig(50), fp.PGNConfig(50)):
        papers, rewritten, recompute = (cost(B16, config, "cls", graph, True, batch=4) for graph in GRAPHS)
        assert rewritten.flops < papers.flops
        assert rewritten.flops < recompute.flops
        assert recompute.saved_bytes < rewritten.saved_bytes < papers.saved_bytes
    assert cost(B16, fp.VPTConfig(50), graph="papers").flops == pytest.approx(44.44e9, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"readout": "map"}, "readout"),
        ({"graph": "plain"}, "graph"),
        ({"dtype": "float64"}, "dtype"),
        ({"batch": 0}, "batch"),
        ({"activation_bits": 4}, "activation_bits must be 8, 2"),
        ({"activation_bits": 8, "graph": "papers"}, "activation_bits"),
        ({"activation_bits": 8, "backbone": dataclasses.replace(B16, activation="relu")}, "relu"),
        ({"activation_bits": 8, "config": fp.VQTConfig()}, "activation_bits"),
        ({"backbone": dataclasses.replace(B16, has_cls=False)}, "class token"),
        ({"backbone": dataclasses.replace(B16, depth=1)}, "one block"),
        ({"config": fp.FullFineTuneConfig()}, "FullFineTuneConfig"),
        ({"config": fp.VPTConfig(project=8)}, "project"),
        ({"config": fp.PGNConfig(trunk="resnet18")}, "resnet18"),
        ({"config": fp.VAPTConfig(conv=False)}, "VAPTConfig.conv"),
        ({"config": fp.LinearProbeConfig(), "readout": "prompts"}, "needs prompt tokens"),
        ({"config": fp.V2APTConfig(inference_samples=3)}, "inference_samples"),
        ({"config": fp.CVPTConfig(100)}, "100 prompts of role 'cross'"),
        ({"config": fp.VQTConfig(), "readout": "prompts"}, "needs prompt tokens"),
    ],
)
def test_what_has_no_formula_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cost(**{"backbone": B16, "config": fp.VPTConfig(), **arguments})


def test_the_measurement_sees_a_tensor_that_is_kept(bench: ModuleType) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    assert bench.count_saved(lambda: x + 1) == 4 * 64 * 64
    assert bench.count_saved(lambda: (x + 1).exp() + 1) == 2 * 4 * 64 * 64  # exp keeps its output
    assert bench.count_dispatches(lambda: (x.t() @ x).view(-1).add_(1)) == ["aten.mm.default", "aten.add_.Tensor"]
    assert bench.count_flops(lambda: x @ x) == 2 * 64**3


def test_grouped_convolutions_count_as_often_as_they_multiply(bench: ModuleType) -> None:
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    forward = 2 * 2 * 8 * 16 * 9
    assert bench.count_flops(lambda: torch.nn.functional.conv2d(x, weight, groups=8)) == forward
    assert bench.count_flops(lambda: torch.nn.functional.conv2d(x, weight, groups=8).sum().backward()) == 3 * forward


def test_the_documentation_has_the_numbers_of_the_table(repository: Path) -> None:
    table = (repository / "results" / "cost.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and " / " in line]
    assert len(rows) == 3 * (2 * 7 + 2)
    for row in rows:
        for cell in row[3:]:
            formula, rest = cell.split(" / ")
            measured = rest.split(" ")[0]
            assert float(formula.replace(",", "")) == pytest.approx(float(measured.replace(",", "")), rel=0.01)
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    found = {tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if " GF | " in line}
    wanted = {row[0].strip("| ") for row in rows if row[1] == "50"}
    assert found
    assert {row[0] for row in found} <= wanted
    for name, graph, *cells in found:
        row = next(r for r in rows if r[0].strip("| ") == name and r[1] == "50" and r[2] == graph)
        measured_cells = [cell.split(" / ")[1].split(" ")[0] for cell in row[3:]]
        assert [cell.removesuffix(" GF").removesuffix(" MiB") for cell in cells] == measured_cells


@pytest.mark.parametrize("method", ["pgn", "v2apt", "vapt", "vpt-deep"])
def test_on_a_gpu_a_step_dispatches_less_than_the_papers(
    bench: ModuleType, small: fp.FrozenViT, configs: dict[str, PromptConfig], method: str
) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    model = fp.PromptedViT(small, configs[method], num_classes=10, readout="cls")
    found = bench.on_a_gpu(model, torch.randn(2, 3, 64, 64))
    ours, papers = found.training
    assert ours < papers
    calls = bench.count_dispatches(lambda: model(torch.randn(2, 3, 64, 64)).sum().backward())
    assert ours < len(calls)  # on a CPU, the same graph without kernels
