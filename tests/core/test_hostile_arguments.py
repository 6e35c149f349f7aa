"""Arguments, parameters, gradients of every kind: the oracle's result, or an error and no change.

Fuzzed with hypothesis; `-m reliability` runs the same properties over many more examples.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer

LAM, ALPHA = "booster_lam", "booster_alpha"
quick = settings(max_examples=40)
many = settings(max_examples=3_000)


def frozen_state(opt: torch.optim.Optimizer) -> list[Any]:
    """Weights, gradients, state and hyperparameters as bits that can be compared."""

    def bits(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        if value.layout is not torch.strided:
            value = value.to_dense()
        value = value.detach().resolve_conj()
        flat = value.contiguous().view(-1) if value.numel() else value.new_empty(0)
        return value.shape, value.dtype, flat.view(torch.uint8).tolist()

    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in opt.param_groups
    ]
    params = [p for group in opt.param_groups for p in group["params"]]
    tensors = [bits(t) for p in params for t in (p, p.grad)]
    return [repr(groups), tensors, [bits(v) for s in opt.state.values() for v in s.values()]]


# ------------------------------------------------------------------------------------- numbers


def numbers() -> st.SearchStrategy[Any]:
    """What λ, α and ε may be: any real number that is finite and not negative."""
    finite = st.floats(0.0, allow_infinity=False, allow_nan=False)  # subnormal ones, −0.0 beside
    return st.one_of(
        finite,
        st.just(-0.0),
        st.integers(0, 10**300),
        st.fractions(0),
        finite.map(np.float64),
        st.floats(0.0, 2.0**127, width=32).map(np.float32),
        st.integers(0, 2**62).map(np.int64),
    )


def no_numbers() -> st.SearchStrategy[Any]:
    """What they may not be."""
    return st.one_of(
        st.floats(max_value=-5e-324, allow_nan=False),
        st.sampled_from([math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]),
        st.integers(-(10**300), -1),
        st.fractions(max_value=Fraction(-1, 10**9)),
        st.booleans(),
        st.sampled_from(["", "5", "nan", b"1"]),
        st.complex_numbers(max_magnitude=1.0),
        st.sampled_from([None, np.bool_(True), np.array(0.5), Decimal("0.1"), [1.0], (1.0,), {}]),
        st.just(0.5).map(torch.tensor),
    )


def sgd() -> torch.optim.SGD:
    param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return torch.optim.SGD([param], lr=0.1, momentum=0.9)


def setting(name: str) -> Callable[[BoosterOptimizer, Any], None]:
    return lambda opt, value: setattr(opt, name, value)


def adding(key: str) -> Callable[[BoosterOptimizer, Any], None]:
    return lambda opt, value: opt.add_param_group(
        {"params": [nn.Parameter(torch.ones(1))], key: value}
    )


ENTRIES: dict[str, Callable[[Any, Any], None]] = {
    "lam": setting("lam"),
    "alpha": setting("alpha"),
    "group's lam": adding(LAM),
    "group's alpha": adding(ALPHA),
    "constructor's lam": lambda base, value: (BoosterOptimizer(base, value), None)[1],
    "constructor's alpha": lambda base, value: (BoosterOptimizer(base, alpha=value), None)[1],
    "constructor's eps": lambda base, value: (BoosterOptimizer(base, eps=value), None)[1],
}


def start(entry: str) -> Any:
    return sgd() if entry.startswith("constructor") else BoosterOptimizer(sgd())


def takes_number(entry: str, value: Any) -> None:
    opt = start(entry)
    ENTRIES[entry](opt, value)
    if entry in ("lam", "alpha"):
        assert getattr(opt, entry) == float(value)
        assert type(getattr(opt, entry)) is float


def refuses(entry: str, value: Any) -> None:
    opt = start(entry)
    before = frozen_state(opt)
    name = entry.split()[-1]
    with pytest.raises((TypeError, ValueError), match=f"{name} must be (a number|finite)") as error:
        ENTRIES[entry](opt, value)
    text = repr(value)
    assert text in str(error.value) or len(text) > 40 or "\n" in text
    assert frozen_state(opt) == before


@quick
@given(entry=st.sampled_from(list(ENTRIES)), value=numbers())
def test_numbers_are_taken(entry: str, value: Any) -> None:
    takes_number(entry, value)


@pytest.mark.reliability
@many
@given(entry=st.sampled_from(list(ENTRIES)), value=numbers())
def test_numbers_are_taken_many(entry: str, value: Any) -> None:
    takes_number(entry, value)


@quick
@given(entry=st.sampled_from(list(ENTRIES)), value=no_numbers())
def test_what_is_no_number_is_refused_and_changes_nothing(entry: str, value: Any) -> None:
    refuses(entry, value)


@pytest.mark.reliability
@many
@given(entry=st.sampled_from(list(ENTRIES)), value=no_numbers())
def test_what_is_no_number_is_refused_and_changes_nothing_many(entry: str, value: Any) -> None:
    refuses(entry, value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "5", None, True, 10**400], ids=repr)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_usual_mistakes_and_an_integer_beyond_any_float_are_refused(
    entry: str, value: Any
) -> None:
    refuses(entry, value)


@quick
@given(value=no_numbers(), key=st.sampled_from([LAM, ALPHA]), loaded=st.booleans())
def test_what_is_in_a_group_is_checked_before_it_is_used(
    value: Any, key: str, loaded: bool
) -> None:
    """As from a file that somebody edited: the next step names the value, and nothing has moved."""
    opt = BoosterOptimizer(sgd())
    if loaded:
        state = copy.deepcopy(opt.state_dict())
        state["param_groups"][0][key] = value
        opt.load_state_dict(state)
    else:
        opt.param_groups[0][key] = value
    before = frozen_state(opt)

    def must_not_run() -> Tensor:
        raise AssertionError("a closure ran")

    for call in (
        lambda: opt.regularize(must_not_run),
        lambda: opt.step(must_not_run, must_not_run),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{key} must be"):
            call()
    assert frozen_state(opt) == before


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"state": {}},
        {"param_groups": []},
        {"state": {}, "param_groups": []},
        {"state": {}, "param_groups": [{"params": []}]},
        {"state": {}, "param_groups": [{"params": [0, 1]}]},
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": 3},
        [],
        "state",
    ],
    ids=repr,
)
def test_a_malformed_state_changes_nothing(state: Any) -> None:
    opt = BoosterOptimizer(sgd(), 2.0, 0.3)
    before = frozen_state(opt)
    with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
        opt.load_state_dict(state)
    assert frozen_state(opt) == before
    assert (opt.lam, opt.alpha) == (2.0, 0.3)


# --------------------------------------------------------------------------------- parameters


def strided(values: Tensor) -> Tensor:
    return torch.stack([values, values], -1)[..., 0]


def channels_last(values: Tensor) -> Tensor:
    return values.reshape(1, 2, 1, -1).to(memory_format=torch.channels_last)


PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "transposed": lambda values: values.reshape(2, -1).t(),
    "strided": strided,
    "channels last": channels_last,
    "scalar": lambda values: values[0].clone(),
    "empty": lambda values: values[:0].reshape(3, 0),
    "sixty dimensions": lambda values: values.reshape([1] * 59 + [-1]),
    "reversed view": lambda values: values.as_strided((2,), (values.numel() - 1,)),
}
GRADS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda p: None,
    "ones": torch.ones_like,
    "expanded": lambda p: torch.ones((), dtype=p.dtype).expand(p.shape),
    "not a number": lambda p: torch.full_like(p, math.nan),
    "infinite": lambda p: torch.full_like(p, math.inf),
    "other strides": lambda p: strided(torch.ones_like(p, memory_format=torch.contiguous_format)),
    "subnormal": lambda p: torch.full_like(p, 5e-324),
}
ROLES = ("reached", "unreached", "frozen", "twice")


@st.composite
def parameter_sets(draw: st.DrawFn) -> list[tuple[str, str, str, float]]:
    """For each parameter how it lies in memory, its role, its present gradient, and its scale."""
    one = st.tuples(
        st.sampled_from(list(PLACED)),
        st.sampled_from(ROLES),
        st.sampled_from(list(GRADS)),
        st.sampled_from([0.0, 1.0, 1e-310, 1e-30, 1e6]),
    )
    first = (draw(st.sampled_from(["contiguous", "strided", "scalar"])), "reached", "none", 1.0)
    return [first, *draw(st.lists(one, max_size=6))]


def bowl(values: Sequence[Tensor]) -> Tensor:
    """Curved everywhere, and finite for any finite weight."""
    return sum((torch.atan(v - 0.3).square().sum() for v in values), torch.zeros(()).double())


def equals_the_oracle(
    cases: list[tuple[str, str, str, float]], lam: float, alpha: float, zeroing: bool
) -> None:
    params: list[nn.Parameter] = []
    for index, (placed, role, grad, scale) in enumerate(cases):
        values = scale * torch.linspace(-1, 1, 6, dtype=torch.float64).roll(index)
        param = nn.Parameter(PLACED[placed](values), requires_grad=role != "frozen")
        if param.requires_grad:
            param.grad = GRADS[grad](param.detach())
        params.append(param)
    reached = [p for p, case in zip(params, cases, strict=True) if case[1] in ("reached", "twice")]
    twice = [p for p, case in zip(params, cases, strict=True) if case[1] == "twice"]

    def h(values: Sequence[Tensor]) -> Tensor:
        shared = dict(zip(map(id, reached), values, strict=True))
        return bowl(values) + bowl([shared[id(p)] * 2 for p in twice])

    opt = BoosterOptimizer(torch.optim.SGD(params, lr=0.1), lam, alpha)
    present = [None if p.grad is None else p.grad.clone() for p in params]
    before = [(p.data_ptr(), p.stride(), p.detach().clone()) for p in params]

    def closure() -> Tensor:
        if zeroing:
            opt.zero_grad()
        loss = h(reached)
        loss.backward()
        return loss

    opt.regularize(closure)
    expected = iter(
        booster_gradient(lambda _: torch.zeros((), requires_grad=True), h, reached, lam, alpha)
    )
    for param, was, (pointer, strides, weights) in zip(params, present, before, strict=True):
        wanted = was
        if any(param is r for r in reached):
            more = next(expected)
            wanted = more if was is None else was + more
        assert (param.data_ptr(), param.stride()) == (pointer, strides)
        assert torch.equal(param, weights)
        if wanted is None:
            assert param.grad is None
        else:
            torch.testing.assert_close(param.grad, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


parameters_and_numbers = {
    "cases": parameter_sets(),
    "lam": st.floats(0.01, 1e3),
    "alpha": st.floats(1e-6, 10.0),
    "zeroing": st.booleans(),
}


@quick
@given(**parameters_and_numbers)
def test_parameters_of_any_kind_equal_the_oracle(**drawn: Any) -> None:
    equals_the_oracle(**drawn)


@pytest.mark.reliability
@many
@given(**parameters_and_numbers)
def test_parameters_of_any_kind_equal_the_oracle_many(**drawn: Any) -> None:
    equals_the_oracle(**drawn)


def test_parts_of_one_storage() -> None:
    """Views that do not overlap are parameters like any others; what lies between stays."""
    storage = torch.linspace(-1, 1, 10, dtype=torch.float64)
    kept = storage.clone()
    params = [nn.Parameter(storage[:3]), nn.Parameter(storage[4:7]), nn.Parameter(storage[8:])]
    opt = BoosterOptimizer(torch.optim.SGD(params, lr=0.1), 5.0, 0.1)

    def closure() -> Tensor:
        loss = bowl(params)
        loss.backward()
        return loss

    opt.regularize(closure)
    expected = booster_gradient(
        lambda _: torch.zeros((), requires_grad=True), bowl, params, 5.0, 0.1
    )
    for param, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(storage, kept)


def test_a_parameter_without_memory_beside_others() -> None:
    """As sharded training frees them: it is not read where the harmful loss does not reach it."""
    freed, used = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    freed.untyped_storage().resize_(0)
    opt = BoosterOptimizer(torch.optim.SGD([freed, used], lr=0.1))

    def closure() -> Tensor:
        loss = used.pow(3).sum()
        loss.backward()
        return loss

    opt.step(closure, closure)
    assert freed.untyped_storage().size() == 0
    assert not torch.equal(used, torch.ones(2))


def test_parameters_without_data() -> None:
    """On the meta device everything has a shape and nothing a value."""
    param = nn.Parameter(torch.empty(3, 2, device="meta"))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), self_check=False)

    def closure() -> Tensor:
        loss = param.pow(3).sum()
        loss.backward()
        return loss

    assert opt.step(closure, closure).is_meta
    assert param.grad is not None
    assert param.grad.shape == (3, 2)


def expanded() -> tuple[nn.Parameter, Callable[[], Tensor]]:
    param = nn.Parameter(torch.ones(1).expand(4))
    return param, lambda: param.square().sum()


def float8() -> tuple[nn.Parameter, Callable[[], Tensor]]:
    param = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    return param, lambda: param.float().square().sum()


@pytest.mark.parametrize("make", [expanded, float8])
def test_what_arithmetic_cannot_take_is_an_error_and_changes_nothing(
    make: Callable[[], tuple[nn.Parameter, Callable[[], Tensor]]],
) -> None:
    param, h = make()
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1, momentum=0.9))
    before = frozen_state(opt)

    def closure() -> Tensor:
        loss = h()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError):  # torch's own: its message names the operation
        opt.regularize(closure)
    assert frozen_state(opt) == before
    assert not param._post_accumulate_grad_hooks  # type: ignore[attr-defined]


@pytest.mark.parametrize("usage", ["one call", "staged", "from before"])
def test_sparse_gradients_are_refused_and_change_nothing(usage: str) -> None:
    """Of a pass, or, before any pass, those that were there."""
    table = nn.Embedding(4, 3, sparse=True)
    opt = BoosterOptimizer(torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    if usage == "from before":
        closure()
        calls = 0
    before = frozen_state(opt)
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.step(closure, closure) if usage == "one call" else opt.regularize(closure)
    assert calls == (0 if usage == "from before" else 1)
    assert frozen_state(opt) == before
    assert not table.weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_integers_beside_trained_weights() -> None:
    counts = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
    weights = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = BoosterOptimizer(torch.optim.SGD([counts, weights], lr=0.1), 5.0, 0.1)

    def closure() -> Tensor:
        loss = (counts.sum() * weights.pow(3)).sum()
        loss.backward()
        return loss

    opt.step(closure, closure)
    assert torch.equal(counts, torch.ones(4, dtype=torch.int32))
    assert not torch.equal(weights, torch.ones(2, dtype=torch.float64))


# ----------------------------------------------------------------------------------- closures


def test_a_gradient_written_by_hand_may_be_a_view() -> None:
    """h = ½s² with s the sum: ∇h(w) = s·1, and ∇h(w) − ∇h(w′) = α√n·1."""
    param = nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), lam=3.0, alpha=0.1, eps=0.0)

    def closure() -> Tensor:
        total = param.detach().sum()
        param.grad = total.expand(4)
        return total.square() / 2

    opt.regularize(closure)
    torch.testing.assert_close(param.grad, torch.full((4,), 3.0 * 0.1 * 2.0).double())


@pytest.mark.parametrize(
    "loss",
    [1, 0.5, math.nan, math.inf, Fraction(1, 3), np.float64(0.5), np.int32(2),
     10**400, torch.tensor(1), torch.tensor([[0.5]])],
    ids=repr,
)  # fmt: skip
def test_any_one_number_is_a_loss(loss: Any) -> None:
    opt = BoosterOptimizer(sgd())
    (param,) = opt.param_groups[0]["params"]

    def closure() -> Any:
        param.pow(3).sum().backward()
        return loss

    returned = opt.regularize(closure)
    assert returned is not None
    assert returned.shape == ()


@pytest.mark.parametrize(
    "loss",
    [None, "0.5", b"1", True, [0.5], np.array(0.5), Decimal("0.5"), torch.zeros(0), torch.ones(2),
     torch.tensor(True)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("call", [1, 2])
def test_anything_else_is_none_and_changes_nothing(loss: Any, call: int) -> None:
    opt = BoosterOptimizer(sgd())
    (param,) = opt.param_groups[0]["params"]
    param.grad = torch.full_like(param, 0.25)
    before, calls = frozen_state(opt), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        value = param.pow(3).sum()
        value.backward()
        return loss if calls == call else value

    said = f"its loss, got {loss!r}"
    if isinstance(loss, Tensor):
        said = f"a real scalar loss, got a tensor of shape {tuple(loss.shape)}"
    with pytest.raises((TypeError, ValueError), match=re.escape(f"must return {said}")):
        opt.regularize(closure)
    assert calls == call
    assert frozen_state(opt) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_of_extreme_size(scale: float, dtype: torch.dtype) -> None:
    """In float64 the formula; in float32, whose squares leave its range, a norm that says so."""
    param = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    weights = param.detach().clone()
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), 5.0, 0.1, eps=0.0)

    def closure() -> Tensor:
        loss = scale * param.square().sum()
        loss.backward()
        return loss

    opt.regularize(closure)
    assert torch.equal(param, weights)
    assert opt.diagnostics is not None
    norm = opt.diagnostics.harmful_grad_norm.item()
    assert param.grad is not None
    if dtype is torch.float64 or norm not in (0.0, math.inf):
        expected = 5.0 * 2 * scale * 0.1 * weights / weights.norm()
        torch.testing.assert_close(param.grad, expected, rtol=1e-5, atol=0)
        assert norm == pytest.approx(2 * scale * weights.norm().item(), rel=1e-4)
    else:
        assert norm == (0.0 if scale < 1 else math.inf)
        assert not param.grad.any()
