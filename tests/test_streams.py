"""What one stream writes under a host lock, another reads only after it."""

from __future__ import annotations

import threading

import pytest
import torch
from recorded_streams import RecordedStreams, elsewhere
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt import streams
from fastprompt.kept import Kept, SeenValues


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedStreams:
    found = RecordedStreams()
    monkeypatch.setitem(streams.STREAMS, "cpu", found)
    return found


def test_a_stream_waits_once_for_what_another_computed(recorded: RecordedStreams) -> None:
    kept, given, here = Kept[dict[int, tuple[Tensor, Tensor]]](), [torch.ones(3)], threading.get_ident()

    def get() -> None:
        kept.get(SeenValues, given, (), lambda: {0: (2 * given[0], 3 * given[0])})

    get()
    get()
    assert recorded.followed == []

    def twice() -> None:
        get()
        get()

    other = elsewhere(twice)
    assert recorded.followed == [(other, here, 2)]
    given[0] += 1
    third = elsewhere(get)  # computes it again: nobody waits but those who come after
    assert recorded.followed == [(other, here, 2)]
    get()
    assert recorded.followed[1:] == [(here, third, 2)]


def test_nobody_waits_inside_a_capture(recorded: RecordedStreams) -> None:
    written = streams.Written(torch.device("cpu"))
    recorded.capturing = True
    elsewhere(written.read)
    assert recorded.followed == []
    recorded.capturing = False
    assert recorded.followed == [(elsewhere(written.read), threading.get_ident(), 0)]


def test_kept_prefixes_and_folded_weights_are_handed_over(
    recorded: RecordedStreams, tiny_vit: VisionTransformer, tiny_images: Tensor
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=2), num_classes=3).eval()
    here = threading.get_ident()

    def run() -> None:
        with torch.no_grad():
            model(tiny_images)

    run()
    recorded.followed.clear()
    other = elsewhere(run)
    kept = {count for stream, mark, count in recorded.followed if (stream, mark) == (other, here)}
    assert len(recorded.followed) == 2
    assert len(kept) == 2
    assert all(count > 0 for count in kept)


def test_an_engine_writes_after_what_still_reads_and_is_read_after_it(
    recorded: RecordedStreams, tiny_vit: VisionTransformer, tiny_images: Tensor
) -> None:
    backbone, here = fp.FrozenViT(tiny_vit), threading.get_ident()
    with fp.Engine(backbone, (1,), torch.float32, "eager") as engine:
        engine.add_adapter("birds", fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), num_classes=3))
        recorded.followed.clear()
        reader = elsewhere(lambda: engine(tiny_images[:1], adapter_names=["birds"]))
        assert (reader, here, 0) in recorded.followed
        recorded.followed.clear()
        engine.add_adapter("birds", fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=4), num_classes=3))
        assert (here, reader, 0) in recorded.followed
