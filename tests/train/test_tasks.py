from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, r2_score
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.domains import Domains
from fastprompt.train.fit import fit
from fastprompt.train.recipes import Recipe
from fastprompt.train.tasks import Score, Task, class_labels, kind_of_labels, make_task

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=4, batch_size=16, lr=2e-2, warmup_epochs=0, dtype="float32").replace()


def rows(labels: torch.Tensor) -> torch.Tensor:
    """Two labels per image of `colours`: which colour, and whether it is one of the first two."""
    return torch.cat([F.one_hot(labels, 4), (labels < 2)[:, None]], 1)


def test_what_labels_are_is_read_from_loss_and_data(colours: Callable[..., Any]) -> None:
    images, labels = colours(8)
    several = rows(labels)
    for data in ((images, several), TensorDataset(images, several), DataLoader(TensorDataset(images, several), 2)):
        assert kind_of_labels("bce", data) == "labels"
        assert kind_of_labels("cross_entropy", data) == "class"
        assert kind_of_labels("l1", data) == "values"
    assert kind_of_labels("bce", TensorDataset(images, labels)) == "class"


@pytest.mark.parametrize("weights", ["none", (1.0, 2.0, 0.5, 4.0)])
def test_the_mean_of_the_training_loss_is_pytorchs(weights: Any) -> None:
    task = make_task(Recipe(label_smoothing=0.1, class_weights=weights), "class", 4, None, CPU)
    outputs, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    weight = None if weights == "none" else torch.tensor(weights)
    expected = F.cross_entropy(outputs, labels, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(task.training_loss(outputs, labels) / task.divisor(labels), expected)
    torch.testing.assert_close(task.validation_loss(outputs, labels) / 6, F.cross_entropy(outputs, labels))


@pytest.mark.parametrize("weights", ["none", (1.0, 2.0, 0.5, 4.0, 1.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_head_for_each_domain_compares_its_own_classes(weights: Any, smoothing: float) -> None:
    heads = Domains(("a", "b"), ((0, 2, 4), (1, 3)), "per-domain")
    task = make_task(Recipe(label_smoothing=smoothing, class_weights=weights), "class", 5, None, CPU, heads)
    outputs, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 1])
    own, correct = [], 0
    for row, label in zip(outputs, labels.tolist(), strict=True):
        classes = next(list(each) for each in heads.classes if label in each)
        weight = None if weights == "none" else torch.tensor(weights)[classes]
        target = torch.tensor(classes.index(label))
        own.append(F.cross_entropy(row[classes], target, weight, label_smoothing=smoothing, reduction="sum"))
        correct += classes[int(row[classes].argmax())] == label
    loss = task.training_loss(outputs, labels)
    torch.testing.assert_close(loss, torch.stack(own).sum())
    assert int(task.num_correct(outputs, labels)) == correct
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 1] == outputs.grad[0, 3] == 0, "other domains' classes get no gradient"


@pytest.mark.parametrize(("options", "name"), [({"mixup": 0.2}, "mixup"), ({"loss": "bce"}, "loss")])
def test_a_head_for_each_domain_takes_unmixed_classes(options: dict[str, Any], name: str) -> None:
    heads = Domains(("a", "b"), ((0,), (1,)), "per-domain")
    with pytest.raises(ValueError, match=f"{name} must be .* with a head for each domain"):
        make_task(Recipe(**options), "class", 2, None, CPU, heads)


def test_binary_cross_entropy_takes_classes_and_rows() -> None:
    task, outputs, labels = Task("bce", "class", 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    expected = F.binary_cross_entropy_with_logits(outputs, F.one_hot(labels, 4).float())
    torch.testing.assert_close(task.training_loss(outputs, labels) / task.divisor(labels), expected)
    several = Task("bce", "labels", 4)
    torch.testing.assert_close(several.training_loss(outputs, F.one_hot(labels, 4)) / 6, expected)


@pytest.mark.parametrize(("loss", "expected"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_regression_losses(loss: str, expected: Callable[..., Any]) -> None:
    outputs, values = torch.randn(6, 3), torch.randn(6, 3)
    task = Task(loss, "values", 3)
    torch.testing.assert_close(task.training_loss(outputs, values) / task.divisor(values), expected(outputs, values))
    one = Task(loss, "values", 1)
    torch.testing.assert_close(
        one.training_loss(outputs[:, :1], values[:, 0]) / 6, expected(outputs[:, 0], values[:, 0])
    )


def test_balanced_weights_are_inverse_to_the_number_of_images() -> None:
    counts = torch.tensor([6, 2, 4])
    task = make_task(Recipe(class_weights="balanced"), "class", 3, counts, CPU)
    torch.testing.assert_close(task.class_weights, torch.tensor([12 / 18, 12 / 6, 12 / 12]))
    with pytest.raises(ValueError, match="class_weights must not be 'balanced' without training images of class 1"):
        make_task(Recipe(class_weights="balanced"), "class", 3, torch.tensor([6, 0, 4]), CPU)
    with pytest.raises(ValueError, match="class_weights must be 3 numbers, one per class, got 2"):
        make_task(Recipe(class_weights=(1.0, 2.0)), "class", 3, None, CPU)
    with pytest.raises(ValueError, match="mixup must be 0 with several labels per image"):
        make_task(Recipe(loss="bce", mixup=0.2), "labels", 3, None, CPU)


def test_scores_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    outputs, labels = generator.normal(size=(40, 3)), generator.integers(0, 2, (40, 3))
    labels[:, 2] = 0  # a class without positive labels does not count
    score = Score(Task("bce", "labels", 3), CPU)
    for part in (slice(0, 25), slice(25, 40)):
        score.add(torch.tensor(outputs[part]), torch.tensor(labels[part]))
    loss, value = score.result()
    each = [average_precision_score(labels[:, c], outputs[:, c]) for c in range(2)]
    assert value == pytest.approx(np.mean(each), rel=1e-6)
    expected = F.binary_cross_entropy_with_logits(torch.tensor(outputs), torch.tensor(labels).double())
    assert loss == pytest.approx(expected.item(), rel=1e-6)

    values = generator.normal(size=(40, 3))
    score = Score(Task("mse", "values", 3), CPU)
    score.add(torch.tensor(outputs), torch.tensor(values))
    assert score.result()[1] == pytest.approx(r2_score(values, outputs), rel=1e-6)


def test_labels_of_all_images(colours: Callable[..., Any]) -> None:
    images, labels = colours(8)

    class Stated(TensorDataset):
        targets = labels.tolist()

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an image was read")

    for data in ((images, labels), TensorDataset(images, labels), Stated(images, labels)):
        assert torch.equal(class_labels(data, 4), labels)
    with pytest.raises(ValueError, match="got a DataLoader"):
        class_labels(DataLoader(TensorDataset(images, labels), 2), 4)
    with pytest.raises(ValueError, match="train must have labels from 0 to 2"):
        class_labels((images, labels), 3)


def test_several_labels_per_image_are_learned(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    (images, labels), (val_images, val_labels) = colours(64), colours(40, seed=1)
    train, val = (images, rows(labels)), (val_images, rows(val_labels).float())
    result = fit(make_model(num_classes=5), train, val, RECIPE.replace(loss="bce"), progress=False)
    assert result.best_val_accuracy == max(record["val_map"] for record in result.history) > 0.9
    assert "train_accuracy" not in result.history[0]
    with pytest.raises(ValueError, match="compare_probe must not ask for a linear probe unless labels are classes"):
        fit(make_model(num_classes=5), train, val, RECIPE.replace(loss="bce"), compare_probe=True)
    for wrong, message in (
        ((images, rows(labels) * 2), "train must have zeros and ones as labels"),
        ((images, rows(labels)[:, :3]), r"train must have labels of shape \(N, 5\)"),
        (TensorDataset(images, rows(labels) * 2), r"train\[0\] must have zeros and ones"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make_model(num_classes=5), wrong, val, RECIPE.replace(loss="bce"), progress=False)


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_a_value_is_learned(loss: str, make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    (images, labels), (val_images, val_labels) = colours(64), colours(40, seed=1)
    train, val = (images, labels / 4.0), TensorDataset(val_images, val_labels[:, None] / 4.0)
    recipe = RECIPE.replace(loss=loss, epochs=12)
    result = fit(make_model(num_classes=1), train, val, recipe, progress=False)
    assert result.best_val_accuracy == max(record["val_r2"] for record in result.history) > 0.5
    with pytest.raises(TypeError, match="train must have floating-point values to predict"):
        fit(make_model(num_classes=1), (images, labels), val, recipe, progress=False)
