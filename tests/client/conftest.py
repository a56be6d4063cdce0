"""A tiny model, the folder that was exported of it, and a host here that keeps to the contract or breaks it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.pixels.export import export_client, host_features


def make_backbone(width: int = 48, seed: int = 0) -> fp.FrozenViT:
    torch.manual_seed(seed)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
    )
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.3 if name == "pos_embed" else p[0].numel() ** -0.5)
    return fp.FrozenViT(vit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def make_model(backbone: fp.FrozenViT, config: Any) -> fp.PromptedViT:
    """With logits and library as far from their start as after training."""
    torch.manual_seed(1)
    model = fp.PromptedViT(backbone, config, num_classes=3, class_names=["a", "b", "c"])
    with torch.no_grad():
        model.head.weight.normal_()
        if hasattr(model.generator, "trunk"):
            model.generator.trunk.fc.weight.normal_()
            for module in model.generator.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def backbone() -> fp.FrozenViT:
    return make_backbone()


@pytest.fixture(scope="session")
def other_backbone() -> Callable[..., fp.FrozenViT]:
    """`other_backbone(width=48, seed=0)`."""
    return make_backbone


@pytest.fixture(scope="session")
def make() -> Callable[[fp.FrozenViT, Any], fp.PromptedViT]:
    """`make(backbone, config)`: a model that looks trained."""
    return make_model


CONFIGS = {
    "extend": fp.RGBPGNConfig(num_prompts=4, library_size=12, widths=(4, 8)),
    "replace": fp.RGBPGNConfig(num_prompts=4, library_size=12, widths=(4, 8), placement="replace", resolution=16),
    "border": fp.PixelPromptConfig(border=5),
}


@pytest.fixture(scope="session", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, backbone: fp.FrozenViT) -> fp.PromptedViT:
    return make_model(backbone, CONFIGS[request.param])


@pytest.fixture(scope="session")
def extend(backbone: fp.FrozenViT) -> fp.PromptedViT:
    return make_model(backbone, CONFIGS["extend"])


@pytest.fixture(scope="session")
def folder(extend: fp.PromptedViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export_client` writes of `extend`; not to be changed."""
    out = tmp_path_factory.mktemp("exported") / "client"
    export_client(extend, out)
    return out


@pytest.fixture
def photo() -> np.ndarray:
    """uint8 (41, 57, 3)."""
    return np.random.default_rng(3).integers(0, 256, (41, 57, 3), dtype=np.uint8)


class FrozenHost(ThreadingHTTPServer):
    """`POST /v1/embeddings` of a frozen backbone, on a port of its own.

    Attributes:
        change: picture → picture, what the host does to it first. normalise: uint8 (1, 3, H, W) → what the backbone
            takes. readout: of the backbone. finish: (D,) → (D,). respond: path → (status, headers, body) instead of
            all that, or None.
        requests: (path, headers, body) of every request. files: path → (content type, bytes) that GET returns.
    """

    daemon_threads = True

    def __init__(self, backbone: fp.FrozenViT) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backbone, self.readout, self.key = backbone, "cls", None
        self.change: Callable[[Image.Image], Image.Image] = lambda picture: picture
        self.normalise: Callable[[Tensor], Tensor] = backbone.normalise
        self.finish: Callable[[np.ndarray], np.ndarray] = lambda vector: vector
        self.respond: Callable[[str], tuple[int, dict[str, str], bytes] | None] = lambda path: None
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.files: dict[str, tuple[str, bytes]] = {}
        self.models: list[dict[str, Any]] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def listing(self) -> dict[str, Any]:
        if self.models is not None:
            return {"object": "list", "data": self.models}
        vit = self.backbone
        entry = {
            "id": "tiny",
            "object": "model",
            "fingerprint": vit.fingerprint,
            "width": vit.width,
            "image_size": list(vit.image_size),
            "patch_size": vit.patch_size,
            "mean": list(vit.mean),
            "std": list(vit.std),
        }
        return {"object": "list", "data": [entry, {"id": "birds", "object": "adapter", "fingerprint": "f"}]}

    def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = []
        for i, text in enumerate(given):
            assert text.startswith("data:image/png;base64,")
            picture = self.change(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB"))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            vector = self.finish(host_features(self.backbone, self.normalise(pixels), self.readout).numpy())
            coded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            data.append(
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": coded if body.get("encoding_format") == "base64" else vector.tolist(),
                }
            )
        return {"object": "list", "model": "tiny", "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


class Handler(BaseHTTPRequestHandler):
    server: FrozenHost

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle_one(self, body: Any) -> None:
        self.server.requests.append((self.path, dict(self.headers), body))
        path = self.path.partition("?")[0]
        special = self.server.respond(path)
        if special is not None:
            return self.reply(special[0], special[2], special[1])
        if self.server.key is not None and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self.reply(401, {"error": {"message": "wrong key", "type": "authentication_error", "code": None}})
        if self.command == "GET" and path in self.server.files:
            kind, content = self.server.files[path]
            return self.reply(200, content, {"Content-Type": kind})
        if self.command == "GET" and path == "/v1/models":
            return self.reply(200, self.server.listing())
        if self.command == "POST" and path == "/v1/embeddings":
            return self.reply(200, self.server.embeddings(body))
        return self.reply(404, {"error": {"message": f"no {path}", "type": "invalid_request_error", "code": None}})

    def do_GET(self) -> None:
        self.handle_one(None)

    def do_POST(self) -> None:
        self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))


@pytest.fixture
def host(backbone: fp.FrozenViT) -> Iterator[FrozenHost]:
    """A host that keeps to the contract until a test changes it."""
    server = FrozenHost(backbone)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
