"""Kernel benchmarks: counts of work, the oracle, what is timed, comparison of runs, tables, the command line."""

import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benchmarks import attention_problem, gpu_timing, kernel_checks, kernel_peers, kernel_rows, kernels, roofline
from benchmarks.attention_problem import Attention, checked_heads, in_blocks, visible_pairs
from benchmarks.command_line import percent
from benchmarks.kernel_cases import OPERATIONS, Case, cases, small_problems
from benchmarks.kernel_checks import Oracle, Verdict, failures, largest_error, repeats_bits, roughened
from benchmarks.kernel_peers import LIGER, Variant, variants
from benchmarks.kernel_problems import AdamW, RmsNorm, Rope, SwiGlu, Work, call_of
from benchmarks.moe_problem import LOADS, Experts, chosen
from kernels.configuration import use_arch

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ROUGH = Attention((5, 0, 9, 1, 14), 4, 2, 8, padding=3)


def row(us: float = 100.0, *, deviation: float = 1.0, variant: str = "triton", **more) -> dict:
    times = {"p20": us - deviation, "p50": us, "p80": us + deviation}
    fields = {
        "op": "rope",
        "phase": "forward",
        "label": "T=4 fp32",
        "variant": variant,
        "is_ours": variant == "triton",
        "status": "right",
        "kernel_us": times,
        "wall_us": times,
        "us": us,
        "gpu": "H100",
        "hardware": "x",
        "tflops": 1.0,
        "gbps": 50.0,
        "share_of_copy": 0.5,
        "flops": 100,
        "bytes": 50,
        "commit": "abc",
        "date": "2026-11-25T00:00:00",
        "command": "python -m benchmarks.kernels",
        "torch": "2.11",
        "ceilings": {"copy_gbps": 100.0, "matrix_tflops": 10.0},
    }
    return fields | more


def untimed(status: str, **more) -> dict:
    return {name: value for name, value in row(**more).items() if name not in ("us", "kernel_us")} | {"status": status}


# Catches: a window that does not count the query itself; the diagonal left out; a window longer than the sequence.
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 50])
def test_visible_pairs_are_those_that_a_loop_counts(causal, window):
    for length in (0, 1, 2, 7, 13):
        seen = [
            (i, j)
            for i in range(length)
            for j in range(length)
            if (j <= i or not causal) and (window is None or j > i - window)
        ]
        assert visible_pairs(length, causal, window) == len(seen), length


def test_pairs_of_ragged_sequences_stay_inside_them():
    assert Attention((3, 2), 2, 1, 4).pairs == 6 + 3
    assert Attention((3, 2), 2, 1, 4, causal=False).pairs == 9 + 4
    assert Attention((3, 2), 2, 1, 4, window=2).pairs == 5 + 3


# By hand, b = 2 bytes. Catches: a backward counted as a forward; heads counted as key heads; the LSE left out.
@pytest.mark.parametrize(
    ("problem", "phase", "flops", "moved"),
    [
        (Attention((3, 2), 2, 1, 4), "forward", 4 * 4 * 2 * 9, 2 * 3 * 5 * 4 * 2 + 4 * 5 * 2),
        (Attention((3, 2), 2, 1, 4), "backward", 10 * 4 * 2 * 9, 2 * 240 + 40),
        (RmsNorm(10, 100), "forward", 4000, 4000),
        (RmsNorm(10, 100), "backward", 8000, 6000),
        (RmsNorm(10, 100, residual=True), "forward", 5000, 8000),
        (RmsNorm(10, 100, residual=True), "backward", 9000, 8000),
        (Rope(10, 4, 2, 8), "forward", 3 * 6 * 80, 2 * 6 * 80 * 2),
        (SwiGlu(10, 100), "forward", 5000, 6000),
        (SwiGlu(10, 100), "backward", 10_000, 10_000),
        (AdamW(1000), "step", 14_000, 28_000),
    ],
)
def test_work_equals_hand_count(problem, phase, flops, moved):
    assert problem.work(phase, 2) == Work(flops, moved)


def test_bytes_of_an_update_are_those_of_its_tensors():
    tensors = AdamW(10).inputs(torch.bfloat16, CPU)
    read = sum(tensors[name].nbytes for name in ("master", "exp_avg", "exp_avg_sq", "gradient"))
    written = sum(tensors[name].nbytes for name in ("master", "exp_avg", "exp_avg_sq", "copy"))
    assert read + written == AdamW(10).work("step", 2).bytes


def loop_attention(problem: Attention, tensors: dict) -> torch.Tensor:
    """One query at a time, float64."""
    q, k, v = (tensors[name].double() for name in ("q", "k", "v"))
    out, start = [], 0
    scale = problem.scale or problem.width**-0.5
    for length in problem.lengths:
        for i in range(length):
            last = i + 1 if problem.causal else length
            first = max(0, i - problem.window + 1) if problem.window else 0
            keys = slice(start + first, start + last)
            group = problem.heads // problem.kv_heads
            heads = [
                (k[keys, h // group] @ q[start + i, h] * scale).softmax(0) @ v[keys, h // group]
                for h in range(problem.heads)
            ]
            out.append(torch.stack(heads))
        start += length
    return torch.stack(out)


# Catches: blocks without their last queries; keys of a block cut at its first query; a key head of another group.
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (False, 4)])
def test_reference_in_blocks_equals_a_loop(monkeypatch, causal, window, fused):
    monkeypatch.setattr(attention_problem, "BLOCK_SCORES", 1)
    problem = replace(ROUGH, causal=causal, window=window, lengths=(5, 0, 33))
    tensors = problem.inputs(torch.float64, CPU)
    heads = [0, 1]
    out = in_blocks(problem, tensors, "forward", torch.float64, heads, fused=fused)["out"]
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("q", "k", "v")}
    expected = loop_attention(problem, leaves)
    torch.testing.assert_close(out[:-3], expected)
    assert not out[-3:].any()
    grads = torch.autograd.grad(expected, list(leaves.values()), tensors["dout"][:-3])
    actual = in_blocks(problem, tensors, "backward", torch.float64, heads, fused=fused)
    for name, grad in zip(("dq", "dk", "dv"), grads):
        torch.testing.assert_close(actual[name][:-3], grad[:-3])


def test_reference_of_some_heads_is_a_slice_of_the_whole_reference():
    tensors = ROUGH.inputs(torch.float32, CPU)
    for phase in ("forward", "backward"):
        whole = in_blocks(ROUGH, tensors, phase, torch.float64, [0, 1])
        some = in_blocks(ROUGH, tensors, phase, torch.float64, [1])
        for name, x in attention_problem.select_heads(ROUGH, whole, [1]).items():
            assert torch.equal(x, some[name])


def test_large_problems_are_checked_on_the_outer_key_heads():
    assert checked_heads(Attention((32768,), 32, 8, 128), "forward") == [0, 7]
    assert checked_heads(Attention((512,), 32, 8, 128), "forward") == list(range(8))


# Catches: a limit without the factor 2; `ref` compared in fp32; NaN let through by max().
def test_verdict_follows_the_rule():
    problem = RmsNorm(3, 4)
    oracle = Oracle(problem, problem.inputs(torch.float32, CPU), "forward")
    ref, base = torch.tensor([4.0, -8.0], dtype=torch.float64), torch.tensor([4.0, -8.25])
    oracle.ref, oracle.bases = {"y": ref}, [{"y": base}]
    (verdict,) = oracle.verdicts({"y": torch.tensor([4.25, -8.0])})
    assert verdict.error == 0.25 and verdict.limit == 2 * 0.25 + 4 * 2**-23 * 8 and verdict.is_right
    assert not oracle.verdicts({"y": torch.tensor([4.6, -8.0])})[0].is_right
    assert not oracle.verdicts({"y": torch.tensor([float("nan"), -8.0])})[0].is_right
    assert not oracle.verdicts({"y": torch.tensor([4.0])})[0].is_right
    assert not oracle.verdicts({})[0].is_right
    assert not Verdict("y", float("nan"), 1.0, 0.0).is_right


def test_largest_error_looks_at_every_chunk(monkeypatch):
    monkeypatch.setattr(kernel_checks, "CHUNK", 4)
    out, ref = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.float64)
    for place in (0, 7, 14):
        changed = out.flatten().clone()
        changed[place] = 2.0
        assert largest_error(changed.view(3, 5), ref) == 2.0
        changed[place] = float("nan")
        assert math.isnan(largest_error(changed.view(3, 5), ref))


PROBLEMS = [
    (ROUGH, "forward"),
    (ROUGH, "backward"),
    (replace(ROUGH, causal=False, window=6), "backward"),
    (RmsNorm(7, 16), "forward"),
    (RmsNorm(7, 16, residual=True), "backward"),
    (Rope(5, 4, 2, 8), "forward"),
    (Rope(5, 4, 2, 8), "backward"),
    (SwiGlu(6, 8), "forward"),
    (SwiGlu(6, 8), "backward"),
    (AdamW(50), "step"),
]
NAMES = [f"{problem.op} {phase} {place}" for place, (problem, phase) in enumerate(PROBLEMS)]


def results_of(problem, tensors, phase):
    """What plain PyTorch gives, of attention by the blocks."""
    if isinstance(problem, Attention):
        return in_blocks(problem, tensors, phase, tensors["q"].dtype, list(range(problem.kv_heads)))
    return call_of(problem, problem.formula, {name: x.clone() for name, x in tensors.items()}, phase)()


# Catches: queries that see no key of their code (probabilities of 1/3); a pair whose keys are equal, which makes dQ 0.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("problem", "phase"), PROBLEMS, ids=NAMES)
def test_exact_inputs_have_exact_results_and_show_one_wrong_element(problem, phase, dtype):
    easy, tensors = problem.exact(dtype, CPU)
    oracle = Oracle(easy, tensors, phase)
    rounded = {name: ref.to(torch.float32 if name in AdamW.STATE else dtype) for name, ref in oracle.ref.items()}
    assert all(verdict.is_right for verdict in oracle.exact_verdicts(rounded))
    for name, ref in oracle.ref.items():
        assert float(ref.abs().max()) > 1e-3, f"{name} is zero"
        wrong = rounded[name].clone()
        place = int(ref.abs().argmax())
        wrong.view(-1)[place] *= 1 + 2 * torch.finfo(wrong.dtype).eps
        if wrong.dtype == torch.bfloat16:
            assert not all(v.is_right for v in oracle.exact_verdicts(rounded | {name: wrong})), name


# Catches: queries that want a key outside their window or behind them.
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, 3), (False, None)])
def test_exact_attention_has_probabilities_of_one_and_a_half(causal, window):
    easy, tensors = replace(ROUGH, lengths=(40, 3), causal=causal, window=window).exact(torch.float32, CPU)
    out = loop_attention(easy, tensors)
    torch.testing.assert_close(out * 2, (out * 2).round(), rtol=0, atol=1e-12)
    dq = in_blocks(easy, tensors, "backward", torch.float64, [0, 1])["dq"] / easy.scale
    torch.testing.assert_close(dq * 4, (dq * 4).round(), rtol=0, atol=1e-9)
    logits = tensors["q"][:40, 0] @ tensors["k"][:40, 0].T
    best = logits.masked_fill(~easy.seen(0, 40, 0, 40, CPU), float("-inf")).amax(-1)
    assert torch.equal(best, torch.full_like(best, 256 * 6))


@pytest.mark.parametrize(("problem", "phase"), PROBLEMS, ids=NAMES)
def test_this_projects_functions_pass_on_the_cpu(problem, phase):
    assert failures(problem, phase, torch.float32, CPU) == []


# Catches: an oracle that is computed by the function under test.
@pytest.mark.parametrize(("problem", "phase"), [PROBLEMS[0], PROBLEMS[5], PROBLEMS[7]], ids=NAMES[:3])
def test_failures_names_what_is_wrong(monkeypatch, problem, phase):
    right = type(problem).ours
    monkeypatch.setattr(type(problem), "ours", lambda self, t: tuple(1.01 * x for x in right(self, t)))
    actual = failures(problem, phase, torch.float32, CPU)
    assert any(text.startswith("random: ") for text in actual) and any(text.startswith("exact: ") for text in actual)


def test_failures_shows_unwritten_memory_and_unequal_runs(monkeypatch):
    def unwritten(self, tensors):
        out = torch.empty_like(tensors["gate_up"][:, : self.width])
        out[1:] = self.formula(tensors)[0][1:].detach()
        return (out,)

    monkeypatch.setattr(SwiGlu, "ours", unwritten)
    assert any("error nan" in text for text in failures(SwiGlu(6, 8), "forward", torch.float32, CPU))
    runs = iter(range(99))
    monkeypatch.setattr(SwiGlu, "ours", lambda self, t: (self.formula(t)[0] * (1 + 1e-7 * next(runs)),))
    assert "random: two runs differ" in failures(SwiGlu(6, 8), "forward", torch.float32, CPU)


def test_repeats_bits_takes_nan_as_equal():
    nan = torch.tensor([float("nan"), 1.0])
    assert repeats_bits({"a": nan}, {"a": nan.clone()})
    assert not repeats_bits({"a": nan}, {"a": torch.tensor([float("nan"), 1.0000001])})


def test_roughened_rows_have_scales_over_four_decades():
    tensors = roughened(RmsNorm(200, 64), RmsNorm(200, 64).inputs(torch.float32, CPU))
    scales = tensors["x"].norm(dim=-1) / 8
    assert scales.min() < 2e-3 and scales.max() > 7


# Catches: a backward that runs the forward again, or adds to the gradients of the call before.
def test_backward_is_timed_without_the_forward_and_into_fresh_gradients():
    calls = []
    problem = RmsNorm(4, 8, residual=True)
    tensors = problem.inputs(torch.float32, CPU)
    call = call_of(problem, lambda t: calls.append(1) or problem.formula(t), tensors, "backward")
    first, second = call(), call()
    assert calls == [1] and set(first) == {"dx", "dweight", "dresidual"}
    assert all(torch.equal(first[name], second[name]) and first[name] is not second[name] for name in first)
    assert tensors["x"].grad is None and not tensors["x"].requires_grad


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `advance` moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_time_calls_rotates_and_gives_percentiles(clock):
    order = []
    seconds = {"a": 0.010, "b": 0.020}
    calls = {name: lambda name=name: (order.append(name), clock(seconds[name])) for name in seconds}
    actual = gpu_timing.time_calls(calls, CPU, seconds=0.061, repeats=(2, 9))
    assert actual["a"].wall_us["p50"] == pytest.approx(1e4) and actual["b"].us == pytest.approx(2e4)
    assert actual["a"].kernel_us is None and actual["a"].repeats == 4
    assert order[6:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert gpu_timing.percentiles(range(11)) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


class FakeEvent:
    """Stands in for torch.cuda.Event: notes when it is recorded; every pair is 2 ms apart."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 2.0


# Catches: a flush between the events; a call outside them; milliseconds taken for microseconds.
def test_kernel_time_stands_between_events_behind_the_flush(monkeypatch):
    log = FakeEvent.log = []
    flush = SimpleNamespace(write=lambda host_us: log.append(f"flush {host_us:.0f}"))
    monkeypatch.setattr(gpu_timing, "Flush", lambda device: flush)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: log.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    calls = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    actual = gpu_timing._kernel_times(calls, CUDA, 2, {"a": 1e-5, "b": 2e-5}, {"a": "A", "b": "B"})
    one = ["flush 10", "event", "push A", "a", "pop", "event"]
    two = ["flush 20", "event", "push B", "b", "pop", "event"]
    assert log == one + two + two + one + ["wait"]
    assert actual == {"a": [2000.0, 2000.0], "b": [2000.0, 2000.0]}


SMI = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$1" in *_event_*) exit 6;; esac
echo "1980, 2619, 650.5, 61, 0x0000000000000004"
"""


# Catches: a driver that knows clocks_throttle_reasons only taken for one that knows nothing.
def test_state_of_the_gpu_is_read_under_either_name(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert gpu_timing.state_under(lambda: None, CUDA, 0.0) == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "power_watt": 650.5,
        "temperature_c": 61.0,
        "throttle": ["power cap"],
    }
    asked = (tmp_path / "asked").read_text()
    assert "clocks_event_reasons.active" in asked and "clocks_throttle_reasons.active" in asked and "GPU-12-34" in asked
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert gpu_timing.state_under(lambda: None, CUDA, 0.0) == {}


def peer_is_right(problem, prepare, phase, dtype=torch.float32):
    tensors = problem.inputs(dtype, CPU)
    copies = {name: x.clone() for name, x in tensors.items()}
    results = call_of(problem, prepare(problem, CPU), copies, phase)()
    verdicts = Oracle(problem, tensors, phase).verdicts({name: x.detach() for name, x in results.items()})
    return all(verdict.is_right for verdict in verdicts)


# Catches: batches cut at the wrong rows; heads of another group; a gradient in another layout.
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("kv_heads", "causal"), [(4, True), (2, True), (2, False)])
def test_fused_attention_is_given_the_same_problem(monkeypatch, kv_heads, causal, phase):
    monkeypatch.setattr(kernel_peers, "_takes_groups", lambda problem, *_: problem.heads == problem.kv_heads)
    assert peer_is_right(Attention((8, 8), 4, kv_heads, 16, causal=causal), kernel_peers._fused("MATH"), phase)


FLEX = [
    Attention((8, 8), 4, 2, 16), Attention((8, 8), 4, 2, 16, causal=False), Attention((16,), 4, 2, 16, window=5),
    Attention((9, 5, 2), 4, 2, 16), Attention((9, 5, 2), 4, 2, 16, causal=False, window=3),
]  # fmt: skip


# Catches: a window off by one; documents that see each other; a mask left out.
@pytest.mark.parametrize("problem", FLEX, ids=lambda problem: problem.label)
def test_flex_attention_is_given_the_same_mask(monkeypatch, problem):
    monkeypatch.setattr(kernel_peers, "compiled", lambda function: function)
    tensors = problem.inputs(torch.float32, CPU)
    out = kernel_peers._flex(problem, CPU)(tensors)[0]
    torch.testing.assert_close(out.double(), Oracle(problem, tensors, "forward").ref["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "window"), [({}, (-1, 0)), ({"causal": False}, (-1, -1)), ({"window": 5}, (4, 0))])
def test_packed_attention_is_given_the_same_window(monkeypatch, options, window):
    from torch.nn.attention import varlen

    asked = {}

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        asked.update(scale=scale, window_size=window_size, enable_gqa=enable_gqa, max=(max_q, max_k))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    problem = Attention((9, 5), 4, 2, 16, **options)
    kernel_peers._packed(problem, CPU)(problem.inputs(torch.float32, CPU))
    assert asked == {"scale": 0.25, "window_size": window, "enable_gqa": True, "max": (9, 9)}


@pytest.mark.parametrize("problem", [RmsNorm(4, 32), RmsNorm(4, 32, residual=True), Rope(5, 4, 2, 16), SwiGlu(4, 32)])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_compiled_formula_is_given_the_same_problem(problem, phase):
    assert peer_is_right(problem, lambda p, _: kernel_peers._row_function(p, lambda function: function), phase)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_peers_are_the_same_step(dtype):
    assert peer_is_right(AdamW(100), kernel_peers._fused_adamw, "step", dtype)
    assert peer_is_right(AdamW(100), lambda p, _: kernel_peers._row_function(p, lambda f: f), "step", dtype)


@pytest.mark.parametrize(("host", "writes"), [(0, 1), (10, 1), (50, 2), (500, 17), (1e9, gpu_timing.MAX_WRITES)])
def test_flush_keeps_the_device_busy_longer_than_the_host_launches(host, writes):
    assert gpu_timing.writes_to_cover(host, 60.0) == writes


@pytest.mark.parametrize("flops", [2 * 512**3, 3e9, 1.1e12, 44e12])
def test_matrix_product_has_the_operations_asked_for(flops):
    call, actual = gpu_timing.matrix_call(torch.device("meta"), torch.bfloat16, int(flops))
    call()
    assert actual == pytest.approx(flops, rel=0.1)


def test_throttle_reasons_are_named():
    assert gpu_timing.throttle_reasons("0x0000000000000004") == ["power cap"]
    assert gpu_timing.throttle_reasons("0x0000000000000041") == ["hardware thermal"]
    assert gpu_timing.throttle_reasons("[N/A]") == []


def session() -> kernels.Session:
    about = {"commit": "abc", "hardware": "test", "date": "2026-11-25", "command": "x"}
    return kernels.Session(CPU, about, {"copy_gbps": 10.0, "matrix_tflops": 1.0}, seconds=0.001)


# Catches: a wrong variant whose time is lost, or taken for a right one; an error that ends the run; speedups over
# a variant that is wrong or was not timed.
def test_wrong_variants_are_timed_and_marked_and_failing_ones_reported(monkeypatch):
    ran = []

    def wrong(problem, device):
        return lambda t: ran.append(1) or tuple(x * 1.001 for x in problem.formula(t))

    def failing(problem, device):
        raise RuntimeError("no kernel image")

    def fails_in_the_end(problem, device):
        return lambda t: (_ for _ in ()).throw(ValueError("odd\nshape"))

    chosen = [
        Variant("reference", is_ours=True),
        Variant("eager", lambda problem, _: problem.formula),
        Variant("wrong", wrong, is_ours=True),
        Variant("failing", failing),
        Variant("late", fails_in_the_end),
        Variant("wrong peer", wrong),
        Variant("gone", absent="is not installed"),
    ]
    monkeypatch.setattr(kernels, "variants", lambda case, device: chosen)
    rows = {r["variant"]: r for r in kernels.measure(session(), Case(SwiGlu(8, 16), "forward", torch.float32))}
    status = {name: r["status"] for name, r in rows.items()}
    assert status == {
        "reference": "right",
        "eager": "right",
        "wrong": "wrong",
        "failing": "error",
        "late": "error",
        "gone": "absent",
        "wrong peer": "wrong",
    }
    assert {name for name, r in rows.items() if "us" in r} == {"reference", "eager", "wrong", "wrong peer"}
    assert len(ran) > 10 and "y: error" in rows["wrong"]["note"] and "speedup" not in rows["wrong"]
    assert " WRONG  [y: error" in kernel_rows.line_of(rows["wrong"])
    assert "(wrong)" not in kernel_rows.markdown(list(rows.values()))
    assert roofline.point_of(rows["wrong"]) is None and "Wrong or not timed" in roofline.page_of(list(rows.values()))
    assert rows["failing"]["note"] == "RuntimeError: no kernel image"
    assert rows["late"]["note"] == "ValueError: odd shape" and rows["gone"]["note"] == "is not installed"
    assert set(rows["reference"]["speedup"]) == {"eager"}
    assert rows["reference"]["speedup"]["eager"] == rows["eager"]["us"] / rows["reference"]["us"]


def test_a_failure_while_timing_costs_one_case(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA out of\nmemory")

    monkeypatch.setattr(gpu_timing, "time_calls", fail)
    rows = kernels.measure(session(), Case(SwiGlu(8, 16), "forward", torch.float32))
    assert {r["note"] for r in rows} == {"not timed: RuntimeError: CUDA out of memory"} and "us" not in rows[0]
    assert "right: not timed" in kernel_rows.line_of(rows[0])


def test_variants_that_did_not_compile_are_never_launched(monkeypatch):
    case = Case(SwiGlu(8, 16), "forward", torch.float32)
    one = session()
    one.compiled[case, "reference"] = {"error": "the compiler ended its process"}
    one.compiled[case, "eager"] = {"registers": 40}
    rows = kernels.measure(one, case)
    assert rows[1]["registers"] == 40
    assert rows[0]["status"] == "error" and "not compiled" in rows[0]["note"] and "us" not in rows[0]


# Catches: an in-place variant that leaves its mark on what the next variant reads.
def test_variants_that_write_their_inputs_receive_copies(monkeypatch):
    def spoil(problem, device):
        def function(t):
            out = problem.formula({name: x.clone() for name, x in t.items()})
            t["gate_up"].data.zero_()
            return out

        return function

    chosen = [Variant("spoils", spoil, mutates=True), Variant("eager", lambda problem, _: problem.formula)]
    monkeypatch.setattr(kernels, "variants", lambda case, device: chosen)
    rows = kernels.measure(session(), Case(SwiGlu(8, 16), "forward", torch.float32))
    assert [r["status"] for r in rows] == ["right", "right"]


def test_cases_of_a_gpu_hold_the_shapes_that_matter():
    actual = cases(["attention"], CUDA)
    labels = [case.label for case in actual if case.phase == "forward"]
    assert len(actual) == 2 * len(labels) and all(case.phase == "forward" for case in actual[: len(labels)])
    assert all(case.problem.tokens == 32768 for case in actual if not case.problem.is_ragged)
    for text in (
        "S=8 H=32 K=8 C=128 causal bf16",
        "S=1 H=32 K=8 C=128 full",
        "H=16 K=16 C=128",
        "window=4096",
        "ragged",
        "C=64",
        "C=96",
        "C=256",
    ):
        assert any(text in label for label in labels), text
    assert set(cases(["attention"], CUDA, quick=True)) < set(actual)
    rows = [case.label for case in cases(["rms_norm", "adamw", "swiglu", "rope"], CUDA)]
    assert "T=16384 D=4096 residual bf16" in rows and "T=16384 F=28672 bf16" in rows and "P=117440512 bf16" in rows


def test_variants_on_a_gpu_say_why_they_are_absent():
    with use_arch(90):
        actual = {v.name: v for v in variants(cases(["attention"], CUDA)[0], CUDA)}
        window = next(c for c in cases(["attention"], CUDA) if c.problem.window)
        ragged = next(c for c in cases(["attention"], CUDA) if c.problem.is_ragged and c.phase == "backward")
        absent = {v.name: v.absent for v in variants(window, CUDA)}
        without = {v.name: v for v in variants(ragged, CUDA)}
        norm = {v.name: v.absent for v in variants(cases(["rms_norm"], CUDA)[0], CUDA)}
    assert list(actual) == [
        "triton",
        "triton plain",
        "triton rotated",
        "sdpa cudnn",
        "sdpa flash",
        "torch varlen",
        "flex",
        "eager",
    ]
    assert absent["sdpa cudnn"] == "takes no window" and not absent["torch varlen"]
    assert without["sdpa flash"].absent == "takes sequences of one length only" and "triton plain" not in without
    assert actual["eager"].absent == "scores of 8.0 GiB" and norm["liger"] in ("", LIGER)
    assert list(norm) == ["triton", "eager", "compile", "liger"]


@pytest.mark.parametrize("problem", small_problems(), ids=lambda p: p.op)
def test_plain_formula_agrees_with_this_projects_function(problem):
    """Both in fp32, so that a formula with other meaning than the kernel's shows before a GPU does."""
    phase = problem.phases[0]
    tensors = problem.inputs(torch.float32, CPU)
    actual = [
        call_of(problem, function, {name: x.clone() for name, x in tensors.items()}, phase)()
        for function in (problem.ours, problem.formula)
    ]
    for name, x in actual[0].items():
        torch.testing.assert_close(x, actual[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("now", "then", "worse", "shown"),
    [
        (row(110), row(100), True, "+10.0%"),
        (row(104), row(100), False, "+4.0%"),
        (row(110, deviation=20), row(100, deviation=5), False, "(within the noise)"),
        (row(90), row(100), False, "-10.0%"),
        (row(110, variant="eager"), row(100, variant="eager"), False, "+10.0%"),
        (untimed("wrong", note="y: error"), row(100), True, "wrong now: y: error"),
        (row(100), untimed("wrong"), None, ""),
    ],
)
def test_compare_finds_what_got_slower_beyond_its_noise(now, then, worse, shown):
    changes = kernel_rows.compare([now], [then], 0.05)
    assert [change.is_worse for change in changes] == ([] if worse is None else [worse])
    assert all(shown in change.text for change in changes)


def test_compare_refuses_other_hardware_and_passes_over_rows_of_one_file():
    with pytest.raises(ValueError, match="expected results of H100, got some of H200"):
        kernel_rows.compare([row()], [row(gpu="H200")], 0.05)
    assert kernel_rows.compare([row(label="T=5 fp32")], [row()], 0.05) == []


@pytest.mark.parametrize(("us", "limit", "status"), [(110, "5%", 1), (110, "0.2", 0), (100, "5%", 0)])
def test_compare_command_gives_its_exit_status(tmp_path, capsys, us, limit, status):
    for name, rows in (("old.json", [row(100)]), ("new.json", [row(us)])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--fail-over", limit]
    assert kernels.main(options) == status
    assert ("worse: rope forward T=4 fp32 triton: 100.0 -> 110.0 us" in capsys.readouterr().out) == bool(status)


def test_line_has_the_form_of_the_conventions():
    text = kernel_rows.line_of(
        row(
            82.4,
            op="rms_norm",
            label="T=16384 D=4096 bf16",
            gbps=3258.4,
            share_of_copy=0.76,
            peak_memory_gib=0.25,
            speedup={"eager": 3.9, "compile": 1.02},
        )
    )
    expected = [
        "rms_norm",
        "fwd",
        "T=16384 D=4096 bf16",
        "triton",
        "82.4 us",
        "(81.4 to 83.4)",
        "wall     82.4",
        "3258 GB/s  76% of copy",
        "3.90x eager",
        "1.02x compile",
        "peak 0.25 GiB",
    ]
    places = [text.index(part) for part in expected]
    assert places == sorted(places)
    attention = kernel_rows.line_of(row(tflops=512.3, share_of_matrix=0.7, share_of_equal=0.8))
    assert "512.3 TFLOP/s  70% of matmul  80% at equal FLOPs" in attention
    assert kernel_rows.line_of(untimed("absent", note="not installed")).endswith("absent: not installed")


def test_rates_and_shares_come_from_the_same_run():
    actual: dict = {}
    kernel_rows.add_rates(actual, 4_000_000, 2_000_000, 100.0, True, {"copy_gbps": 40.0, "matrix_tflops": 0.08})
    assert actual["tflops"] == pytest.approx(0.04) and actual["gbps"] == pytest.approx(20.0)
    assert actual["share_of_copy"] == pytest.approx(0.5) and actual["share_of_matrix"] == pytest.approx(0.5)


def test_ratios_exclude_the_equal_product_from_the_peers():
    rows = [row(100, tflops=2.0), row(150, variant="eager", tflops=1.0), row(50, variant="matmul equal", tflops=4.0)]
    kernel_rows.add_ratios(rows)
    assert rows[0]["speedup"] == {"eager": 1.5} and rows[0]["share_of_equal"] == 0.5
    assert rows[1]["speedup"] == {} and "speedup" not in rows[2]


def test_markdown_names_hardware_and_command_of_every_table():
    rows = [row(1234.5, speedup={"eager": 2.0}), row(variant="eager"), row(gpu="H200"), untimed("wrong")]
    text = kernel_rows.markdown(rows)
    assert text.count("| operation |") == 2
    for expected in (
        "H100, torch 2.11, commit abc, 2026-11-25; `python -m benchmarks.kernels`",
        "copy 100 GB/s",
        "| rope forward | T=4 fp32 | 1,234.5 (1,233.5 to 1,235.5) | 50 GB/s | 50% of copy | eager 2.00 |",
        "H200",
    ):
        assert expected in text
    assert len(text.splitlines()) == 2 * 5 + 1


# Catches: axes that are not logarithmic; a roof that does not bend at the ridge.
def test_roofline_places_a_point_at_the_ridge_on_the_bend():
    axes = roofline.Axes([(1.0, 1.0)], 100.0, 10.0)
    bend = re.search(r'points="([\d.,]+) ([\d.,]+) ([\d.,]+)"', roofline._roofs(axes, 100.0, 10.0)[0])
    assert bend[2] == f"{axes.x(100.0):.1f},{axes.y(10.0):.1f}"
    assert axes.x(10.0) - axes.x(1.0) == pytest.approx(axes.x(100.0) - axes.x(10.0))
    start = [float(x) for x in bend[1].split(",")]
    assert start[1] == pytest.approx(axes.y(10**axes.low_y), abs=0.1) or start[0] == pytest.approx(roofline.LEFT)


def test_roofline_page_is_self_contained_and_escaped():
    text = roofline.page_of([row(label="<T=4>"), row(variant="eager"), untimed("error", note="<b>")])
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "&lt;T=4&gt;" in text and "<T=4>" not in text and "error &lt;b&gt;" in text
    with pytest.raises(ValueError, match="at least one timed row"):
        roofline.chart([untimed("error")])
    assert "no row was timed" in roofline.page_of([untimed("error")])


def test_range_names_hold_nothing_that_profilers_take_as_their_own():
    with use_arch(90):
        for case in cases(["attention", "rms_norm", "adamw"], CUDA):
            assert re.fullmatch(r"[A-Za-z0-9_.]+", case.range_name)
    lines = kernels.profiler_lines("python -m benchmarks.kernels --op rope", "rope.forward.T4")
    assert "--nvtx-include 'rope.forward.T4/'" in lines[0] and "--clock-control none" in lines[0]
    assert "-c cudaProfilerApi" in lines[1] and all(line.endswith("--op rope --profile") for line in lines)


def test_percent_takes_shares_and_refuses_others():
    assert percent("5%") == 0.05 and percent("0.1") == 0.1 and percent("2.5%") == 0.025
    for text in ("five", "-5%", "nan", ""):
        with pytest.raises(Exception, match="expected a share"):
            percent(text)


@pytest.mark.slow
def test_harness_runs_on_a_cpu_end_to_end(tmp_path, capsys):
    results = tmp_path / "out.jsonl"
    assert kernels.main(["--device", "cpu", "--quick", "--json", str(results)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("These are CPU figures: no GPU is used")
    rows = kernel_rows.read_rows(results)
    assert {r["op"] for r in rows} == set(OPERATIONS)
    assert {r["status"] for r in rows} == {"right"} and all(r["repeats_bits"] for r in rows if "repeats_bits" in r)
    needed = {"commit", "hardware", "torch", "triton", "date", "seed", "command", "wall_us", "tflops", "gbps", "us"}
    needed |= {"max_error", "error_limit", "rms_error", "ceilings", "reproduce", "flops", "bytes", "repeats"}
    assert needed <= rows[0].keys() and rows[0]["kernel_us"] is None
    page = results.with_suffix(".html").read_text()
    assert "<svg" in page and "CPU: " in page
    assert kernels.main(["--table", str(results)]) == 0
    assert "| attention forward | T=96" in capsys.readouterr().out
    assert kernels.main(["--compare", str(results), str(results)]) == 0


def test_profile_runs_once_and_writes_nothing(tmp_path, capsys):
    results = tmp_path / "out.jsonl"
    options = ["--device", "cpu", "--op", "swiglu", "--profile", "--variant", "reference", "--json", str(results)]
    assert kernels.main(options) == 0
    printed = capsys.readouterr().out
    assert "ncu --nvtx --nvtx-include 'swiglu.forward.T64_F48_fp32.reference/'" in printed and " us " not in printed
    assert "nsys profile" in printed and not results.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "atention"], "got atention; the nearest is attention"),
        (["--quik"], "--quik: expected a known option, got an unknown one; the nearest is --quick"),
        (["--fail-over", "much"], "expected a share such as 5% or 0.05, got 'much'"),
        (["--compare", "none.json", "none.json"], "none.json: expected a results file, found none"),
        (["--compare", "a", "b", "c"], "expected one or two files, got 3"),
        (["--device", "cpu", "--case", "T=9999"], "got 'T=9999', which is in none"),
        (
            ["--device", "cpu", "--variant", "eagr"],
            "expected some of reference, eager, got eagr; the nearest is",
        ),
    ],
)
def test_command_line_refuses_with_status_2(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"op": "a"}\n{', "x.json:2: expected a JSON object"), ("[1]", "x.json:1: expected a result row")],
)
def test_results_file_errors_name_the_line(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        kernel_rows.read_rows(tmp_path / "x.json")


# Catches: columns instead of rows split among the experts; gates in another order; transposed weights.
def test_torch_s_grouped_product_is_given_the_same_experts():
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    problem = Experts(40, 32, 16, experts=4, load="zipf")
    tensors = problem.inputs(torch.float32, torch.device("cpu"))
    (actual,), (expected,) = kernel_peers._grouped_experts(problem, tensors), problem.formula(tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_loads_of_the_experts_are_what_they_are_called():
    counts = {load: torch.bincount(chosen(load, 4000, 8, 2, seed=1).flatten(), minlength=8) for load in LOADS}
    assert counts["uniform"].max() < 1.1 * counts["uniform"].min() and counts["one"][4] == 4000
    assert counts["zipf"][0] > 2 * counts["zipf"][7] > 0 and not counts["idle"][::4].any()
    for load in LOADS:
        assert all(len(set(row)) == 2 for row in chosen(load, 50, 8, 2, seed=0).tolist())


# Catches: gradients of whole weights that are kept for every piece of the rows, or only the last piece's.
def test_float64_results_in_pieces_equal_those_at_once(monkeypatch):
    problem = Experts(40, 16, 8, experts=3, load="zipf")
    tensors = problem.inputs(torch.float32, torch.device("cpu"))
    whole = kernel_checks.by_rows(problem, tensors, "backward")
    monkeypatch.setattr(kernel_checks, "CHUNK", 7 * 4 * 2 * 8)
    stacked = []
    monkeypatch.setattr(torch, "stack", lambda *a, **k: stacked.append(a) or pytest.fail("stacked"))
    actual = kernel_checks.by_rows(problem, tensors, "backward")
    assert actual.keys() == whole.keys() and not stacked
    for name in whole:
        torch.testing.assert_close(actual[name], whole[name], rtol=1e-12, atol=1e-13)


# Catches: a check of the table's entry that runs the CUDA library in its place.
def test_the_permutation_that_is_checked_is_triton_s(monkeypatch):
    from benchmarks.moe_problem import MoePermute
    from kernels import _expert_rows, use_backend

    ran, right = [], _expert_rows.moe_permute
    monkeypatch.setattr(_expert_rows, "moe_permute", lambda *a: ran.append(1) or right(*a))
    problem = MoePermute(9, 40)
    with use_backend("triton"):
        problem.ours(problem.inputs(torch.float32, torch.device("cpu")))
    assert ran == [1]
