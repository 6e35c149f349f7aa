"""Limit cases and closed forms: quadratics, linear losses, scale, and what hypothesis can find."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn

from tests.problems import quadratic
from torch_booster import BoosterOptimizer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

shapes = st.lists(
    st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6
)
lams = st.floats(0.01, 100.0)
alphas = st.floats(1e-3, 10.0)
seeds = st.integers(0, 2**31)


def regularizer(
    params: list[nn.Parameter],
    loss: Callable[[], Tensor],
    lam: float = 1.0,
    alpha: float = 0.1,
    eps: float = 1e-7,
) -> tuple[list[Tensor], BoosterOptimizer]:
    base = torch.optim.SGD(params, lr=0.1)
    opt = BoosterOptimizer(base, lam, alpha, eps=eps, self_check=False)  # which has its own tests
    opt.zero_grad()

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    opt.regularize(closure)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params], opt


def bowl(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> Callable[[], Tensor]:
    """A smooth loss with curvature that differs from weight to weight."""
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]

    def loss() -> Tensor:
        terms = [(1 + (p - t).square()).log().sum() for p, t in zip(params, targets, strict=True)]
        return scale * torch.stack(terms).sum()

    return loss


def parameters(sizes: list[tuple[int, ...]], dtypes: list[torch.dtype], seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)]))
        for i, size in enumerate(sizes)
    ]


@given(size=st.integers(1, 12), lam=lams, alpha=alphas, seed=seeds, eps=st.floats(0, 1e-3))
def test_quadratic_closed_form(size: int, lam: float, alpha: float, seed: int, eps: float) -> None:
    """∇h = Hw − b, so the regulariser is λ·α·H·g/(‖g‖ + ε)."""
    hessian, b, w = quadratic(size, seed)
    param = nn.Parameter(w.clone())
    g = hessian @ w - b
    assume(g.norm() > 1e-6)
    (got,), _ = regularizer(
        [param], lambda: 0.5 * param @ hessian @ param - b @ param, lam, alpha, eps
    )
    expected = lam * alpha * hessian @ g / (g.norm() + eps)
    torch.testing.assert_close(
        got,
        expected,
        rtol=0,
        atol=1e-12 * lam * (1 + float(hessian.norm())) * (1 + float(g.norm() + alpha)),
    )


@given(sizes=shapes, seed=seeds, lam=lams, alpha=alphas, groups=st.integers(1, 3))
def test_perturbation_has_length_alpha_and_leaves_no_trace(
    sizes: list[tuple[int, ...]], seed: int, lam: float, alpha: float, groups: int
) -> None:
    params = parameters(sizes, [torch.float64], seed)
    assume(sum(p.numel() for p in params) > 0)
    before = [(p.data_ptr(), p.detach().clone()) for p in params]
    base = torch.optim.SGD([{"params": params[i::groups]} for i in range(groups)], lr=0.1)
    opt = BoosterOptimizer(base, lam, alpha, self_check=False)
    loss = bowl(params, seed + 1)
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in params])
        value = loss()
        value.backward()
        return value

    opt.regularize(closure)
    at_w, at_w_prime = seen
    distance = (
        sum(float((a - b).square().sum()) for a, b in zip(at_w, at_w_prime, strict=True)) ** 0.5
    )
    assert distance == pytest.approx(alpha, rel=1e-5)
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(distance, rel=1e-9)
    for p, (pointer, value) in zip(params, before, strict=True):
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)


@given(
    sizes=shapes,
    seed=seeds,
    alpha=alphas,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
)
def test_restore_is_the_identity_in_every_dtype(
    sizes: list[tuple[int, ...]], seed: int, alpha: float, dtypes: list[torch.dtype]
) -> None:
    params = parameters(sizes, dtypes, seed)
    assume(sum(p.numel() for p in params) > 0)
    before = [p.detach().clone() for p in params]
    losses = [bowl([p], seed + i) for i, p in enumerate(params)]
    grads, _ = regularizer(params, lambda: sum(loss().double() for loss in losses), 2.0, alpha)  # type: ignore[arg-type,return-value]
    for p, value, grad in zip(params, before, grads, strict=True):
        assert torch.equal(p, value)
        assert grad.dtype == p.dtype
        assert grad.isfinite().all()


@given(sizes=shapes, seed=seeds, scale=st.floats(1e-3, 1e3), alpha=alphas)
def test_direction_does_not_depend_on_the_scale_of_h(
    sizes: list[tuple[int, ...]], seed: int, scale: float, alpha: float
) -> None:
    """c·h has the perturbation of h, hence c times its regulariser."""
    params = parameters(sizes, [torch.float64], seed)
    assume(sum(p.numel() for p in params) > 0)
    one, _ = regularizer(params, bowl(params, seed + 1), 1.0, alpha, eps=0.0)
    other, _ = regularizer(params, bowl(params, seed + 1, scale), 1.0, alpha, eps=0.0)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a * scale, b, rtol=1e-7, atol=1e-10 * scale)


@given(sizes=shapes, seed=seeds, lam=lams, alpha=alphas)
def test_linear_in_lam(sizes: list[tuple[int, ...]], seed: int, lam: float, alpha: float) -> None:
    params = parameters(sizes, [torch.float64], seed)
    assume(sum(p.numel() for p in params) > 0)
    one, _ = regularizer(params, bowl(params, seed + 1), 1.0, alpha)
    other, _ = regularizer(params, bowl(params, seed + 1), lam, alpha)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(lam * a, b, rtol=1e-12, atol=0)


@given(sizes=shapes, seed=seeds, alpha=alphas)
def test_zero_where_h_is_linear(sizes: list[tuple[int, ...]], seed: int, alpha: float) -> None:
    params = parameters(sizes, [torch.float64], seed)
    assume(sum(p.numel() for p in params) > 0)
    slopes = [torch.randn_like(p) for p in params]
    grads, opt = regularizer(
        params,
        lambda: torch.stack([(p * s).sum() for p, s in zip(params, slopes, strict=True)]).sum(),
        7.0,
        alpha,
    )
    assert all(not grad.any() for grad in grads)
    norm = torch.cat([s.flatten() for s in slopes]).norm()
    assert opt.diagnostics is not None
    torch.testing.assert_close(
        opt.diagnostics.harmful_loss_drop, alpha * norm, rtol=1e-5, atol=1e-9
    )


@given(size=st.integers(2, 10), seed=seeds)
def test_a_regularised_step_blunts_the_next_harmful_step(size: int, seed: int) -> None:
    """The sign: the drop h(w) − h(w′) is smaller after a step on the regulariser."""
    hessian, b, w = quadratic(size, seed)
    g = hessian @ w - b
    param = nn.Parameter(w.clone())

    def loss() -> Tensor:
        return 0.5 * param @ hessian @ param - b @ param

    (gradient,), opt = regularizer([param], loss, 1.0, 0.1)
    assume(float(g.norm()) > 1e-2 and float(gradient.norm()) > 1e-3)
    assert opt.diagnostics is not None
    drop = opt.diagnostics.harmful_loss_drop.item()
    with torch.no_grad():
        param.sub_(1e-3 * gradient / gradient.norm())
    _, opt = regularizer([param], loss, 1.0, 0.1)
    assert opt.diagnostics is not None
    assert opt.diagnostics.harmful_loss_drop.item() < drop


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_harmful_gradient(dtype: torch.dtype, eps: float) -> None:
    """At a stationary point of h there is no direction: no 0/0, no regulariser."""
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    (grad,), opt = regularizer(
        [param], lambda: (param - param.detach()).square().sum(), 5.0, eps=eps
    )
    assert not grad.any()
    assert opt.diagnostics is not None
    assert opt.diagnostics.harmful_grad_norm == 0
    assert opt.diagnostics.perturbation_norm == 0


def test_alpha_zero_is_no_regulariser() -> None:
    param = nn.Parameter(torch.randn(4, dtype=torch.float64))
    (grad,), _ = regularizer([param], lambda: param.pow(4).sum(), 5.0, 0.0)
    assert not grad.any()


def test_complex_parameters() -> None:
    """|z|² has gradient 2z; the norm counts real and imaginary parts."""
    z = nn.Parameter(torch.tensor([3.0 + 4.0j], dtype=torch.complex128))
    (grad,), opt = regularizer([z], lambda: z.abs().square().sum(), 2.0, 0.5)
    assert opt.diagnostics is not None
    assert opt.diagnostics.harmful_grad_norm.item() == pytest.approx(10.0)
    torch.testing.assert_close(grad, 2.0 * 2.0 * 0.5 * z.detach() / 5.0, rtol=1e-6, atol=0)


def test_norm_is_accumulated_in_float32() -> None:
    """A float16 sum of squares would overflow: 300² · 1000 is 9e7."""
    param = nn.Parameter(torch.full((1000,), 300.0, dtype=torch.float16))
    _, opt = regularizer([param], lambda: param.float().square().sum() / 2, 1.0, 0.1)
    assert opt.diagnostics is not None
    assert opt.diagnostics.harmful_grad_norm.dtype == torch.float32
    assert opt.diagnostics.harmful_grad_norm.item() == pytest.approx(300 * 1000**0.5, rel=1e-5)
