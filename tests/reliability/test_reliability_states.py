"""Random sequences of what a training script may do, against the oracle around a bare optimizer.

The machine drives a `BoosterOptimizer` on one model and, on a twin of it, the bare base optimizer
with the gradient of `tests.reference`. Weights, gradients, optimizer state and hyperparameters are
equal after every rule. Saving, loading and copying happen to the wrapped side alone: the twin is
the unbroken run.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from tests.conftest import Counts
from tests.reference import Loss, booster_gradient
from torch_booster import BoosterOptimizer

BASES: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, alpha=0.9),  # has an alpha of its own
}
LAMS = st.sampled_from([0.0, 0.5, 5.0])
ALPHAS = st.sampled_from([0.0, 0.01, 0.1, 0.5])
OWN = st.none() | st.fixed_dictionaries({"booster_lam": LAMS, "booster_alpha": ALPHAS})


class BoomError(Exception):
    pass


# Two losses of five blocks of weights; each misses some, three are there from the beginning.

SIZE, BLOCKS = 3, 5
FIRST = [0, 1, 2]
F_BLOCKS, H_BLOCKS = (0, 1, 3, 4), (0, 2, 4)


def loss_of(blocks: Sequence[int], seed: int) -> Loss:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    matrix, target = draw(6, SIZE * len(blocks)), draw(6)

    def loss(values: Sequence[Tensor]) -> Tensor:
        x = torch.cat([values[i] for i in blocks])
        return (torch.tanh(matrix @ x) - target).square().mean()

    return loss


F, H = loss_of(F_BLOCKS, 1), loss_of(H_BLOCKS, 2)


class Side:
    """A model, an optimizer that has its first blocks, and a scheduler."""

    def __init__(self, base: str, lam: float | None = None, alpha: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, SIZE, generator=generator, dtype=torch.float64)
        self.model = nn.ParameterList([draw() for _ in range(BLOCKS)])
        for i, block in enumerate(self.blocks):
            block.requires_grad_(i in FIRST)
        self.opt = BASES[base]([self.blocks[i] for i in FIRST])
        if lam is not None:
            self.opt = BoosterOptimizer(self.opt, lam, alpha, self_check=False)
            self.opt._now.told.add("plain")  # plain steps are among the rules
        self.scheduler = ExponentialLR(self.opt, 0.9)

    @property
    def blocks(self) -> list[Tensor]:
        return list(self.model.parameters())

    def add(self, block: int, own: dict[str, Any] | None = None) -> None:
        self.blocks[block].requires_grad_()
        self.opt.add_param_group({"params": [self.blocks[block]], **(own or {})})
        group = self.opt.param_groups[-1]
        group["initial_lr"] = group["lr"]  # as the scheduler gives it to groups that it finds

    def take(self, model: nn.ParameterList, opt: Optimizer) -> None:
        self.model, self.opt = model, opt
        self.schedule()

    def schedule(self) -> None:
        self.scheduler = ExponentialLR(self.opt, 0.9)

    def close_to(self, other: Side) -> bool:
        pairs = list(zip(self.blocks, other.blocks, strict=True))
        return all(
            close(a, b) and close(a.grad, b.grad) and close(state_of(self, a), state_of(other, b))
            for a, b in pairs
        )


def state_of(side: Side, block: Tensor) -> dict[str, Any]:
    return side.opt.state.get(block, {})


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    return a is b or a == b


class Machine(RuleBasedStateMachine):
    """Every rule acts on both sides; `pending` says whether a regulariser waits in `.grad`."""

    rules_run: ClassVar[int] = 0

    @initialize(base=st.sampled_from(sorted(BASES)), lam=LAMS, alpha=ALPHAS)
    def begin(self, base: str, lam: float, alpha: float) -> None:
        self.base = base
        self.booster, self.twin = Side(base, lam, alpha), Side(base)
        self.groups = [(FIRST, {"booster_lam": lam, "booster_alpha": alpha})]
        self.defaults = dict(self.groups[0][1])
        self.pending = self.stepped = False
        self.steps = 0

    # what the machine knows

    @property
    def wrapped(self) -> BoosterOptimizer:
        assert isinstance(self.booster.opt, BoosterOptimizer)
        return self.booster.opt

    def hyperparameters(self, key: str) -> dict[int, float]:
        return {i: own[key] for blocks, own in self.groups for i in blocks}

    def trainable(self) -> list[int]:
        held = self.hyperparameters("booster_lam")
        return [i for i, block in enumerate(self.twin.blocks) if i in held and block.requires_grad]

    def on(self) -> bool:
        return any(own["booster_lam"] for _, own in self.groups)

    def oracle(self, f: Loss) -> dict[int, Tensor]:
        """The gradient of each trainable block that f or a regulariser reaches."""
        lams, alphas = map(self.hyperparameters, ("booster_lam", "booster_alpha"))
        chosen, blocks = self.trainable(), self.twin.blocks

        def of_chosen(loss: Loss) -> Loss:
            def of(values: Sequence[Tensor]) -> Tensor:
                given = dict(zip(chosen, values, strict=True))
                return loss([given.get(i, block.detach()) for i, block in enumerate(blocks)])

            return of

        params = [blocks[i] for i in chosen]
        lam, alpha = ([of[i] for i in chosen] for of in (lams, alphas))
        grads = booster_gradient(of_chosen(f), of_chosen(H), params, lam, alpha)
        by_f = F_BLOCKS if f is F else ()
        reached = {i for i in chosen if i in by_f or (lams[i] and i in H_BLOCKS)}
        pairs = zip(chosen, grads, strict=True)
        return {i: g for i, g in pairs if g is not None and i in reached}

    def accumulate(self, grads: dict[int, Tensor]) -> None:
        for i, g in grads.items():
            block = self.twin.blocks[i]
            block.grad = g + (0.0 if block.grad is None else block.grad)

    def closure(
        self, loss_of: Loss, share: float = 1.0, zeroing: bool = False, boom_at: int = 0
    ) -> Callable[[], Tensor]:
        """Forward and backward on the wrapped side, which may zero first or raise at its end."""
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if zeroing:
                self.booster.opt.zero_grad()
            loss = share * loss_of(self.booster.blocks)
            if calls == boom_at and loss_of is F:
                raise BoomError
            loss.backward()
            if calls == boom_at:
                raise BoomError
            return loss

        return closure

    # steps

    @precondition(lambda self: not self.pending)
    @rule(zeroing=st.sampled_from(["neither", "f", "h"]))
    def step_in_one_call(self, zeroing: str) -> None:
        f = self.closure(F, zeroing=zeroing == "f")
        h = self.closure(H, zeroing=zeroing == "h")
        if zeroing == "f":
            self.twin.opt.zero_grad()
        if zeroing == "h" and self.on():  # what is trainable is set aside before
            for i in set(self.hyperparameters("booster_lam")) - {*self.trainable()}:
                self.twin.blocks[i].grad = None
        expected = F(self.twin.blocks), H(self.twin.blocks)
        self.accumulate(self.oracle(F))
        loss: Any = self.wrapped.step(f, h)
        self.twin.opt.step()
        self.stepped = True
        self.steps += 1
        assert close(loss.detach(), expected[0].detach())
        if self.on():
            assert self.wrapped.diagnostics is not None
            assert close(self.wrapped.diagnostics.harmful_loss, expected[1].detach())

    @precondition(lambda self: not self.pending)
    @rule()
    def regularize(self) -> None:
        self.accumulate(self.oracle(nothing) if self.on() else {})
        loss = self.wrapped.regularize(self.closure(H))
        assert (loss is not None) == self.on()
        lams = self.hyperparameters("booster_lam")
        self.pending = any(lams[i] for i in self.trainable() if i in H_BLOCKS)

    @rule(micro_batches=st.integers(1, 3))
    def accumulate_alignment(self, micro_batches: int) -> None:
        for _ in range(micro_batches):
            self.closure(F, 1 / micro_batches)()
        leaves = [self.twin.blocks[i] for i in self.trainable()]
        loss = F(self.twin.blocks)
        grads: list[Tensor | None] = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        pairs = zip(self.trainable(), grads, strict=True)
        self.accumulate({i: g for i, g in pairs if g is not None})

    @rule()
    def plain_step(self) -> None:
        self.booster.opt.step()
        self.twin.opt.step()
        self.pending, self.stepped = False, True
        self.steps += 1

    @rule(micro_batches=st.integers(1, 3))
    def staged_step(self, micro_batches: int) -> None:
        self.zero_grad(True)
        self.regularize()
        self.accumulate_alignment(micro_batches)
        self.plain_step()

    @precondition(lambda self: self.pending)
    @rule()
    def second_regulariser_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="counted twice"):
            self.wrapped.regularize(self.closure(H))
        if self.on():
            with pytest.raises(RuntimeError, match="counted twice"):
                self.wrapped.step(self.closure(F), self.closure(H))

    @precondition(lambda self: not self.pending and self.on())
    @rule(where=st.sampled_from(["pass 1", "pass 2", "alignment"]), staged=st.booleans())
    def closure_raises(self, where: str, staged: bool) -> None:
        harmful = self.closure(H, boom_at=int(where[-1]) if where != "alignment" else 0)
        f = self.closure(F, boom_at=int(where == "alignment"))
        with pytest.raises(BoomError):  # noqa: PT012
            if staged and where != "alignment":
                self.wrapped.regularize(harmful)
            else:
                self.wrapped.step(f, harmful)

    # what happens between steps

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.booster.opt.zero_grad(set_to_none)
        self.twin.opt.zero_grad(set_to_none)
        self.pending = False

    @precondition(lambda self: len(self.groups) < BLOCKS - len(FIRST) + 1)
    @rule(own=OWN)
    def add_param_group(self, own: dict[str, float] | None) -> None:
        block = len(FIRST) + len(self.groups) - 1
        self.booster.add(block, own)
        self.twin.add(block)
        self.groups.append(([block], dict(own or self.defaults)))

    @rule(block=st.integers(0, BLOCKS - 1))
    def freeze_or_unfreeze(self, block: int) -> None:
        left = set(self.trainable()) ^ {block}
        known = block in self.hyperparameters("booster_lam")
        if known and left & set(F_BLOCKS) and left & set(H_BLOCKS):
            for side in (self.booster, self.twin):
                side.blocks[block].requires_grad_(block in left)

    @rule(lam=LAMS)
    def set_lam(self, lam: float) -> None:
        self.wrapped.lam = lam
        self.set_everywhere("booster_lam", lam)

    @rule(alpha=ALPHAS)
    def set_alpha(self, alpha: float) -> None:
        self.wrapped.alpha = alpha
        self.set_everywhere("booster_alpha", alpha)

    def set_everywhere(self, key: str, value: float) -> None:
        self.defaults[key] = value
        for _, own in self.groups:
            own[key] = value

    @rule(lr=st.sampled_from([1e-3, 1e-2]), group=st.integers(0, BLOCKS))
    def set_lr(self, lr: float, group: int) -> None:
        for side in (self.booster, self.twin):
            side.opt.param_groups[group % len(self.groups)]["lr"] = lr

    @precondition(lambda self: self.stepped)
    @rule()
    def scheduler_step(self) -> None:
        self.booster.scheduler.step()
        self.twin.scheduler.step()

    @rule()
    def there_and_back_in_float32(self) -> None:
        for side in (self.booster, self.twin):
            side.model.float()
            side.model.double()

    # copies and checkpoints, which carry no gradients; the twin is left as it is

    def taken_anew(self, model: nn.ParameterList, opt: Optimizer) -> None:
        self.booster.take(model, opt)
        self.twin.opt.zero_grad()
        self.twin.schedule()
        self.pending = self.stepped = False

    def fresh(self) -> Side:
        """A model and an optimizer of the same make, with other weights and hyperparameters."""
        side = Side(self.base, 1.0, 1.0)
        for blocks, _ in self.groups[1:]:
            side.add(blocks[0])
        for old, new in zip(self.booster.blocks, side.blocks, strict=True):
            new.requires_grad_(old.requires_grad)
            new.data.zero_()
        return side

    @rule()
    def copy_together(self) -> None:
        self.booster.opt.zero_grad()
        self.taken_anew(*copy.deepcopy((self.booster.model, self.booster.opt)))

    @rule()
    def pickle_together(self) -> None:
        self.booster.opt.zero_grad()
        self.taken_anew(*pickle.loads(pickle.dumps((self.booster.model, self.booster.opt))))

    @rule(weights=st.sampled_from(["torch", "safetensors"]))
    def save_and_load(self, weights: str) -> None:
        side, file = self.fresh(), io.BytesIO()
        model, state = self.booster.model.state_dict(), self.booster.opt.state_dict()
        torch.save({"model": model, "opt": state}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if weights == "safetensors":
            saved["model"] = through_safetensors(model)
        side.model.load_state_dict(saved["model"])
        side.opt.load_state_dict(saved["opt"])
        self.defaults = {"booster_lam": 1.0, "booster_alpha": 1.0}  # the fresh optimizer's own
        self.taken_anew(side.model, side.opt)

    @rule()
    def load_in_place(self) -> None:
        """Gradients stay where they are, and what was a regulariser is one no longer."""
        self.booster.opt.load_state_dict(copy.deepcopy(self.booster.opt.state_dict()))
        self.pending = False

    @precondition(lambda self: self.complete())
    @rule()
    def distributed_checkpoint(self) -> None:
        side = self.fresh()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is but one process
            dcp.save(pair_of(self.booster), checkpoint_id=folder, no_dist=True)
            found = pair_of(side)
            dcp.load(found, checkpoint_id=folder, no_dist=True)
        set_state_dict(
            side.model,
            side.opt,
            model_state_dict=found["model"],
            optim_state_dict=found["opt"],
        )
        self.defaults = {"booster_lam": 1.0, "booster_alpha": 1.0}
        self.taken_anew(side.model, side.opt)

    def complete(self) -> bool:
        """Whether all have state and are trainable: of others torch saves or loads none."""
        held = self.hyperparameters("booster_lam")
        blocks = self.twin.blocks
        stateful = {i for i in held if blocks[i] in self.twin.opt.state}
        return set(self.trainable()) == stateful == set(held)

    # what holds at all times

    @invariant()
    def equal_to_the_oracle(self) -> None:
        type(self).rules_run += 1
        if not hasattr(self, "booster"):
            return
        assert self.booster.close_to(self.twin)
        waiting = self.wrapped._now.waiting
        assert (waiting is not None and waiting.is_there()) == self.pending
        steps = {"booster_step": self.steps}
        groups = zip(
            self.booster.opt.param_groups, self.twin.opt.param_groups, self.groups, strict=True
        )
        for group, bare, (blocks, own) in groups:
            assert close(without_params(group), without_params(bare) | own | steps)
            assert list(map(id, group["params"])) == [id(self.booster.blocks[i]) for i in blocks]
        hooks = sum(len(hooks_of(block) or {}) for block in self.booster.blocks)
        assert hooks <= (waiting is not None)


def nothing(values: Sequence[Tensor]) -> Tensor:
    """An alignment loss that adds no gradient."""
    return torch.stack([v.sum() for v in values]).sum() * 0


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def hooks_of(block: Any) -> Any:
    return block._post_accumulate_grad_hooks


def pair_of(side: Side) -> dict[str, Any]:
    model, opt = get_state_dict(side.model, side.opt)
    return {"model": model, "opt": opt}


def through_safetensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch", reason="the examples extra is absent")
    return safetensors.load(safetensors.save(weights))


def test_any_sequence_equals_the_oracle(full: bool, counts: Counts) -> None:
    Machine.rules_run = 0
    examples, steps = (600, 50) if full else (40, 30)
    size = settings(max_examples=examples, stateful_step_count=steps)
    run_state_machine_as_test(Machine, settings=size)
    counts.add("operations in random sequences", Machine.rules_run, 0)


def test_zeroing_in_the_harmful_closure_leaves_earlier_gradients_alone() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    a.grad, b.grad = torch.full((1,), 7.0), torch.full((1,), 7.0)
    opt = BoosterOptimizer(torch.optim.SGD([a, b], lr=0.0), lam=5.0, alpha=0.0)

    def f() -> Tensor:
        loss = (a + b).sum()
        loss.backward()
        return loss

    def h() -> Tensor:
        opt.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return loss

    opt.step(f, h)
    assert (a.grad, b.grad) == (torch.full((1,), 8.0), torch.full((1,), 8.0))
