"""Rewrite the words of a command line for tyro: command names, settings files, KEY=VALUE."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_origin, get_type_hints

import tyro

from fastprompt.arguments import ArgumentError

COMMANDS = ("adapt", "eval", "predict", "export", "convert", "serve", "demo", "info", "report", "protocols", "bench")
ALSO_CALLED = {
    "adapt": ("train", "fit", "finetune", "fine-tune", "tune", "run", "learn"),
    "eval": ("evaluate", "test", "validate", "score", "accuracy"),
    "predict": ("classify", "infer", "inference", "prediction", "label"),
    "export": ("save", "onnx", "openvino", "client"),
    "convert": ("import", "official", "checkpoint"),
    "serve": ("host", "server", "deploy", "api"),
    "demo": ("gradio", "page", "web", "app", "gui", "ui"),
    "info": ("show", "list", "describe", "help", "cost", "version", "methods", "backbones"),
    "report": ("html", "plot", "plots", "compare", "summary"),
    "protocols": ("protocol", "datasets", "data", "tasks"),
    "bench": ("benchmark", "vtab", "table"),
}
EXAMPLES = {
    "adapt": "fastprompt adapt --data FOLDER --out runs/first",
    "eval": "fastprompt eval runs/first",
    "predict": "fastprompt predict runs/first photo.jpg",
    "export": "fastprompt export runs/first --format onnx --out first.onnx",
    "convert": "fastprompt convert FILE --backbone NAME --out my-adapter",
    "serve": "fastprompt serve --adapter NAME=runs/first",
    "demo": "fastprompt demo runs/first",
    "info": "fastprompt info runs/first",
    "report": "fastprompt report runs/first runs/second",
    "protocols": "fastprompt protocols vtab1k --data-root DIR",
    "bench": "fastprompt bench vtab1k --data-root DIR --out runs/vtab1k",
}
SHORT = {"set": "options", "recipe": "recipe", "grid": "grid"}
"""Flags that take KEY=VALUE, and the group of typed flags that each stands for."""


def check_command(words: Sequence[str]) -> None:
    """Raise `ValueError` with a suggestion unless the first word is a command."""
    if words and (words[0].startswith("-") or words[0] in COMMANDS):
        return
    if not words:
        raise ValueError(f"a command is needed: {', '.join(COMMANDS)}; for example `{EXAMPLES['adapt']}`")
    names = {also: command for command, others in ALSO_CALLED.items() for also in (command, *others)}
    close = difflib.get_close_matches(words[0].lower(), names, n=1, cutoff=0.7)
    hint = f"did you mean `{EXAMPLES[names[close[0]]]}`?" if close else "see `fastprompt --help`"
    raise ValueError(f"{words[0]!r} is not a command ({', '.join(COMMANDS)}); {hint}")


def value_of(words: Sequence[str], flag: str) -> str | None:
    """Return the last value of `--flag VALUE` or `--flag=VALUE`, or None if the flag is absent."""
    found = None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else words[i + 1] if i + 1 < len(words) else None
    return found


def group_type(name: str, hints: Mapping[str, Any], describe: Callable[[str], str]) -> Any:
    """Build a `TypedDict` with one optional key per flag; a flag that is not given is absent from the dictionary."""
    annotated = {}
    for key, hint in hints.items():
        said = tyro.conf.arg(help=describe(key), help_behavior_hint="")
        annotated[key] = Annotated[hint, said, tyro.conf.FlagConversionOff]  # booleans are words, as in files
    return TypedDict(name, annotated, total=False)  # type: ignore[operator]


def fields_of(cls: type, leave_out: Iterable[str] = ()) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return the types of a dataclass's fields, and a function that gives a field's documentation and default.

    Documentation of base classes counts, too.
    """
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        documented |= _attributes(base.__doc__ or "", fields)

    def describe(name: str) -> str:
        return f"{documented.get(name, '')} (default: {fields[name].default})".strip()

    return {name: hints[name] for name in fields if name not in {*leave_out}}, describe


def flags_of(command: type) -> set[str]:
    """Return the names of a command's fields that are flags; the others are positional."""
    hints = get_type_hints(command, include_extras=True)
    return {f.name for f in dataclasses.fields(command) if tyro.conf.Positional not in get_args(hints[f.name])}


def _attributes(text: str, names: Iterable[str]) -> dict[str, str]:
    """Parse a docstring's `Attributes:` section into name -> text; one line may document several names."""
    section = " ".join(text.partition("Attributes:")[2].split("\n\n")[0].split())
    parts = re.split(rf"(?:^|(?<=\s))({'|'.join(map(re.escape, names))}): ", section)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def key_values(items: Sequence[str], flag: str, known: Iterable[str], owner: str) -> dict[str, list[str]]:
    """Split `["num_prompts=8", "widths=(16, 32)"]` into `{"num_prompts": ["8"], "widths": ["16", "32"]}`.

    Raises:
        ValueError: an item is not KEY=VALUE, or a key is given twice or is not in `known`, the keys of `owner`.
    """
    names, found = list(known), {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise ValueError(f"{flag} must be KEY=VALUE, got {item!r}")
        if key in found:
            raise ValueError(f"{flag}: {key!r} is given twice")
        found[key] = _value_words(text)
    for key in found:
        check_key(key, names, owner)
    return found


def check_key(key: str, names: Sequence[str], owner: str) -> None:
    """Raise `ValueError` with the nearest name unless `key` is one of `names`."""
    if key not in names:
        close = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{key}: {owner} has no such option; it has {', '.join(names) or 'none'}{hint}")


def _value_words(text: str) -> list[str]:
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        return [word for part in text[1:-1].split(",") for word in _value_words(part) if word]
    if text.lower() in ("true", "false", "none"):
        return [text.title()]
    return [text.strip("'\"")]


def flags(group: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """Write a group's values as typed flags: `{"widths": ["16", "32"]}` -> `--options.widths 16 32`."""
    return [word for key, words in values.items() for word in (f"--{group}.{key.replace('_', '-')}", *words)]


def spelled_out(
    words: Sequence[str],
    group: str,
    flag: str,
    known: Iterable[str],
    owner: str,
    bare: str | None = None,
    several: bool = False,
) -> list[str]:
    """Replace `--set KEY=VALUE ...` by the typed flags of `group`, in place.

    A word without "=" is the value of the key `bare`, if `bare` is given. With `several`, each key has one or several
    values, as in KEY=1,2,3.
    """
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word != flag:
            out.append(word)
            continue
        items = []
        while rest and not rest[0].startswith("--"):
            item = rest.pop(0)
            items.append(f"{bare}={item}" if bare and "=" not in item else item)
        if not items:
            raise ValueError(f"{flag} must be KEY=VALUE, got nothing")
        if several:
            parts = [item.partition("=") for item in items]
            items = [f"{key}{equals}[{text.strip('()[]')}]" if equals else key for key, equals, text in parts]
        out += flags(group, key_values(items, flag, known, owner))
    return out


def with_settings_file(words: Sequence[str], command: type) -> list[str]:
    """Replace `--config FILE` by the file's settings, written as flags in front of those of the command line.

    The file is YAML (a run's run.json is valid YAML): flag names without dashes, `options` and `recipe` as mappings.
    Flags on the command line override the file.
    """
    rest, files = [], []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif equals or words:
            files.append(Path(value if equals else words.pop(0)))
        else:
            raise ArgumentError("config", "must be a YAML file, got nothing")
    if len(files) > 1:
        raise ArgumentError("config", f"must be one file, got {', '.join(map(str, files))}")
    return [*_file_words(files[0], command, _given(rest)), *rest] if files else rest


def _given(words: Sequence[str]) -> set[str]:
    """Return the settings given on a command line, in any spelling: --lr, --recipe.lr and --recipe lr=... are `lr`."""
    names, items = set(), False
    for word in words:
        if word.startswith("--"):
            items = word[2:] in SHORT
            name = re.sub(r"^--(no-|options\.|recipe\.|grid\.)?", "", word.partition("=")[0])
            names |= set() if items else {name.replace("-", "_")}
        elif items:
            key, equals, _ = word.partition("=")
            names.add(key.replace("-", "_") if equals else "published")
    return names


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file by name, with underscores for dashes.

    Raises:
        ValueError: the file is not YAML, or holds no mapping. OSError: it cannot be read.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError("config", f"must be YAML, got {path} ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ArgumentError("config", f"must be a mapping of settings, got {path} with {type(settings).__name__}")
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def _file_words(path: Path, command: type, given: set[str]) -> list[str]:
    fields = {f.name: f for f in dataclasses.fields(command) if f.name not in ("config", "debug")}
    hints, words = get_type_hints(command), []
    for name, value in read_config(path).items():
        check_key(name, [*fields], str(path))
        if name in given:
            continue
        if name in SHORT.values():
            if not isinstance(value, dict):
                raise ArgumentError("config", f"must have a mapping as {name}, got {json.dumps(value)} in {path}")
            inner = {str(key).replace("-", "_"): _yaml_words(item) for key, item in value.items()}
            words += flags(name, {key: item for key, item in inner.items() if key not in given})
        elif hints[name] is bool:
            if not isinstance(value, bool):
                raise ArgumentError("config", f"must have true or false as {name}, got {json.dumps(value)} in {path}")
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif get_origin(hints[name]) is list:  # a flag that is repeated for each item
            words += [word for item in _yaml_words(value) for word in (f"--{name.replace('_', '-')}", item)]
        elif value is not None or type(None) not in get_args(hints[name]):
            words += [f"--{name.replace('_', '-')}", *_yaml_words(value)]
    return words


def _yaml_words(value: Any) -> list[str]:
    return [word for item in value for word in _yaml_words(item)] if isinstance(value, list) else [str(value)]
