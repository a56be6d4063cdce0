"""The load test's own check: an answer for another picture or of another tenant is not taken for right."""

from __future__ import annotations

import re
from pathlib import Path

import load_serve
import numpy as np
import pytest

import fastprompt as fp
from fastprompt.serve.protocol import BASE
from fastprompt.serve.tenants import HostSettings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_tells_answers_apart(place: Path, tmp_path: Path, dtype: str) -> None:
    name, shown = f"local-dir:{place / 'vit'}", load_serve.pictures(32)[:8]
    adapters = load_serve.make_adapters(tmp_path, fp.load_backbone(name), shown)
    settings = HostSettings(name, adapters=adapters, dtype=dtype, threads=1)
    check = load_serve.Check(settings, shown)
    outputs = {BASE: list(check.features)}
    for own, i in check.places:
        outputs.setdefault(own, []).append(check.likely[check.place(own, i)])
    for own in check.names:
        for i in range(len(shown)):
            assert check.is_right(own, i, check.entry(own, outputs[own][i]))
            for other, answers in outputs.items():
                for j, output in enumerate(answers):
                    if (own == BASE) == (other == BASE) and (own, i) != (other, j):
                        assert not check.is_right(own, i, check.entry(own, output))
            for share, right in ((0.5, True), (2.0, False)):
                noise, entry = share * check.tolerance[own], check.entry(own, outputs[own][i])
                if own == BASE:
                    entry = check.entry(own, outputs[own][i] * np.float32(1 + noise))
                else:
                    entry["probabilities"][0]["probability"] *= np.exp(noise)
                assert check.is_right(own, i, entry) == right
    wrong = check.entry("vpt-10", outputs["vpt-10"][0])
    wrong["probabilities"][0]["class"] = "vpt-50/0"
    assert not check.is_right("vpt-10", 0, wrong)
    with pytest.raises(RuntimeError, match=re.escape("0 apart, too close to tell answers apart")):
        load_serve.Check(settings, [shown[0], *shown[:3]])
