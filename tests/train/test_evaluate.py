from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import fastprompt as fp
from fastprompt.train.evaluate import (
    backbone_precision,
    evaluate,
    evaluate_classes,
    summarise,
    summarise_labels,
    summarise_values,
)

V2APT = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16)


def test_numbers_from_known_logits() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]])
    labels = torch.tensor([0, 0, 1, 1])
    evaluation = summarise(probabilities.log(), labels, seconds=1.0)
    assert evaluation.accuracy == 0.75
    assert evaluation.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert evaluation.per_class[:2].tolist() == [0.5, 1.0]
    assert math.isnan(evaluation.per_class[2])
    assert evaluation.mean_per_class == 0.75
    assert evaluation.loss == pytest.approx(-sum(map(math.log, (0.7, 0.4, 0.8, 0.6))) / 4)
    assert torch.allclose(evaluation.probabilities, probabilities)
    assert evaluation.predictions.tolist() == [0, 1, 1, 1]
    assert evaluation.correct.tolist() == [True, False, True, True]
    # one image to a bin: |1 - 0.7|, |0 - 0.5|, |1 - 0.8|, |1 - 0.6|
    assert evaluation.ece == pytest.approx((0.3 + 0.5 + 0.2 + 0.4) / 4, abs=1e-6)


def test_calibration_error_is_zero_when_confidence_is_accuracy() -> None:
    probabilities = torch.tensor([[0.75, 0.25]]).repeat(8, 1)
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1])
    assert summarise(probabilities.log(), labels, 1.0).ece == pytest.approx(0, abs=1e-7)
    assert summarise(probabilities.log(), torch.ones(8, dtype=torch.long), 1.0).ece == pytest.approx(0.75)


def test_f1_and_top_5() -> None:
    ranks = torch.arange(8.0).repeat(4, 1)  # class 7 is the most probable, 3 the fifth
    evaluation = summarise(ranks, torch.tensor([7, 3, 2, 7]), 1.0)
    assert evaluation.top5_accuracy == 0.75
    assert evaluation.macro_f1 == pytest.approx((2 * 2 / (2 * 2 + 2) + 0 + 0) / 3)
    assert evaluation.mean_per_class == pytest.approx(1 / 3)
    alone = summarise(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), 1.0)
    assert (alone.accuracy, alone.top5_accuracy, alone.macro_f1, alone.ece) == (1, 1, 1, 0)
    assert alone.confusion.tolist() == [[3]]
    assert alone.probabilities.shape == (3, 1)


@pytest.mark.parametrize("form", ["pair", "dataset", "loader"])
def test_evaluates_in_order_and_in_eval_mode(
    form: str, make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    images, labels = colours(9)
    model = make_model(V2APT).train()
    forms: dict[str, Any] = {"pair": (images, labels), "dataset": TensorDataset(images, labels)}
    forms["loader"] = DataLoader(forms["dataset"], 2)
    before = torch.get_rng_state()
    evaluation = evaluate(model, forms[form], batch_size=4)
    assert form == "loader" or torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generator.training
    assert not model.backbone.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(images).softmax(-1)
    assert torch.allclose(evaluation.probabilities, expected, atol=1e-6)
    assert torch.equal(evaluation.labels, labels)
    assert evaluation.confusion.sum() == 9


def test_latent_samples_are_averaged(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    model = make_model(V2APT)
    with torch.no_grad():
        for decoder in model.generator.decoders:
            decoder.fc2.weight.normal_()
    data = colours(8)
    mean = evaluate(model, data).probabilities
    one, many = (evaluate(model, data, num_samples=k).probabilities for k in (1, 16))
    assert not torch.allclose(mean, one, atol=1e-4)
    assert not torch.allclose(one, many, atol=1e-4)
    assert torch.allclose(many.sum(-1), torch.ones(8), atol=1e-5)
    assert model.generator.config.inference_samples == 0
    again = evaluate(model, data, batch_size=3, num_samples=16).probabilities
    assert torch.allclose(again, many, atol=1e-5)


def test_wrong_arguments(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    images, labels = colours(8)
    model = make_model()
    with pytest.raises(ValueError, match="dataset must not be empty"):
        evaluate(model, (images[:0], labels[:0]))
    with pytest.raises(ValueError, match=r"labels from 0 to .*, got 4"):
        evaluate(model, (images, labels + 1))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, (images, labels), batch_size=0)
    with pytest.raises(TypeError, match="batch_size"):
        evaluate(model, (images, labels), batch_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes"):
        evaluate(make_model(num_classes=None), (images, labels))
    with pytest.raises(ValueError, match="num_samples"):
        evaluate(model, (images, labels), num_samples=4)
    with pytest.raises(ValueError, match="num_samples"):
        evaluate(make_model(V2APT), (images, labels), num_samples=0)


def test_precision_is_lent_and_given_back_exactly(make_model: Callable[..., Any]) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}

    def interrupted() -> None:
        with backbone_precision(model, torch.bfloat16):
            assert model.backbone.dtype == torch.bfloat16
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        interrupted()
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.set_backbone_dtype(torch.bfloat16)
    with backbone_precision(model, torch.float32):
        assert model.backbone.dtype == torch.float32
    assert model.backbone.dtype == torch.bfloat16


def test_precision_of_a_training_backbone_keeps_what_was_trained(make_model: Callable[..., Any]) -> None:
    model = make_model(fp.FullFineTuneConfig())
    with backbone_precision(model, torch.bfloat16), torch.no_grad():
        assert model.backbone.cls_token.dtype == torch.float32
        model.backbone.cls_token.fill_(3.0)
    assert (model.backbone.cls_token == 3).all()


class Named(TensorDataset):
    """Images whose labels have names."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.classes = classes


NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def named(make_model: Callable[..., Any], colours: Callable[..., Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model of `NAMES` that is right about every image, images (16), and which of the names each is."""
    images, labels = colours(16)
    model = fp.PromptedViT(make_model().backbone, fp.LinearProbeConfig(), 4, class_names=NAMES)
    fp.fit_linear_probe(model, (images, labels), (images, labels))
    assert evaluate(model, (images, labels)).accuracy == 1
    return model, images, labels


@pytest.mark.parametrize("form", ["dataset", "loader", "subset", "argument"])
def test_classes_are_matched_by_name(form: str, named: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    model, images, labels = named
    some = labels >= 2
    of_folder, names = labels[some] - 2, ["cat", "dog"]  # numbers of a folder with these two alone
    data: Any = Named(images[some], of_folder, names)
    options: dict[str, Any] = {}
    if form == "loader":
        data = DataLoader(data, 3)
    if form == "subset":
        data = Subset(Named(images, torch.where(some, labels - 2, 2), [*names, "emu"]), some.nonzero()[:, 0].tolist())
    if form == "argument":
        data, options = (images[some], of_folder), {"class_names": names}
    with pytest.warns(UserWarning, match="lacks ant, bee of the model's 4"):
        found = evaluate(model, data, **options)
    assert found.accuracy == 1
    assert torch.equal(found.labels, labels[some])
    assert found.confusion.diagonal().tolist() == [0, 0, 4, 4]
    if form != "subset":
        assert evaluate(model, data, class_names=NAMES).accuracy == 0  # by number, asked for


def test_the_order_of_names_is_the_datas_own(
    named: tuple[Any, torch.Tensor, torch.Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    model, images, labels = named
    order = torch.tensor([2, 0, 3, 1])
    data = Named(images, order.argsort()[labels], [NAMES[i] for i in order])
    found = evaluate(model, data)
    assert found.accuracy == 1
    assert torch.equal(found.labels, labels)
    model.class_names = None
    assert evaluate(model, data).accuracy < 1  # without names label i is class i
    assert not recwarn.list


def test_images_of_a_class_that_the_model_has_not_are_refused(named: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    model, images, labels = named
    message = "must have images of the model's classes only, got images of emu"
    data = Named(images, labels, ["ant", "bee", "cat", "emu"])
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="lacks dog"):
        evaluate(model, data)
    data.targets = labels  # as torchvision's have it: nothing has to be read to know
    with pytest.raises(ValueError, match=message):
        evaluate(model, data)
    with pytest.raises(ValueError, match="got images of e, f, g, h"):
        evaluate(model, Named(images, labels, list("efgh")))
    with pytest.raises(ValueError, match="dataset has several named 'ant'"):
        evaluate(model, Named(images, labels, ["ant", "ant", "cat", "dog"]))
    kept = labels < 3
    with pytest.warns(UserWarning, match="lacks dog"):  # a class without images does no harm
        assert evaluate(model, Named(images[kept], labels[kept], ["ant", "bee", "cat", "emu"])).accuracy == 1


def test_logits_that_are_not_finite_are_an_error(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    model, (images, labels) = make_model(), colours(6)
    images = images.float() / 64 - 2
    images[4] = 3e38 * images[4].sign()
    with pytest.raises(ValueError, match=r"images must give finite outputs, got .* for image 1, whose values reach 3e"):
        evaluate(model, (images, labels), batch_size=3)
    with torch.no_grad():
        model.head.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"model must have finite parameters, got .* in head\.bias"):
        evaluate(model, colours(6))


def test_several_labels_are_scored_by_average_precision_and_thresholds() -> None:
    logits = torch.tensor([[3.0, -1.0, 0.0], [1.0, 2.0, 0.0], [-1.0, 0.5, 0.0], [0.5, -2.0, 0.0]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]])
    found = summarise_labels(logits, labels, 1.0)
    # ranked 1 0 1 1: (1 + 2/3 + 3/4) / 3; ranked 1 1 0 0: 1; the third label never occurs
    assert found.per_label[:2].tolist() == pytest.approx([(1 + 2 / 3 + 3 / 4) / 3, 1.0])
    assert math.isnan(found.per_label[2])
    assert found.map == pytest.approx(float(found.per_label[:2].mean()))
    p = logits.double().sigmoid()
    assert found.loss == pytest.approx(float(-(labels * p.log() + (1 - labels) * (1 - p).log()).mean()))
    assert found.predictions().tolist() == (p >= 0.5).tolist()
    assert found.f1(0.5)[:2].tolist() == pytest.approx([4 / 6, 1.0])
    best = found.best_thresholds()
    for c in range(2):  # no other threshold is better
        tried = [float(found.f1(float(value))[c]) for value in found.probabilities[:, c]]
        assert float(found.f1(best)[c]) == max(tried)
    assert best[2] == 1
    tied = summarise_labels(torch.zeros(4, 1), torch.tensor([[1], [0], [0], [1]]), 1.0)
    assert float(tied.f1(tied.best_thresholds())) == pytest.approx(2 * 2 / (4 + 2))


def test_values_are_scored_by_their_errors() -> None:
    outputs, targets = (
        torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 8.0]]),
        torch.tensor([[1.0, 4.0], [3.0, 6.0], [5.0, 8.0]]),
    )
    found = summarise_values(outputs, targets, 1.0)
    assert found.per_value.tolist() == pytest.approx([1 - 2 / 8, 1 - 2 / 8])
    assert (found.r2, found.mae) == pytest.approx((0.75, 4 / 6))
    assert found.rmse == pytest.approx(math.sqrt(4 / 6))
    assert summarise_values(outputs[:, :1], targets[:, 0], 1.0).r2 == pytest.approx(0.75)


@pytest.mark.parametrize(("loss", "kind"), [("bce", "labels"), ("mse", "values")])
def test_a_fitted_model_knows_what_it_predicts(
    loss: str, kind: str, make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    images, classes = colours(24)
    rows = torch.stack([classes == 0, classes > 1, classes == 3], dim=1).float()
    model = make_model(num_classes=3)
    result = fp.fit(
        model,
        (images, rows),
        (images, rows),
        epochs=1,
        loss=loss,
        label_smoothing=0.0,
        dtype="float32",
        out_dir=tmp_path,
        progress=False,
    )
    assert model.predicts == kind
    saved = fp.PromptedViT.from_pretrained(model.backbone, tmp_path / "best")
    assert saved.predicts == kind
    found = evaluate(saved, (images, rows))
    score = found.map if kind == "labels" else found.r2
    assert score == pytest.approx(result.best_val_accuracy, rel=1e-4)
    with pytest.raises(TypeError, match=rf"must have {kind} of shape \(N, 3\)"):
        evaluate(saved, (images, classes))
    with pytest.raises(ValueError, match=f"model must predict classes, got one that predicts {kind}"):
        evaluate_classes(saved, (images, rows))
    saved.predicts = "class"
    assert evaluate(saved, (images, classes % 3)).probabilities.shape == (24, 3)
