from __future__ import annotations

import threading

import pytest
import torch

from fastprompt.kernels import dispatch, stopwatch
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.stopwatch import Choices
from fastprompt.vit import linear


def winner(name: str, calls: list[str]) -> str:
    calls.append(name)
    return name


def test_choices_are_kept_under_the_text_of_their_signature_and_told_before_they_count() -> None:
    calls: list[str] = []
    told: list[dict[str, str]] = []
    choices = Choices(on_choice=lambda: told.append(dict(choices.made)))
    key = ("op", torch.float32, torch.Size([2, 3]), None)
    with stopwatch.kept(choices):
        for _ in range(3):
            assert stopwatch.decide(key, lambda: winner("fast", calls), "safe") == "fast"
    assert calls == ["fast"]
    assert told == [{str(key): "fast"}]
    with stopwatch.kept(Choices(dict(choices.made))):
        assert stopwatch.decide(key, lambda: winner("other", calls), "safe") == "fast"
        assert stopwatch.decide("another", lambda: winner("other", calls), "safe") == "other"
    assert stopwatch.decide(key, lambda: winner("outside", calls), "safe") == "outside"


def test_without_measurements_nothing_is_measured_or_kept() -> None:
    calls: list[str] = []
    choices = Choices({"known": "fast"}, measure=False)
    with stopwatch.kept(choices):
        assert stopwatch.decide("known", lambda: winner("other", calls), "safe") == "fast"
        assert stopwatch.decide("new", lambda: winner("other", calls), "safe") == "safe"
    assert calls == []
    assert choices.made == {"known": "fast"}


def test_choices_are_those_of_a_thread() -> None:
    found: list[str] = []
    with stopwatch.kept(Choices({"key": "mine"})):
        thread = threading.Thread(target=lambda: found.append(stopwatch.decide("key", lambda: "theirs", "safe")))
        thread.start()
        thread.join()
        assert stopwatch.decide("key", lambda: "theirs", "safe") == "mine"
    assert found == ["theirs"]


def test_float32_products_follow_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(300, 200), torch.randn(64, 200)
    plain, other = torch.nn.functional.linear(x, weight), torch.zeros(300, 64)
    monkeypatch.setattr(linear, "_product", lambda *_: other)
    for measured, kept in (("MKL", "oneDNN"), ("oneDNN", "MKL")):
        monkeypatch.setattr(linear, "faster_product", lambda measured=measured: measured)
        assert linear.onednn_is_faster() == (measured == "oneDNN")
        with stopwatch.kept(Choices({linear.PRODUCTS: kept})):
            assert torch.equal(linear.linear(x, weight, None), other if kept == "oneDNN" else plain)
        with stopwatch.kept(Choices(measure=False)):
            assert torch.equal(linear.linear(x, weight, None), plain)


def test_ops_follow_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch._native_obstacle("prefix_attention", "cpu", ""):
        pytest.skip("there is no native library")
    monkeypatch.setattr(dispatch, "measured", {})
    q = torch.randn(1, 2, 5, 16)
    times = iter([1e-6, 2e-6])  # the kernels', then the reference's
    monkeypatch.setattr(dispatch, "seconds_on_cpu", lambda _: next(times))
    choices = Choices()
    with stopwatch.kept(choices):
        prefix_attention(q, q, q)
    assert dispatch.choices["prefix_attention"].backend == "native"
    assert list(choices.made.values()) == ["native"]
    times = iter([2e-6, 1e-6])
    monkeypatch.setattr(dispatch, "measured", {})
    prefix_attention(q, q, q)
    assert dispatch.choices["prefix_attention"].backend == "reference"
    for made, backend in ((choices.made, "native"), ({}, "reference")):
        for known in (dispatch.measured, {}):  # whether this process has measured otherwise, or nothing
            monkeypatch.setattr(dispatch, "measured", known)
            with stopwatch.kept(Choices(dict(made), measure=False)):
                prefix_attention(q, q, q)
            assert dispatch.choices["prefix_attention"].backend == backend
