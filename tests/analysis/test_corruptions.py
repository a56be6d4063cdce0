from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.analysis.corruptions import CORRUPTIONS

pytest.importorskip("imagecorruptions")
FAST = ("gaussian_noise", "contrast")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(60, 200, (6, 3, 32, 32), dtype=torch.uint8)


def test_the_corruptions_are_those_of_the_package() -> None:
    import imagecorruptions

    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names()


def test_noise_is_an_images_own_and_the_same_every_time(images: Tensor) -> None:
    state = np.random.get_state()[1].tolist()
    same = images[:1].expand(3, -1, -1, -1)
    found = fp.analysis.corrupt(same, "gaussian_noise", 3)
    assert np.random.get_state()[1].tolist() == state
    assert not torch.equal(found[0], found[1])
    np.random.seed(9)
    assert torch.equal(fp.analysis.corrupt(same, "gaussian_noise", 3), found)
    assert not torch.equal(fp.analysis.corrupt(same, "gaussian_noise", 3, seed=1), found)


def test_severities_grow(images: Tensor) -> None:
    def change(severity: int) -> float:
        return float((fp.analysis.corrupt(images, "contrast", severity).float() - images).abs().mean())

    changes = [change(severity) for severity in (1, 3, 5)]
    assert changes == sorted(changes)
    assert changes[0] > 1


def test_models_are_compared_on_the_same_images(tiny_vit: Any, images: Tensor) -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    data = TensorDataset(images, labels)
    backbone = fp.FrozenViT(tiny_vit)
    models = {
        name: fp.PromptedViT(backbone, config, num_classes=2).eval()
        for name, config in (("probe", fp.LinearProbeConfig()), ("vpt", fp.VPTConfig(num_prompts=2)))
    }
    found = fp.analysis.robustness(models, data, corruptions=FAST, severities=(2, 4), max_images=5)
    for name, model in models.items():
        result = found[name]
        assert set(result.corrupted) == {(c, s) for c in FAST for s in (2, 4)}
        expected = fp.evaluate(model, (fp.analysis.corrupt(images[:5], "contrast", 4), labels[:5]))
        assert result.corrupted["contrast", 4] == (expected.accuracy, expected.ece)
        assert result.accuracy == pytest.approx(np.mean([a for a, _ in result.corrupted.values()]))
        assert result.accuracy == pytest.approx(result.correct.mean())
        assert result.clean[0] == fp.evaluate(model, (images[:5], labels[:5])).accuracy
    difference = fp.analysis.robustness_difference(found["vpt"], found["probe"])
    assert difference.mean == pytest.approx(found["vpt"].accuracy - found["probe"].accuracy)
    assert difference.interval[0] <= difference.mean <= difference.interval[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruptions": ("rain",)}, "corruption must be one of"),
        ({"severities": (6,)}, "severity must be from 1 to 5"),
        ({"severities": ()}, "severities must be different"),
        ({"corruptions": "fog"}, "corruptions must be different"),
        ({"max_images": 0}, "max_images must be a positive integer"),
        ({"max_images": 1}, "data must have at least two images"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, tiny_vit: Any, images: Tensor) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.LinearProbeConfig(), num_classes=2)
    with pytest.raises(ValueError, match=message):
        fp.analysis.robustness({"a": model}, TensorDataset(images, torch.zeros(6, dtype=torch.long)), **arguments)
    with pytest.raises(TypeError, match="models must be name"):
        fp.analysis.robustness({}, [])
    with pytest.raises(TypeError, match="images must be raw pixels"):
        fp.analysis.corrupt(images.float(), "fog", 1)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        fp.analysis.corrupt(images[..., :16], "fog", 1)
