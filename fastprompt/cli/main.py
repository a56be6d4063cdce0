"""The entry point: which command, and its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import tyro

from fastprompt.cli.adapt import Adapt, adapt
from fastprompt.cli.eval import Eval, evaluate_adapter
from fastprompt.cli.export import Export, export
from fastprompt.cli.info import Info, info
from fastprompt.cli.options import load_plugins
from fastprompt.cli.predict import Predict, predict
from fastprompt.cli.report import Report, report
from fastprompt.cli.serve import Serve, serve

WRONG_INPUT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


Command = (
    Annotated[Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def run(command: Adapt | Eval | Predict | Export | Serve | Info | Report) -> None:
    """Run one command."""
    if isinstance(command, Adapt):
        adapt(command)
    elif isinstance(command, Eval):
        evaluate_adapter(command)
    elif isinstance(command, Predict):
        predict(command)
    elif isinstance(command, Export):
        export(command)
    elif isinstance(command, Serve):
        serve(command)
    elif isinstance(command, Info):
        info(command)
    else:
        report(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A usage error leaves with `SystemExit(2)`, `--help` with
    `SystemExit(0)`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        load_plugins(words)
    except ValueError as error:
        print(f"fastprompt: error: --plugin: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    command = tyro.cli(
        Command,
        args=words,
        prog="fastprompt",
        description="Instance-conditioned visual prompts on frozen vision transformers.",
    )
    name = type(command).__name__.lower()
    try:
        run(command)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if isinstance(command, Adapt):
            print(f"\ninterrupted; the same command goes on with what is in {command.out}", file=sys.stderr)
        else:
            print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if command.debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (*WRONG_INPUT, OSError, RuntimeError, ArithmeticError, ImportError))
        print(
            f"fastprompt {name}: error: {text if known else f'{type(error).__name__}: {text}'}",
            file=sys.stderr,
        )
        return 2 if isinstance(error, WRONG_INPUT) else 1
