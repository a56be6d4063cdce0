"""`get_prompted_model`: what transformers' Trainer and pipeline, accelerate and Lightning do with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.adapters import CONFIG_FILE, WEIGHTS_FILE, Preprocessing

hf = pytest.importorskip("transformers", minversion="5.23")
accelerate = pytest.importorskip("accelerate")

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def vit(randomised: Callable[..., nn.Module]) -> nn.Module:
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = hf.ViTConfig(**SIZES, intermediate_size=80, **labels)
    return randomised(hf.ViTForImageClassification(config)).eval()


@pytest.fixture
def model(vit: nn.Module) -> Any:
    torch.manual_seed(0)
    return fp.get_prompted_model(vit, fp.VPTConfig(num_prompts=2))


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Twelve images whose brightness is their class."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": noise + i % 3, "labels": i % 3}


def trainer(model: nn.Module, out: Path, **options: Any) -> Any:
    arguments = hf.TrainingArguments(
        str(out),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="epoch",
        eval_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return hf.Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())


def test_it_computes_what_the_prompted_model_computes(model: Any, vit: nn.Module, tiny_images: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    output = model.eval()(pixel_values=tiny_images, labels=labels)
    torch.manual_seed(0)
    own = fp.PromptedViT(fp.FrozenViT(vit), fp.VPTConfig(num_prompts=2), num_classes=3).eval()
    assert torch.equal(output.logits, own(tiny_images))
    assert torch.equal(output.loss, F.cross_entropy(own(tiny_images), labels))
    assert model(tiny_images).loss is None
    loss, logits = model(tiny_images, labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_classes_are_those_of_the_classifier(model: Any, vit: nn.Module) -> None:
    assert model.prompted.class_names == NAMES
    assert model.config.id2label == dict(enumerate(NAMES))
    assert fp.get_prompted_model(vit, fp.VPTConfig(), num_classes=5).prompted.class_names is None
    unnamed = hf.ViTForImageClassification(hf.ViTConfig(**SIZES, num_labels=4))
    found = fp.get_prompted_model(unnamed, fp.VPTConfig())
    assert (found.prompted.num_classes, found.prompted.class_names) == (4, None)
    assert found.config.id2label[3] == "LABEL_3"


def test_the_loss_of_v2apt_has_its_kl(vit: nn.Module, tiny_images: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    losses = []
    for beta in (0.0, 0.5):
        config = fp.V2APTConfig(num_prompts=2, num_instance=1, latent=3, hidden=5, beta=beta)
        torch.manual_seed(0)
        model = fp.get_prompted_model(vit, config).eval()
        losses.append(model(tiny_images, labels).loss)
        _, aux = model.prompted(tiny_images, return_aux=True)
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * aux["kl"].mean())


def test_trainer_trains_saves_the_adapter_alone_and_resumes(model: Any, vit: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.prompted.backbone.state_dict().items()}
    run = trainer(model, tmp_path, num_train_epochs=2, activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"^every_n_layers must be 1"):
        model.gradient_checkpointing_enable(every_n_layers=2)
    untrained = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < untrained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.prompted.backbone.state_dict().items())
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == model.prompted.adapter_state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())
    backbone = fp.FrozenViT(vit)
    loaded = fp.PromptedViT.from_pretrained(backbone, tmp_path / "checkpoint-6")
    assert loaded.class_names == NAMES
    resumed = trainer(fp.get_prompted_model(vit, fp.VPTConfig(num_prompts=2)), tmp_path, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name])


def test_trainer_takes_the_best_model_at_the_end(model: Any, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, num_train_epochs=2, load_best_model_at_end=True, metric_for_best_model="best")
    run.compute_metrics = lambda of: {"best": -run.state.epoch}  # the first epoch
    run.train()
    first = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())


def test_a_pipeline_classifies(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.fromarray(torch.randint(0, 256, (40, 70, 3), dtype=torch.uint8).numpy())
    with caplog.at_level(logging.WARNING, logger="transformers"):
        pipeline = hf.pipeline("image-classification", model=model, image_processor=model.image_processor())
        found = pipeline(picture)
    assert caplog.records == []
    pixels = model.image_processor()(picture, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, 32, 32)
    expected = model(pixels).logits.softmax(-1)[0].tolist()
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(dict(zip(NAMES, expected, strict=True)))


def test_the_image_processor_resizes_and_normalises_as_in_training(model: Any) -> None:
    """Within the rounding of libraries: cropped or squashed, then normalised by the backbone's mean and std."""
    columns = torch.arange(64, dtype=torch.uint8)[None, :, None].expand(32, 64, 3)
    picture = Image.fromarray(columns.contiguous().numpy())
    for resize, first, last in (("crop", 16, 47), ("squash", 0, 63)):
        model.prompted.preprocessing = Preprocessing(resize)
        [pixels] = model.image_processor()(picture, return_tensors="pt")["pixel_values"]
        levels = (pixels * 0.5 + 0.5) * 255  # mean and std of ViT's weights
        assert levels[0, 0, 0] == pytest.approx(first, abs=2)
        assert levels[0, 0, -1] == pytest.approx(last, abs=2)


def test_accelerate_saves_and_loads_the_adapter_alone(model: Any, vit: nn.Module, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.prompted.adapter_state_dict().keys()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for _, parameter in model.prompted.trainable_parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in prepared.state_dict().items())


def test_a_module_around_it_has_the_adapter_alone(model: Any, vit: nn.Module, tiny_images: Tensor) -> None:
    """As Lightning has it: the state dict of a module that holds the model, loaded strictly."""
    outer = nn.ModuleDict({"model": model, "metric": nn.Linear(1, 1)})
    state = outer.state_dict()
    assert {name for name in state if name.startswith("model.")} == {
        f"model.{name}" for name in model.prompted.adapter_state_dict()
    }
    other = nn.ModuleDict({"model": fp.get_prompted_model(vit, fp.VPTConfig(num_prompts=2)), "metric": nn.Linear(1, 1)})
    other.load_state_dict(state)
    assert torch.equal(other["model"].eval()(tiny_images).logits, model.eval()(tiny_images).logits)
    del state["model.head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*head\.weight"):
        other.load_state_dict(state)


def test_what_trains_its_backbone_saves_it(vit: nn.Module, tmp_path: Path) -> None:
    model = fp.get_prompted_model(vit, fp.FullFineTuneConfig())
    assert "backbone.blocks.0.qkv.weight" in model.state_dict()
    state = model.state_dict()
    model.load_state_dict(state)
    del state["backbone.blocks.0.qkv.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_it_is_saved_and_loaded(model: Any, vit: nn.Module, tmp_path: Path, tiny_images: Tensor) -> None:
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    model.save_pretrained(tmp_path)
    files = {CONFIG_FILE, WEIGHTS_FILE, "model.safetensors", "config.json", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    loaded = type(model).from_pretrained(fp.FrozenViT(vit), tmp_path)
    assert torch.equal(loaded.eval()(tiny_images).logits, model.eval()(tiny_images).logits)
    assert loaded.config.id2label == model.config.id2label


def test_an_adapter_of_a_folder_stands_alone(vit: Any, tmp_path: Path, tiny_images: Tensor) -> None:
    """A model of transformers says where it came from, as PEFT's `base_model_name_or_path` does."""
    vit.save_pretrained(tmp_path / "vit")
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    for source in (loaded, str(tmp_path / "vit")):
        model = fp.get_prompted_model(source, fp.VAPTConfig(num_prompts=2, hidden=4)).eval()
        assert model.prompted.class_names == NAMES
        model.save_pretrained(tmp_path / "adapter")
        again = type(model).from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(tiny_images).logits, model(tiny_images).logits)
    with torch.no_grad():
        loaded.vit.embeddings.cls_token.add_(1)  # no longer what the folder holds
    fp.get_prompted_model(loaded, fp.VPTConfig()).save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="was trained on another backbone"):
        type(model).from_pretrained(tmp_path / "changed")


def test_models_of_other_libraries(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    for source in (tiny_vit, fp.FrozenViT(tiny_vit)):
        model = fp.get_prompted_model(source, fp.PGNConfig(num_prompts=2, library_size=4, widths=(4,)), num_classes=2)
        assert model(tiny_images).logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "^model must be a model, its name or its folder, got int"),
        ({"config": {"kind": "vpt"}}, TypeError, "^config must be a method's configuration, got dict"),
        ({"num_classes": None}, ValueError, "^num_classes must be given"),
        ({"num_classes": 0}, ValueError, "^num_classes must be a positive integer"),
    ],
)
def test_wrong_arguments_are_named(
    tiny_vit: VisionTransformer, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"model": tiny_vit, "config": fp.VPTConfig(), "num_classes": 2, **change}
    with pytest.raises(error, match=message):
        fp.get_prompted_model(**arguments)


def test_a_model_without_head_is_refused(model: Any, tiny_vit: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"^prompted must have a head"):
        type(model).of(fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig()))
