"""The errors in docs/faq.md: each is provoked here, and the page shows what it says.

PYTHONPATH=. python tests/docs/test_faq.py    # writes the texts of today into the page
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from torch_booster import BoosterOptimizer

PAGE = Path(__file__).parents[2] / "docs" / "faq.md"
ANYTHING = "[...]"  # in the page, stands for what depends on the model
# A heading whose first fenced block is a text, and that text.
ENTRY = re.compile(
    r"^## (?P<heading>[^\n]+)\n+```text\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Loop:
    """A small model, its optimizer, and the forward and backward pass of a loss."""

    def __init__(self, model: nn.Module | None = None, **options: object) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.model = model or self.model
        base = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.opt = BoosterOptimizer(base, **options)  # type: ignore[arg-type]

    def loss(self) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return self.model(torch.ones(3, 4, dtype=dtype)).square().mean()

    def closure(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss


def between_forward_and_backward() -> None:
    loop = Loop()
    loss = loop.loss()
    loop.opt.regularize(loop.closure)
    loss.backward()


def scaler_with_closures() -> None:
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loop.loss())
    scaler.step(loop.opt, loop.closure, loop.closure)


def scaler_with_closures_first() -> None:
    loop = Loop()
    torch.amp.GradScaler("cpu").step(loop.opt, loop.closure, loop.closure)


def no_gradients() -> None:
    loop = Loop()
    loop.opt.regularize(loop.loss)


def no_loss() -> None:
    loop = Loop()
    loop.opt.regularize(lambda: loop.closure() and None)


def twice() -> None:
    loop = Loop()
    loop.opt.regularize(loop.closure)
    loop.opt.regularize(loop.closure)


def forgotten() -> None:
    loop = Loop()
    loop.closure()
    loop.opt.step()


def another_batch() -> None:
    loop = Loop()
    batches = iter(torch.randn(3, 3, 4))

    def closure() -> Tensor:
        loss = loop.model(next(batches)).square().mean()
        loss.backward()
        return loss

    loop.opt.regularize(closure)


def of_another_optimizer() -> None:
    body, head = nn.Linear(4, 8), nn.Linear(8, 2)
    loop = Loop(body)
    loop.model = nn.Sequential(body, head)
    loop.opt.regularize(loop.closure)


def steps_in_the_backward_pass() -> None:
    loop = Loop()
    inner = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    parameters = list(loop.model.parameters())
    parameters[0].register_post_accumulate_grad_hook(lambda _: inner.step())
    loop.opt.regularize(loop.closure)


def broken_promise() -> None:
    loop = Loop(accumulates=True)

    def closure() -> Tensor:
        loop.opt.zero_grad()
        return loop.closure()

    loop.opt.regularize(closure)


def prepared() -> None:
    loop = Loop()
    assert not loop.opt._is_accelerate_prepared  # as accelerator.prepare asks
    loop.opt.regularize(loop.closure)


def read_on_the_wrapper() -> None:
    loop = Loop()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(loop.opt).diagnostics  # noqa: B018


def one_closure() -> None:
    loop = Loop()
    loop.opt.step(loop.closure)


def sparse() -> None:
    model = nn.Embedding(8, 2, sparse=True)
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    opt.regularize(closure)


def lbfgs() -> None:
    BoosterOptimizer(torch.optim.LBFGS(nn.Linear(4, 1).parameters()))


def a_class() -> None:
    BoosterOptimizer(torch.optim.AdamW)  # type: ignore[arg-type]


def deepspeed() -> None:
    model = nn.Linear(4, 1)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    BoosterOptimizer(torch.optim.AdamW(model.parameters()))


def rounded_away() -> None:
    loop = Loop(nn.Linear(4, 8).to(torch.bfloat16), alpha=1e-4)
    loop.opt.regularize(loop.closure)


def blow_up() -> None:
    loop = Loop(alpha=1e3)
    for group in loop.opt.param_groups:
        group["lr"] = 0.0
    for _ in range(9):
        loop.opt.step(loop.closure, loop.closure)
    loop.opt.read_diagnostics()


def nothing_gained() -> None:
    loop = Loop()
    for group in loop.opt.param_groups:
        group["lr"] = 0.0
    for _ in range(60):
        loop.opt.step(loop.closure, loop.closure)
    loop.opt.read_diagnostics()


PROVOKE: dict[str, Callable[[], None]] = {
    "A variable has been modified by an inplace operation": between_forward_and_backward,
    "No inf checks were recorded": scaler_with_closures,
    "Attempted step but _scale is None": scaler_with_closures_first,
    "harmful_closure made no gradients": no_gradients,
    "harmful_closure must return its loss": no_loss,
    "The regulariser would be counted twice": twice,
    "This step had no regulariser": forgotten,
    "harmful_closure is not one function of the weights": another_batch,
    "The harmful pass left gradients on other tensors": of_another_optimizer,
    "The harmful pass changed weights": steps_in_the_backward_pass,
    "harmful_closure zeroed or edited .grad, though accumulates=True": broken_promise,
    "Accelerate prepared this optimizer": prepared,
    "AcceleratedOptimizer object has no attribute": read_on_the_wrapper,
    "step() is missing harmful_closure": one_closure,
    "A gradient is sparse": sparse,
    "LBFGS": lbfgs,
    "base_optimizer must be an instance": a_class,
    "DeepSpeed": deepspeed,
    "The perturbation was rounded away": rounded_away,
    "The alignment blows up": blow_up,
    "The harmful loss is where it was": nothing_gained,
}


def said(heading: str) -> str:
    """The message of the error or of the warning that an entry is about."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            PROVOKE[heading]()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    (warning,) = warned
    return f"{warning.category.__name__}: {warning.message}"


def entries() -> Iterator[tuple[str, str]]:
    for match in ENTRY.finditer(PAGE.read_text()):
        yield match["heading"].replace("`", ""), match["text"]


def test_every_entry_is_provoked() -> None:
    assert [heading for heading, _ in entries()] == list(PROVOKE)


@pytest.mark.parametrize("heading", PROVOKE)
def test_the_page_shows_what_is_said(heading: str) -> None:
    parts = dict(entries())[heading].split(ANYTHING)
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in parts)
    assert re.fullmatch(pattern, " ".join(said(heading).split())), said(heading)


def write() -> None:
    """Writes the texts of today into the page."""
    text = PAGE.read_text()
    for heading, old in list(entries()):
        new = " ".join(said(heading).split())
        # Shapes and versions of torch's own message depend on the model.
        new = re.sub(r"operation: .* Hint: .*", f"operation: {ANYTHING}", new)
        text = text.replace(f"```text\n{old}```", f"```text\n{textwrap.fill(new, 96)}\n```", 1)
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
