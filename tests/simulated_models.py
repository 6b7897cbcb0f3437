"""Small models of every kind that the tests of simulated ranks divide."""

import dataclasses

from wizard_engine.model import PRESETS

TINY = dataclasses.replace(PRESETS["tiny"], layers=4)
MODELS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "mixture": dataclasses.replace(TINY, tied=False, experts=4),
    "tied mixture": dataclasses.replace(TINY, experts=4),
}
