"""The command that shows the world."""

import pytest

from wizard_engine.world.__main__ import main
from wizard_engine.world.evolve import OPERATORS
from wizard_engine.world.solve import STYLES


def test_show_prints_problems_an_evolved_chain_and_a_judged_pair(capsys: pytest.CaptureFixture[str]):
    main(["--show", "3", "--seed", "1"])
    text = capsys.readouterr().out
    assert all(text.count(f"  {style} ") == 3 for style in STYLES)
    assert all(f"{operator} " in text for operator in OPERATORS)
    assert text.count("[[") == 4
