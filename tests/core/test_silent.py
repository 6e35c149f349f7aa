"""Inputs on which a step would be wrong without a word: served right, said once, or refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.optimizers import WRAPPABLE, accepted, make
from tests.problems import make_problem
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer

LAM, ALPHA = 5.0, 0.1


def closure_of(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss

    return closure


@pytest.fixture
def silent() -> Iterator[None]:
    """Within it every warning is an error, as everywhere here; named where that is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drop_and_regularizer(
    model: nn.Module, loss_of: Callable[[], Tensor], alpha: float = 0.0, **options: Any
) -> tuple[float, float]:
    """At α = 0 both are exactly zero, wherever the passes see one function."""
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LAM, alpha, **options)
    opt.regularize(closure_of(loss_of))
    assert opt.diagnostics is not None
    grads = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    return opt.diagnostics.harmful_loss_drop.item(), max(grads)


# ------------------------------------------------------- parameters that other optimizers hold


class TwoPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("usage", ["one_call", "staged"])
@pytest.mark.parametrize("there_before", [False, True])
def test_gradients_of_another_optimizers_parameters(usage: str, there_before: bool) -> None:
    torch.manual_seed(0)
    model = TwoPart().double()
    x = torch.randn(6, 5, dtype=torch.float64)
    opt = BoosterOptimizer(torch.optim.SGD(model.body.parameters(), lr=0.1), module=model)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    f, h = closure_of(lambda: model(x).square().mean()), closure_of(lambda: (model(x) - 1).sum())
    expected = torch.autograd.grad(model(x).square().mean(), list(model.head.parameters()))
    before = torch.zeros(())
    if there_before:
        for p in model.head.parameters():
            p.grad = torch.ones_like(p)
        before = torch.ones(())
    if usage == "one_call":
        opt.step(f, h)
    else:
        opt.regularize(h)
        f()
        opt.step()
    for p, wanted in zip(other.param_groups[0]["params"], expected, strict=True):
        torch.testing.assert_close(p.grad, wanted + before, rtol=0, atol=1e-12)


def test_where_no_module_names_them_it_is_said_once() -> None:
    model, x = TwoPart(), torch.randn(6, 5)
    opt = BoosterOptimizer(torch.optim.SGD(model.body.parameters(), lr=0.1))
    h = closure_of(lambda: model(x).square().mean())
    with pytest.warns(
        UserWarning, match=r"2 tensors that this optimizer does not hold.*module=mod"
    ):
        opt.regularize(h)
    opt.zero_grad()
    opt.regularize(h)


def test_activations_and_frozen_weights_are_nobodys_parameters(silent: None) -> None:
    model, x = TwoPart(), torch.randn(6, 5)
    model.head.requires_grad_(False)
    x.requires_grad_(True)  # as PEFT asks of the embeddings' output
    BoosterOptimizer(torch.optim.SGD(model.body.parameters(), lr=0.1)).regularize(
        closure_of(lambda: model(x).square().mean())
    )


# --------------------------------------------------------------------- one function of the weights


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_every_global_generator_is_replayed(source: str, silent: None) -> None:
    draw: dict[str, Callable[[], float]] = {
        "torch": lambda: float(torch.rand(())),
        "numpy": lambda: float(np.random.rand()),
        "python": random.random,
    }
    model, x = TwoPart(), torch.randn(6, 5)
    losses: list[float] = []

    def noisy() -> Tensor:
        loss = (model(x) * draw[source]()).square().mean()
        losses.append(loss.item())
        return loss

    assert drop_and_regularizer(model, noisy) == (0.0, 0.0)
    assert len(set(losses)) == 1
    noisy()
    assert losses[-1] != losses[0]  # the stream goes on


def own_generator(x: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: x + torch.randn(x.shape, generator=generator)


def own_numpy_generator(x: Tensor) -> Callable[[], Tensor]:
    generator = np.random.default_rng(0)
    return lambda: x + torch.from_numpy(generator.normal(size=x.shape)).float()


def next_batch(x: Tensor) -> Callable[[], Tensor]:
    batches = cycle(torch.randn(7, *x.shape))
    return lambda: next(batches)


def counter(x: Tensor) -> Callable[[], Tensor]:
    calls: list[int] = []
    return lambda: (calls.append(1), x * len(calls))[1]


@pytest.mark.parametrize("inputs", [own_generator, own_numpy_generator, next_batch, counter])
def test_a_closure_that_does_not_repeat_is_told_by_how_much(
    inputs: Callable[[Tensor], Callable[[], Tensor]],
) -> None:
    model, draw = TwoPart(), inputs(torch.randn(6, 5))
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LAM, ALPHA)
    h = closure_of(lambda: model(draw()).square().mean())
    with pytest.warns(UserWarning, match=r"not one function.*gave [\d.]+ and [\d.]+.*new batch"):
        opt.regularize(h)
    opt.zero_grad()
    opt.regularize(h)
    with pytest.warns(UserWarning, match="not one function"):
        opt.check(h)


def test_a_check_on_request_leaves_everything_as_it_was(silent: None) -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), LAM, ALPHA)
    opt.regularize(problem.h_closure)
    seen = opt.diagnostics
    grads = [None if p.grad is None else p.grad.clone() for p in problem.params]
    weights = [p.detach().clone() for p in problem.params]
    opt.check(problem.h_closure)
    assert opt.diagnostics is seen
    for p, grad, weight in zip(problem.params, grads, weights, strict=True):
        assert torch.equal(p, weight)
        assert grad is None if p.grad is None else torch.equal(p.grad, grad)  # type: ignore[arg-type]
    problem.f_closure()
    opt.step()


def test_the_check_runs_one_more_pass_once() -> None:
    problem = make_problem()
    calls: list[int] = []

    def h() -> Tensor:
        calls.append(1)
        return problem.h_closure()

    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), LAM, ALPHA)
    counts = []
    for _ in range(3):
        opt.step(problem.f_closure, h)
        counts.append(len(calls))
        calls.clear()
    assert counts == [3, 2, 2]


# ------------------------------------------------------------------------- buffers and their twins


class Rotary(nn.Module):
    """Frequencies in a buffer that is made anew when a longer input comes, as an int remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.ones(4))
        self.longest = 2

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("frequencies", torch.full((4,), 1.0 / len(x)))
        return self.linear(x) * self.frequencies


class Observed(nn.Module):
    """A buffer that takes the batch's shape in the first forward pass, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(4, 4), way
        self.register_buffer("least", torch.tensor(torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.way == "resized":
            self.least.resize_(y.shape[1]).copy_(y.detach().amin(0))
        elif self.way == "replaced":
            self.least = y.detach().amin(0)
        elif not hasattr(self, "seen"):
            self.register_buffer("seen", y.detach().amin(0))
        return y


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_buffer_whose_twin_is_a_python_attribute(alpha: float, silent: None) -> None:
    torch.manual_seed(0)
    model, x = Rotary().double(), torch.randn(6, 4, dtype=torch.float64)
    params = dict(model.named_parameters())

    def loss_of(values: Any) -> Tensor:
        at = dict(zip(params, values, strict=True))
        out = torch.func.functional_call(copy.deepcopy(model), at, (x,))
        return out.square().mean()

    expected = booster_gradient(
        lambda v: 0 * loss_of(v), loss_of, list(params.values()), LAM, alpha
    )
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LAM, alpha, module=model)
    opt.regularize(closure_of(lambda: model(x).square().mean()))
    assert model.longest == 2
    assert torch.equal(model.frequencies, torch.ones(4, dtype=torch.float64))  # type: ignore[arg-type]
    for p, wanted in zip(params.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["resized", "replaced", "added"])
def test_buffers_that_change_their_shape(way: str, silent: None) -> None:
    model, x = Observed(way), torch.randn(6, 4)
    buffer = model.least
    assert drop_and_regularizer(model, lambda: model(x).square().mean(), module=model) == (0.0, 0.0)
    assert model.least is buffer
    assert dict(model.named_buffers()).keys() == {"least"}
    assert torch.equal(model.least, torch.tensor(torch.inf))  # type: ignore[arg-type]


# ------------------------------------------------------------------------- what becomes of `.grad`


def halve(param: Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(0.5)


def test_hooks_that_mask_gradients_leave_earlier_ones_alone() -> None:
    problem = make_problem()
    earlier = [torch.randn_like(p) for p in problem.params]
    for p, grad in zip(problem.params, earlier, strict=True):
        p.grad = grad.clone()
        p.register_post_accumulate_grad_hook(halve)
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.0), LAM, ALPHA)
    opt.regularize(problem.h_closure)
    halved = booster_gradient(
        lambda v: 0 * problem.h_of(v), lambda v: problem.h_of(v) / 2, problem.params, LAM, ALPHA
    )
    for p, grad, regularizer in zip(problem.params, earlier, halved, strict=True):
        wanted = grad if regularizer is None else grad + regularizer
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("usage", ["one_call", "staged"])
def test_a_harmful_closure_that_keeps_its_graph(usage: str) -> None:
    problem = make_problem()
    expected = booster_gradient(problem.f_of, problem.h_of, problem.params, LAM, ALPHA)

    def h() -> Tensor:
        loss = problem.h()
        loss.backward(create_graph=True)
        return loss

    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.0), LAM, ALPHA)
    earlier = [torch.ones_like(p) for p in problem.params]
    for p, grad in zip(problem.params, earlier, strict=True):
        p.grad = grad.clone()
    if usage == "one_call":
        opt.step(problem.f_closure, h)
    else:
        opt.regularize(h)
        problem.f_closure()
    for p, grad in zip(problem.params, expected, strict=True):
        wanted = torch.ones_like(p) if grad is None else grad + 1
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch ties .grad to the weight")
@pytest.mark.parametrize(
    ("held", "grad"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_gradients_of_another_dtype(held: torch.dtype, grad: torch.dtype, norm: Any) -> None:
    params = [nn.Parameter(torch.randn(64).to(held)) for _ in range(2)]
    for p in params:
        p.grad_dtype = grad
    opt = BoosterOptimizer(torch.optim.SGD(params, lr=0.1), LAM, 1.0, norm=norm)
    h = closure_of(lambda: torch.stack([p.float().pow(3).sum() for p in params]).sum())
    for _ in range(2):
        opt.regularize(h)  # the second time on what is there
        assert all(p.grad is not None and p.grad.dtype is grad for p in params)
        closure_of(lambda: torch.stack([p.float().sum() for p in params]).sum())()
        opt.zero_grad(set_to_none=False)
    assert opt.diagnostics is not None
    assert opt.diagnostics.drop_ratio.item() == pytest.approx(1.0, abs=0.8)


@pytest.mark.parametrize("way", ["opt", "opt_in_place", "model", "never"])
def test_a_step_without_its_regularizer_is_told_once(way: str) -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), LAM, ALPHA)

    def step() -> None:
        if way != "never":
            opt.regularize(problem.h_closure)
            assert opt.diagnostics is not None
        if way == "model":
            problem.model.zero_grad()
        elif way != "never":
            opt.zero_grad(set_to_none=way == "opt")
        problem.f_closure()
        opt.step()
        assert opt.diagnostics is None
        assert opt.read_diagnostics() == {}

    with pytest.warns(UserWarning, match=r"no regulariser although λ is not zero.*in this order"):
        step()
    step()


@pytest.mark.parametrize("why", ["lam", "every", "warm-up", "lr"])
def test_steps_that_are_meant_to_be_plain_are_not_told(why: str, silent: None) -> None:
    problem = make_problem()
    base = torch.optim.SGD(problem.params, lr=0.0 if why == "lr" else 0.1)
    every, warmup = 3 if why == "every" else 1, 5 if why == "warm-up" else 0
    opt = BoosterOptimizer(
        base, 0.0 if why == "lam" else LAM, ALPHA, every=every, lam_warmup_steps=warmup
    )
    if why == "every":
        opt.step(problem.f_closure, problem.h_closure)
    problem.f_closure()
    opt.step()


# ------------------------------------------------------------------------------------ the optimizer


@pytest.mark.parametrize("how", ["group", "attribute"])
def test_a_base_that_maximises(how: str) -> None:
    """f is a reward then, and the drop is still what has to shrink."""
    problem = make_problem()
    expected = booster_gradient(problem.f_of, problem.h_of, problem.params, -LAM, ALPHA)
    if how == "group":
        base: torch.optim.Optimizer = torch.optim.SGD(problem.params, lr=1e-3, maximize=True)
    else:
        lib = pytest.importorskip("pytorch_optimizer", reason="the peers extra is absent")
        base = lib.AdamP(problem.params, lr=1e-3, maximize=True)
    opt = BoosterOptimizer(base, LAM, ALPHA)
    opt.regularize(problem.h_closure)
    assert opt.diagnostics is not None
    before = opt.diagnostics.harmful_loss_drop.item()
    problem.f_closure()
    for p, wanted in zip(problem.params, expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-12)
    if how == "group":
        opt.zero_grad()
        for _ in range(20):  # the regulariser alone
            opt.zero_grad()
            opt.regularize(problem.h_closure)
            opt.step()
        opt.zero_grad()
        opt.regularize(problem.h_closure)
        assert opt.diagnostics is not None
        assert opt.diagnostics.harmful_loss_drop.item() < before


class PerSample(torch.optim.SGD):
    """As opacus' DPOptimizer: steps on `grad_sample` of each parameter."""

    @property
    def grad_samples(self) -> list[Tensor]:
        return [p.grad_sample for p in self.param_groups[0]["params"]]


class Wrapping(torch.optim.SGD):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups[0]["params"], lr=0.1)
        self.optimizer = optimizer


@pytest.mark.parametrize("nested", [False, True])
def test_bases_that_do_not_read_grad_are_refused_by_name(nested: bool) -> None:
    base: torch.optim.Optimizer = PerSample(make_problem().params, lr=0.1)
    with pytest.raises(TypeError, match=r"PerSample.*grad_sample.*reads \.grad"):
        BoosterOptimizer(Wrapping(base) if nested else base)
    params = make_problem().params
    params[0].main_grad = torch.zeros_like(params[0])  # type: ignore[attr-defined]  # as Megatron's
    with pytest.raises(TypeError, match=r"main_grad.*reads \.grad"):
        BoosterOptimizer(torch.optim.SGD(params, lr=0.1))


def test_a_base_whose_code_needs_a_closure_is_refused_when_wrapped() -> None:
    lib = pytest.importorskip("pytorch_optimizer", reason="the peers extra is absent")
    with pytest.raises(TypeError, match=r"AliG\.step needs a closure"):
        BoosterOptimizer(lib.AliG(make_problem().params))


@pytest.mark.parametrize("name", WRAPPABLE)
def test_hooks_run_once_and_in_torchs_order(name: str) -> None:
    """Process-wide before the optimizer's own, and after them: as with the bare optimizer."""

    def run(opt: torch.optim.Optimizer, step: Callable[[], object]) -> list[str]:
        seen: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("process-wide before")),
            register_optimizer_step_post_hook(lambda *_: seen.append("process-wide after")),
            opt.register_step_pre_hook(lambda *_: seen.append("own before")),  # type: ignore[arg-type,func-returns-value]
            opt.register_step_post_hook(lambda *_: seen.append("own after")),
        ]
        step()
        for handle in handles:
            handle.remove()
        step()  # hooks that were taken away do not run
        return seen

    problem = make_problem()
    params = accepted(name, problem.params)
    for p in params:
        p.grad = torch.ones_like(p)
    bare = make(name, params)
    order = run(bare, bare.step)
    assert order == ["process-wide before", "own before", "own after", "process-wide after"]

    wrapped = BoosterOptimizer(make(name, params), module=problem.model)

    def step() -> None:
        wrapped.zero_grad()
        wrapped.step(problem.f_closure, problem.h_closure)

    assert run(wrapped, step) == order


@pytest.mark.parametrize("name", WRAPPABLE)
def test_a_profiler_sees_one_optimizer_step(name: str) -> None:
    problem = make_problem()
    params = accepted(name, problem.params)
    opt = BoosterOptimizer(make(name, params), module=problem.model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step(problem.f_closure, problem.h_closure)
    steps = [e for e in profile.key_averages() if e.key.startswith("Optimizer.step#")]
    assert [(e.key, e.count) for e in steps] == [(f"Optimizer.step#{name}.step", 1)]


def test_a_step_pre_hook_gets_the_wrapper_and_may_change_arguments() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1))
    seen: list[Any] = []

    def hook(optimizer: Any, args: Any, kwargs: Any) -> Any:
        seen.append(optimizer)
        return args, kwargs

    opt.register_step_pre_hook(hook)
    opt.step(problem.f_closure, problem.h_closure)
    assert seen == [opt]


# ----------------------------------------------------------------------------------------- messages


class Enormous(nn.Module):
    def __repr__(self) -> str:
        return "weights " * 1000

    def __call__(self) -> Enormous:
        return self


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda problem, opt: BoosterOptimizer(Enormous()), r"got a Enormous.*Pass AdamW\("),
        (lambda problem, opt: BoosterOptimizer(problem.params), r"got a list.*Pass AdamW\("),
        (lambda problem, opt: opt.step(3.0, problem.h_closure), r"got 3\.0\. Pass the function"),
        (
            lambda problem, opt: opt.step(problem.f_closure, torch.ones(100)),
            r"got a Tensor\. Pass the function",
        ),
        (
            lambda problem, opt: opt.regularize(lambda: (problem.h_closure(), Enormous())[1]),
            r"got a Enormous\. End it with `return loss`",
        ),
        (lambda problem, opt: setattr(opt, "lam", Enormous()), r"got a Enormous\. Pass a float"),
    ],
)
def test_messages_are_short_and_end_with_what_to_write(
    call: Callable[[Any, Any], object], match: str
) -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1))
    with pytest.raises(TypeError, match=match) as error:
        call(problem, opt)
    assert len(str(error.value)) < 400


def test_a_class_with_its_arguments_is_answered_with_the_right_call() -> None:
    with pytest.raises(TypeError, match=r"AdamW\(model\.parameters\(\), \.\.\.\)"):
        BoosterOptimizer(torch.optim.AdamW, make_problem().params)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a list\. Pass AdamW\(model\.parameters\(\)"):
        BoosterOptimizer(make_problem().params, torch.optim.AdamW)  # type: ignore[arg-type]


# -------------------------------------------------------------------- a promise about the closure


def test_a_scaled_loss_does_not_blind_the_check() -> None:
    """Its gradients promise a thousand times the change that the returned loss shows."""
    model, draw = TwoPart(), next_batch(torch.randn(6, 5))

    def h() -> Tensor:
        loss = model(draw()).square().mean()
        (1024 * loss).backward()
        return loss

    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LAM, 1e-3)
    with pytest.warns(UserWarning, match="not one function"):
        opt.regularize(h)


@pytest.mark.parametrize("zeroing", ["none", "in_place", "halved"])
def test_a_closure_that_breaks_its_promise_is_found_out(zeroing: str) -> None:
    problem = make_problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    opt = BoosterOptimizer(base, LAM, ALPHA, accumulates=True)

    if zeroing == "halved":
        for p in problem.params:
            p.register_post_accumulate_grad_hook(halve)

    def zeroes() -> Tensor:
        if zeroing != "halved":
            base.zero_grad(set_to_none=zeroing == "none")
        return problem.h_closure()

    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match=r"edited \.grad, though accumulates=True"):
        opt.regularize(zeroes)
    for p, weight in zip(problem.params, before, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is None
