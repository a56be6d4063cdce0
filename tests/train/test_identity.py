from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision.transforms import v2

import fastprompt as fp
from fastprompt.train import batches
from fastprompt.train.identity import (
    data_identities,
    data_identity,
    differences,
    not_covered,
    require_same,
    run_identity,
    tensor_digest,
    weights_digest,
)
from fastprompt.train.recipes import Recipe

Pair = tuple[Tensor, Tensor]


class Pictures(Dataset[Any]):
    """Images under a transform."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Any] = lambda image: image) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), int(self.labels[index])


def one_pixel(images: Tensor, labels: Tensor) -> Pair:
    images = images.clone()
    images[-1, 2, 31, 31] ^= 1
    return images, labels


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "images": one_pixel,
    "labels": lambda x, y: (x, y.flip(0)),
    "num_images": lambda x, y: (torch.cat([x, x[:1]]), torch.cat([y, y[:1]])),
    "images of floats": lambda x, y: (x.float(), y),
    "images in another order": lambda x, y: (x.flip(0), y),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["pair", "dataset", "loader"])
def test_a_change_of_the_data_is_named(change: str, form: str, colours: Callable[..., Pair]) -> None:
    make: Callable[..., Any] = {
        "pair": lambda x, y: (x, y),
        "dataset": Pictures,
        "loader": lambda x, y: DataLoader(Pictures(x, y), 4),
    }[form]
    before = data_identity(make(*colours(8)), "train", 4)
    assert before == data_identity(make(*colours(8)), "train", 4)
    after = data_identity(make(*CHANGES[change](*colours(8))), "train", 4)
    assert list(differences({"train": after}, {"train": before})) == [f"train.{change.split()[0]}"]


def test_tensors_and_datasets_of_the_same_images_are_the_same_data(colours: Callable[..., Pair]) -> None:
    images, labels = colours(6)
    forms = [
        (images, labels),
        (images.numpy(), labels.numpy()),
        Pictures(images, labels),
        TensorDataset(images, labels),
    ]
    found = [data_identity(form, "train", 4) for form in forms]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["read"] == 6
    assert not_covered(found[0], "train") is None


def test_random_transforms_are_seen_and_global_generators_left_alone(colours: Callable[..., Pair]) -> None:
    data = colours(16)

    def noise(image: Tensor) -> Tensor:
        return image + torch.rand(()) + np.random.rand()

    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    found = [
        data_identities(Pictures(*data, transform), data, 4)["train"]
        for transform in (v2.RandomHorizontalFlip(), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), noise, noise)
    ]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len({identity["images"] for identity in found}) == 3


def test_images_that_differ_from_reading_to_reading_are_said_not_to_be_covered(colours: Callable[..., Pair]) -> None:
    images, labels = colours(6)
    generator = np.random.default_rng(0)
    found = data_identity(Pictures(images, labels, lambda image: image + generator.random()), "val", 4)
    assert found["images"] is None
    assert "val yields different images each time it is read" in str(not_covered(found, "val"))
    assert (
        "labels"
        in differences({"val": data_identity((images, labels.flip(0)), "val", 4)}, {"val": found})["val.labels"]
    )


def test_of_many_images_a_sample_is_read_and_the_rest_is_said(
    colours: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHECK_ALL_UP_TO", 8)
    monkeypatch.setattr(batches, "CHECKED_OF_MORE", 4)
    images, labels = colours(12)

    class Stating(Pictures):
        stated = "one"

        def identity(self) -> dict[str, Any]:
            return {"files": self.stated, "resize": "crop"}

    plain, stating = (data_identity(kind(images, labels), "train", 4) for kind in (Pictures, Stating))
    assert (plain["read"], plain["num_images"]) == (4, 12)
    assert "train has 12 images, of which only 4 are compared" in str(not_covered(plain, "train"))
    assert not_covered(stating, "train") is None
    Stating.stated = "two"
    after = data_identity(Stating(images, labels), "train", 4)
    assert list(differences({"train": after}, {"train": stating})) == ["train.stated.files"]
    assert data_identity(Stating(images[:8], labels[:8]), "train", 4)["stated"] == {"resize": "crop"}


def test_a_loader_is_its_batches_its_order_and_its_collate_function(colours: Callable[..., Pair]) -> None:
    data = Pictures(*colours(8))

    def collate(items: list[Any]) -> Pair:
        return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])

    loaders = {
        "loader": DataLoader(data, 4),
        "batch_size": DataLoader(data, 2),
        "drop_last": DataLoader(data, 4, drop_last=True),
        "sampler.kind": DataLoader(data, 4, shuffle=True),
        "collate": DataLoader(data, 4, collate_fn=collate),
    }
    found = {name: data_identity(loader, "train", 4) for name, loader in loaders.items()}
    for name in list(loaders)[1:]:
        assert f"train.loader.{name}" in differences({"train": found[name]}, {"train": found["loader"]})
    assert "train.loader" in differences({"train": found["loader"]}, {"train": data_identity(data, "train", 4)})
    assert found["collate"]["images"] is not None
    subsets = [data_identity(DataLoader(data, 4, sampler=SubsetRandomSampler(range(n))), "train", 4) for n in (5, 6)]
    assert "train.loader.sampler.indices" in differences({"train": subsets[0]}, {"train": subsets[1]})
    for subset in ([0, 1, 2], {0, 1, 2}):
        other = data_identity(DataLoader(data, 4, sampler=SubsetRandomSampler(subset)), "train", 4)  # type: ignore[arg-type]
        assert not_covered(other, "train") == (
            None
            if isinstance(subset, list)
            else "train is drawn by a SubsetRandomSampler, and its indices cannot be compared: a run may be resumed on "
            "different images"
        )
    lists = [data_identity(DataLoader(data, batch_sampler=each), "train", 4) for each in ([[0, 1], [2]], [[0], [2, 1]])]
    assert "train.loader.sampler.batches" in differences({"train": lists[0]}, {"train": lists[1]})
    inner = [SequentialSampler(data), RandomSampler(data)]
    batched = [data_identity(DataLoader(data, batch_sampler=BatchSampler(s, 2, False)), "train", 4) for s in inner]
    assert "train.loader.sampler.sampler.kind" in differences({"train": batched[0]}, {"train": batched[1]})
    assert data_identity(DataLoader(data, 4, sampler=SequentialSampler(data)), "train", 4) == found["loader"]


def test_what_only_a_collate_function_understands_is_seen_where_it_has_bytes() -> None:
    class Odd(Dataset[Any]):
        def __init__(self, value: Any) -> None:
            self.value = value

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return {"image": self.value, "label": index, "more": [1.5, "text", b"bytes", np.int64(3), None]}

    def identity(value: Any) -> dict[str, Any]:
        return data_identity(DataLoader(Odd(value), 2, collate_fn=len), "train", 4)

    black, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white"))
    assert identity(black) == identity(black.copy())
    assert identity(black)["images"] != identity(white)["images"]
    assert identity(np.zeros(3))["images"] != identity(np.ones(3))["images"]
    assert identity(object())["images"] is None
    assert not_covered(identity(object()), "train") is not None


@pytest.fixture
def identity_of(make_model: Callable[..., Any], colours: Callable[..., Pair]) -> Callable[..., dict[str, Any]]:
    """identity_of(model, recipe=, dtype=): the identity of a run, as JSON gives it back."""
    data = data_identities(colours(8), colours(4, seed=1), 4)

    def make(model: Any = None, recipe: Recipe = Recipe(), dtype: torch.dtype = torch.float32) -> dict[str, Any]:  # noqa: B008
        return json.loads(json.dumps(run_identity(make_model() if model is None else model, recipe, dtype, data)))

    return make


def test_what_changes_the_result_is_named(make_model: Callable[..., Any], identity_of: Callable[..., Any]) -> None:
    backbone = make_model().backbone

    def model(config: Any = fp.VPTConfig(num_prompts=2), on: Any = backbone, seed: int = 0, **options: Any) -> Any:  # noqa: B008
        torch.manual_seed(seed)
        return fp.PromptedViT(on, config, num_classes=4, **options)

    def other_backbone(**options: Any) -> Any:
        torch.manual_seed(0)
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
        return fp.FrozenViT(vit, **options)

    frozen = model()
    frozen.head.requires_grad_(False)
    before = identity_of(model())
    assert differences(identity_of(model()), before) == {}
    changes: dict[str, dict[str, Any]] = {
        "recipe.lr": identity_of(model(), Recipe(lr=0.5)),
        "recipe.deterministic": identity_of(model(), Recipe(deterministic=True)),
        "backbone_dtype": identity_of(model(), dtype=torch.bfloat16),
        "config.num_prompts": identity_of(model(fp.VPTConfig(num_prompts=3))),
        "class_names": identity_of(model(class_names=list("abcd"))),
        "readout": identity_of(model(readout="patches")),
        "initial_weights": identity_of(model(seed=1)),
        "trained": identity_of(frozen),
        "std": identity_of(model(on=other_backbone(std=(0.1, 0.1, 0.1)))),
        "mean": identity_of(model(on=other_backbone(mean=(0.1, 0.1, 0.1)))),
        "stored_dtype": identity_of(model(on=other_backbone().bfloat16())),
    }
    for name, after in changes.items():
        assert name in differences(after, before), name
    assert differences(identity_of(model(), Recipe(num_workers=3)), before) == {}
    rows = [torch.eye(4, 48), torch.eye(4, 48).flip(0)]
    texts = [identity_of(model(head="text", class_embeddings=each)) for each in rows]
    assert list(differences(*texts)) == ["head_tensors.head.class_embeddings"]
    scales = [identity_of(model(head="text", class_embeddings=torch.eye(4, 48), logit_scale=s)) for s in (1.0, 2.0)]
    assert list(differences(*scales)) == ["head.logit_scale"]
    prototypes = [identity_of(model(head="prototypes", prototypes=each)) for each in rows]
    assert list(differences(*prototypes)) == ["head_tensors.head.prototypes"]


def test_a_refusal_says_what_differs_and_what_to_do(
    identity_of: Callable[..., Any], make_model: Any, tmp_path: Any
) -> None:
    mine, theirs = identity_of(recipe=Recipe(lr=0.5)), identity_of(make_model(seed=1))
    with pytest.raises(
        ValueError, match=r"holds another run \(recipe\.lr is 0\.5, was 0\.001, initial_weights changed\)"
    ):
        require_same(mine, theirs, tmp_path)
    require_same(mine, theirs, tmp_path, except_for=["recipe.lr", "initial_weights"])
    with pytest.raises(
        ValueError, match=r"replace it with resume=False .--no-resume.\. .*seed before building the model"
    ):
        require_same(identity_of(), theirs, tmp_path)
    del theirs["train"], theirs["initial_weights"]  # as of a version that recorded neither
    require_same(identity_of(), theirs, tmp_path)


def test_digests_know_names_shapes_and_dtypes() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    others = [tensor.view(2, 3), tensor.view(torch.float32), tensor + 1, tensor.flip(0)]
    assert len({tensor_digest(each) for each in (tensor, *others)}) == 5
    assert tensor_digest(tensor.view(2, 3).t().contiguous()) == tensor_digest(tensor.view(2, 3).t())
    assert weights_digest({"a": tensor, "b": others[0]}) != weights_digest({"b": tensor, "a": others[0]})
    assert weights_digest({"a": tensor, "b": others[0]}) == weights_digest({"b": others[0], "a": tensor})
    assert tensor_digest(torch.zeros(3).bfloat16()) != tensor_digest(torch.zeros(3).half())
