"""Optimizers from outside torch.optim, each driven by the oracle's gradient beside the wrapper.

Each package is an extra of the user's: schedulefree, torchao, muon-optimizer, pytorch_optimizer,
peft, bitsandbytes, transformers. Cases whose package is absent are skipped and say so.
"""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer
from torch_booster import optimizer as optimizer_module

pytestmark = [
    # torchao compiles its step; run as written it does the same in a fraction of the time.
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

LAM, ALPHA = 5.0, 0.1


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def package(name: str) -> Any:
    pytest.importorskip(name.partition(".")[0], reason=f"{name} is not installed")
    return importlib.import_module(name)


class Body(nn.Module):
    """Matrices of 4096 elements, the least that the 8-bit optimizers quantise, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Run:
    """A model, alignment and harmful closures on it, and the oracle's gradient at its weights."""

    def __init__(self, adapted: bool = False, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        self.model: nn.Module = Body()
        if adapted:
            peft = package("peft")
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["inner", "outer"])
            self.model = peft.get_peft_model(self.model, config)
            for name, p in self.model.named_parameters():
                if "lora_B" in name:  # starts at zero, where lora_A has no gradient
                    nn.init.normal_(p, std=0.1)
        self.model.to(dtype)
        self.x = torch.randn(8, 64).to(dtype)
        self.y = torch.randn(8, 64).to(dtype)

    @property
    def named(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def closure(self, sign: float) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.model(self.x), sign * self.y)
            loss.backward()
            return loss

        return closure

    def loss_of(self, sign: float) -> Callable[[Sequence[Tensor]], Tensor]:
        model = copy.deepcopy(self.model)  # never the live one
        names = list(self.named)

        def loss(values: Sequence[Tensor]) -> Tensor:
            out = functional_call(model, dict(zip(names, values, strict=True)), (self.x,))
            return nn.functional.mse_loss(out, sign * self.y)

        return loss

    def formula(self) -> list[Tensor | None]:
        params = list(self.named.values())
        return booster_gradient(self.loss_of(1.0), self.loss_of(-1.0), params, LAM, ALPHA)

    def booster_step(self, opt: BoosterOptimizer, usage: str) -> None:
        opt.zero_grad()
        if usage == "one_call":
            opt.step(self.closure(1.0), self.closure(-1.0))
        else:
            opt.regularize(self.closure(-1.0))
            self.closure(1.0)()
            opt.step()

    def formula_step(self, *optimizers: Any) -> None:
        for p, g in zip(self.named.values(), self.formula(), strict=True):
            p.grad = g
        for optimizer in optimizers:
            optimizer.step()


def to_train(optimizer: Any) -> Any:
    getattr(optimizer, "train", lambda: None)()
    return optimizer


def distance(a: Run, b: Run) -> float:
    pairs = zip(a.weights, b.weights, strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


# --------------------------------------------------------------------------- the optimizers

Make = Callable[[Any, nn.Module], Optimizer]


def plain(name: str, lr: float | None, **options: Any) -> Make:
    return lambda lib, model: getattr(lib, name)(model.parameters(), lr=lr, **options)


def around(name: str, base: Callable[[Any], Optimizer], **options: Any) -> Make:
    return lambda lib, model: getattr(lib, name)(base(model.parameters()), **options)


def with_matrices(name: str) -> Make:
    """Muon on the matrices and Adam on the rest, in one optimizer."""

    def make(lib: Any, model: nn.Module) -> Optimizer:
        params = list(model.parameters())
        matrices = {"params": [p for p in params if p.ndim == 2], "use_muon": True, "lr": 0.02}
        rest = {"params": [p for p in params if p.ndim != 2], "use_muon": False, "lr": 0.01}
        return getattr(lib, name)([matrices, rest])

    return make


def lora_plus(lib: Any, model: nn.Module) -> Optimizer:
    return lib.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, weight_decay=0.1
    )


def lora_fa(lib: Any, model: nn.Module) -> Optimizer:
    return lib.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


CASES: dict[str, tuple[str, Make]] = {
    "AdamWScheduleFree": ("schedulefree", plain("AdamWScheduleFree", 0.01, weight_decay=0.1)),
    "SGDScheduleFree": ("schedulefree", plain("SGDScheduleFree", 0.1, warmup_steps=2)),
    "RAdamScheduleFree": ("schedulefree", plain("RAdamScheduleFree", 0.01)),
    "MuonWithAuxAdam": ("muon", with_matrices("SingleDeviceMuonWithAuxAdam")),
    "pytorch_optimizer Muon": ("pytorch_optimizer", with_matrices("Muon")),
    "AdaMuon": ("pytorch_optimizer", with_matrices("AdaMuon")),
    "Lion": ("pytorch_optimizer", plain("Lion", 0.001)),
    "AdamP": ("pytorch_optimizer", plain("AdamP", 0.01)),
    "CAME": ("pytorch_optimizer", plain("CAME", 0.001)),
    "Prodigy": ("pytorch_optimizer", plain("Prodigy", 1.0)),
    "pytorch_optimizer AdaFactor": ("pytorch_optimizer", plain("AdaFactor", 0.01)),
    "Lookahead": ("pytorch_optimizer", around("Lookahead", adamw, k=2)),
    "ScheduleFree around SGD": ("pytorch_optimizer", around("ScheduleFreeWrapper", sgd)),
    "OrthoGrad": ("pytorch_optimizer", around("OrthoGrad", adamw)),
    "LoRA+": ("peft.optimizers", lora_plus),
    "LoRA-FA": ("peft.optimizers", lora_fa),
    "AdamW8bit": ("bitsandbytes.optim", plain("AdamW8bit", 0.01)),
    "PagedAdamW8bit": ("bitsandbytes.optim", plain("PagedAdamW8bit", 0.01)),
    "Lion8bit": ("bitsandbytes.optim", plain("Lion8bit", 0.001)),
    "transformers Adafactor": ("transformers.optimization", plain("Adafactor", None)),
}

# Compared step by step, in float32: states that are rounded to a few bits, or turned into an
# eigenbasis (SOAP), make much of a difference in the last bit.
STEPWISE: dict[str, tuple[str, Make]] = {
    "torchao AdamW8bit": ("torchao.optim", plain("AdamW8bit", 0.01)),
    "torchao AdamW4bit": ("torchao.optim", plain("AdamW4bit", 0.01)),
    "torchao AdamWFp8": ("torchao.optim", plain("AdamWFp8", 0.01)),
    "SOAP": ("pytorch_optimizer", plain("SOAP", 0.01)),
}


def started(name: str, lam: float = LAM) -> tuple[Run, BoosterOptimizer]:
    run = prepared(name)
    opt = BoosterOptimizer(base_for(name, run), lam, ALPHA)
    opt.train()
    return run, opt


def prepared(name: str) -> Run:
    lib, _ = (CASES | STEPWISE)[name]
    return Run(lib.startswith("peft"), torch.float32 if name in STEPWISE else torch.float64)


def base_for(name: str, run: Run) -> Optimizer:
    lib, make = (CASES | STEPWISE)[name]
    return make(package(lib), run.model)


@pytest.mark.parametrize("usage", ["one_call", "staged"])
@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_the_base_on_the_formulas_gradient(name: str, usage: str) -> None:
    run, opt = started(name)
    twin = prepared(name)
    bare = to_train(base_for(name, twin))
    before = prepared(name)
    for _ in range(5):
        run.booster_step(opt, usage)
        twin.formula_step(bare)
    assert distance(run, twin) < 1e-9
    assert distance(run, before) > 1e-5


@pytest.mark.parametrize("usage", ["one_call", "staged"])
@pytest.mark.parametrize("name", STEPWISE)
def test_each_step_is_the_bases_on_the_formulas_gradient(name: str, usage: str) -> None:
    run, opt = started(name)
    twin = prepared(name)
    bare = base_for(name, twin)
    for _ in range(5):
        expected = run.formula()
        run.booster_step(opt, usage)
        for p, q, g in zip(run.named.values(), twin.named.values(), expected, strict=True):
            assert p.grad is not None
            assert g is not None
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
            q.grad = p.grad.clone()
        bare.step()
        assert distance(run, twin) == 0.0
    assert "8bit" not in name or any(
        type(value).__name__ == "OptimState8bit"
        for state in opt.state.values()
        for value in state.values()
    )


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", CASES | STEPWISE)
def test_state_dict_continues_the_run(name: str) -> None:
    run, opt = started(name)
    for _ in range(3):
        run.booster_step(opt, "one_call")

    resumed, again = started(name, lam=1.0)
    resumed.model.load_state_dict(run.model.state_dict())
    again.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert (again.lam, again.alpha) == (LAM, ALPHA)
    for _ in range(3):
        run.booster_step(opt, "staged")
        resumed.booster_step(again, "staged")
    assert distance(run, resumed) == 0.0


def test_lora_fa_freezes_what_booster_must_not_move() -> None:
    """LoRA-FA trains lora_B alone: the norm and the perturbation are over these."""
    run, opt = started("LoRA-FA")
    assert all("lora_B" in name for name in run.named)
    frozen = [p.detach().clone() for p in run.model.parameters() if not p.requires_grad]
    run.booster_step(opt, "one_call")
    after = [p for p in run.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))


# --------------------------------------------------------------------------- schedule-free


def test_schedule_free_is_switched_through_the_wrapper() -> None:
    run, opt = started("AdamWScheduleFree")
    for _ in range(3):
        run.booster_step(opt, "one_call")
    training = run.weights
    opt.eval()
    averaged = run.weights
    assert any(not torch.equal(a, b) for a, b in zip(training, averaged, strict=True))
    with pytest.raises(Exception, match="train mode"):
        run.booster_step(opt, "one_call")
    assert all(torch.equal(a, b) for a, b in zip(averaged, run.weights, strict=True))
    opt.train()
    for a, b in zip(training, run.weights, strict=True):
        torch.testing.assert_close(a, b)


def test_schedule_free_wrapper_goes_around() -> None:
    """It is no torch optimizer, so it is refused inside; outside it steps on the same gradient."""
    lib = package("schedulefree")
    run, twin = Run(), Run()
    with pytest.raises(TypeError, match=r"ScheduleFreeWrapper.*around BoosterOptimizer"):
        BoosterOptimizer(lib.ScheduleFreeWrapper(sgd(run.model.parameters())))

    opt = BoosterOptimizer(sgd(run.model.parameters()), LAM, ALPHA)
    outer = to_train(lib.ScheduleFreeWrapper(opt))
    bare = to_train(lib.ScheduleFreeWrapper(sgd(twin.model.parameters())))
    for _ in range(5):
        outer.zero_grad()
        opt.regularize(run.closure(-1.0))
        run.closure(1.0)()
        outer.step()
        twin.formula_step(bare)
    assert distance(run, twin) < 1e-9


# --------------------------------------------------------------------------- two optimizers


def matrices_and_rest(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]


def muon_and_adamw(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    matrices, rest = matrices_and_rest(model)
    return torch.optim.Muon(matrices, lr=0.02), adamw(rest)


def test_one_regulariser_for_several_optimizers() -> None:
    """`regularize` needs an optimizer over all parameters, not one that ever steps."""
    run, twin = Run(), Run()
    everything = torch.optim.SGD(run.model.parameters())
    booster = BoosterOptimizer(everything, LAM, ALPHA)
    steppers = muon_and_adamw(run.model)
    bare = muon_and_adamw(twin.model)
    for _ in range(5):
        run.model.zero_grad()
        booster.regularize(run.closure(-1.0))
        run.closure(1.0)()
        for stepper in steppers:
            stepper.step()
        twin.formula_step(*bare)
    assert distance(run, twin) < 1e-9


def test_two_wrappers_have_two_norms() -> None:
    """Why Muon and AdamW are not wrapped one by one: each would perturb its own part alone."""
    run = Run()
    whole = BoosterOptimizer(torch.optim.SGD(run.model.parameters()))
    whole.regularize(run.closure(-1.0))
    parts = [BoosterOptimizer(optimizer) for optimizer in muon_and_adamw(run.model)]
    for part in parts:
        with pytest.warns(UserWarning, match=r"tensors that this optimizer does not hold"):
            part.regularize(run.closure(-1.0))
    norms = [opt.diagnostics.harmful_grad_norm.item() for opt in (whole, *parts) if opt.diagnostics]
    assert norms[0] ** 2 == pytest.approx(norms[1] ** 2 + norms[2] ** 2)
    assert max(norms[1:]) < norms[0]


# --------------------------------------------------------------------------- second order


@pytest.mark.parametrize("usage", ["one_call", "staged"])
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_hessian_optimizers_see_the_alignment_hessian(name: str, usage: str) -> None:
    """They differentiate `.grad` again, which Booster leaves on f's graph."""
    lib = package("pytorch_optimizer")
    run, twin = Run(), Run()

    def with_graph(of: Run) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(of.model(of.x), of.y)
            params = list(of.named.values())
            for p, g in zip(
                params, torch.autograd.grad(loss, params, create_graph=True), strict=True
            ):
                p.grad = g if p.grad is None else p.grad + g
            return loss

        return closure

    opt = BoosterOptimizer(getattr(lib, name)(run.model.parameters(), lr=0.01), LAM, ALPHA)
    bare = getattr(lib, name)(twin.model.parameters(), lr=0.01)
    for seed in range(5):
        opt.zero_grad()
        torch.manual_seed(seed)  # of the Hessian's random probes
        if usage == "one_call":
            opt.step(with_graph(run), run.closure(-1.0))
        else:
            opt.regularize(run.closure(-1.0))
            with_graph(run)()
            opt.step()
        expected = twin.formula()
        twin.model.zero_grad()
        with_graph(twin)()
        for p, g in zip(twin.named.values(), expected, strict=True):
            assert p.grad is not None
            p.grad.data.copy_(g)
        torch.manual_seed(seed)
        bare.step()
    assert distance(run, twin) < 1e-9

    without_graph = Run()
    opt = BoosterOptimizer(getattr(lib, name)(without_graph.model.parameters(), lr=0.01))
    before = without_graph.weights
    with pytest.raises(RuntimeError, match="does not require grad"):
        without_graph.booster_step(opt, usage)
    assert all(torch.equal(a, b) for a, b in zip(before, without_graph.weights, strict=True))


# --------------------------------------------------------------------------- refused


def sam(name: str, *options: Any) -> Make:
    return lambda lib, m: getattr(lib, name)(m.parameters(), torch.optim.SGD, *options, lr=0.1)


def gsam(lib: Any, model: nn.Module) -> Optimizer:
    base = sgd(model.parameters())
    schedule = lib.LinearScheduler(base, t_max=5, max_lr=0.1)
    return lib.GSAM(model.parameters(), base_optimizer=base, model=model, rho_scheduler=schedule)


REFUSED: dict[str, tuple[str, Make, str]] = {
    "SAM": ("pytorch_optimizer", sam("SAM"), "evaluates the gradient again"),
    "LookSAM": ("pytorch_optimizer", sam("LookSAM"), "evaluates the gradient again"),
    "GSAM": ("pytorch_optimizer", gsam, "evaluates the gradient again"),
    "BSAM": (
        "pytorch_optimizer",
        lambda lib, m: lib.BSAM(m.parameters(), num_data=8),
        "evaluates the gradient again",
    ),
    "LOMO": ("pytorch_optimizer", lambda lib, m: lib.LOMO(m), "during the backward pass"),
    "AdaLOMO": ("pytorch_optimizer", lambda lib, m: lib.AdaLOMO(m), "during the backward pass"),
    "AdamWScheduleFreeClosure": (
        "schedulefree",
        plain("AdamWScheduleFreeClosure", 0.01),
        "needs a closure",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    lib, make, reason = REFUSED[name]
    run = Run()
    base = make(package(lib), run.model)
    before = run.weights
    with pytest.raises(TypeError, match=rf"^{name}\b.*{reason}"):
        BoosterOptimizer(base)
    assert "booster_lam" not in base.param_groups[0]
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights, strict=True))


@pytest.mark.parametrize("zeroes", [False, True])
def test_an_optimizer_that_steps_in_the_backward_pass_is_found_out(zeroes: bool) -> None:
    run = Run()
    stepping = {p: sgd([p]) for p in run.model.parameters()}

    def step(param: Tensor) -> None:
        stepping[param].step()
        if zeroes:
            stepping[param].zero_grad()

    for p in run.model.parameters():
        p.register_post_accumulate_grad_hook(step)
    opt = BoosterOptimizer(sgd(run.model.parameters()))
    before = run.weights
    with pytest.raises(RuntimeError, match="changed weights"):
        opt.regularize(run.closure(-1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights, strict=True))


def test_hooks_of_others_are_no_reason() -> None:
    run = Run()
    seen: list[float] = []
    for p in run.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))  # type: ignore[union-attr]
        p.register_hook(lambda grad: grad * 1.0)
    run.booster_step(BoosterOptimizer(sgd(run.model.parameters())), "one_call")
    assert seen


class Instant:
    """Stands for a CUDA stream and its events on a machine that has none."""

    def record_event(self) -> Instant:
        return self

    def wait_stream(self, other: Instant) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Optimizer]:
    """torchao's CPUOffloadOptimizer, with a device that is this machine's own memory."""
    lib = package("torchao.optim.cpu_offload")
    if not torch.cuda.is_available():
        unpinned = torch.empty_like
        monkeypatch.setattr(lib, "get_available_devices", lambda: ["cpu", "cuda"])
        monkeypatch.setattr(torch.cuda, "Stream", Instant)
        monkeypatch.setattr(torch.cuda, "current_stream", Instant)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(
            torch, "empty_like", lambda t, pin_memory=False, **options: unpinned(t, **options)
        )
    return lambda model: lib.CPUOffloadOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)


def test_cpu_offload_is_refused(offload: Callable[[nn.Module], Optimizer]) -> None:
    with pytest.raises(
        TypeError, match=r"CPUOffloadOptimizer takes the gradients during the backward pass"
    ):
        BoosterOptimizer(offload(Run().model))


def test_cpu_offload_would_step_on_harmful_gradients(
    offload: Callable[[nn.Module], Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused: its groups lack the hooked parameters, so nothing clears their `.grad`."""
    monkeypatch.setattr(optimizer_module, "checked_base", lambda base, _: base)
    run, start = Run(), Run()
    base = offload(run.model)
    base.defaults = {}
    run.booster_step(BoosterOptimizer(base, LAM, ALPHA, self_check=False), "one_call")
    stepped_on = (start.weights[0] - run.weights[0]) / 0.1
    for sign in (1.0, -1.0, -1.0):
        start.closure(sign)()
    summed = start.model.get_parameter("inner.weight").grad
    assert summed is not None
    assert (stepped_on - summed).norm() < 0.02 * summed.norm()


def test_layer_wise_optimizers_are_refused_before_a_closure_runs() -> None:
    """The trainer's stand-in for them holds no parameter; the real ones step in hooks."""
    lib = package("transformers.trainer_pt_utils")
    run = Run()
    for p in run.model.parameters():
        stepper = sgd([p])
        p.register_post_accumulate_grad_hook(lambda _, stepper=stepper: stepper.step())
    opt = BoosterOptimizer(lib.LayerWiseDummyOptimizer(lr=0.1))
    before = run.weights
    for call in (
        lambda: opt.regularize(run.closure(-1.0)),
        lambda: opt.step(run.closure(1.0), run.closure(-1.0)),
    ):
        with pytest.raises(RuntimeError, match=r"LayerWiseDummyOptimizer.*layer-wise"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights, strict=True))
    assert all(p.grad is None for p in run.model.parameters())
