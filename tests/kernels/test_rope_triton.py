"""Rotary embedding in Triton: positions that no table holds, and traced with positions."""

import torch
from closeness import scaled

import kernels
from kernels.rope import rope, rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens=5, width=20):
    qkv = scaled(tokens, 6, width, seed=0).float().to(DEVICE).requires_grad_()
    return qkv, [x.to(DEVICE) for x in rope_tables(torch.arange(8), width, 100.0)]


# Catches: the table's length or the sign of a position left out of the mask.
def test_rope_of_positions_outside_the_table_is_nan(monkeypatch):
    qkv, tables = inputs()
    positions = torch.tensor([0, 8, 7, -1, 9], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr("kernels.rope.values_are_checked", lambda tensor: False)
    with kernels.use_backend("triton"):
        turned = rope(qkv[:, :3], qkv[:, 3:5], *tables, positions)
        inside = rope(qkv[[0, 2], :3], qkv[[0, 2], 3:5], *tables, positions[[0, 2]])
    for out, near in zip(turned, inside):
        assert out[[1, 3, 4]].isnan().all() and torch.equal(out[[0, 2]], near)


def test_rope_with_positions_traces_without_a_graph_break():
    qkv, tables = inputs()
    positions = torch.tensor([3, 0, 7, 7, 1], device=DEVICE)

    def loss(qkv):
        q, k, _ = qkv.split((3, 2, 1), dim=1)
        q, k = rope(q, k, *tables, positions)
        return q.sin().sum() + k.cos().sum()

    with kernels.use_backend("triton"):
        traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
        result, expected = (torch.autograd.grad(f(qkv), qkv) for f in (traced, loss))
    torch._dynamo.reset()
    assert torch.equal(result[0], expected[0])
