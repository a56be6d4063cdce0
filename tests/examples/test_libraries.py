"""The examples of other libraries and of many adapters: they learn, and what they save is the adapter alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_trainer_and_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    printed = printed_by("hf_trainer.py", capsys)
    assert "8 of 8 right, the checkpoint is the same adapter: True" in printed


def test_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    printed = printed_by("lightning_module.py", capsys)
    assert "3 tensors in the checkpoint, accuracy 1.00" in printed


def test_many_adapters_in_one_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert "24 of 24 right in one batch of 3 adapters" in printed_by("many_adapters.py", capsys)
