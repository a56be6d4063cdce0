from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.data.streamed import GROUPS_KEPT
from fastprompt.train.batches import Batches, check_data, local_order, split_indices


def labels_of(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches.epoch(epoch)]


@pytest.mark.parametrize("form", ["pair", "dataset"])
def test_an_epoch_is_a_permutation_that_can_be_repeated(form: str) -> None:
    data: Any = (torch.zeros(10, 3, 2, 2), torch.arange(10))
    if form == "dataset":
        data = TensorDataset(*data)
    batches = Batches(data, 4, name="train", num_classes=10, seed=3)
    first, second = labels_of(batches, 0), labels_of(batches, 1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    assert labels_of(batches, 0) == first
    assert labels_of(Batches(data, 4, name="train", num_classes=10, seed=4), 0) != first
    assert labels_of(Batches(data, 4, name="train", num_classes=10)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_pair_and_dataset_give_the_same_batches(colours: Callable[..., Any]) -> None:
    images, labels = colours(13)
    both = [
        list(Batches(data, 4, name="train", num_classes=4, seed=0, merge_single=True).epoch(2))
        for data in ((images, labels), TensorDataset(images, labels))
    ]
    for (x, y), (u, v) in zip(*both, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert [len(y) for _, y in both[0]] == [4, 4, 5]


def test_workers_load_the_same_batches(colours: Callable[..., Any]) -> None:
    data = TensorDataset(*colours(8))
    here, there = (labels_of(Batches(data, 4, name="train", num_classes=4, seed=0, num_workers=n)) for n in (0, 1))
    assert here == there


def test_a_last_single_image_is_merged_only_where_asked() -> None:
    assert split_indices(torch.arange(5), 2, merge_single=True) == [[0, 1], [2, 3, 4]]
    assert split_indices(torch.arange(5), 2, merge_single=False) == [[0, 1], [2, 3], [4]]
    assert split_indices(torch.arange(2), 1, merge_single=True) == [[0], [1]]
    assert split_indices(torch.arange(1), 4, merge_single=True) == [[0]]


def test_a_loader_keeps_its_batches_but_one_of_a_single_image(colours: Callable[..., Any]) -> None:
    loader: Any = DataLoader(TensorDataset(*colours(9)), 4)
    assert [len(b) for b in labels_of(Batches(loader, 1, name="train", num_classes=4))] == [4, 4, 1]
    assert [len(b) for b in labels_of(Batches(loader, 1, name="train", num_classes=4, merge_single=True))] == [4, 4]
    singles: Any = DataLoader(TensorDataset(*colours(3)), 1)
    assert [len(b) for b in labels_of(Batches(singles, 1, name="train", num_classes=4, merge_single=True))] == [1, 1, 1]


def test_a_loader_with_a_generator_of_its_own_repeats_epochs(colours: Callable[..., Any]) -> None:
    generator = torch.Generator()
    loader: Any = DataLoader(
        TensorDataset(torch.zeros(16, 3, 2, 2), torch.arange(16)), 16, shuffle=True, generator=generator
    )
    batches = Batches(loader, 1, name="train", num_classes=16, seed=0)
    first = labels_of(batches, 0)
    assert labels_of(batches, 1) != first
    assert labels_of(batches, 0) == first


def test_what_the_check_could_not_read_is_checked_in_its_batch() -> None:
    pixels = torch.zeros(4, 3, 2, 2)
    pixels[3, 0, 0, 0] = float("nan")
    data: Any = TensorDataset(pixels, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="a batch of train must have finite pixels"):
        list(Batches(data, 2, name="train", num_classes=2).epoch())
    with pytest.raises(ValueError, match=r"a batch of train must have labels .*, got 5"):
        list(Batches((pixels, torch.tensor([0, 1, 0, 5])), 2, name="train", num_classes=2).epoch())


def test_large_datasets_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastprompt.train.batches as module

    monkeypatch.setattr(module, "CHECK_ALL_UP_TO", 100)
    monkeypatch.setattr(module, "CHECKED_OF_MORE", 50)
    data: Any = TensorDataset(torch.zeros(200, 3, 1, 1), torch.arange(200) % 4)
    assert len(check_data(data, "train", 4)) == 50


def test_arrays_are_taken(colours: Callable[..., Any]) -> None:
    images, labels = colours(6)
    batches = list(Batches((images.numpy(), labels.numpy()), 4, name="train", num_classes=4).epoch())
    assert torch.equal(torch.cat([x for x, _ in batches]), images)


def test_a_loader_must_yield_images_and_labels(colours: Callable[..., Any]) -> None:
    data = TensorDataset(*colours(4))

    def to_dict(items: Any) -> Any:
        return {"image": items}

    with pytest.raises(TypeError, match=r"train must be a DataLoader that yields \(images, labels\)"):
        list(Batches(DataLoader(data, 2, collate_fn=to_dict), 1, name="train", num_classes=4).epoch())

    def lost_axis(items: Any) -> Any:
        return torch.stack([image for image, _ in items])[:, 0], torch.tensor([int(y) for _, y in items])

    with pytest.raises(ValueError, match="a batch of train must have images of shape"):
        list(Batches(DataLoader(data, 2, collate_fn=lost_axis), 1, name="train", num_classes=4).epoch())


def test_images_that_are_fetched_together_come_close_to_each_other() -> None:
    together = torch.arange(200) // 2  # 100 sets of two images
    order = local_order(together, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == [*range(200)]
    kept: list[int] = []
    fetched = 0
    for number in together[order].tolist():
        fetched += number not in kept
        kept = [*(each for each in kept if each != number), number][-GROUPS_KEPT:]
    assert fetched == 100
    assert order[:16].tolist() != sorted(order[:16].tolist())
