"""One registration per method: what it records, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import get_method, method_of, registry
from fastprompt.train.recipes import Recipe, default_recipe, paper_recipe


@pytest.fixture(autouse=True)
def registered() -> Iterator[dict[str, Any]]:
    """The registry, as it is after the test, too."""
    before = dict(registry._METHODS)
    yield registry._METHODS
    registry._METHODS.clear()
    registry._METHODS.update(before)


@dataclasses.dataclass(frozen=True)
class MineConfig(fp.PromptConfig):
    kind: ClassVar[str] = "mine"
    num_prompts: int = 2
    scale: float = 0.5


class Mine(fp.PromptGenerator):
    known_at, config_class = "static", MineConfig

    def __init__(self, config: Any = None, geometry: Any = None, **options: Any) -> None:
        super().__init__(config, geometry, **options)
        self.num_prompts, self.layers = self.config.num_prompts, (0,)
        self.tokens = torch.nn.Parameter(torch.zeros(1, self.num_prompts, self.geometry.width))

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Any = None) -> Tensor:
        return self.config.scale * self.tokens


@pytest.mark.parametrize("name", fp.list_methods())
def test_every_registration_is_complete(name: str) -> None:
    method = get_method(name)
    assert method.title
    config = method.config()
    assert type(config) is method.config_class
    assert method_of(config).config_class is method.config_class
    assert default_recipe(name).epochs > 0
    for published in method.published.values():
        assert published.source
        Recipe.from_dict(published.recipe)


def test_names_fix_options() -> None:
    deep, shallow = get_method("vpt-deep"), get_method("vpt-shallow")
    assert deep.config({"num_prompts": 3}) == fp.VPTConfig(num_prompts=3)
    assert shallow.config() == fp.VPTConfig(deep=False)
    assert "deep" not in deep.free_options
    with pytest.raises(ValueError, match="deep: method 'vpt-deep' has no such option; it has num_prompts"):
        deep.config({"deep": False})
    with pytest.raises(ValueError, match="x: method 'linear' has no such option; it has no options"):
        get_method("linear").config({"x": 1})
    assert get_method("pgn").config({"widths": [4, 8]}).widths == (4, 8)  # type: ignore[attr-defined]
    assert method_of(fp.VPTConfig(deep=False)) is shallow
    assert method_of("vpt") is deep
    assert method_of("linear-sgd").title == "Linear probe (SGD)"


def test_what_trains() -> None:
    assert [name for name in fp.list_methods() if get_method(name).head_only] == ["linear", "linear-sgd"]
    assert get_method("linear").solver == "lbfgs"
    assert get_method("linear-sgd").solver == "gradient"


def test_a_registration_is_all_there_is(tiny_vit: Any) -> None:
    fp.register_method(
        "mine",
        title="Mine",
        recipe={"lr": 0.25},
        lrs=(0.1, 0.2),
        published={"mine-paper": fp.Published("here", {"lr": 2.0, "batch_size": 64}, lr_per=256)},
        variants={"mine-loud": fp.Variant("Mine, loud", {"scale": 1.0}, {"epochs": 3})},
    )(Mine)
    assert {"mine", "mine-loud"} <= set(fp.list_methods())
    assert {"mine", "mine-loud"}.isdisjoint(fp.list_methods(on_swin=True))
    assert default_recipe(MineConfig()).lr == 0.25
    assert default_recipe("mine").label_smoothing == default_recipe("pgn").label_smoothing
    assert default_recipe("mine-loud") == default_recipe("mine").replace(epochs=3, min_steps=200)
    assert paper_recipe(MineConfig()).lr == paper_recipe("mine-paper").lr == 0.5
    assert get_method("mine-loud").lrs == (0.1, 0.2)
    assert fp.config_from_dict({"kind": "mine", "scale": 2.0}) == MineConfig(scale=2.0)
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), get_method("mine-loud").config(), 3)
    assert isinstance(model.generator, Mine)
    assert model.generator.config.scale == 1.0


def test_a_name_is_registered_once(registered: dict[str, Any]) -> None:
    before = dict(registered)
    for name in ("vapt", "vpt", "vpt-shallow"):
        with pytest.raises(ValueError, match=f"name '{name}' is registered already, by fastprompt.generators"):
            fp.register_method(name, title="Mine")(Mine)
    with pytest.raises(ValueError, match="name 'pgn' is registered already"):
        fp.register_method("mine", title="Mine", variants={"pgn": fp.Variant("PGN")})(Mine)
    with pytest.raises(ValueError, match="published recipe 'pgn-paper' is registered already"):
        fp.register_method("mine", title="Mine", published={"pgn-paper": fp.Published("here", {})})(Mine)
    assert registered == before
    fp.register_method("mine", title="Mine", variants={"mine-too": fp.Variant("Mine, too")})(Mine)
    with pytest.raises(ValueError, match=r"kind 'mine' is registered already, by .*MineConfig.*replace=True"):
        fp.register_method("mine", title="Mine")(Mine)
    fp.register_method("mine", title="Mine, again", replace=True)(Mine)
    assert get_method("mine").title == "Mine, again"
    assert "mine-too" not in registered


@pytest.mark.parametrize("name", ["", "Mine", "my method", "mine_", "-mine", "mine/..", "méthode", None, 3])
def test_malformed_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="name must be lower-case letters, digits and hyphens, got"):
        fp.register_method(name, title="Mine")(Mine)
    with pytest.raises(ValueError, match="name must be lower-case letters, digits and hyphens, got"):
        fp.register_method("mine", title="Mine", variants={name: fp.Variant("Mine")})(Mine)


def config_class(decorate: bool = True, frozen: bool = True, **body: Any) -> Any:
    annotations = {key: "ClassVar[str]" if key == "kind" else int for key in body}
    made = type("BadConfig", (fp.PromptConfig,), {"__annotations__": annotations, "__module__": __name__, **body})
    return dataclasses.dataclass(frozen=True)(made) if decorate else made


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: config_class(), ValueError, "BadConfig.kind must be a ClassVar, .*lower-case .* got None"),
        (lambda: config_class(kind="Bad Kind"), ValueError, "BadConfig.kind must be .* got 'Bad Kind'"),
        (lambda: config_class(decorate=False, kind="bad"), TypeError, "BadConfig must be decorated with @dataclass"),
        (lambda: dict, TypeError, "register_method takes a PromptGenerator or a PromptConfig, got 'dict'"),
        (lambda: config_class, TypeError, "register_method takes a PromptGenerator or a PromptConfig"),
        (
            lambda: dataclasses.make_dataclass(
                "BadConfig", [("size", int)], bases=(fp.PromptConfig,), frozen=True, namespace={"kind": "bad"}
            ),
            TypeError,
            "BadConfig.size must have a default",
        ),
        (
            lambda: type("Bad", (Mine,), {"config_class": config_class(kind="bad"), "known_at": "never"}),
            ValueError,
            "Bad.known_at must be one of .* got 'never'",
        ),
        (lambda: type("Bad", (fp.PromptGenerator,), {}), TypeError, "Bad.config_class must be the method's"),
        (
            lambda: type("Bad", (Mine,), {"config_class": config_class(kind="bad"), "role": "keys"}),
            ValueError,
            "Bad.role must be one of .* got 'keys'",
        ),
        (
            lambda: type("Bad", (Mine,), {"config_class": config_class(kind="bad"), "role": "queries"}),
            TypeError,
            "Bad must define gather, which role 'queries' needs",
        ),
        (
            lambda: type(
                "Bad", (Mine,), {"config_class": config_class(kind="bad"), "role": "cross", "takes_stages": True}
            ),
            ValueError,
            "Bad.takes_stages must be False with role 'cross'",
        ),
        (
            lambda: type("Bad", (fp.PromptGenerator,), {"config_class": config_class(kind="bad"), "known_at": "image"}),
            TypeError,
            "Bad must define prompts",
        ),
        (
            lambda: type("Bad", (Mine,), {"config_class": dict}),
            TypeError,
            "Bad.config_class takes a PromptConfig, got 'dict'",
        ),
        (
            lambda: dataclasses.make_dataclass("Child", [], bases=(fp.VPTConfig,), frozen=True),
            ValueError,
            "kind 'vpt' is registered already, by .*VPTConfig; give Child another kind",
        ),
    ],
)
def test_what_is_no_method_is_refused(
    registered: dict[str, Any], made: Any, error: type[Exception], message: str
) -> None:
    before = dict(registered)
    with pytest.raises(error, match=message):
        fp.register_method("bad", title="Bad")(made())
    assert registered == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"title": ""}, ValueError, "title must be a text, got ''"),
        ({"options": {"size": 3}}, ValueError, "MineConfig has no option 'size'"),
        ({"cost": 3}, TypeError, "cost must be a function of .* got int"),
        ({"published": {"mine-paper": {"lr": 1}}}, TypeError, "published must map names to Published"),
        ({"solver": "newton"}, ValueError, "solver must be one of .* got 'newton'"),
        ({"solver": "lbfgs"}, ValueError, "solver 'lbfgs' fits only a head, but MineConfig trains more"),
        ({"variants": {"mine-too": "Mine"}}, TypeError, r"variants\['mine-too'\] must be a Variant, got str"),
        ({"variants": {"mine": fp.Variant("Mine")}}, ValueError, "variants must have distinct names"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.register_method("mine", **{"title": "Mine", **arguments})(Mine)
    assert "mine" not in fp.list_methods()


def test_what_is_not_registered_says_how_to_register_it() -> None:
    for look_up in (
        lambda: get_method("mine"),
        lambda: default_recipe("mine"),
        lambda: fp.config_from_dict({"kind": "mine"}),
    ):
        with pytest.raises(ValueError, match=r"must be .* got 'mine'; .* import its module, .*--plugin MODULE"):
            look_up()
    with pytest.raises(TypeError, match=r"config must be one of .*VPTConfig.* got MineConfig"):
        method_of(MineConfig())


def test_installed_packages_register_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, fails: bool) -> None:
            self.name, self.value, self.fails, self.loaded = name, f"package.{name}", fails, 0

        def load(self) -> None:
            self.loaded += 1
            if self.fails:
                raise ImportError("no module named numba")
            fp.register_method("mine", title="Mine")(Mine)

    points = [Point("broken", True), Point("mine", False)]
    monkeypatch.setattr(registry, "_loaded_entry_points", set())
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else []
    )
    with pytest.warns(UserWarning, match=r"entry point 'broken' .* cannot be loaded.*no module named numba"):
        assert get_method("mine").title == "Mine"
    assert "mine" in fp.list_methods()
    assert [point.loaded for point in points] == [1, 1]


def test_a_file_among_the_generators_is_a_method(tmp_path: Path, repository: Path) -> None:
    shutil.copytree(repository / "fastprompt", tmp_path / "fastprompt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "examples" / "own_method.py", tmp_path / "fastprompt" / "generators" / "pooled.py")
    script = (
        "import fastprompt as fp; print(fp.__file__, 'pooled' in fp.list_methods(), fp.PooledConfig().num_prompts, "
        "fp.Pooled.__module__, hasattr(fp, 'PoledConfig'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where = tmp_path / "fastprompt" / "__init__.py"
    assert ran.stdout.split() == [str(where), "True", "4", "fastprompt.generators.pooled", "False"]
