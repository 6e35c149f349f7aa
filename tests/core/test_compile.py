"""Compiled models: the gradient is the eager one, and the perturbation compiles nothing anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.problems import Problem, make_problem
from tests.reference import Loss, booster_gradient
from tests.tiny_llama import boosted, check_step, tiny_llama, trainable
from torch_booster import BoosterOptimizer

LAM, ALPHA = 3.0, 0.1


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inductor() -> Iterator[str]:
    """torch's default compiler, in this process and with little to compile in C++."""
    from torch._inductor import config, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch's default compiler needs a C++ compiler, and none is installed")
    plain = {"cpp.simdlen": 0, "cpp_cache_precompile_headers": False}
    with config.patch({"compile_threads": 1, **plain}):
        yield "inductor"


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def formula(eager: Problem, at: Problem) -> list[Tensor]:
    grads = booster_gradient(eager.f_of, eager.h_of, at.params, LAM, ALPHA)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(at.params, grads, strict=True)]


def assert_formula(problem: Problem, wanted: list[Tensor]) -> None:
    for p, w in zip(problem.params, wanted, strict=True):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, w, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("name", "zeroing"), [("mlp", False), ("tied", True)], ids=["accumulates", "zeroes"]
)
def test_gradient_is_the_formulas(name: str, zeroing: bool) -> None:
    """All graphs are of the first step: one for its batch size, and one for others."""
    eager, problem = make_problem(name), make_problem(name)
    problem.model.compile(backend="aot_eager")
    optimizer = BoosterOptimizer(torch.optim.AdamW(problem.params, lr=1e-2), LAM, ALPHA)

    def harmful() -> Tensor:
        if zeroing:
            optimizer.zero_grad()
        return problem.h_closure()

    in_first_step = 0
    for i in range(4):
        wanted = formula(eager, problem)
        optimizer.zero_grad()
        if i % 2:
            optimizer.step(problem.f_closure, harmful)
            assert_formula(problem, wanted)
        else:
            optimizer.regularize(harmful)
            problem.f_closure()
            assert_formula(problem, wanted)
            optimizer.step()
        in_first_step = in_first_step or graphs()
        assert 1 <= graphs() == in_first_step


class Masked(nn.Module):
    """Linear after dropout; shows what dropout left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = nn.functional.dropout(x, 0.5)
        return self.linear(left), left


def loss_of(output: Tensor) -> Tensor:
    return output.tanh().square().mean()


# It imports a part of torch that uses another deprecated one.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_default_compiler(inductor: str) -> None:
    """It draws masks in a way of its own; they repeat all the same, and the formula holds."""
    model = Masked()
    forward, x = torch.compile(model, backend=inductor), torch.randn(4, 8).double()
    params = list(model.parameters())
    base = torch.optim.AdamW(params, lr=1e-2)
    optimizer = BoosterOptimizer(base, LAM, ALPHA, self_check=False)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        output, left = forward(x)
        seen.append(left)
        loss = loss_of(output)
        loss.backward()
        return loss

    def on(left: Tensor) -> Loss:
        return lambda values: loss_of(nn.functional.linear(left, *values))

    for _ in range(3):
        seen.clear()
        optimizer.zero_grad()
        optimizer.regularize(closure)
        closure()
        first, second, alignment = seen
        assert torch.equal(first, second)
        assert not torch.equal(first, alignment)
        wanted = booster_gradient(on(alignment), on(first), params, LAM, ALPHA)
        for p, w in zip(params, wanted, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=0, atol=1e-12)
        optimizer.step()
        assert graphs() == 1


def test_buffers_of_a_compiled_module() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    forward, x = torch.compile(model, backend="aot_eager"), torch.randn(4, 5).double()

    def loss() -> Tensor:
        result = forward(x).square().mean()
        result.backward()
        return result

    optimizer = BoosterOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), LAM, ALPHA, module=forward
    )
    for _ in range(2):
        before = [b.clone() for b in model.buffers()]
        optimizer.zero_grad()
        optimizer.regularize(loss)
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))
        loss()
        optimizer.step()
        assert not any(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))
    assert graphs() == 1


# ---------------------------------------------------------------------- the backward pass too


def whole_closure(problem: Problem, on: str) -> Callable[[], Tensor]:
    forward = problem.h if on == "h" else problem.f

    def forward_and_backward() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    return forward_and_backward


# Where a graph breaks, the compiler looks for a .grad of what comes in between.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("option", ["trace_autograd_ops", "compiled_autograd", None])
def test_compiled_closures(option: str | None) -> None:
    """The backward pass within what is compiled: in the graph, in one of its own, in none.

    In the first two the hooks that watch `.grad` are the compiler's to run, or to leave out.
    """
    eager, problem = make_problem(), make_problem()
    f, h = (torch.compile(whole_closure(problem, on), backend="aot_eager") for on in "fh")
    optimizer = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), LAM, ALPHA)
    seen = []
    with torch._dynamo.config.patch({option: True} if option else {}):
        for _ in range(5):
            wanted = formula(eager, problem)
            optimizer.zero_grad()
            optimizer.step(f, h)
            assert_formula(problem, wanted)
            seen.append(graphs())
    assert seen[-1] == seen[1]


# ---------------------------------------------------------------------- adapters


# peft asks models for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_in_a_compiled_model() -> None:
    """The whole of PEFT's model is one graph, dropout included."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama(layers=1), config).train()
    forward = torch.compile(model, backend="aot_eager")
    optimizer = boosted(trainable(model).values())
    for _ in range(3):
        check_step(model, optimizer, forward)
    assert graphs() == 1
    assert not counters["graph_break"]
