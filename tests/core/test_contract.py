"""The torch.optim.Optimizer contract, over every dense optimizer and scheduler of torch."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from tests.optimizers import REFUSED, WRAPPABLE, make
from torch_booster import BoosterOptimizer


def two_layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))


class Run:
    """A model, a wrapped optimizer and the loop around them."""

    def __init__(self, name: str, lam: float = 5.0, **options: Any) -> None:
        self.model = two_layers()
        self.opt = BoosterOptimizer(make(name, self.model.parameters(), **options), lam, 0.1)
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(8, 4, generator=generator)
        self.y = torch.randn(8, 4, generator=generator)

    def closure(self, sign: float) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.model(self.x), sign * self.y)
            loss.backward()
            return loss

        return closure

    def step(self) -> Tensor:
        self.opt.zero_grad()
        return self.opt.step(self.closure(1.0), self.closure(-1.0))

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Rows of the contract, by what other wrappers break.


@pytest.mark.parametrize("name", WRAPPABLE)
def test_is_an_optimizer_and_returns_the_loss(name: str) -> None:
    run = Run(name)
    assert isinstance(run.opt, Optimizer)
    expected = nn.functional.mse_loss(run.model(run.x), run.y).item()
    assert run.step().item() == expected


@pytest.mark.parametrize("name", WRAPPABLE)
def test_resumed_run_equals_the_unbroken_one(name: str) -> None:
    unbroken = Run(name).train(6)
    first = Run(name).train(3)
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "opt": first.opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = Run(name, lam=1.0)
    resumed.model.load_state_dict(saved["model"])
    resumed.opt.load_state_dict(saved["opt"])
    assert resumed.opt.lam == 5.0
    resumed.train(3)
    assert_equal(resumed.weights, unbroken.weights)


@pytest.mark.parametrize("name", WRAPPABLE)
def test_weights_keep_their_storage(name: str) -> None:
    run = Run(name)
    before = [(id(p), p.data_ptr()) for p in run.model.parameters()]
    run.train(2)
    assert [(id(p), p.data_ptr()) for p in run.model.parameters()] == before


@pytest.mark.parametrize("name", WRAPPABLE)
def test_base_state_holds_the_base_keys_only(name: str) -> None:
    run = Run(name).train(2)
    model = two_layers()
    bare = make(name, model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    bare.step()
    for wrapped_state, bare_state in zip(run.opt.state.values(), bare.state.values(), strict=True):
        assert wrapped_state.keys() == bare_state.keys()
    assert run.opt.state is run.opt.base_optimizer.state
    assert run.opt.defaults is run.opt.base_optimizer.defaults
    assert run.opt.param_groups is run.opt.base_optimizer.param_groups


@pytest.mark.parametrize("name", WRAPPABLE)
def test_group_keys_do_not_collide(name: str) -> None:
    """RMSprop and ASGD own `alpha`, ASGD `lambd`, Adadelta `rho`: they keep their values."""
    bare = make(name, two_layers().parameters())
    own = {key: value for key, value in bare.param_groups[0].items() if key != "params"}
    opt = BoosterOptimizer(bare, lam=3.0, alpha=0.25)
    group = opt.param_groups[0]
    assert {key: group[key] for key in own} == own
    assert set(group) - set(own) == {"params", "booster_lam", "booster_alpha", "booster_step"}
    assert (opt.lam, opt.alpha) == (3.0, 0.25)


@pytest.mark.parametrize("name", WRAPPABLE)
def test_lam_zero_is_the_base_optimizer_bit_for_bit(name: str) -> None:
    wrapped = Run(name, lam=0.0)
    bare_model = two_layers()
    bare = make(name, bare_model.parameters())

    def must_not_run() -> Tensor:
        raise AssertionError("the harmful closure ran although lam is 0")

    for _ in range(5):
        wrapped.opt.zero_grad()
        wrapped.opt.step(wrapped.closure(1.0), must_not_run)
        bare.zero_grad()
        nn.functional.mse_loss(bare_model(wrapped.x), wrapped.y).backward()
        bare.step()
    assert_equal(wrapped.weights, [p.detach() for p in bare_model.parameters()])
    assert wrapped.opt.regularize(must_not_run) is None


@pytest.mark.parametrize("name", WRAPPABLE)
def test_state_dict_is_interchangeable_with_the_bare_optimizer(name: str) -> None:
    wrapped = Run(name).train(2)
    state_dict = wrapped.opt.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}

    bare = make(name, two_layers().parameters())
    bare.load_state_dict(copy.deepcopy(state_dict))

    from_bare = make(name, two_layers().parameters()).state_dict()
    assert "booster_lam" not in from_bare["param_groups"][0]
    wrapped.opt.load_state_dict(from_bare)
    assert (wrapped.opt.lam, wrapped.opt.alpha) == (5.0, 0.1)
    wrapped.step()


@pytest.mark.parametrize("name", WRAPPABLE)
def test_pickle_and_deepcopy_with_the_model(name: str) -> None:
    run = Run(name).train(2)
    expected = copy.deepcopy(run).train(2).weights
    copied = pickle.loads(pickle.dumps(run))
    assert copied.opt.param_groups[0]["params"][0] is next(copied.model.parameters())
    assert_equal(copied.train(2).weights, expected)
    run.train(2)
    assert_equal(run.weights, expected)


@pytest.mark.parametrize("name", WRAPPABLE)
def test_add_param_group(name: str) -> None:
    run = Run(name)
    extra = nn.Parameter(torch.ones(4, 4))
    run.opt.add_param_group({"params": [extra], "booster_lam": 1.5})
    assert run.opt.param_groups is run.opt.base_optimizer.param_groups
    assert run.opt.param_groups[1]["booster_lam"] == 1.5
    assert run.opt.param_groups[1]["booster_alpha"] == 0.1
    with pytest.raises(ValueError, match="different lam"):
        _ = run.opt.lam
    run.opt.lam = 2.0
    assert [group["booster_lam"] for group in run.opt.param_groups] == [2.0, 2.0]
    run.step()
    with pytest.raises(ValueError, match="nan"):
        run.opt.add_param_group({"params": [nn.Parameter(extra)], "booster_lam": float("nan")})


def test_group_added_to_the_base_gets_the_defaults() -> None:
    run = Run("AdamW")
    run.opt.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    run.step()
    assert run.opt.param_groups[1]["booster_lam"] == 5.0


def test_setters_reach_the_base() -> None:
    """Accelerate and fully sharded training replace these objects."""
    run = Run("AdamW")
    groups, state, defaults = list(run.opt.param_groups), run.opt.state, dict(run.opt.defaults)
    run.opt.param_groups, run.opt.state, run.opt.defaults = groups, state, defaults
    assert run.opt.base_optimizer.param_groups is groups
    assert run.opt.base_optimizer.state is state
    assert run.opt.base_optimizer.defaults is defaults


def test_hooks() -> None:
    run = Run("AdamW")
    seen: list[Any] = []
    opt = run.opt
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o)))
    opt.register_state_dict_pre_hook(lambda o: seen.append(("state_dict pre", o)))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "mark": 1})
    opt.register_load_state_dict_pre_hook(
        lambda o, sd: {key: value for key, value in sd.items() if key != "mark"}
    )
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("load post", o)))
    run.step()
    opt.lam = 0.0  # a plain step without a word
    opt.step()
    assert seen == [("pre", opt), ("post", opt)] * 2
    seen.clear()
    state_dict = opt.state_dict()
    assert state_dict["mark"] == 1
    opt.load_state_dict(state_dict)
    assert seen == [("state_dict pre", opt), ("load post", opt)]


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(Run("AdamW").opt)
    assert "BoosterOptimizer" in text
    assert "booster_alpha: 0.1" in text
    assert "booster_lam: 5.0" in text


def test_train_and_eval_are_passed_on() -> None:
    class Moody(torch.optim.SGD):
        mood = "train"

        def train(self) -> None:
            self.mood = "train"

        def eval(self) -> None:
            self.mood = "eval"

    base = Moody(two_layers().parameters(), lr=0.1)
    opt = BoosterOptimizer(base)
    opt.eval()
    assert base.mood == "eval"
    opt.train()
    assert base.mood == "train"
    Run("SGD").opt.eval()


def test_plain_step_is_the_base_step() -> None:
    run, bare_model = Run("AdamW"), two_layers()
    bare = make("AdamW", bare_model.parameters())
    for model in (run.model, bare_model):
        nn.functional.mse_loss(model(run.x), run.y).backward()
    with pytest.warns(UserWarning, match=r"no regulariser although λ is not zero.*opt\.lam = 0"):
        run.opt.step(closure=None)
    bare.step()
    assert_equal(run.weights, [p.detach() for p in bare_model.parameters()])


# Schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01),
}


def test_every_scheduler_of_torch_is_covered() -> None:
    known = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_the_base_groups(name: str) -> None:
    run, bare_model = Run("AdamW", lam=0.0), two_layers()
    bare = make("AdamW", bare_model.parameters())
    rates: dict[str, list[float]] = {"wrapped": [], "bare": []}
    for label, opt in (("wrapped", run.opt), ("bare", bare)):
        scheduler = SCHEDULERS[name](opt)
        for step in range(6):
            opt.zero_grad()
            if opt is run.opt:
                loss = run.opt.step(run.closure(1.0), run.closure(-1.0))
            else:
                loss = nn.functional.mse_loss(bare_model(run.x), run.y)
                loss.backward()
                bare.step()
            with warnings.catch_warnings():  # SequentialLR warns of its own use of `epoch`
                warnings.filterwarnings("ignore", message=".*epoch parameter.*")
                scheduler.step(*([float(step)] if name == "ReduceLROnPlateau" else []))
            rates[label].append(opt.param_groups[0]["lr"])
        assert loss.isfinite()
    assert rates["wrapped"] == rates["bare"]
    assert len(set(rates["bare"])) > 1
    assert_equal(run.weights, [p.detach() for p in bare_model.parameters()])


def test_averaged_model_beside_the_wrapper() -> None:
    run = Run("SGD")
    averaged = swa_utils.AveragedModel(run.model)
    for _ in range(3):
        run.step()
        averaged.update_parameters(run.model)
    assert all(p.isfinite().all() for p in averaged.parameters())


# What is refused


def test_refused_optimizers_say_why() -> None:
    params = list(two_layers().parameters())
    for name in REFUSED:
        with pytest.raises(TypeError, match=f"{name}.*(closure|sparse)"):
            BoosterOptimizer(make(name, params))


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("adamw", "torch.optim.Optimizer, got 'adamw'"),
        (None, "torch.optim.Optimizer, got None"),
    ],
)
def test_bad_base(base: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        BoosterOptimizer(base)


def test_an_optimizer_of_deepspeeds_is_refused() -> None:
    class EngineOptimizer(torch.optim.SGD):
        __module__ = "deepspeed.runtime"

    with pytest.raises(TypeError, match=r"EngineOptimizer.*DeepSpeed"):
        BoosterOptimizer(EngineOptimizer(two_layers().parameters(), lr=0.1))


def test_wrapping_twice() -> None:
    with pytest.raises(TypeError, match="already"):
        BoosterOptimizer(Run("AdamW").opt)


def test_bad_closures() -> None:
    run = Run("AdamW")
    good, before = run.closure(1.0), run.weights
    with pytest.raises(TypeError, match="missing harmful_closure"):
        run.opt.step(good)
    with pytest.raises(TypeError, match="missing alignment_closure"):
        run.opt.step(None, good)
    with pytest.raises(TypeError, match="harmful_closure must be callable"):
        run.opt.step(good, torch.zeros(()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="harmful_closure must be callable"):
        run.opt.regularize(3.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"harmful_closure made no gradients.*backward"):
        run.opt.regularize(lambda: torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"alignment_closure made no gradients.*backward"):
        run.opt.step(lambda: torch.zeros(()), good)
    assert_equal(run.weights, before)
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.model.parameters())


def test_regularize_twice_before_a_step() -> None:
    run = Run("AdamW")
    harmful = run.closure(-1.0)
    run.opt.regularize(harmful)
    grads = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="counted twice"):
        run.opt.regularize(harmful)
    with pytest.raises(RuntimeError, match="counted twice"):
        run.opt.step(run.closure(1.0), harmful)
    assert_equal([p.grad for p in run.model.parameters() if p.grad is not None], grads)
    run.opt.step()
    run.opt.regularize(harmful)
    run.opt.zero_grad()
    run.opt.regularize(harmful)
    run.model.zero_grad()
    run.opt.regularize(harmful)


def test_step_with_a_closure_after_regularize_accumulates_onto_it() -> None:
    """As engines step that hand every optimizer a closure."""
    staged, handed, one_call = (Run("AdamW") for _ in range(3))
    for run in (staged, handed):
        run.opt.zero_grad()
        run.opt.regularize(run.closure(-1.0))
    staged.closure(1.0)()
    staged.opt.step()
    loss = handed.opt.step(handed.closure(1.0))
    assert_equal(handed.weights, staged.weights)
    assert_equal(handed.weights, one_call.train(1).weights)
    assert loss > 0

    before = handed.weights
    handed.opt.zero_grad()
    with pytest.raises(TypeError, match="missing harmful_closure"):
        handed.opt.step(handed.closure(1.0))
    handed.opt.regularize(handed.closure(-1.0))
    handed.model.zero_grad()
    with pytest.raises(TypeError, match="missing harmful_closure"):
        handed.opt.step(handed.closure(1.0))
    handed.opt.regularize(handed.closure(-1.0))

    assert_equal(handed.weights, before)

    def zeroing() -> Tensor:
        handed.opt.zero_grad()
        return handed.closure(1.0)()

    handed.opt.step(zeroing)
    one_call.step()
    assert_equal(handed.weights, one_call.weights)
