from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.models.vision_transformer import VisionTransformer

import fastprompt as fp
from fastprompt.data.images import FORMATS, LARGEST_COVER, to_rgb, to_tensor
from fastprompt.pixels.export import export_client
from fastprompt_client import Client, pictures


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise on top of smooth colours, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + random.integers(-40, 41, (height, width, 3)), 0, 255).astype(np.uint8)


def in_training(image: np.ndarray, size: tuple[int, int], resize: str = "crop") -> np.ndarray:
    return to_tensor(Image.fromarray(image), size, resize).permute(1, 2, 0).numpy()


def test_the_picture_is_that_of_training(model: fp.PromptedViT, tmp_path: Path) -> None:
    """Bit for bit, but where the float32 sums of torch and onnxruntime lie on two sides of half a level."""
    export_client(model, tmp_path)
    client, different, pixels = Client(tmp_path), 0, 0
    for seed in range(20):
        image = random_image(32, 32, seed)
        expected = fp.RGBPrompts(model).pictures(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        found, wanted = client.picture(image).astype(int), expected.permute(1, 2, 0).numpy().astype(int)
        assert found.shape == wanted.shape == (*client.folder.picture_size, 3)
        rows = found.shape[0] - client.folder.rows * 8
        assert np.array_equal(found[:rows], wanted[:rows])  # the image's own part
        assert np.abs(found - wanted).max() <= 1
        different, pixels = different + int((found != wanted).sum()), pixels + found.size
    assert different <= 1e-3 * pixels


@pytest.mark.parametrize(
    ("height", "patch", "rows"), [(224, 16, 1), (224, 16, 2), (112, 16, 1), (518, 14, 1), (224, 32, 2), (96, 8, 5)]
)
def test_shrinking_is_that_of_training(height: int, patch: int, rows: int) -> None:
    """Many shrunk pixels are half way between two levels: they go down on both sides."""
    vit = VisionTransformer(
        img_size=(height, 3 * patch), patch_size=patch, embed_dim=12, depth=1, num_heads=2, num_classes=0
    )
    backbone = fp.FrozenViT(vit, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    config = fp.RGBPGNConfig(num_prompts=3 * rows, library_size=2, widths=(2,), placement="replace")
    generator = fp.RGBPGN(config, backbone)
    image = random_image(height, 3 * patch)
    small = generator.shrink(backbone.normalise(torch.from_numpy(image).permute(2, 0, 1)[None]))[0]
    mean, std = torch.tensor(backbone.mean).view(3, 1, 1), torch.tensor(backbone.std).view(3, 1, 1)
    expected = ((small * std + mean) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(pictures.Shrink(height, height - rows * patch)(image), expected)


def test_shrinking_without_rounding_is_that_of_training(tmp_path: Path) -> None:
    """Of two rows in turn every shrunk pixel is half way between: down where training rounds, else to the even one."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=0)
    backbone = fp.FrozenViT(vit, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = np.tile(np.array([[101], [102]], np.uint8), (16, 96)).reshape(32, 32, 3)
    for rounds, level in ((True, 101), (False, 102)):
        config = fp.RGBPGNConfig(num_prompts=8, library_size=2, widths=(2,), placement="replace", round_pixels=rounds)
        model = fp.PromptedViT(backbone, config, num_classes=2).eval()
        manifest = export_client(model, tmp_path / str(rounds))
        assert manifest["prompts"]["round_pixels"] is rounds
        assert (Client(tmp_path / str(rounds)).picture(image)[1:15] == level).all()
        small = model.generator.shrink(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0, :, 1:15] * 255
        torch.testing.assert_close(small, torch.full_like(small, 101 if rounds else 101.5), rtol=0, atol=1e-3)


def test_without_the_tie_rule_shrinking_would_differ() -> None:
    image = random_image(112, 112)
    small = (
        torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255,
            size=(96, 112),
            mode="bilinear",
            antialias=True,
        )
        * 255
    )
    near_half = ((small - small.floor() - 0.5).abs() < 1e-6).double().mean()
    assert near_half > 0.01


@pytest.mark.parametrize(
    ("source", "target", "resize"),
    [
        ((300, 400), (224, 224), "crop"),
        ((400, 300), (224, 224), "crop"),
        ((300, 400), (224, 224), "squash"),
        ((64, 64), (112, 112), "crop"),
        ((225, 224), (224, 224), "crop"),
        ((500, 333), (96, 128), "crop"),
    ],
)
def test_resizing_is_that_of_training_to_a_level(source: tuple[int, int], target: tuple[int, int], resize: str) -> None:
    image = random_image(*source)
    found = pictures.resized(Image.fromarray(image), target, resize).astype(int)
    expected = in_training(image, target, resize).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.05


def test_columns_are_resized_before_rows() -> None:
    """Each pass rounds, and Pillow's versions differ in which is first; torchvision and the page begin with columns."""
    image = Image.fromarray(random_image(150, 61))
    columns = image.resize((32, 150), Image.Resampling.BICUBIC)
    expected = np.asarray(columns.resize((32, 79), Image.Resampling.BICUBIC))
    assert np.array_equal(pictures.resized(image, (79, 32), "squash"), expected)


@pytest.mark.parametrize("size", [(1500, 1), (1, 1500), (30_000, 3)], ids=str)
def test_a_line_of_pixels_is_refused_before_it_takes_gigabytes(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    with pytest.raises(ValueError, match=rf"image has an aspect ratio too extreme to crop, got {size[0]} x {size[1]}"):
        pictures.resized(image, (224, 224), "crop")
    with pytest.raises(ValueError, match="aspect ratio too extreme to crop"):
        to_tensor(image, (224, 224), "crop")
    assert pictures.resized(image, (224, 224), "squash").shape == (224, 224, 3)
    assert to_tensor(image, (224, 224), "squash").shape == (3, 224, 224)
    assert pictures.LARGEST_COVER == LARGEST_COVER


def test_a_panorama_is_not() -> None:
    image = random_image(8, 400)
    found, expected = pictures.resized(Image.fromarray(image), (64, 64), "crop"), in_training(image, (64, 64))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = random_image(32, 32)
    assert np.array_equal(pictures.resized(Image.fromarray(image), (32, 32), "crop"), image)


def saved(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def sloppy_exif(tag: int) -> bytes:
    """Orientation 6, and a text in a tag that holds numbers: a reader that writes all tags anew fails."""
    entries = sorted([(0x0112, 3, 1, b"\0\6\0\0"), (tag, 2, 4, b"abc\0")])
    return (
        b"Exif\0\0MM\0*"
        + struct.pack(">IH", 8, len(entries))
        + b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
        + struct.pack(">I", 0)
    )


def kinds() -> dict[str, bytes]:
    colours = Image.fromarray(random_image(20, 30))
    alpha = colours.copy()
    alpha.putalpha(Image.fromarray(random_image(20, 30, 1)).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16))
    return {
        "rgb": saved(colours, format="PNG"),
        "alpha": saved(alpha, format="PNG"),
        "grey": saved(colours.convert("L"), format="PNG"),
        "palette": saved(colours.convert("P"), format="PNG"),
        "1 bit": saved(colours.convert("1"), format="PNG"),
        "cmyk": saved(colours.convert("CMYK"), format="JPEG"),
        "16 bits": saved(deep, format="PNG"),
        "16 bits, dark": saved(Image.fromarray(np.full((20, 30), 200, np.uint16)), format="PNG"),
        "turned": saved(colours, format="JPEG", exif=exif),
        "turned tiff": saved(colours, format="TIFF", exif=exif),
        "turned, bad rational": saved(colours, format="JPEG", exif=sloppy_exif(0x011F)),
        "turned, bad number": saved(colours, format="WEBP", exif=sloppy_exif(0x0100)),
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_files_are_opened_as_in_training(kind: str, tmp_path: Path) -> None:
    from fastprompt.data.images import open_image

    content = kinds()[kind]
    (tmp_path / "image").write_bytes(content)
    expected = np.asarray(open_image(tmp_path / "image"))
    for given in (content, tmp_path / "image", str(tmp_path / "image"), bytearray(content)):
        assert np.array_equal(np.asarray(pictures.open_image(given)), expected)
    assert expected.shape == ((30, 20, 3) if kind.startswith("turned") else (20, 30, 3))
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(expected))), expected)


@pytest.mark.parametrize("bounds", [None, (0, 4095), (-1024, 3071), (0, 1)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_files_are_scaled_as_in_training(
    bounds: tuple[float, float] | None, dtype: type, tmp_path: Path
) -> None:
    from fastprompt.data.images import open_image

    values = np.linspace(0 if dtype is np.uint16 else -2000, 5000, 600).reshape(20, 30).astype(dtype)
    Image.fromarray(values).save(tmp_path / "image.tif")
    expected = np.asarray(open_image(tmp_path / "image.tif", intensity_range=bounds))
    assert np.array_equal(np.asarray(pictures.open_image(tmp_path / "image.tif", intensity_range=bounds)), expected)
    assert len(np.unique(expected)) > (1 if bounds is None or bounds[1] == 1 else 100)


def test_the_folder_says_how_deep_grey_images_are_scaled(folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder, tmp_path / "client"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert Client(folder).folder.intensity_range is None
    for value, found in (([0, 4095], (0.0, 4095.0)), (None, None)):
        manifest["preprocessing"]["intensity_range"] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert Client(folder).folder.intensity_range == found
    values = np.full((40, 32), 4095, np.uint16)
    dark = Client(folder).picture(Image.fromarray(values))
    manifest["preprocessing"]["intensity_range"] = [0, 4095]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Client(folder).picture(Image.fromarray(values)).mean() > dark.mean()
    for wrong in (3, [1], [1, 1], [2, 1], ["0", "1"], [0, 1e999]):
        manifest["preprocessing"]["intensity_range"] = wrong
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"preprocessing\.intensity_range must"):
            Client(folder)


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_pillow_turns_it(orientation: int, tmp_path: Path) -> None:
    from fastprompt.data.images import open_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_image(20, 30)).save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    for found in (pictures.open_image(tmp_path / "image.png"), open_image(tmp_path / "image.png")):
        assert np.array_equal(np.asarray(found), expected)


def test_exif_data_that_cannot_be_read_say_nothing() -> None:
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 1, 0x8769, 9, 1, 0xFFFFFFFF) + bytes(4)
    assert pictures.open_image(saved(Image.new("RGB", (6, 4)), format="JPEG", exif=exif)).size == (6, 4)


def test_formats_that_start_programs_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprompt.data.checks import check_image
    from fastprompt.data.images import open_image

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    Image.new("RGB", (20, 20)).save(tmp_path / "image.eps")
    (tmp_path / "image.png").write_bytes((tmp_path / "image.eps").read_bytes())
    with pytest.raises(ValueError, match=r"image\.png cannot be read: cannot identify"):
        pictures.open_image(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*image\.png: cannot identify"):
        open_image(tmp_path / "image.png")
    assert "cannot identify" in str(check_image(tmp_path / "image.png").damage)
    assert pictures.FORMATS == FORMATS


@pytest.mark.parametrize("error", [TypeError, struct.error, RuntimeError, NotImplementedError, ZeroDivisionError])
def test_whatever_a_reader_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of its errors a damaged file gets differs between Pillow's versions."""
    from fastprompt.data.checks import check_image
    from fastprompt.data.images import open_image

    file = tmp_path / "image.bmp"
    Image.new("RGB", (6, 4)).save(file)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: (_ for _ in ()).throw(error("deep inside")))
    with pytest.raises(ValueError, match=r"image\.bmp cannot be read: deep inside"):
        pictures.open_image(file)
    with pytest.raises(ValueError, match=r"cannot read the image .*image\.bmp: deep inside"):
        open_image(file)
    assert check_image(file).damage == "deep inside"


def test_the_png_is_the_picture(folder: Path, photo: np.ndarray) -> None:
    client = Client(folder)
    content = client.png(photo)
    assert content.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), client.picture(photo))
    assert client.picture(Image.fromarray(photo)).shape == (40, 32, 3)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 3)), TypeError, r"image must be a uint8 array \(H, W, 3\), got float64"),
        (np.zeros((3, 3, 4), np.uint8), TypeError, "image must be a uint8 array"),
        (np.zeros((0, 3, 3), np.uint8), ValueError, "image must have from 1 to 10,000 pixels, got 3 x 0"),
        (np.zeros((200, 60, 3), np.uint8), ValueError, "image must have from 1 to 10,000 pixels, got 60 x 200"),
        (3, TypeError, "image must be a path, bytes, a PIL image or a uint8 array, got int"),
        (b"", ValueError, "image cannot be read"),
        (b"\x89PNG\r\n\x1a\nxx", ValueError, "image cannot be read"),
        (saved(Image.fromarray(random_image(40, 40)), format="PNG")[:600], ValueError, "image cannot be read"),
        (
            saved(Image.new("1", (300, 300)), format="PNG"),
            ValueError,
            "image must have from 1 to 10,000 pixels, got 300 x 300",
        ),
        (saved(Image.new("1", (20_000, 20_000)), format="PNG"), ValueError, "image has"),
        ("no/such/file.png", ValueError, "image no/such/file.png is not a file"),
    ],
    ids=str,
)
def test_bad_images_are_named(folder: Path, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Client(folder, max_pixels=10_000).picture(image)


def test_prompt_takes_only_the_right_size(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(32, 32, 3\), got uint8 \(32, 33, 3\)"):
        Client(folder).prompt(np.zeros((32, 33, 3), np.uint8))
