"""Lines of text are the same to every reader, and text of others steers no terminal."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.metrics import MetricsLogger
from wizard_engine.runtime.text_lines import LINE_END, LINE_ENDS, LINE_START, one_line, printable, split_lines
from wizard_engine.synthesis.outputs import print_table

TEXT = st.text(st.one_of(st.sampled_from(LINE_ENDS + "a#\u202e\u200b\x1b"), st.characters()), max_size=30)


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_split_lines_are_those_of_python(text):
    assert split_lines(text) == (text + "|").splitlines()[:-1] + [(text + "|").splitlines()[-1][:-1]]
    starts = [match.start() for match in re.finditer(rf"{LINE_START}(?:[^\r]|\r(?!\n)|\r\n)", text)]
    assert not text or starts[0] == 0
    assert len(re.findall(rf"{LINE_START}[^{LINE_ENDS}]+{LINE_END}", text)) == sum(map(bool, split_lines(text)))


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_printable_text_is_one_line_without_controls_and_keeps_the_rest(text):
    shown = printable(text)
    assert shown.splitlines() == ([shown] if shown else []) and "\x1b" not in shown and "\u202e" not in shown
    kept = re.sub(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])", "", shown)
    assert all(character in text for character in kept)


def test_printable_escapes_what_moves_the_cursor_or_turns_the_text():
    assert printable("a\x1b[2Jb\r\nc\x9b\u202ed\u2028\x7f") == "a\\x1b[2Jb\\r\\nc\\x9b\\u202ed\\u2028\\x7f"
    assert printable("père 中文 👨\u200d👩\u200d👧") == "père 中文 👨\u200d👩\u200d👧"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r" and one_line(" a\u2028b\x1c\x85c ") == "a b c"


def test_a_table_has_a_line_a_key_whatever_the_key(capsys):
    print_table("skill", {"add\nition\x1b[31m": {"wins": 1}, "b\u2028c": {"wins": 2}})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "add\\nition\\x1b" in lines[1] and "\x1b" not in "".join(lines)


def test_an_error_is_one_line_of_the_log(capsys, monkeypatch):
    def fails(cfg):
        raise ValueError("rows.jsonl:3: expected text, got 'x\nrecipe.py: all is well\x1b[1A'")

    monkeypatch.setattr("wizard_engine.runtime.launch.cli", lambda config, presets: None)
    with pytest.raises(SystemExit):
        launch(fails, object)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and "x\\nrecipe.py: all is well\\x1b[1A" in printed
    MetricsLogger.warn("loss\x1b[2J rose")
    assert "loss\\x1b[2J rose" in capsys.readouterr().err
