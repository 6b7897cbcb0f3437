"""Sharded models do what one process does: losses, norms, gradients, weights, in float64; and bit for bit what an
all-reduce does, in fp32."""

import pytest
import sharded_cases
from many_ranks import results_by_rank, selected

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """World size -> the results of each rank, of the worlds that the session tests."""
    out = tmp_path_factory.mktemp("sharded")
    return results_by_rank(sharded_cases.__file__, selected(request, "world"), out, selected(request, "name"))


@pytest.mark.every(29)
@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(world, name, marks=[pytest.mark.slow] * (world > 2))
        for world in sharded_cases.LAYOUTS
        for name in sharded_cases.cases(world)
    ],
)
def test_sharded_model_equals_one_process(results, world, name):
    for rank, on_rank in enumerate(results[world]):
        errors = on_rank["cases"][name]
        assert max(errors.values()) < TOLERANCE, (rank, errors)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_an_all_reduce_bit_for_bit(results, world):
    for on_rank in results[world]:
        assert len(on_rank["bits"]) == 4 and all(all(equal.values()) for equal in on_rank["bits"].values()), on_rank[
            "bits"
        ]
