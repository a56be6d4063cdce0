"""A method of one file outside the package, wherever a method is used: nothing else knows it."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import table
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from starlette.requests import Request

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.cost import cost
from fastprompt.generators import get_method, load_plugin, registry
from fastprompt.serve.protocol import Limits, Work
from fastprompt.serve.routes import Routes
from fastprompt.serve.tenants import HostSettings, answers, load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_method.py"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module", autouse=True)
def unregistered() -> Iterator[None]:
    """What the tests register is forgotten behind them, since other tests list all methods."""
    methods, modules, paths = dict(registry._METHODS), set(sys.modules), list(sys.path)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(methods)
    sys.path[:] = paths
    for name in {"own_method"} - modules:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vit`, a tiny random backbone in timm's folder format, and `images`, dark and light ones."""
    root = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    (root / "vit").mkdir()
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES)
    save_file(module.state_dict(), root / "vit" / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (root / "vit" / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(low, low + 127, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run of the method by the command line, which is told where its module is."""
    sizes = ["--num-train", "12", "--num-val", "6", "--num-test", "6", "--epochs", "2"]
    command = ["--method", "pooled", "--num-prompts", "3", "--backbone", f"local-dir:{place / 'vit'}"]
    command += ["--data", str(place / "images"), "--out", str(place / "run"), "--dtype", "float32", "--no-progress"]
    assert main(["adapt", "--plugin", str(EXAMPLE), *command, *sizes, "--test"]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def backbone(place: Path) -> fp.FrozenViT:
    return fp.load_backbone(f"local-dir:{place / 'vit'}")


def test_the_method_is_less_than_fifty_lines() -> None:
    source = EXAMPLE.read_text()
    method = source[source.index("@dataclass") : source.index("def main")].strip()
    assert len(method.splitlines()) < 50


def test_its_file_alone_is_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {name: method for name, method in registry._METHODS.items() if name != "pooled"}
    monkeypatch.setattr(registry, "_METHODS", methods)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "2,050 trained parameters, accuracy 1.00" in capsys.readouterr().out


def test_adapt(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert (results["method"], results["title"]) == ("pooled", "Pooled prompts")
    assert results["config"] == {"kind": "pooled", "num_prompts": 3}
    assert results["recipe"]["lr"] == 5e-3
    assert results["recipe"]["label_smoothing"] == fp.default_recipe("pgn").label_smoothing
    assert results["trained_parameters"]["generator"] == 2 * 3 * (16 + 48)
    assert results["test"]["num_images"] == 6
    assert "library" not in results


def test_eval_in_a_process_of_its_own(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    words = ["eval", str(run), "--split", "test", "--out", str(out), "--plugin", "own_method"]
    command = [sys.executable, "-m", "fastprompt", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    ran = subprocess.run(command, cwd=EXAMPLE.parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((run / "results.json").read_text())
    assert json.loads(out.read_text())["predictions"] == results["test"]["predictions"]


def test_without_its_module_everybody_says_what_is_missing(
    run: Path,
    backbone: fp.FrozenViT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = {name: method for name, method in registry._METHODS.items() if name != "pooled"}
    monkeypatch.setattr(registry, "_METHODS", methods)
    with pytest.raises(ValueError, match=r"kind must be .* got 'pooled'; .* own_method had registered it"):
        fp.PromptedViT.from_pretrained(backbone, run / "best")
    for command in (
        ["eval", str(run)],
        ["info", str(run)],
        ["adapt", "--method", "pooled", "--data", "x", "--out", "y"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "'pooled'" in said
        assert "--plugin MODULE" in said
    bare = shutil.copytree(run / "best", tmp_path / "bare")
    with pytest.raises(ValueError, match=r"adapter 'mine': .*--plugin MODULE"):
        load(HostSettings(adapters={"mine": bare}, dtype="float32", threads=1))


def test_a_module_that_cannot_be_had_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken_method.py").write_text("import no_such_module\n")
    (tmp_path / "json.py").write_text("")
    for given, said in (
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (str(tmp_path / "nowhere.py"), "which does not exist"),
        (str(tmp_path / "broken_method.py"), "No module named 'no_such_module'"),
        (str(tmp_path / "json.py"), "has the same name as the module"),
    ):
        assert main(["info", "--plugin", given]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("fastprompt info: error: --plugin ")
        assert said in line


def test_the_table_takes_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[table.Plan] = []
    started: list[list[str]] = []
    monkeypatch.setattr(table, "run_all", lambda plan, *_: plans.append(plan) or [])
    where = ["--workers", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert table.main(["--plugin", str(EXAMPLE), "--methods", "pooled", *where]) == 0
    assert plans[0].grid("pooled") == (2e-3, 5e-3)
    assert "pooled" in table.default_rows()
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    table.start(table.Job("pooled", 2e-3, 0, False), plans[0], 1)
    assert started[0][-2:] == ["--plugin", str(EXAMPLE)]


def test_help_lists_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapt", "--plugin", str(EXAMPLE), "--help"])
    assert "pooled" in capsys.readouterr().out


def test_save_load_engine_and_mixed_batches(run: Path, backbone: fp.FrozenViT, tmp_path: Path) -> None:
    load_plugin(str(EXAMPLE))
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    mine = fp.PromptedViT.from_pretrained(backbone, run / "best")
    torch.manual_seed(1)
    others = {
        "vpt": fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3), 5).eval(),
        "vapt": fp.PromptedViT(backbone, fp.VAPTConfig(num_prompts=3), 4).eval(),
        "pgn": fp.PromptedViT(backbone, fp.PGNConfig(2, 8, widths=(4, 4, 4, 4)), 2).eval(),
    }
    mine.save_pretrained(tmp_path / "again")
    again = fp.PromptedViT.from_pretrained(backbone, tmp_path / "again")
    with torch.inference_mode():
        expected = {"mine": mine(images), **{name: model(images) for name, model in others.items()}}
        assert torch.equal(again(images), expected["mine"])
        torch.testing.assert_close(mine.reference_forward(images), expected["mine"], rtol=1e-4, atol=1e-5)
        alone = fp.Engine(mine, (1, 4), torch.float32, "eager")
        torch.testing.assert_close(alone(images), expected["mine"], rtol=1e-4, atol=1e-5)
        engine = fp.Engine(backbone, (6,), torch.float32, "eager")
        engine.add_adapter("mine", run / "best")
        for name, model in others.items():
            engine.add_adapter(name, model)
        names = ["vpt", "mine", "pgn", "mine", "vapt", "mine"]
        for i, (name, logits) in enumerate(zip(names, engine(images, adapter_names=names), strict=True)):
            torch.testing.assert_close(logits, expected[name][i], rtol=1e-4, atol=1e-5)


def test_cost_is_what_runs(run: Path, place: Path, backbone: fp.FrozenViT, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_cost", ROOT / "bench" / "cost.py")
    assert spec is not None
    assert spec.loader is not None
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    config = get_method("pooled").config({"num_prompts": 3})
    model = fp.PromptedViT(backbone, config, 2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model(images)
        measured = bench.count_flops(lambda: model(images)) / 2
    assert cost(backbone, config, dtype="float32", batch=2, num_classes=2).flops == pytest.approx(measured, rel=0.01)
    command = ["info", "--plugin", str(EXAMPLE), "--method", "pooled", "--num-prompts", "3", "--cost", "--json"]
    capsys.readouterr()
    assert main([*command, "--backbone", f"local-dir:{place / 'vit'}", "--num-classes", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)["cost"]["methods"]["Pooled prompts"]
    assert facts["rewritten"]["forward GFLOPs per image"] == pytest.approx(measured / 1e9, abs=1e-4)


def test_the_host_serves_it(run: Path, backbone: fp.FrozenViT) -> None:
    engine, catalogue = load(
        HostSettings(adapters={"mine": run / "best"}, dtype="float32", threads=1, plugins=[str(EXAMPLE)])
    )
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")

    async def compute(work: Work) -> list[np.ndarray]:
        [answer] = answers(engine, [work])
        assert isinstance(answer, list)
        return answer

    async def ask() -> httpx.Response:
        routes = Routes(catalogue, Limits(), (), compute)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (await routes(Request(scope, receive)))(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
            files = {"file": ("a.png", stream.getvalue(), "image/png")}
            return await client.post("/v1/classify", data={"model": "mine"}, files=files)

    answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    model = fp.PromptedViT.from_pretrained(backbone, run / "best")
    with torch.inference_mode():
        logits = model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    best = answer.json()["data"][0]
    assert model.class_names is not None
    assert model.class_names[int(logits.argmax())] in json.dumps(best)
