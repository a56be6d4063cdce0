from __future__ import annotations

import io
import json
import warnings

import pytest

from fastprompt.terminal import printable, printable_json, printable_warnings, say

HOSTILE = "a\x1b[31m\x1b]0;title\x07\x9b2J\u202eb\r\x7f\x00\u2028\udcff"


def test_what_a_terminal_obeys_is_escaped() -> None:
    assert printable(HOSTILE).isprintable()
    assert printable("\x1b[31m\u202e\udcff\r") == r"\x1b[31m\u202e\udcff\r"


@pytest.mark.parametrize("text", ["cat", "Ärger – 1 → 2", "猫", "👩\u200d🚀", "a\nb\tc", r"C:\new"])
def test_other_text_stays(text: str) -> None:
    assert printable(text) == text


def test_say_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"found {HOSTILE}")
    stream = io.StringIO()
    say(HOSTILE, stream)
    assert capsys.readouterr().out == f"found {stream.getvalue()}"
    assert stream.getvalue() == printable(HOSTILE) + "\n"


def test_json_is_exact_and_printable() -> None:
    value = {HOSTILE: [HOSTILE, "Ä", 1.5, None], "🚀": {}}
    text = printable_json(value)
    assert json.loads(text) == value
    assert text.replace("\n", "").isprintable()
    assert "Ä" in text


def test_warnings_are_printable() -> None:
    usual = warnings.formatwarning
    with printable_warnings():
        text = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "x.py", 1)
    assert printable(HOSTILE) in text
    assert text.replace("\n", "").isprintable()
    assert warnings.formatwarning is usual
