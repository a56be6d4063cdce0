"""Errors that carry the name of their argument."""

from __future__ import annotations

import pickle

import pytest

import fastprompt as fp
from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError, argument_names


@pytest.mark.parametrize(
    ("kind", "also"),
    [(ArgumentError, ValueError), (ArgumentTypeError, TypeError), (ArgumentPathError, FileNotFoundError)],
)
def test_an_error_is_of_the_builtin_kind_and_survives_pickling(kind: type[ArgumentError], also: type) -> None:
    error = pickle.loads(pickle.dumps(kind("epochs", "must be positive, got 0")))
    assert isinstance(error, also)
    assert isinstance(error, ValueError)
    assert (error.argument, error.problem) == ("epochs", "must be positive, got 0")
    assert str(error) == "epochs must be positive, got 0"


@pytest.mark.parametrize("kind", [ArgumentError, ArgumentTypeError, ArgumentPathError])
def test_an_argument_takes_the_name_of_the_caller(kind: type[ArgumentError]) -> None:
    with pytest.raises(kind, match=r"^data_root must be a folder$") as caught, argument_names(root="data_root"):
        raise kind("root", "must be a folder")
    assert isinstance(caught.value.__cause__, kind)


def test_other_errors_pass_as_they_are() -> None:
    other, plain = ArgumentError("seed", "must be an integer"), ValueError("root must be a folder")
    for error in (other, plain):
        with pytest.raises(ValueError, match="must be") as caught, argument_names(root="data_root"):
            raise error
        assert caught.value is error


def test_errors_of_the_library_carry_their_argument() -> None:
    with pytest.raises(ArgumentError) as caught:
        fp.VPTConfig(num_prompts=0)
    assert caught.value.argument == "VPTConfig.num_prompts"
    with pytest.raises(ArgumentTypeError) as caught:
        fp.load_data("mnist5k", image_size="112")
    assert caught.value.argument == "image_size"
