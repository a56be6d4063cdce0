"""Adapters on the Hub, against a stand-in for its HTTP API: round trips, damage, refusals, no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from documented import prepare
from hub_stub import Hub, in_its_place, running
from PIL import Image
from safetensors.torch import save
from scipy.stats import binomtest
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from fastprompt.cli import main
from fastprompt.data.images import open_image, to_tensor
from fastprompt.fetch import FetchError
from fastprompt.hub import CARD_FILE, is_repository, model_card
from fastprompt.intervals import wilson
from fastprompt.runs.directory import adapter_dir
from fastprompt.serve.tenants import HostSettings, load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with in_its_place(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def backbone(make_vit: Callable[..., VisionTransformer]) -> fp.FrozenViT:
    return fp.FrozenViT(make_vit())


@pytest.fixture
def model(backbone: fp.FrozenViT) -> fp.PromptedViT:
    torch.manual_seed(0)
    names = ["ant", "bee"]
    return fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), num_classes=2, class_names=names).eval()


def upload(hub: Hub, model: fp.PromptedViT, repository: str, folder: Path) -> None:
    """Put an adapter into a repository without the code under test."""
    model.save_pretrained(folder)
    hub.repositories[repository] = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def metadata_of(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(text))


def test_what_is_pushed_is_loaded_again(
    hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tiny_images: Tensor
) -> None:
    address = model.push_to_hub("ann/birds", token="hf_secret", license="mit", commit_message="First")
    assert address == f"{hub.address}/ann/birds/commit/{hub.commit('ann/birds')}"
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert set(hub.repositories["ann/birds"]) == {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}
    loaded = fp.PromptedViT.from_pretrained(backbone, "ann/birds")
    assert torch.equal(loaded(tiny_images), model(tiny_images))
    assert loaded.class_names == ["ant", "bee"]
    card = hub.repositories["ann/birds"][CARD_FILE].decode()
    assert metadata_of(card)["license"] == "mit"
    assert backbone.fingerprint in card
    assert 'from_pretrained(backbone, "ann/birds")' in card


def test_an_adapter_stands_alone_with_its_backbone_on_the_hub(hub: Hub, tiny_images: Tensor) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = VisionTransformer(num_classes=0, **sizes)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(vit.state_dict(), {"format": "pt"})}
    hub.repositories["ann/vit"] = files
    backbone = fp.FrozenViT.from_timm("hf-hub:ann/vit", pretrained=True)
    model = fp.PromptedViT(backbone, fp.FreePromptsConfig(num_prompts=2), num_classes=3).eval()
    model.push_to_hub("ann/free", token="t")
    loaded = fp.PromptedViT.from_pretrained("ann/free")
    assert loaded.backbone is not backbone
    assert torch.equal(loaded(tiny_images), model(tiny_images))
    card = hub.repositories["ann/free"][CARD_FILE].decode()
    assert metadata_of(card)["base_model"] == "ann/vit"
    assert 'from_pretrained("ann/free")' in card


@pytest.fixture
def whole(hub: Hub, model: fp.PromptedViT) -> fp.PromptedViT:
    """A model of two classes whose adapter is ann/birds and whose backbone is ann/vit."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    weights = save(VisionTransformer(num_classes=0, **sizes).state_dict(), {"format": "pt"})
    hub.repositories["ann/vit"] = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    backbone = fp.FrozenViT.from_timm("hf-hub:ann/vit", pretrained=True)
    model = fp.PromptedViT(backbone, model.config, num_classes=2, class_names=["owl", "robin"]).eval()
    model.push_to_hub("ann/birds", token="t")
    return model


def test_commands_take_a_repository(
    hub: Hub, whole: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "ann/birds", "owl.png", "--dtype", "float32", "--out", "owl.json"]) == 0
    found = json.loads(Path("owl.json").read_text())
    pixels = to_tensor(open_image(Path("owl.png")), (32, 32))
    expected = whole(pixels[None])[0].softmax(-1).tolist()
    assert list(found["images"][0]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    assert main(["eval", "ann/birds", "--data", "birds", "--out", "eval.json"]) == 0
    assert json.loads(Path("eval.json").read_text())["adapter"] == "ann/birds"
    assert main(["export", "ann/birds", "--format", "pt2", "--out", "birds.pt2"]) == 0
    assert main(["info", "ann/birds", "--json"]) == 0
    engine, catalogue = load(HostSettings(adapters={"birds": Path("ann/birds")}, dtype="float32", backend="eager"))
    engine.release()
    assert catalogue.adapters["birds"] == ["owl", "robin"]


def test_a_folder_comes_before_a_repository(
    hub: Hub, whole: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole.save_pretrained("ann/birds")
    (tmp_path / "run.json").write_text("{}")
    before = len(hub.requests)
    assert adapter_dir(Path("ann/birds")) == Path("ann/birds")
    with pytest.raises(FileNotFoundError, match=r"must be a directory that exists, got ann/bird"):
        adapter_dir(Path("ann/bird"))
    assert len(hub.requests) == before


def test_commands_say_what_to_do_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("owl.png")
    assert main(["predict", "ann/none", "owl.png"]) == 2
    assert "ann/none is neither a directory here nor a repository" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["predict", "ann/birds", "owl.png"]) == 1
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in said
    assert "hf download ann/birds --local-dir DIRECTORY" in said


def test_a_folder_of_this_machine_is_not_uploaded(hub: Hub, tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"num_classes": 0}}))
    weights = save(VisionTransformer(num_classes=0, **sizes).state_dict())
    (tmp_path / "secret" / "model.safetensors").write_bytes(weights)
    backbone = fp.FrozenViT.from_timm(f"local-dir:{tmp_path / 'secret'}", pretrained=True)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=1), num_classes=2)
    model.push_to_hub("ann/private", token="t")
    assert not [name for name, content in hub.repositories["ann/private"].items() if b"secret" in content]
    model.save_pretrained(tmp_path / "here")
    assert b"secret" in (tmp_path / "here" / CONFIG_FILE).read_bytes()


def test_an_engine_takes_an_adapter_of_the_hub(
    hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tiny_images: Tensor, tmp_path: Path
) -> None:
    upload(hub, model, "ann/birds", tmp_path / "adapter")
    with fp.Engine(backbone, batch_sizes=(1,), dtype=torch.float32, backend="eager") as engine:
        engine.add_adapter("birds", "ann/birds")
        [logits] = engine(tiny_images[:1], adapter_names=["birds"])
    torch.testing.assert_close(logits, model(tiny_images[:1])[0].detach())


def test_a_directory_wins_over_a_repository(
    hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ann/birds")
    assert not is_repository("ann/birds")
    fp.PromptedViT.from_pretrained(backbone, "ann/birds")
    assert hub.requests == []
    with pytest.raises(ValueError, match=r"^revision must be None for an adapter in a directory, got 'main'"):
        fp.PromptedViT.from_pretrained(backbone, "ann/birds", revision="main")


@pytest.mark.parametrize("where", ["runs", "./a/b", "../a/b", "/a/b", "a/b/c", "a\\b", Path("ann/birds")])
def test_other_paths_are_no_repositories(where: str | Path, hub: Hub, backbone: fp.FrozenViT) -> None:
    with pytest.raises(FileNotFoundError, match="is no adapter"):
        fp.PromptedViT.from_pretrained(backbone, where)
    assert hub.requests == []


def test_a_damaged_download_is_fetched_again(
    hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tiny_images: Tensor, tmp_path: Path
) -> None:
    upload(hub, model, "ann/birds", tmp_path / "adapter")
    hub.damaged["ann/birds"] = 1
    loaded = fp.PromptedViT.from_pretrained(backbone, "ann/birds")
    assert hub.damaged["ann/birds"] == 0
    assert torch.equal(loaded(tiny_images), model(tiny_images))
    cached = next((tmp_path / "cache").rglob(WEIGHTS_FILE)).resolve()
    content = cached.read_bytes()
    cached.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # damaged where it is kept
    with pytest.raises(ValueError, match=r"^ann/birds, as it was fetched before, is damaged: .*corrupted"):
        fp.PromptedViT.from_pretrained(backbone, "ann/birds", local_files_only=True)
    assert torch.equal(fp.PromptedViT.from_pretrained(backbone, "ann/birds")(tiny_images), model(tiny_images))
    hub.damaged["ann/birds"] = 2
    cached.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"^ann/birds was fetched twice and is damaged: .*corrupted"):
        fp.PromptedViT.from_pretrained(backbone, "ann/birds")


def test_what_was_fetched_is_there_without_network(
    hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, model, "ann/birds", tmp_path / "adapter")
    fp.PromptedViT.from_pretrained(backbone, "ann/birds")
    asked = len(hub.requests)
    fp.PromptedViT.from_pretrained(backbone, "ann/birds", local_files_only=True)
    assert len(hub.requests) == asked
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    fp.PromptedViT.from_pretrained(backbone, "ann/birds")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:9 cannot be reached .*, and it was not fetched before\. On a"):
        fp.PromptedViT.from_pretrained(backbone, "ann/fish")
    with pytest.raises(FetchError, match="hf download ann/fish --local-dir DIRECTORY"):
        fp.PromptedViT.from_pretrained(backbone, "ann/fish", local_files_only=True)
    with pytest.raises(FetchError, match=r"ann/fish cannot be uploaded to .*hf upload ann/fish DIRECTORY"):
        model.push_to_hub("ann/fish", token="t")


def test_what_the_hub_refuses(hub: Hub, model: fp.PromptedViT, backbone: fp.FrozenViT, tmp_path: Path) -> None:
    def load(repository: str, **options: Any) -> None:
        fp.PromptedViT.from_pretrained(backbone, repository, **options)

    with pytest.raises(FileNotFoundError, match=r"^ann/none is neither a directory here nor a repository of http"):
        load("ann/none")
    hub.repositories["ann/bert"] = {"model.safetensors": b"x"}
    with pytest.raises(FileNotFoundError, match="ann/bert on the Hub is no adapter of fastprompt"):
        load("ann/bert")
    upload(hub, model, "ann/birds", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^revision must be a branch, tag or commit of ann/birds, got 'v9'"):
        load("ann/birds", revision="v9")
    hub.gated.add("ann/birds")
    with pytest.raises(PermissionError, match="ann/birds is gated: ask for access at http"):
        load("ann/birds")
    hub.refused.add("ann/fish")
    with pytest.raises(PermissionError, match="refuses this token for ann/fish"):
        model.push_to_hub("ann/fish", token="t")


def test_wrong_arguments_send_nothing(hub: Hub, model: fp.PromptedViT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^repo_id must be 'owner/name', got 'birds'"):
        model.push_to_hub("birds")
    with pytest.raises(ValueError, match=r"^repo_id must be 'owner/name' as the Hub takes it, got 'ann/bi--rds'"):
        model.push_to_hub("ann/bi--rds", token="t")
    with pytest.raises(ValueError, match=r"^license must be an identifier of the Hub"):
        model.push_to_hub("ann/birds", license="My own\nlicence")
    with pytest.raises(FileNotFoundError, match=r"^run_dir must be the directory of a finished run"):
        model.push_to_hub("ann/birds", run_dir=tmp_path)
    with pytest.raises(TypeError, match=r"^run_dir must be the directory of a run, got int"):
        model.push_to_hub("ann/birds", run_dir=3)  # type: ignore[arg-type]
    assert hub.requests == []


def test_the_card_is_written_from_the_run(hub: Hub, backbone: fp.FrozenViT, tmp_path: Path) -> None:
    """A run of `fp.fit` records its recipe and its best epoch; one of the command line adds the data and test."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    data = torch.utils.data.TensorDataset(images, labels)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=1), num_classes=2)
    result = fp.fit(model, data, data, out_dir=tmp_path / "run", epochs=1, batch_size=4, lr=0.01, num_workers=0)
    model.push_to_hub("ann/run", run_dir=tmp_path / "run", token="t")
    card = hub.repositories["ann/run"][CARD_FILE].decode()
    [accuracy] = re.findall(r"\| validation \| 8 \| (0\.\d+|1\.0+) \|", card)
    assert float(accuracy) == result.best_val_accuracy
    assert "epochs 1, batch_size 4, optimizer adamw, lr 0.01" in card
    records = {"accuracy": 0.75, "num_images": 8, "macro_f1": 0.5}
    results = {"validation": records, "test": {**records, "accuracy": 0.625}, "recipe": {"epochs": 7}}
    results["data"] = {"name": "/home/ann/birds", "train": 1200, "val": 8, "test": 8}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    model.push_to_hub("ann/run", run_dir=tmp_path / "run", token="t")
    card = hub.repositories["ann/run"][CARD_FILE].decode()
    low, high = binomtest(5, 8).proportion_ci(0.95, "wilson")
    assert f"| test | 8 | 0.6250 | {low:.4f} to {high:.4f} | 0.5000 |" in card
    assert "| Data | birds: 1,200 train, 8 val, 8 test images |" in card
    assert "/home/ann" not in card
    assert [entry["metrics"][0]["value"] for entry in metadata_of(card)["model-index"][0]["results"]] == [0.75, 0.625]


def test_names_of_classes_do_not_become_markup(model: fp.PromptedViT, tmp_path: Path) -> None:
    model.class_names = ["<script>", "a|b\n# Title"]
    model.save_pretrained(tmp_path)
    card = model_card(read_adapter(tmp_path)[0], "ann/birds")
    assert r"\<script\>, a\|b # Title" in card


def test_a_card_says_that_the_backbone_was_trained(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    fp.PromptedViT(backbone, fp.FullFineTuneConfig(), num_classes=2).save_pretrained(tmp_path)
    assert "trained: its weights are part of the adapter" in model_card(read_adapter(tmp_path)[0], "ann/birds")


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (3, 7), (900, 1000)])
def test_the_interval_is_wilsons(hits: int, total: int) -> None:
    assert wilson(hits, total) == pytest.approx(tuple(binomtest(hits, total).proportion_ci(0.95, "wilson")), abs=1e-12)


def test_the_endpoint_of_the_environment_is_asked(tmp_path: Path) -> None:
    code = "from fastprompt.hub import read_pretrained; read_pretrained('ann/none')"
    with running() as served:
        environment = {**os.environ, "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"nor a repository of {served.address}" in ran.stderr
    assert len(served.requests) > 0
