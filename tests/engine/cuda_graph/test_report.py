"""`bench/gpu_graphs.py` runs on a device alone; here its control flow does, by the double."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from recorded_graphs import (
    RecordedGraph,
    RecordingCapturer,
)
from timm.models.vision_transformer import VisionTransformer

import fastprompt as fp
from fastprompt.generators import PromptConfig


@pytest.fixture(scope="module")
def bench(configs: dict[str, PromptConfig]) -> ModuleType:
    path = Path(__file__).resolve().parents[3] / "bench" / "gpu_graphs.py"
    spec = importlib.util.spec_from_file_location("gpu_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.METHODS = {name: configs[name] for name in module.METHODS}
    module.ROUNDS, module.CALLS, module.ADAPTERS = 2, 1, 3
    return module


def test_has_parity_and_times_of_every_method_and_batch(
    bench: ModuleType, tiny_vit: VisionTransformer, capturable_on_cpu: None
) -> None:
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
    bench: ModuleType, tiny_vit: VisionTransformer, capturable_on_cpu: None
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
