"""Metrics: full precision, resume, cut lines, refusals."""

import io
import json
import re
import sys
import time

import numpy as np
import pytest
import torch

from wizard_engine.runtime import metrics
from wizard_engine.runtime.metrics import MetricsLogger, byte_bar, progress, read_metrics


def logger(path, **options):
    return MetricsLogger(path, 10, "test", quiet=True, **options)


def test_log_keeps_every_digit(tmp_path):
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "lr": np.float64(1 / 3), "norm": torch.tensor(0.1), "tokens": 2**60}
    log = logger(tmp_path / "deep" / "m.jsonl")
    log.log(step=1, **values)
    log.close()
    log.close()
    (line,) = read_metrics(tmp_path / "deep" / "m.jsonl")
    assert line == {"step": 1, **values, "norm": float(torch.tensor(0.1))}
    assert list(line)[:2] == ["step", "loss"] and isinstance(line["tokens"], int)


def test_log_writes_each_line_at_once_and_not_a_number_as_null(tmp_path):
    log = logger(tmp_path / "m")
    log.log(step=1, loss=float("nan"), norm=float("inf"))
    assert (tmp_path / "m").read_text() == '{"step": 1, "loss": null, "norm": null}\n'
    log.close()


@pytest.mark.parametrize("value", ["1", None, ["x"], (1.0,), 1j])
def test_log_refuses_what_is_no_number(tmp_path, value):
    log = logger(tmp_path / "m")
    with pytest.raises(TypeError, match="metric loss: expected a number"):
        log.log(step=1, loss=value)
    assert (tmp_path / "m").read_text() == ""
    log.close()


def test_resume_drops_later_and_cut_lines_and_goes_on(tmp_path):
    log = logger(tmp_path / "m")
    for step in range(1, 6):
        log.log(step=step, loss=step / 3)
    log.close()
    with open(tmp_path / "m", "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [1, 2, 3, 4, 5]
    log = logger(tmp_path / "m", resume_step=3)
    log.log(step=4, loss=9.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "m")] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),
        (4, 9.0),
    ]
    logger(tmp_path / "m").close()
    assert (tmp_path / "m").read_text() == ""


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}"])
def test_resume_names_a_broken_line(tmp_path, line):
    (tmp_path / "m").write_text(json.dumps({"step": 1}) + f"\n{line}\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(ValueError, match=r"m:2: expected a JSON object"):
        logger(tmp_path / "m", resume_step=2)


def test_bar_shows_loss_rate_and_mfu(tmp_path, capsys):
    log = MetricsLogger(tmp_path / "m", 4, "sft", resume_step=1)
    log.log(step=2, loss=0.123456, tokens_per_second=31234.5, mfu=0.25, other=7.0)
    log.close()
    text = capsys.readouterr().err
    assert "sft" in text and "2/4" in text and "loss=0.1235" in text and "mfu=0.25" in text and "other" not in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "quiet", "is_shown"), [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)]
)
def test_progress_shows_a_bar_on_a_terminal_only(stderr, quiet, is_shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", stderr())
    assert list(progress([3, 4], desc="tokenize", unit="row", quiet=quiet)) == [3, 4]
    with progress(desc="judge", unit="call", total=2, quiet=quiet) as bar:
        bar.update(2)
    written = sys.stderr.getvalue()
    assert [word in written for word in ("tokenize", "row/s", "judge", "call/s")] == [is_shown] * 4
    assert capsys.readouterr().out == ""


# Catches: minutes of silence in a log file, also during one long item; lines of a bar that is closed or quiet.
def test_a_bar_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "LINE_SECONDS", 0.02)

    def printed_while(bar):
        for _ in range(500):
            if text := capsys.readouterr().err:
                return text.splitlines()[0]
            time.sleep(0.01)

    shown = {bar: printed_while(bar) for bar in progress(iter("ab"), desc="audit", unit="pass", total=2)}
    assert shown["a"].startswith("audit: 0/2 pass [00:00<?]") and "1/2" in shown["b"]
    with byte_bar("load x", 3 * 2**30) as bar:
        bar.update(2**30)
        assert "load x: 1.00G/3.00G B" in printed_while(bar)
    capsys.readouterr()
    assert list(progress("ab", desc="audit", unit="pass", quiet=True)) == ["a", "b"] and bar.n == 2**30
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


# Catches: a log file with a line for each step of a bar; one without loss, or without the last step.
def test_steps_without_a_terminal_are_lines_with_their_values(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "LINE_SECONDS", 60.0)
    log = MetricsLogger(tmp_path / "m", 900, "sft", resume_step=100)
    for step in range(101, 901):
        log.log(step=step, loss=2.0 + step)
        log.show_phase("generate")
    assert capsys.readouterr().err == "" and log._bar.postfix == "loss=902, now=generate"
    log.close()
    log.close()
    assert re.fullmatch(r"sft: 900/900 step \[00:00<00:00, loss=902, now=generate\]\n", capsys.readouterr().err)


# Catches: a line every five seconds for days.
def test_lines_of_a_long_bar_are_rare(monkeypatch):
    pauses = []

    class Ended:
        def wait(self, seconds):
            pauses.append(seconds)
            return len(pauses) == 4

    bar = progress(desc="judge", unit="call", total=2)
    for number, lasted in enumerate((1, 100, 3600)):
        monkeypatch.setattr(metrics.Progress, "seconds", property(lambda self, _=number, lasted=lasted: lasted))
        pauses.clear()
        metrics._lines(lambda: bar, Ended())
        assert pauses == [5] + 3 * [max(5, min(lasted / 10, 60))]


# Catches: a model that is loaded or saved with --quiet, whose code has no such option, and shows a bar.
def test_nothing_is_shown_within_silenced(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    for quiet in (True, False):
        with metrics.silenced(quiet), metrics.silenced(False), byte_bar("load x", 10) as bar:
            assert bar.is_shown is not quiet
    assert byte_bar("load x", 10).is_shown


def test_a_bar_keeps_the_values_of_earlier_steps(tmp_path):
    log = MetricsLogger(tmp_path / "m", 9, "test", shown=("loss", "held_out_loss"))
    log.show({"held_out_loss": 2.5, "lr": 1.0})
    log.log(step=1, loss=3.0)
    assert log._bar.postfix == "loss=3, held_out_loss=2.5"
    log.log(step=2, loss=2.0, held_out_loss=1.5)
    assert log._bar.postfix == "loss=2, held_out_loss=1.5"
    log.close()
