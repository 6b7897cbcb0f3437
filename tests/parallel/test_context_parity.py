"""Models whose matrices, experts and tokens are divided do what one process does: losses, norms, gradients, weights, in
float64."""

import context_cases
import pytest
from many_ranks import results_by_rank, selected

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """World size -> the results of each rank."""
    out = tmp_path_factory.mktemp("context")
    return results_by_rank(context_cases.__file__, context_cases.LAYOUTS, out, selected(request, "name"))


@pytest.mark.every(29)
@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in context_cases.LAYOUTS for name in context_cases.cases(world)]
)
def test_parallel_model_equals_one_process(results, world, name):
    for rank, on_rank in enumerate(results[world]):
        errors = on_rank["cases"][name]
        assert max(errors.values()) < TOLERANCE, (rank, errors)


@pytest.mark.parametrize("world", context_cases.LAYOUTS)
def test_what_ranks_of_a_row_have_alike_is_alike_bit_for_bit(results, world):
    """Weights of norms and routers after two steps, losses and scores; and random weights are those of one process."""
    for on_rank in results[world]:
        assert on_rank["alike"] and on_rank["alike"].keys() == on_rank["random"].keys()
        assert all(value is True for value in (*on_rank["alike"].values(), *on_rank["random"].values())), on_rank
