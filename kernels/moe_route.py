"""Routing of a mixture of experts: which experts a token goes to, with what weight, and where its rows stand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype, values_are_checked
from .expert_tiles import TILE_ROWS, num_slots


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a packed row go. Rows are (token, choice) pairs, sorted by expert, then by token.

    logits: (T, E) fp32, differentiable.   gates: (T, A) fp32, weights of the chosen, differentiable.
    experts: (T, A) int32, by falling logit unless replayed.   offsets: (E + 1,) int32, rows of expert e are
    offsets[e] to offsets[e + 1].   rows: (R,) int32, the pair token * A + choice of each sorted row.
    positions: (T, A) int32, the sorted row of each pair.   tiles: (2, ceil(R / 128) + E - 1) int32, expert and first
    row of each tile of 128 rows of one expert; expert -1 behind the last one, so that no count has to reach the host.
    """

    logits: Tensor
    gates: Tensor
    experts: Tensor
    offsets: Tensor
    rows: Tensor
    positions: Tensor
    tiles: Tensor

    @property
    def counts(self) -> Tensor:
        """(E,) int32 rows of each expert."""
        return self.offsets.diff()


def moe_route_reference(
    hidden: Tensor, router: Tensor, experts_per_token: int, replayed_experts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gates and experts in at least fp32; ties go to the lower expert."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits_TE = hidden.to(dtype) @ router.to(dtype).T
    if replayed_experts is None:
        chosen_TA = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :experts_per_token]
    else:
        chosen_TA = replayed_experts.long()
    return logits_TE, logits_TE.gather(1, chosen_TA).softmax(-1), chosen_TA.int()


def layout_reference(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """offsets, rows, positions and tiles of chosen experts."""
    flat_R = experts.flatten().long()
    counts_E = torch.bincount(flat_R, minlength=num_experts)[:num_experts]
    offsets = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0))
    rows_R = flat_R.sort(stable=True).indices
    positions_R = torch.empty_like(rows_R)
    positions_R[rows_R] = torch.arange(rows_R.numel(), device=rows_R.device)
    tiles = torch.zeros((2, num_slots(flat_R.numel(), num_experts)), dtype=torch.int32, device=experts.device)
    tiles[0] = -1
    per_expert = (counts_E + TILE_ROWS - 1) // TILE_ROWS
    tile_expert = torch.repeat_interleave(torch.arange(num_experts, device=experts.device), per_expert)
    tile_in_expert = (
        torch.arange(tile_expert.numel(), device=experts.device) - (per_expert.cumsum(0) - per_expert)[tile_expert]
    )
    tiles[0, : tile_expert.numel()], tiles[1, : tile_expert.numel()] = (
        tile_expert.int(),
        (offsets[tile_expert] + TILE_ROWS * tile_in_expert).int(),
    )
    return offsets.int(), rows_R.int(), positions_R.view_as(experts).int(), tiles


@torch.library.custom_op("wizard_engine::moe_route", mutates_args=())
def _route(hidden: Tensor, router: Tensor, experts_per_token: int, replayed_experts: Tensor | None) -> list[Tensor]:
    if runs_triton(hidden, "hidden"):
        from ._moe_route import moe_route as kernels

        return list(kernels(hidden, router, experts_per_token, replayed_experts))
    chosen = moe_route_reference(hidden, router, experts_per_token, replayed_experts)
    return [x.contiguous() for x in (*chosen, *layout_reference(chosen[2], router.shape[0]))]


@_route.register_fake
def _(hidden, router, experts_per_token, replayed_experts):
    tokens, experts = hidden.shape[0], router.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = tokens * experts_per_token
    shapes = ((tokens, experts_per_token), (experts + 1,), (rows,), (tokens, experts_per_token))
    numbers = [hidden.new_empty(shape, dtype=torch.int32) for shape in (*shapes, (2, num_slots(rows, experts)))]
    logits, gates = (hidden.new_empty((tokens, n), dtype=dtype) for n in (experts, experts_per_token))
    return [logits, gates, *numbers]


class _Route(torch.autograd.Function):
    """Adds the gradients that reach the logits; two thin products then make those of hidden states and router."""

    @staticmethod
    def forward(ctx, hidden, router, experts_per_token, replayed_experts):
        logits, gates, *layout = _route(hidden, router, experts_per_token, replayed_experts)
        ctx.save_for_backward(hidden, router, gates, layout[0])
        ctx.mark_non_differentiable(*layout)
        return logits, gates, *layout

    @staticmethod
    def backward(ctx, dlogits_TE, dgates_TA, *_):
        hidden, router, gates_TA, experts_TA = ctx.saved_tensors
        dchosen_TA = gates_TA * (dgates_TA - (gates_TA * dgates_TA).sum(-1, keepdim=True))
        numbers_E = torch.arange(router.shape[0], device=router.device)
        for choice in range(experts_TA.shape[1]):
            here_TE = experts_TA[:, choice, None] == numbers_E
            dlogits_TE = dlogits_TE + dchosen_TA[:, choice, None] * here_TE
        rounded_TE = dlogits_TE.to(hidden.dtype)
        dhidden = rounded_TE @ router if ctx.needs_input_grad[0] else None
        drouter = rounded_TE.T @ hidden if ctx.needs_input_grad[1] else None
        return dhidden, drouter, None, None


def moe_route(
    hidden: Tensor, router: Tensor, *, experts_per_token: int, replayed_experts: Tensor | None = None
) -> Routing:
    """Sends each token to its best experts: logits in fp32, top-k, softmax over the chosen (Mixtral's order).

    logits = hidden router^T,   gates_t = softmax(logits_t[experts_t])

    Equal logits go to the lower expert; rows of an expert stand in the order of their tokens, without a sort: counts of
    tiles of tokens, prefix sums over them, places inside a tile. Nothing waits for the device.

    Args:
        hidden: (T, D) fp32, fp16 or bf16 (CPU: fp64 too), last dim contiguous.   router: (E, D), dtype of hidden.
        experts_per_token: A, 1 to E.
        replayed_experts: (T, A) int32 or int64, a recorded choice to take instead of the best experts; different ones
            for each token. The gates are those of the current logits.
    Returns:
        Routing. Logits and gates are differentiable in hidden and router; the gradient of the logits is rounded to the
        dtype of hidden.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, A is out of range, or a replayed expert is out of
            range or twice there (values are checked on CPU, and on CUDA inside kernels.check_values()).
    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1.
    """
    _check(hidden, router, experts_per_token, replayed_experts)
    return Routing(
        *_Route.apply(
            hidden, router, experts_per_token, None if replayed_experts is None else replayed_experts.contiguous()
        )
    )


def expert_layout(counts: Tensor, total: int) -> Routing:
    """Routing of rows that came from several places, each row to one expert with weight 1; no logits.

    Rows stand by place, then by expert, and are sorted by expert, then by place. Nothing waits for the device.

    Args:
        counts: (P, E) integers, rows of each expert from each place.   total: their sum, R.
    """
    counts_PE = counts.long()
    places, experts = counts_PE.shape
    device, cumulated_P = counts.device, counts_PE.flatten().cumsum(0)
    segment_R = torch.repeat_interleave(
        torch.arange(places * experts, device=device), counts_PE.flatten(), output_size=total
    )
    offsets = torch.nn.functional.pad(counts_PE.sum(0).cumsum(0), (1, 0))
    first_PE = offsets[:-1] + counts_PE.cumsum(0) - counts_PE
    row_R = torch.arange(total, device=device)
    positions_R = row_R - (cumulated_P - counts_PE.flatten())[segment_R] + first_PE.flatten()[segment_R]
    rows_R = torch.empty_like(positions_R).scatter_(0, positions_R, row_R)
    slot = torch.arange(num_slots(total, experts), device=device)
    tiles_E = (offsets.diff() + TILE_ROWS - 1) // TILE_ROWS
    ends_E = tiles_E.cumsum(0)
    owner = torch.searchsorted(ends_E, slot, right=True)
    known = owner.clamp(max=experts - 1)
    start = offsets[:-1][known] + TILE_ROWS * (slot - (ends_E - tiles_E)[known])
    beyond = slot >= ends_E[-1]
    tiles = torch.stack((owner.masked_fill(beyond, -1), start.masked_fill(beyond, 0))).int()
    chosen = (segment_R % experts).int()[:, None]
    gates = torch.ones((total, 1), dtype=torch.float32, device=device)
    return Routing(
        gates.new_empty((total, 0)), gates, chosen, offsets.int(), rows_R.int(), positions_R.int()[:, None], tiles
    )


def _check(hidden: Tensor, router: Tensor, experts_per_token: int, replayed_experts: Tensor | None) -> None:
    if hidden.dim() != 2 or router.dim() != 2 or hidden.shape[1] != router.shape[1] or not router.shape[0]:
        raise ValueError(
            f"hidden, router: expected (T, D), (E, D) with E >= 1, got {tuple(hidden.shape)}, {tuple(router.shape)}"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a float dtype, got {str(hidden.dtype).removeprefix('torch.')}")
    if not 1 <= experts_per_token <= router.shape[0]:
        raise ValueError(f"experts_per_token: expected 1 to {router.shape[0]}, got {experts_per_token}")
    same_dtype(hidden=hidden, router=router)
    same_device(hidden=hidden, router=router, replayed_experts=replayed_experts)
    contiguous_rows(hidden=hidden, router=router)
    if replayed_experts is not None:
        _check_replayed(replayed_experts, (hidden.shape[0], experts_per_token), router.shape[0])


def _check_replayed(replayed_experts: Tensor, shape: tuple[int, int], experts: int) -> None:
    if replayed_experts.shape != shape or replayed_experts.dtype not in (torch.int32, torch.int64):
        name = str(replayed_experts.dtype).removeprefix("torch.")
        raise ValueError(
            f"replayed_experts: expected {shape} int32 or int64, got {tuple(replayed_experts.shape)} {name}"
        )
    if not values_are_checked(replayed_experts) or not replayed_experts.numel():
        return
    ordered = replayed_experts.sort(-1).values
    wrong = (ordered[:, 0] < 0) | (ordered[:, -1] >= experts) | (ordered.diff(dim=-1) == 0).any(-1)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"replayed_experts: expected different experts of 0 to {experts - 1}, got "
            f"{replayed_experts[token].tolist()} at token {token}"
        )


def expert_counts(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Tensor:
    """(E,) int64 tokens that each expert got, of experts (T, A); `real` (T,) bool leaves padding out."""
    chosen_TE = (experts[..., None] == torch.arange(num_experts, device=experts.device)).sum(1)
    return (chosen_TE if real is None else chosen_TE * real[:, None]).sum(0)


def load_balancing_loss(
    logits: Tensor,
    experts: Tensor,
    *,
    num_tokens: float | Tensor,
    real: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """A micro-batch's share of the load-balancing loss, A where the load is even.

    loss = E sum_e f_e P_e,   f_e = share of the real tokens that e was chosen by,   P_e = sum_t softmax(logits_t)_e /
    num_tokens; f has no gradient.

    Args:
        logits: (T, E) fp32.   experts: (T, A) integers.   num_tokens: tokens of the step over all ranks and
            micro-batches, so that the sum of the shares is the mean over the step weighted by tokens.
        real: (T,) bool, False for padding, which counts in neither; None: all are real.
        counts: (E,) real tokens that chose each expert, where these tokens are one rank's share of a micro-batch.
    Returns:
        () fp32 (fp64 for fp64).
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6, with f summed over the choices as in Mixtral's code.
    """
    probability_TE = logits.softmax(-1)
    if real is not None:
        probability_TE = probability_TE.masked_fill(~real[:, None], 0.0)
    if counts is None:
        counts = expert_counts(experts, logits.shape[1], real)
    fraction_E = counts / (counts.sum() / experts.shape[1]).clamp(min=1)
    return logits.shape[1] * (fraction_E * probability_TE.sum(0)).sum() / num_tokens


def router_z_loss(logits: Tensor, *, num_tokens: float | Tensor, real: Tensor | None = None) -> Tensor:
    """A micro-batch's share of the router z-loss: mean over tokens of log(sum_e exp(logits_te))^2.

    Args and returns as `load_balancing_loss`.
    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    square_T = logits.logsumexp(-1).square()
    if real is not None:
        square_T = square_T.masked_fill(~real, 0.0)
    return square_T.sum() / num_tokens
