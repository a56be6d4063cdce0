"""The entry point: parse a command, run it, return its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Union

import tyro

import fastprompt
from fastprompt.arguments import ArgumentError
from fastprompt.cli.adapt import Adapt, adapt
from fastprompt.cli.bench import Bench, bench
from fastprompt.cli.convert import Convert, convert
from fastprompt.cli.demo import Demo, demo
from fastprompt.cli.eval import Eval, evaluate_adapter
from fastprompt.cli.export import Export, export
from fastprompt.cli.info import Info, info
from fastprompt.cli.options import load_plugins
from fastprompt.cli.predict import Predict, predict
from fastprompt.cli.protocols import Protocols, protocols
from fastprompt.cli.report import Report, report
from fastprompt.cli.serve import Serve, serve
from fastprompt.cli.words import (
    check_command,
    fields_of,
    flags_of,
    group_type,
    key_values,
    spelled_out,
    value_of,
    with_settings_file,
)
from fastprompt.terminal import printable_warnings, say
from fastprompt.train.termination import EXIT_CODE, Terminated

WRONG_INPUT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


PUBLISHED = {
    "published": "name of a published recipe, such as vapt-paper; published= may be omitted",
    "base_lr": "learning rate of the published recipe before it is scaled by the batch size",
}
"""Keys that --recipe takes in addition to the fields of a recipe, and their help."""

CLASSES: dict[str, type] = {
    "adapt": Adapt,
    "eval": Eval,
    "predict": Predict,
    "export": Export,
    "convert": Convert,
    "serve": Serve,
    "demo": Demo,
    "info": Info,
    "report": Report,
    "protocols": Protocols,
    "bench": Bench,
}


def options_of(method: str) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return the types of a method's command-line options, and a function that describes an option."""
    from fastprompt.generators import get_method

    found = get_method(method)
    return fields_of(found.config_class, found.options)


def typed_groups(name: str, words: list[str]) -> tuple[type, list[str]]:
    """Extend the class of `adapt` or `info` by typed flags for the method's options and the recipe.

    Returns that class and the words to parse with it.
    """
    command: type = CLASSES[name]
    groups: list[tuple[str, Any, Any]] = []
    method = value_of(words, "--method") or ("pgn" if name == "adapt" else None)
    if method is None:
        if "--set" in words:
            raise ArgumentError("method", "is required with --set")
        return command, words
    hints, describe = options_of(method)
    words = spelled_out(words, "options", "--set", hints, f"method {method!r}")
    groups.append(("options", group_type("Options", hints, describe), field(default_factory=dict)))
    if name == "adapt":
        from fastprompt.train.recipes import GRID_FIELDS, Recipe

        hints, describe_field = fields_of(Recipe)
        lists = {key: list[hints[key]] for key in GRID_FIELDS}  # type: ignore[valid-type]
        hints |= {"published": str, "base_lr": float}
        words = spelled_out(words, "recipe", "--recipe", hints, "the recipe", bare="published")
        groups.append(
            (
                "recipe",
                group_type("Recipe", hints, lambda key: PUBLISHED.get(key) or describe_field(key)),
                field(default_factory=dict),
            )
        )
        words = spelled_out(words, "grid", "--grid", lists, "the grid", several=True)
        said = group_type("Grid", lists, lambda key: f"values of --recipe.{key.replace('_', '-')} to try")
        groups.append(("grid", said, field(default_factory=dict)))
    typed = make_dataclass(command.__name__, groups, bases=(command,))
    typed.__doc__ = command.__doc__
    return typed, words


def recipe_values(items: Sequence[str]) -> dict[str, Any]:
    """Parse `["label_smoothing=0.1", ...]` into typed recipe fields, for programs that parse their own flags."""
    from fastprompt.train.recipes import Recipe

    hints, describe = fields_of(Recipe)
    found = key_values(items, "--recipe", hints, "the recipe")
    words = [word for key, value in found.items() for word in (f"--{key.replace('_', '-')}", *value)]
    return dict(tyro.cli(group_type("Recipe", hints, describe), args=words))


def parse(words: list[str]) -> Any:
    """Parse the words of a command line. Usage errors raise `SystemExit(2)`, `--help` raises `SystemExit(0)`.

    Raises:
        ValueError: the first word is not a command, a method or option is unknown, or a settings file is wrong.
    """
    check_command(words)
    classes, name = dict(CLASSES), words[0]
    if name in ("adapt", "serve"):
        words = [name, *with_settings_file(words[1:], CLASSES[name])]
    try:
        load_plugins(words)
    except ValueError as error:
        raise ArgumentError("plugin", f"cannot be loaded: {error}") from error
    if name in ("adapt", "info"):
        classes[name], words = typed_groups(name, words)
    commands: Any = Union[tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in classes.items())]  # noqa: UP007
    return tyro.cli(
        commands,
        args=words,
        prog="fastprompt",
        description="Instance-conditioned visual prompts on frozen vision transformers; --version prints the version.",
    )


def run(command: Adapt | Eval | Predict | Export | Convert | Serve | Demo | Info | Report | Protocols | Bench) -> None:
    """Run one command."""
    if isinstance(command, Adapt):
        adapt(command)
    elif isinstance(command, Eval):
        evaluate_adapter(command)
    elif isinstance(command, Predict):
        predict(command)
    elif isinstance(command, Export):
        export(command)
    elif isinstance(command, Convert):
        convert(command)
    elif isinstance(command, Serve):
        serve(command)
    elif isinstance(command, Demo):
        demo(command)
    elif isinstance(command, Info):
        info(command)
    elif isinstance(command, Protocols):
        protocols(command)
    elif isinstance(command, Bench):
        bench(command)
    else:
        report(command)


def described(error: BaseException, name: str | None) -> str:
    """Return the error's text; if the command takes the argument as a flag, name the flag."""
    if isinstance(error, ArgumentError) and name is not None:
        argument = error.argument.rpartition(".")[2]  # VPTConfig.num_prompts
        if argument in flags_of(CLASSES[name]):
            return f"--{argument.replace('_', '-')} {error.problem}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Flags that do not parse raise `SystemExit(2)`, `--help` raises `SystemExit(0)`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        say(f"fastprompt {fastprompt.__version__}")
        return 0
    name = words[0] if words and words[0] in CLASSES else None
    called = f"fastprompt {name}" if name else "fastprompt"
    try:
        command = parse(words)
    except (ValueError, OSError) as error:
        say(f"{called}: error: {' '.join(described(error, name).split())}", sys.stderr)
        return 2
    try:
        with printable_warnings():
            run(command)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if isinstance(command, (Adapt, Bench)):
            say(f"\ninterrupted; run the same command again to resume from {command.out}", sys.stderr)
        else:
            say("\ninterrupted; nothing was written", sys.stderr)
        return 130
    except Terminated as error:
        again = "run the same command again to resume"
        say(f"\nterminated{'; a checkpoint was written' if error.saved else ''}; {again}", sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if command.debug:
            say(traceback.format_exc(), sys.stderr)
        text = " ".join(described(error, name).split()) or type(error).__name__
        known = isinstance(error, (*WRONG_INPUT, OSError, RuntimeError, ArithmeticError, ImportError))
        say(
            f"{called}: error: {text if known else f'{type(error).__name__}: {text}'}",
            sys.stderr,
        )
        return 2 if isinstance(error, WRONG_INPUT) else 1
