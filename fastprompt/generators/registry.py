"""The registry of methods: configuration, generator, recipe and cost of each, by name.

A new method needs only `register_method`. Recipes, the command line, tables and cost formulas read the registry, so a
method is one file with a configuration, a generator and a registration.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators.accounting import CostFormula
from fastprompt.generators.base import Geometry, PromptConfig, PromptGenerator

if TYPE_CHECKING:
    from fastprompt.vit import FrozenViT

ENTRY_POINTS = "fastprompt.methods"
"""Group of entry points in which an installed package names a module that registers methods."""

HOW_TO_REGISTER = (
    "your own method must be registered first: import its module, pass --plugin MODULE to the command line, or "
    f"install a package with an entry point in the group {ENTRY_POINTS!r}"
)

KNOWN_AT = ("static", "image", "embeddings", "layer")
ROLES = ("sequence", "queries", "cross")
SOLVERS = ("gradient", "lbfgs")

Registered = TypeVar("Registered", bound="type[PromptConfig] | type[PromptGenerator]")


@dataclasses.dataclass(frozen=True)
class Published:
    """Training settings that a method's authors published.

    Attributes:
        source: where they are published, and what is unknown.
        recipe: fields of `fastprompt.train.recipes.Recipe` that differ from its defaults; "lr" is the base rate.
        lr_per: number of images per step that "lr" is for; the rate is scaled by batch_size / lr_per. None does not
            scale it.
        lrs, weight_decays: the base rates and weight decays that the authors search; empty if they search none.
        warmup_steps: length of the warmup if the authors count it in optimizer steps; None uses "warmup_epochs".
        augment, resize: the authors' augmentation and resizing of training images, as in `fastprompt.load_data`.
    """

    source: str
    recipe: Mapping[str, Any]
    lr_per: int | None = None
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    warmup_steps: int | None = None
    augment: str = "none"
    resize: str = "crop"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Another name of a method, with what differs from the method's registration.

    Attributes:
        title: title in tables and other output.
        options: options of the configuration that the name fixes.
        recipe: fields of the recipe that differ from the method's.
        lrs: learning rates to try; None uses the method's.
        solver: as in `register_method`; None uses the method's.
    """

    title: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lrs: tuple[float, ...] | None = None
    solver: str | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """What `register_method` records for one name; see its arguments.

    Attributes:
        generator_class: the method's `PromptGenerator`; None if the method has no prompts.
    """

    name: str
    title: str
    paper: str
    config_class: type[PromptConfig]
    generator_class: type[PromptGenerator] | None
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]
    lrs: tuple[float, ...]
    published: Mapping[str, Published]
    cost: CostFormula | None
    solver: str

    @property
    def head_only(self) -> bool:
        """Whether only the head is trained, so that features can be computed once."""
        return self.generator_class is None and not self.config_class.trains_backbone

    @property
    def free_options(self) -> tuple[str, ...]:
        """The options of the configuration that the name does not fix."""
        return tuple(f.name for f in dataclasses.fields(self.config_class) if f.init and f.name not in self.options)

    def config(self, options: Mapping[str, Any] | None = None) -> PromptConfig:
        """Return the configuration with `options` and those that the name fixes; lists become tuples.

        Raises:
            TypeError, ValueError: an option is unknown, is fixed by the name, or has an invalid value.
        """
        for key in options or {}:
            if key not in self.free_options:
                has = ", ".join(self.free_options) or "no options"
                raise ValueError(f"{key}: method {self.name!r} has no such option; it has {has}")
        return self.config_class.from_dict({**(options or {}), **self.options})


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    title: str,
    paper: str = "",
    options: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    lrs: tuple[float, ...] = (),
    published: Mapping[str, Published] | None = None,
    cost: CostFormula | None = None,
    solver: str = "gradient",
    variants: Mapping[str, Variant] | None = None,
    replace: bool = False,
) -> Callable[[Registered], Registered]:
    """Class decorator that registers a method for recipes, command line, tables, cost, saving and loading.

    It decorates the method's `PromptGenerator`, with the configuration as its `config_class`. For a method without
    prompts it decorates the `PromptConfig` itself:

        @dataclass(frozen=True)
        class MeanPromptsConfig(fp.PromptConfig):
            kind: ClassVar[str] = "mean"
            num_prompts: int = 4

        @fp.register_method("mean", title="Mean prompts", recipe={"lr": 5e-3})
        class MeanPrompts(fp.PromptGenerator):
            known_at, config_class = "layer", MeanPromptsConfig
            ...

    Args:
        name: name of the method on the command line and in run directories: lower-case letters, digits and hyphens.
            The configuration's `kind` is the name in adapter files; they differ only for methods with variants.
        title: title in tables and other output.
        paper: authors, venue and arXiv number.
        options: options of the configuration that this name fixes.
        recipe: fields of `fastprompt.Recipe` that differ from the recipe that all methods share.
        lrs: learning rates that a comparison tries. If empty, the comparison includes the method only if it is named,
            and then trains at the recipe's rate.
        published: recipes of the authors by name, for `fastprompt.paper_recipe` (the first) and `adapt --recipe NAME`.
        cost: formula of the prompts' cost, `cost(sizes, config, tally)`; see
            `fastprompt.generators.accounting.PromptCost`. None if there is no formula for `fastprompt info --cost`.
        solver: "gradient", or "lbfgs" to fit the head to frozen features with `fastprompt.fit_linear_probe`.
        variants: further names of the method; see `Variant`.
        replace: replace a registration of the same name, for example when a notebook cell is run again.

    Raises:
        TypeError: the decorated class is neither a generator with a configuration nor a configuration, or an argument
            has the wrong type.
        ValueError: a name is malformed or taken, or options, recipe or variants do not fit. Nothing is registered.
    """

    def register(cls: Registered) -> Registered:
        config_class, generator_class = _parts(cls)
        base = Method(
            name=name,
            title=title,
            paper=paper,
            config_class=config_class,
            generator_class=generator_class,
            options=dict(options or {}),
            recipe=dict(recipe or {}),
            lrs=tuple(lrs),
            published=dict(published or {}),
            cost=cost,
            solver=solver,
        )
        methods = [base, *(_variant(base, other, variant) for other, variant in (variants or {}).items())]
        _check(methods, replace)
        if replace:
            for known in [m.name for m in _METHODS.values() if m.config_class.kind == config_class.kind]:
                del _METHODS[known]
        _METHODS.update({method.name: method for method in methods})
        return cls

    return register


def list_methods(*, on_swin: bool = False) -> list[str]:
    """Return the sorted names of all methods, for `fastprompt adapt --method`.

    Args:
        on_swin: return only the methods that are defined on Swin transformers.
    """
    _load_entry_points()
    return sorted(
        method.name
        for method in _METHODS.values()
        if not on_swin or method.generator_class is None or method.generator_class.takes_stages
    )


def registered_classes(package: str) -> dict[str, type]:
    """Return the configurations and generators that modules of `package` have registered, by class name."""
    classes = [cls for method in _METHODS.values() for cls in (method.config_class, method.generator_class) if cls]
    return {cls.__name__: cls for cls in classes if cls.__module__.startswith(f"{package}.")}


def get_method(name: str) -> Method:
    """Return the registration of a method by its name.

    Raises:
        ValueError: no method has this name; the message lists the names.
    """
    if name not in _METHODS:
        _load_entry_points()
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name).lower(), _METHODS, n=1)
        hint = f"did you mean {close[0]}? Otherwise, " if close else ""
        raise ArgumentError(
            "method", f"must be one of {', '.join(sorted(_METHODS))}, got {name!r}; {hint}{HOW_TO_REGISTER}"
        )
    return _METHODS[name]


def method_of(config: PromptConfig | str) -> Method:
    """Return the registration for a configuration, a kind or a method's name.

    If several names share the configuration's class, the first one with matching fixed options is returned.

    Raises:
        TypeError: `config` is neither a registered configuration nor a string.
        ValueError: no method has this kind or name.
    """
    if isinstance(config, str):
        if config not in _METHODS:
            _load_entry_points()
        named = [m for m in _METHODS.values() if config in (m.name, m.config_class.kind)]
        if not named:
            raise ArgumentError(
                "config",
                f"must be a method's configuration, such as fp.PGNConfig(), or one of "
                f"{', '.join(sorted(_METHODS))}, got {config!r}; {HOW_TO_REGISTER}",
            )
        return next((m for m in named if m.name == config), named[0])
    for method in _METHODS.values():
        fixed = method.options.items()
        if method.config_class is type(config) and all(getattr(config, key) == value for key, value in fixed):
            return method
    raise ArgumentTypeError("config", f"must be one of {', '.join(_config_names())}, got {type(config).__name__}")


def published_recipes() -> dict[str, Published]:
    """Return the published recipes of all methods, by name."""
    _load_entry_points()
    return {name: found for method in _METHODS.values() for name, found in method.published.items()}


def load_plugin(module: str) -> None:
    """Import a module that registers methods, unless it is already imported.

    Args:
        module: name of the module, also searched in the working directory, or the path of a `.py` file.

    Raises:
        ValueError: there is no such module or file, or it cannot be imported.
    """
    if not isinstance(module, str) or not module:
        raise ArgumentError("plugin", f"must be the name of a module or the path of a .py file, got {module!r}")
    path = Path(module).resolve()
    name, folder = (path.stem, path.parent) if path.suffix == ".py" else (module, Path.cwd())
    if path.suffix == ".py" and not path.is_file():
        raise ArgumentError(
            "plugin", f"must be the name of a module or the path of a .py file, got {module}, which does not exist"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # also for imports that the module does later
    importlib.invalidate_caches()
    try:
        imported = importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"plugin {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    if path.suffix == ".py" and Path(imported.__file__ or "").resolve() != path:
        raise ValueError(f"plugin {module!r} has the same name as the module {imported.__file__}; rename the file")


def build_generator(config: PromptConfig, geometry: Geometry | FrozenViT) -> PromptGenerator | None:
    """Build the generator of `config` for a backbone or its geometry; return None if the method has no prompts."""
    generator = method_of(config).generator_class
    return None if generator is None else generator(config, geometry)


def config_from_dict(values: Mapping[str, Any]) -> PromptConfig:
    """The inverse of `PromptConfig.to_dict`.

    Raises:
        TypeError: `values` is not a mapping.
        ValueError: `kind` is unknown or missing, or a key is not an option of that kind; the message names the key.
    """
    if not isinstance(values, Mapping):
        raise ArgumentTypeError("values", f"must be a mapping of options, got {type(values).__name__}")
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in [method.config_class.kind for method in _METHODS.values()]:
        _load_entry_points()
    classes = {method.config_class.kind: method.config_class for method in _METHODS.values()}
    if not isinstance(kind, str) or kind not in classes:
        raise ArgumentError("kind", f"must be one of {sorted(classes)}, got {kind!r}; {HOW_TO_REGISTER}")
    return classes[kind].from_dict(values)


def _parts(cls: Any) -> tuple[type[PromptConfig], type[PromptGenerator] | None]:
    """Return configuration and generator of the class that `register_method` decorates."""
    config_class, generator_class = cls, None
    if isinstance(cls, type) and issubclass(cls, PromptGenerator):
        config_class, generator_class = getattr(cls, "config_class", None), cls
        if config_class is None:
            raise TypeError(f"{cls.__name__}.config_class must be the method's PromptConfig, got none")
        if getattr(cls, "known_at", None) not in KNOWN_AT:
            raise ValueError(
                f"{cls.__name__}.known_at must be one of {KNOWN_AT}, got {getattr(cls, 'known_at', None)!r}"
            )
        if cls.role not in ROLES:
            raise ValueError(f"{cls.__name__}.role must be one of {ROLES}, got {cls.role!r}")
        if cls.takes_stages and cls.role != "sequence":
            raise ValueError(f"{cls.__name__}.takes_stages must be False with role {cls.role!r}")
        if cls.role == "queries" and cls.gather is PromptGenerator.gather:
            raise TypeError(f"{cls.__name__} must define gather, which role 'queries' needs")
        if inspect.isabstract(cls):
            raise TypeError(f"{cls.__name__} must define {', '.join(sorted(cls.__abstractmethods__))}")
    if not isinstance(config_class, type) or not issubclass(config_class, PromptConfig):
        what = "a PromptGenerator or a PromptConfig" if generator_class is None else "a PromptConfig"
        where = "register_method" if generator_class is None else f"{cls.__name__}.config_class"
        raise TypeError(f"{where} takes {what}, got {getattr(config_class, '__name__', config_class)!r}")
    label = config_class.__name__
    if "__dataclass_params__" not in vars(config_class) or not vars(config_class)["__dataclass_params__"].frozen:
        raise TypeError(f"{label} must be decorated with @dataclass(frozen=True)")
    if not isinstance(getattr(config_class, "kind", None), str) or not _is_name(config_class.kind):
        raise ValueError(
            f"{label}.kind must be a ClassVar, the method's name in files, of lower-case letters, digits and hyphens, "
            f"got {getattr(config_class, 'kind', None)!r}"
        )
    for field in dataclasses.fields(config_class):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TypeError(f"{label}.{field.name} must have a default, like every option")
    return config_class, generator_class


def _variant(base: Method, name: str, variant: Variant) -> Method:
    """Return the method `base` under another name."""
    if not isinstance(variant, Variant):
        raise TypeError(f"variants[{name!r}] must be a Variant, got {type(variant).__name__}")
    return dataclasses.replace(
        base,
        name=name,
        title=variant.title,
        options=dict(variant.options),
        recipe={**base.recipe, **variant.recipe},
        lrs=base.lrs if variant.lrs is None else tuple(variant.lrs),
        solver=variant.solver or base.solver,
    )


def _check(methods: list[Method], replace: bool) -> None:
    """Raise an error unless all names of one registration can be registered."""
    config_class = methods[0].config_class
    for method in methods:
        if not isinstance(method.name, str) or not _is_name(method.name):
            raise ArgumentError("name", f"must be lower-case letters, digits and hyphens, got {method.name!r}")
        if not isinstance(method.title, str) or not method.title:
            raise ArgumentError("title", f"must be a text, got {method.title!r}")
        if method.solver not in SOLVERS:
            raise ArgumentError("solver", f"must be one of {SOLVERS}, got {method.solver!r}")
        if method.solver == "lbfgs" and not method.head_only:
            raise ValueError(f"solver 'lbfgs' fits only a head, but {config_class.__name__} trains more")
        if method.cost is not None and not callable(method.cost):
            raise ArgumentTypeError(
                "cost", f"must be a function of (sizes, config, tally), got {type(method.cost).__name__}"
            )
        if not all(isinstance(found, Published) for found in method.published.values()):
            raise ArgumentTypeError("published", f"must map names to Published, got {dict(method.published)!r}")
        config_class.from_dict(method.options)
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ArgumentError("variants", f"must have distinct names, got {names}")
    for known in _METHODS.values():
        ours = known.config_class.kind == config_class.kind
        if ours and replace:
            continue
        where = f"{known.config_class.__module__}.{known.config_class.__name__}"
        if ours:
            raise ValueError(
                f"kind {config_class.kind!r} is registered already, by {where}; give {config_class.__name__} another "
                "kind, or pass replace=True"
            )
        for name in (*names, config_class.kind):
            if name in (known.name, known.config_class.kind):
                raise ValueError(f"name {name!r} is registered already, by {where}; choose another name")
        for name in methods[0].published:
            if name in known.published:
                raise ValueError(f"published recipe {name!r} is registered already, by {where}; choose another name")


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text) is not None


def _config_names() -> list[str]:
    return sorted({method.config_class.__name__ for method in _METHODS.values()})


_loaded_entry_points: set[str] = set()


def _load_entry_points() -> None:
    """Import each module that installed packages name in our entry points once; warn about failures."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.value in _loaded_entry_points:
            continue
        _loaded_entry_points.add(point.value)
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the entry point {point.name!r} of {ENTRY_POINTS} ({point.value}) cannot be loaded, so its methods "
                f"are not registered: {type(error).__name__}: {error}",
                stacklevel=3,
            )
