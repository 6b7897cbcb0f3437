"""The time of generated answers against the same by hand, and what changes it."""

import dataclasses

import pytest

from wizard_engine.model import PRESETS
from wizard_engine.planning.generation import Answers, Generation
from wizard_engine.planning.planner import Options, Planner
from wizard_engine.planning.rates import Gpu, Rates

# One layer: 2 heads of 8 channels over a width of 16, one of keys; feed-forward of 32; 40 entries, head and embedding.
MODEL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn_width=32, tied=False
)
GPU = Gpu(memory_gib=10.0, flops=1e9, bandwidth=1e6, node_link=1e9, network=1e9)
RATES = Rates(matrix=0.5, memory=0.25)
ATTENTION, FEED_FORWARD, TABLE, NORMS = 16 * 8 * 2 * (2 + 1), 3 * 16 * 32, 40 * 16, 3 * 16
WEIGHTS = ATTENTION + FEED_FORWARD + 2 * TABLE + NORMS


def generation(gpus=1, group=None, gpu=GPU, value_bytes=2):
    planner = Planner(Options("tiny", gpus), RATES, config=MODEL, gpu=gpu)
    return Generation(planner, gpus, group, value_bytes=value_bytes)


def by_hand(each, steps, prompt, answer, group=1, value_bytes=2):
    """Seconds of a group that generates `each` answers in so many steps."""
    read = value_bytes * (steps * WEIGHTS + each * answer * 2 * 8 * (prompt + answer / 2))
    operations = 2 * (ATTENTION + FEED_FORWARD + TABLE) * each * (prompt + answer)
    return read / (group * 0.25e6) + operations / (group * 0.5e9)


def test_seconds_are_those_by_hand():
    # 8 answers of 20 tokens at once: 20 steps. At most 4 at once: 40 steps.
    assert generation().gpu_seconds(Answers(8, 10, 20, at_once=8)) == pytest.approx(by_hand(8, 20, 10, 20))
    assert generation().gpu_seconds(Answers(8, 10, 20, at_once=4)) == pytest.approx(by_hand(8, 40, 10, 20))
    wide = generation(value_bytes=4).gpu_seconds(Answers(8, 10, 20, at_once=8))
    assert wide == pytest.approx(by_hand(8, 20, 10, 20, value_bytes=4))
    # Four GPUs generate two each; in groups of two a group has four answers.
    four = Answers(8, 10, 20, at_once=8)
    assert generation(4).gpu_seconds(four) == pytest.approx(4 * by_hand(2, 20, 10, 20))
    assert generation(4, group=2).gpu_seconds(four) == pytest.approx(4 * by_hand(4, 20, 10, 20, group=2))
    assert generation().gpu_seconds(Answers(0, 10, 20, at_once=8)) == 0


def test_a_group_is_as_small_as_holds_the_model():
    needed = 2 * WEIGHTS / 2**30
    for memory, group in ((needed, 1), (needed / 2, 2), (needed / 3, 4), (needed / 4, 4), (needed / 5, 8)):
        gpu = dataclasses.replace(GPU, memory_gib=RATES.reserve_gib + memory * 1.001)
        made = generation(16, gpu=gpu)
        assert made.group == made.smallest == group and made.groups == 16 // group
    # 141 billion weights in bf16 are 263 GiB: four H100 of 75 GiB hold them.
    assert Generation(Planner(Options("8x22b", 128), Rates()), 128).group == 4
    assert Generation(Planner(Options("7b", 8), Rates()), 8).group == 1
