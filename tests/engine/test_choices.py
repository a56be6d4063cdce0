"""Choices by measurement, saved with an engine and taken up by another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastprompt as fp
from fastprompt.engine import engine as module
from fastprompt.engine.backends import Backend


@pytest.fixture
def model(backbone: fp.FrozenViT) -> fp.PromptedViT:
    return fp.PromptedViT(backbone, fp.VPTConfig(2), 3).eval()


def timed(monkeypatch: pytest.MonkeyPatch, fastest: str) -> list[str]:
    """Let the named backend win; the list grows by every function that is timed."""
    calls: list[str] = []

    def seconds(run: object, device: torch.device) -> float:
        calls.append(repr(run))
        return 1.0 if len(calls) % 2 == (fastest == "eager") else 2.0

    monkeypatch.setattr(module, "_seconds", seconds)
    return calls


def test_an_engine_runs_what_another_chose(
    model: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = torch.randn(1, 3, *model.backbone.image_size), tmp_path / "choices.json"
    second = "other"
    monkeypatch.setitem(module.BACKENDS, second, Backend(lambda model, images: lambda x: model(x)))
    for fastest in ("eager", second):
        calls = timed(monkeypatch, fastest)
        first = fp.Engine(model, (1,), torch.float32, backends=[second])
        expected = first(images)
        assert [known.chosen for known in first.measured.values()] == [fastest]
        assert calls
        first.save_choices(path)
        calls = timed(monkeypatch, "eager" if fastest == second else second)  # this process would choose the other
        again = fp.Engine(model, (1,), torch.float32, backends=[second], choices=path)
        assert torch.equal(again(images), expected)
        assert [known.chosen for known in again.measured.values()] == [fastest]
        assert calls == []


def test_ops_follow_the_file(model: fp.PromptedViT, tmp_path: Path) -> None:
    images, path = torch.randn(1, 3, *model.backbone.image_size), tmp_path / "choices.json"
    with fp.Engine(model, (1,), torch.float32, "eager") as engine:
        engine(images)
        engine.save_choices(path)
    content = json.loads(path.read_text())
    ops = {key: name for key, name in content["made"].items() if "prefix_attention" in key}
    if not ops:
        pytest.skip("there is no native library")
    for name in ("native", "reference"):
        content["made"].update(dict.fromkeys(ops, name))
        path.write_text(json.dumps(content))
        with fp.Engine(model, (1,), torch.float32, "eager", choices=path) as engine:
            engine(images)
            assert {fp.explain(engine).ops["prefix_attention"].backend} == {name}


@pytest.mark.parametrize("content", ["[]", '{"made": {}}', '{"format": "fastprompt choices 1", "made": {"a": 1}}'])
def test_another_file_is_refused(model: fp.PromptedViT, tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"choices must be a file that Engine\.save_choices wrote"):
        fp.Engine(model, choices=path)
    with pytest.raises(FileNotFoundError):
        fp.Engine(model, choices=tmp_path / "none.json")


def test_a_released_engine_saves_nothing(model: fp.PromptedViT, tmp_path: Path) -> None:
    engine = fp.Engine(model)
    engine.release()
    with pytest.raises(RuntimeError, match="released"):
        engine.save_choices(tmp_path / "choices.json")
