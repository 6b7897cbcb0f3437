"""What carries tokens to experts on other ranks: the layout of rows that came, and copies and sums with gradients."""

import pytest
import torch

import kernels
from kernels.expert_permute import combine, permute_rows
from kernels.moe_route import Routing, expert_layout, layout_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def routing_of(gates, experts, num_experts):
    return Routing(
        torch.zeros(len(experts), num_experts, device=DEVICE), gates, experts, *layout_reference(experts, num_experts)
    )


COUNTS = {
    "even": [[3, 3], [3, 3]],
    "uneven": [[0, 5, 130], [7, 0, 1], [2, 300, 0]],
    "one place": [[4, 0, 9, 1]],
    "one expert gets every row": [[0, 257, 0], [0, 128, 0]],
    "no rows": [[0, 0], [0, 0]],
    "one expert": [[5], [0], [129]],
}


@pytest.mark.parametrize("name", COUNTS)
def test_layout_of_rows_that_came_is_that_of_a_stable_sort(name):
    counts = torch.tensor(COUNTS[name], dtype=torch.int32, device=DEVICE)
    routed_rows, experts = int(counts.sum()), counts.shape[1]
    chosen = torch.cat([torch.full((n,), e, dtype=torch.int32) for row in COUNTS[name] for e, n in enumerate(row)])
    result = expert_layout(counts, routed_rows)
    offsets, rows, positions, tiles = layout_reference(chosen[:, None].to(DEVICE), experts)
    assert torch.equal(result.offsets, offsets) and torch.equal(result.rows, rows)
    assert torch.equal(result.positions, positions) and torch.equal(result.tiles, tiles)
    assert torch.equal(result.experts[:, 0].cpu(), chosen) and bool((result.gates == 1).all())
    assert result.gates.shape == result.experts.shape == (routed_rows, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tokens", "width", "per_token"), [(0, 16, 2), (1, 16, 1), (37, 48, 2), (50, 24, 3)])
def test_rows_and_their_sums_against_plain_indexing(backend, tokens, width, per_token):
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.stack(
        [torch.randperm(4, generator=generator)[:per_token] for _ in range(tokens)] or [torch.zeros(per_token)]
    )
    experts = experts[:tokens].int().to(DEVICE)
    x = torch.randn(tokens, width, generator=generator).to(DEVICE).requires_grad_()
    gates = torch.rand(tokens, per_token, generator=generator).to(DEVICE).requires_grad_()
    grad = torch.randn(tokens, width, generator=generator).to(DEVICE)
    routing = routing_of(gates, experts, 4)
    scale = torch.randn(tokens * per_token, 1, generator=generator).to(DEVICE)

    def result():
        out = combine(permute_rows(x, routing) * scale, routing)
        return out, *torch.autograd.grad(out, (x, gates), grad)

    rows = x[routing.rows.long() // per_token] * scale
    expected = (gates[..., None] * rows[routing.positions.long()]).sum(1)
    expected = expected, *torch.autograd.grad(expected, (x, gates), grad)
    with kernels.use_backend(backend):
        first, second = result(), result()
    for a, b, again in zip(first, expected, second, strict=True):
        assert torch.equal(a, again)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
