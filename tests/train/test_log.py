from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprompt.train.log import choices_line, environment, epoch_line, start_line, whole_log

START, ONE, TWO, END = (
    {"event": "start"},
    {"event": "epoch", "epoch": 1},
    {"event": "epoch", "epoch": 2},
    {"event": "end"},
)
RESUME, DIVERGED = {"event": "resume", "epoch": 1}, {"event": "diverged", "epoch": 2}


@pytest.mark.parametrize(
    ("in_state", "in_file", "expected"),
    [
        ([START, ONE], [START, ONE], [START, ONE]),
        ([START, ONE, END], [START, ONE], [START, ONE, END]),  # killed between the two
        ([START, ONE], [START, ONE, RESUME, DIVERGED, RESUME], [START, ONE, RESUME, DIVERGED, RESUME]),
        ([START, ONE, RESUME, TWO], [START, ONE, RESUME], [START, ONE, RESUME, TWO]),
        ([START, ONE], [], [START, ONE]),
        ([START, ONE], [START, TWO, RESUME], [START, ONE]),  # another run's
        ([START, ONE], [START, ONE, TWO], [START, ONE]),  # no state ever said so
        ([START, ONE], [START, ONE, END], [START, ONE]),
        ([START, ONE], [START, ONE, "text"], [START, ONE]),
        ([START, ONE], [START, ONE, RESUME, TWO], [START, ONE]),
    ],
)
def test_no_row_is_lost_and_none_made_up(in_state: Any, in_file: Any, expected: Any) -> None:
    assert whole_log(in_state, in_file) == expected


def test_the_start_is_said_in_a_line() -> None:
    event = {
        "config": {"kind": "vpt"},
        "device": "cuda:1",
        "backbone_dtype": "bfloat16",
        "num_train": 1200,
        "num_val": 40,
        "trained_parameters": 92160,
    }
    assert start_line(event, 10, 75) == (
        "training vpt on cuda:1 in bfloat16: 1,200 training and 40 validation images, 92,160 trained parameters, "
        "10 epochs of 75 steps"
    )


def test_an_epoch_is_said_in_a_line() -> None:
    event = {"epoch": 3, "train_loss": 0.51234, "train_accuracy": 0.8, "lr": 0.00123, "val_loss": 0.4, "seconds": 4.0}
    event |= {"val_accuracy": 0.9, "images_per_second": 123.4}
    assert epoch_line(event, 10, "accuracy", best=True) == (
        "epoch 3/10: loss 0.5123, accuracy 0.800; validation loss 0.4000, accuracy 0.900 (best); lr 0.00123, "
        "123.4 images/s, 4.0 s"
    )
    del event["train_accuracy"]
    event["val_map"] = 0.75
    line = epoch_line(event, 10, "map", best=False)
    assert line.startswith("epoch 3/10: loss 0.5123; validation loss 0.4000, map 0.750; lr")


def test_choices_are_said_by_op() -> None:
    assert choices_line({}) is None
    choices = {
        "('prefix_attention', device(type='cpu'), torch.Size([1]))": "native",
        "('prefix_attention', device(type='cpu'), torch.Size([2]))": "reference",
        "float32 products": "oneDNN",
    }
    assert choices_line(choices) == (
        "chosen by timing and kept for this run: float32 products by oneDNN, prefix_attention by native and reference"
    )


def test_the_environment_has_what_changes_last_bits() -> None:
    found = environment(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert {"cpu", "native"} <= set(found)
    assert environment(torch.device("meta")) == {"torch": torch.__version__, "device": "meta"}
