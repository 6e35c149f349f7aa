"""Faults and side effects: what a closure does, the weights come back bit for bit."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.problems import Problem, make_problem
from torch_booster import BoosterOptimizer, functional
from torch_booster.distributed import tensor_norms

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def snapshot(params: list[Tensor]) -> list[tuple[int, Tensor]]:
    return [(p.data_ptr(), p.detach().clone()) for p in params]


def assert_unmoved(params: list[Tensor], before: list[tuple[int, Tensor]]) -> None:
    for p, (pointer, value) in zip(params, before, strict=True):
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)


# A closure that raises


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("when", ["before_backward", "after_backward"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_gradients_survive_a_raising_closure(
    dtype: torch.dtype, call: int, when: str, error: type[BaseException]
) -> None:
    """The error of call 3 is the alignment closure's, in the one-call usage."""
    problem = make_problem(dtype=dtype)
    opt = BoosterOptimizer(torch.optim.AdamW(problem.params), 5.0, 0.1, self_check=False)
    kept = [torch.randn_like(p) for p in problem.params]
    for p, grad in zip(problem.params, kept, strict=True):
        p.grad = grad.clone()
    before = snapshot(problem.params)
    calls = 0

    def raising(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == call and when == "before_backward":
                raise error("boom")
            loss = closure()
            if calls == call:
                raise error("boom")
            return loss

        return run

    with pytest.raises(error):
        opt.step(raising(problem.f_closure), raising(problem.h_closure))
    assert calls == call
    assert_unmoved(problem.params, before)
    assert not opt.state
    if call < 3:
        for p, grad in zip(problem.params, kept, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, grad)
    for p in problem.params:  # no hook stays behind
        assert not p._post_accumulate_grad_hooks  # type: ignore[attr-defined]


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
def test_ctrl_c_in_the_second_pass(request: pytest.FixtureRequest) -> None:
    # A shell may start background jobs with the signal ignored.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, kept))
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.AdamW(problem.params), self_check=False)
    before = snapshot(problem.params)
    calls = 0

    def slow() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert not torch.equal(problem.params[0], before[0][1])
            signal.raise_signal(signal.SIGINT)
            time.sleep(10)
        return problem.h_closure()

    with pytest.raises(KeyboardInterrupt):
        opt.regularize(slow)
    assert_unmoved(problem.params, before)


# Gradients that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_survive_non_finite_gradients(dtype: torch.dtype, call: int, value: float) -> None:
    problem = make_problem(dtype=dtype)
    opt = BoosterOptimizer(torch.optim.AdamW(problem.params), 5.0, 0.1, self_check=False)
    before = snapshot(problem.params)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.h()
        if calls == call:
            loss = loss + value * problem.params[0].sum()
        loss.backward()
        return loss

    opt.regularize(closure)
    assert_unmoved(problem.params, before)
    grads = [p.grad for p in problem.params if p.grad is not None]
    assert not all(grad.isfinite().all() for grad in grads)  # a GradScaler must see it


# Randomness, buffers, autocast


def dropout_problem() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 1)).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return model, closure


@pytest.mark.parametrize("replay_rng", [True, False])
def test_both_passes_draw_the_same_masks(replay_rng: bool) -> None:
    model, closure = dropout_problem()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = BoosterOptimizer(base, 1.0, 1e-6, replay_rng=replay_rng, self_check=False)
    opt.regularize(closure)
    assert opt.diagnostics is not None
    drop = opt.diagnostics.harmful_loss_drop
    expected = 1e-6 * opt.diagnostics.harmful_grad_norm  # first order, where the masks are equal
    assert torch.isclose(drop, expected, rtol=1e-3, atol=0).item() is replay_rng


def test_randomness_advances_from_step_to_step() -> None:
    model, closure = dropout_problem()
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), 1.0, 1e-6)
    losses = []
    for _ in range(3):
        opt.zero_grad()
        losses.append(float(opt.regularize(closure)))  # type: ignore[arg-type]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("guarded", [True, False])
def test_batch_norm_statistics(guarded: bool) -> None:
    """With `module` they stay; without, as the docstring says, they move twice a step."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(8, 5)
    opt = BoosterOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        module=model if guarded else None,
        self_check=False,
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    before = {name: value.clone() for name, value in model.named_buffers()}
    objects = {name: id(value) for name, value in model.named_buffers()}
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(norm.running_mean.clone())  # type: ignore[union-attr]
        loss = model(x).square().mean()
        loss.backward()
        return loss

    opt.regularize(closure)
    assert torch.equal(seen[0], seen[1]) is guarded
    assert norm.num_batches_tracked == (0 if guarded else 2)
    if guarded:
        for name, value in model.named_buffers():
            assert torch.equal(value, before[name])
            assert id(value) == objects[name]
        opt.zero_grad()

        def raising() -> Tensor:
            model(x)
            raise BoomError

        with pytest.raises(BoomError):
            opt.regularize(raising)
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("where", ["inside", "around", "around_warm"])
def test_autocast_cache_serves_no_stale_weights(where: str) -> None:
    """With autocast around the call the second pass once saw the unperturbed weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(16, 8)
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 5.0, 0.5)

    def inner() -> Tensor:
        loss = model(x).float().square().mean()
        loss.backward()
        return loss

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def closure() -> Tensor:
        if where != "inside":
            return inner()
        with autocast():
            loss = model(x).float().square().mean()
        loss.backward()
        return loss

    def regularize() -> None:
        if where == "inside":
            opt.regularize(closure)
            return
        with autocast():
            if where == "around_warm":
                model(x)
            opt.regularize(closure)
            outside = model(x)
        with autocast():
            assert torch.equal(outside, model(x))  # nor perturbed ones after the call

    regularize()
    assert opt.diagnostics is not None
    assert opt.diagnostics.harmful_loss_drop > 0.001
    reg = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    opt.zero_grad()
    opt.regularize(lambda: (lambda loss: (loss.backward(), loss)[1])(model(x).square().mean()))
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.nn.functional.cosine_similarity(reg, exact, dim=0) > 0.95


# Rounding


def test_rounding_is_reported_once_and_names_the_fraction() -> None:
    param = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), 5.0, 1e-3)

    def closure() -> Tensor:
        loss = (param.float() * torch.linspace(0, 1, 1000)).square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"bfloat16 moved only 0%.*float32"):
        opt.regularize(closure)
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.regularize(closure)
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_report_where_nothing_is_lost(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(100, dtype=dtype))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), 5.0, 1e-3)
    opt.regularize(lambda: (lambda loss: (loss.backward(), loss)[1])((param - 1).square().sum()))
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(1e-3, rel=0.01)


# No waiting for the device


class Syncs(TorchDispatchMode):
    """Counts the operators that read a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "equal.", "is_set_to")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zeroing", [True, False])
def test_the_step_reads_nothing_back(zeroing: bool) -> None:
    problem = make_problem()
    base = torch.optim.SGD(problem.params, lr=0.1, foreach=True)
    opt = BoosterOptimizer(base, self_check=False)

    def zeroed(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if zeroing:
                opt.zero_grad()
            return closure()

        return run

    with Syncs() as syncs:
        opt.step(zeroed(problem.f_closure), zeroed(problem.h_closure))
        assert syncs.found == []
        assert opt.diagnostics is not None
        opt.diagnostics.harmful_loss.item()
        assert syncs.found == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_arithmetic_on_several_devices_without_reading_back(norm: str) -> None:
    """On fake tensors: shapes and devices are checked, and a value cannot be read at all."""
    with FakeTensorMode(), torch.no_grad():
        params = [
            torch.randn(4, 3, device="cuda:0"),
            torch.randn(3, 2),
            torch.randn(5, device="cuda:1", dtype=torch.float64),
        ]
        weights = [p.clone() for p in params]
        grads = [torch.randn_like(p) for p in params]
        lengths = tensor_norms(functional.norms(grads), params)
        sizes = functional.step_sizes(lengths, [0.1, 0.1, 0.2], norm, 1e-7)
        functional.perturb_(params, weights, grads, sizes)
        functional.scale_(grads, [1.0, 2.0, 3.0])
        functional.add_(grads, weights)
        functional.subtract_(grads, weights)
        functional.copying(params, weights)()
        with pytest.raises(DataDependentOutputException):
            sizes.sum().item()


# GradScaler


def scaled_problem() -> tuple[Problem, BoosterOptimizer, torch.amp.GradScaler]:
    problem = make_problem(dtype=torch.float32)
    opt = BoosterOptimizer(torch.optim.AdamW(problem.params, lr=0.01), 5.0, 0.1)
    return problem, opt, torch.amp.GradScaler("cpu", init_scale=2.0**10)


def test_grad_scaler_in_stages_equals_the_unscaled_step() -> None:
    problem, opt, scaler = scaled_problem()
    plain = make_problem(dtype=torch.float32)
    plain_opt = BoosterOptimizer(torch.optim.AdamW(plain.params, lr=0.01), 5.0, 0.1)

    def scaled_h() -> Tensor:
        loss = problem.h()
        scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        opt.zero_grad()
        opt.regularize(scaled_h)
        scaler.scale(problem.f()).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(problem.params, 1.0)
        scaler.step(opt)
        scaler.update()

        plain_opt.zero_grad()
        plain_opt.regularize(plain.h_closure)
        plain.f_closure()
        nn.utils.clip_grad_norm_(plain.params, 1.0)
        plain_opt.step()
    for p, q in zip(problem.params, plain.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overflow_in", [1, 2, 3])
def test_overflow_skips_the_step(overflow_in: int) -> None:
    problem, opt, scaler = scaled_problem()
    opt = BoosterOptimizer(opt.base_optimizer, 5.0, 0.1, self_check=False)
    before = snapshot(problem.params)
    calls = 0

    def backward(loss: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == overflow_in:
            loss = loss + float("inf") * problem.params[0].sum()
        scaler.scale(loss).backward()
        return loss

    opt.regularize(lambda: backward(problem.h()))
    backward(problem.f())
    scaler.step(opt)
    scaler.update()
    assert_unmoved(problem.params, before)
    assert scaler.get_scale() == 2.0**9
    assert not opt.state
    problem.model.zero_grad()  # which opt does not see, as it did not see the skipped step
    opt.regularize(problem.h_closure)
    assert opt.step_count == 0


@pytest.mark.parametrize("used", [False, True])
def test_grad_scaler_with_closures_fails_loudly_at_the_first_step(used: bool) -> None:
    """torch's own words: it unscales before closures run, and finds nothing to unscale."""
    problem, opt, scaler = scaled_problem()
    before = snapshot(problem.params)
    if used:
        scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks" if used else "_scale is None"):
        scaler.step(opt, problem.f_closure, problem.h_closure)
    assert_unmoved(problem.params, before)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.step(opt, problem.f_closure, problem.h_closure)
    assert not torch.equal(problem.params[0], before[0][1])
