"""The loop learns, adds the KL term, and its adapter loads."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastprompt as fp

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"


def test_it_learns_and_its_adapter_loads(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "accuracy 1.00, the same after loading: True" in printed


@pytest.mark.parametrize(("config", "has_kl"), [(fp.V2APTConfig(beta=1e3), True), (fp.VPTConfig(), False)])
def test_the_loss_has_the_kl_term_where_there_is_one(config: fp.PromptConfig, has_kl: bool) -> None:
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64)
    model = fp.PromptedViT(backbone, config, num_classes=2)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    losses = example["train"](model, DataLoader(TensorDataset(*example["pictures"](8)), batch_size=8), epochs=1)
    assert (losses[0] > 10) == has_kl
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
