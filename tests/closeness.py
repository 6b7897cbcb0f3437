"""The tolerance of numerical tests: a result may be off by twice what eager PyTorch in the same dtype is off by."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

UNIT = 2.0**-23


def assert_close(out: Tensor, base: Tensor, ref: Tensor, what: str = "result") -> None:
    """max|out - ref| <= 2 max|base - ref| + 4 * 2^-23 max|ref|; `ref` in float64, `base` eager in the tested dtype."""
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)} against {tuple(ref.shape)}"
    if not ref.numel():
        return
    error = float((out.double() - ref).abs().max())
    limit = 2 * float((base.double() - ref).abs().max()) + 4 * UNIT * float(ref.abs().max())
    assert error <= limit, f"{what}: error {error:.3e}, limit {limit:.3e}"


def scaled(*shape: int, seed: int, dim: int = 0) -> Tensor:
    """Normal numbers whose slices along `dim` have scales from 1e-3 to 10, float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-3, 1, shape[dim], dtype=torch.float64)
    scales = scales[torch.randperm(shape[dim], generator=generator)]
    return values * scales.view([-1 if i == dim else 1 for i in range(len(shape))])


def results(function: Callable[..., Tensor | tuple], inputs: Mapping[str, Tensor], cotangents) -> dict[str, Tensor]:
    """Outputs of `function(**inputs)` and the gradient of every input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    outs = function(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(
        sum((out * cotangents(out.shape, n).to(out.dtype)).sum() for n, out in enumerate(outs)), list(leaves.values())
    )
    named = {f"output {n}": out.detach() for n, out in enumerate(outs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def check(
    function: Callable[..., Tensor | tuple],
    eager: Callable[..., Tensor | tuple],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    also: Callable[..., Tensor | tuple] | None = None,
) -> None:
    """Outputs and gradients of `function` in `dtype` against `eager` in float64, by the rule of `assert_close`.

    The allowance is that of `eager` in `dtype`, or of `also`, another eager form, where that is further off.
    """

    def cotangents(shape: torch.Size, n: int) -> Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(77 + n), dtype=torch.float64)
        return drawn.to(dtype).double()

    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    out, *bases = (results(f, rounded, cotangents) for f in (function, eager, also or eager))
    ref = results(eager, {name: tensor.double() for name, tensor in rounded.items()}, cotangents)
    for name in ref:
        base = max((b[name] for b in bases), key=lambda b: float((b.double() - ref[name]).abs().sum()))
        assert_close(out[name], base, ref[name], name)
