"""`python experiments/client_parity.py RUN [--images 200]`: compare a client with the trained model.

For run directories of `fastprompt adapt` with pixel prompts. On the run's validation images it counts levels of the
client's pictures that differ from `RGBPrompts.pictures`, and predictions that differ between the model as validated in
training and a client that sends PNGs to a host of the same backbone, in float32 and bfloat16. It repeats this with the
library rounded to bytes, which the client does not do, and shows how likely mistakes of a host change the golden
embedding.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.pixels.export import cosine, export_client, host_features
from fastprompt.runs.directory import adapter_dir, read_settings
from fastprompt.runs.execute import backbone_at, load_run_data, square_size
from fastprompt_client import Client


def by_host(model: fp.PromptedViT, pictures: list[np.ndarray]) -> np.ndarray:
    """Predict classes (n,) from uint8 pictures (H', W, 3)."""
    vit = model.backbone
    features = [
        host_features(vit, vit.normalise(torch.from_numpy(p).permute(2, 0, 1)[None]), model.readout) for p in pictures
    ]
    with torch.no_grad():
        return model.head(torch.stack(features)).argmax(-1).numpy()


@torch.no_grad()
def by_model(model: fp.PromptedViT, images: Tensor) -> np.ndarray:
    return np.concatenate([model(part).argmax(-1).numpy() for part in images.split(16)])


def parity(run: Path, num_images: int) -> dict[str, Any]:
    settings = read_settings(run)
    assert settings is not None, f"{run} has no run.json"
    backbone = backbone_at(settings.backbone, settings.image_size)
    model = fp.PromptedViT.from_pretrained(backbone, adapter_dir(run))
    validation = load_run_data(settings, square_size(backbone)).val
    images = torch.stack([validation[i][0] for i in range(min(num_images, len(validation)))])
    found: dict[str, Any] = {"images": len(images)}
    with tempfile.TemporaryDirectory() as folder:
        manifest = export_client(model, folder)
        client = Client(folder)
        made = [client.prompt(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        wanted = fp.RGBPrompts(model).pictures(images).permute(0, 2, 3, 1).numpy()
        off = np.abs(np.stack(made).astype(int) - wanted)
        found |= {"levels that differ": f"{(off > 0).sum()} of {off.size:,}, by at most {off.max()}"}
        trained = by_model(model, images)
        found["predictions that differ"] = int((by_host(model, made) != trained).sum())
        if "library.npy" in manifest["files"]:
            library = client.folder.library
            object.__setattr__(client.folder, "library", np.rint(library))
            bytes_alone = [client.prompt(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
            off = np.abs(np.stack(bytes_alone).astype(int) - wanted)
            found["levels that differ, library of bytes alone"] = f"{(off > 0).mean():.2%}, by at most {off.max()}"
            changed = by_host(model, bytes_alone) != trained
            found["predictions that differ, library of bytes alone"] = int(changed.sum())
            object.__setattr__(client.folder, "library", library)
        golden = torch.from_numpy(client.folder.golden_embedding)
        mistakes = {f"{m['name']}: {m['detail']}": m["cosine"] for m in manifest["golden"]["mistakes"]}
        picture = fp.RGBPrompts(model).pictures(
            torch.from_numpy(np.array(_opened(client.folder.golden_image))).permute(2, 0, 1)[None]
        )
        model.set_backbone_dtype(torch.bfloat16)
        in_bfloat16 = host_features(backbone, backbone.normalise(picture), model.readout)
        found["cosine of a host in bfloat16"] = round(cosine(golden, in_bfloat16), 6)
        found["predictions that differ, host in bfloat16"] = int((by_host(model, made) != trained).sum())
        found["judged"] = client.judge(in_bfloat16.numpy()).message
        found["cosine of a host that"] = mistakes
    return found


def _opened(png: bytes) -> Any:
    from fastprompt_client.pictures import open_image

    return open_image(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    for run in given.runs:
        print(run)
        for name, value in parity(run, given.images).items():
            if isinstance(value, dict):
                print(f"  {name}")
                for key, entry in value.items():
                    print(f"    {key:<70} {entry}")
            else:
                print(f"  {name:<50} {value}")


if __name__ == "__main__":
    main()
