"""The same host on a local Ray (`make serve-ray`)."""

from __future__ import annotations

import asyncio
import base64
import importlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fastprompt.serve.protocol import Limits, Work, decode, read_form
from fastprompt.serve.tenants import HostSettings, answers, load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # Ray's own
Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def settings(place: Path) -> HostSettings:
    adapters = {name: place / name for name in ("birds", "cars")}
    return HostSettings(f"local-dir:{place / 'vit'}", None, False, adapters, "float32", 8, 1)


@pytest.fixture(scope="module")
def url(settings: HostSettings) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="pip install 'fastprompt[ray]'")
    from ray import serve

    from fastprompt.serve.cluster import application

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for attempt in range(3):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
            break
        except Exception:  # Ray's own processes have 15 seconds to start, which a loaded machine may not give them
            ray.shutdown()
            if attempt == 2:
                raise
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application(settings, Limits(body_bytes=2**18), ["key"]), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastprompt.serve.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'fastprompt\[ray\]'"):
        importlib.import_module("fastprompt.serve.cluster")


def test_an_application_has_the_limits_and_keys_of_a_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'fastprompt[ray]'")
    from fastprompt.serve.cluster import application

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPROMPT_API_KEYS", "one, two")
    relative = HostSettings("local-dir:vit", adapters={"birds": Path("runs/birds")}, device="cuda")
    deployed: Any = application(relative, Limits(waiting=7))._bound_deployment
    settings, limits, keys, _ = deployed.init_args
    assert (keys, limits.waiting) == (["one", "two"], 7)
    assert (settings.backbone, settings.adapters) == (f"local-dir:{tmp_path}/vit", {"birds": tmp_path / "runs/birds"})
    assert (deployed.max_queued_requests, deployed.max_ongoing_requests) == (7, 14)
    assert deployed.ray_actor_options["num_gpus"] == 1
    deployed = application(HostSettings(), keys=())._bound_deployment
    assert deployed.init_args[2] == []
    assert not deployed.ray_actor_options.get("num_gpus")
    monkeypatch.setenv("FASTPROMPT_API_KEYS", "")
    with pytest.raises(ValueError, match="has no API key"):
        application(HostSettings())


def test_a_replica_answers_in_time_or_says_that_it_cannot(settings: HostSettings, picture: Picture) -> None:
    pytest.importorskip("ray", reason="pip install 'fastprompt[ray]'")
    from starlette.requests import Request

    from fastprompt.serve.cluster import Tenants
    from fastprompt.serve.routes import Routes

    replica: Any = object.__new__(Tenants)  # `__init__` asks Ray

    async def together(work: Work) -> list[np.ndarray]:
        await asyncio.sleep(5)
        return []

    replica.together = together
    replica.routes = Routes(load(settings)[1], Limits(answer_seconds=0.5, waiting=2), ["key"], replica.compute)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await replica(Request(scope, receive)))(scope, receive, send)

    async def everybody(key: str) -> list[int]:
        body = {"input": f"data:image/png;base64,{base64.b64encode(picture()).decode()}"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ray", timeout=60) as client:
            return [
                answer.status_code
                for answer in await asyncio.gather(
                    *(client.post("/v1/embeddings", json=body, headers={"X-API-Key": key}) for _ in range(6))
                )
            ]

    assert asyncio.run(everybody("other")) == [401] * 6
    assert sorted(asyncio.run(everybody("key"))) == [503] * 4 + [504] * 2


def test_a_replica_that_hangs_tells_ray() -> None:
    pytest.importorskip("ray", reason="pip install 'fastprompt[ray]'")
    from fastprompt.serve import cluster

    replica: Any = object.__new__(cluster.Tenants)
    replica.batch_seconds, replica._since = 30.0, math.inf
    replica.check_health()
    replica._since = time.monotonic() - 29
    replica.check_health()
    replica._since -= 2
    assert not replica.is_well()
    with pytest.raises(RuntimeError, match="one batch has been computed for 31 s"):
        replica.check_health()


def test_tenants_share_batches_and_get_their_own_answers(url: str, settings: HostSettings, picture: Picture) -> None:
    names = [("__base__", "birds", "cars")[i % 3] for i in range(24)]

    async def ask(client: httpx.AsyncClient, i: int) -> httpx.Response:
        image = f"data:image/png;base64,{base64.b64encode(picture(i)).decode()}"
        if names[i] == "__base__":
            return await client.post("/v1/embeddings", json={"input": image})
        return await client.post("/v1/classify", json={"input": image, "model": names[i]})

    async def everybody() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": "Bearer key"}, timeout=120) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(len(names))))

    engine, catalogue = load(settings)
    for i, answer in enumerate(asyncio.run(everybody())):
        assert answer.status_code == 200, answer.text
        [entry] = answer.json()["data"]
        pixels, _ = decode(read_form([("file", picture(i))], Limits()), catalogue, Limits())
        [[expected]] = answers(engine, [Work(pixels, names[i])])
        if names[i] == "__base__":
            np.testing.assert_allclose(entry["embedding"], expected, rtol=1e-4, atol=1e-5)
        else:
            likely = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
            assert entry["probabilities"][0]["probability"] == pytest.approx(float(likely.max()), rel=1e-3)


def test_hostile_requests_are_refused(url: str, picture: Picture) -> None:
    def post(path: str, status: int, **options: Any) -> str:
        answer = httpx.post(url + path, timeout=60, **{"headers": {"Authorization": "Bearer key"}, **options})
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["code"]

    assert post("/v1/embeddings", 401, headers={}) == "invalid_api_key"
    assert (
        post(
            "/v1/embeddings",
            413,
            content=b" " * 300_000,
            headers={"Authorization": "Bearer key", "Content-Type": "application/json"},
        )
        == "body_too_large"
    )
    assert post("/v1/embeddings", 422, files={"file": ("a.png", picture()[:300], "image/png")}) == "damaged_image"
    assert (
        post("/v1/classify", 404, files={"file": ("a.png", picture(), "image/png")}, data={"model": "dogs"})
        == "model_not_found"
    )
    assert post("/v1/nothing", 404) == "not_found"
    assert post("/health", 405) == "method_not_allowed"
    assert httpx.get(url + "/health", timeout=60).status_code == 200
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer key"}, timeout=60).status_code == 200
