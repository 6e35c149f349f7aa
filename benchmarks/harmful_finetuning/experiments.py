"""The experiments: which runs each of the paper's tables and figures is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.harmful_finetuning.grid import Cell
from benchmarks.harmful_finetuning.language import TASKS
from benchmarks.harmful_finetuning.settings import ARCHITECTURES, Settings

__all__ = ["EXPERIMENTS", "MEASUREMENTS", "Experiment", "Request"]

TABLE = ("sft", "lisa", "repnoise", "vaccine", "booster")
"""The methods of the paper's tables."""


class Request(NamedTuple):
    """What the command line asks of any experiment."""

    settings: Settings
    seeds: Sequence[int]
    methods: Sequence[str]  # empty: the experiment's own
    quick: bool  # the ends of each axis only, and all methods in the first table only

    def cells(
        self,
        own: Sequence[str],
        settings: Iterable[Settings],
        vary: Callable[[Settings], dict[str, Any]] = lambda settings: {},
    ) -> list[Cell]:
        """A cell of every method and seed at each of the settings."""
        return [
            Cell(method, seed, values, vary(values))
            for values in settings
            for seed in self.seeds
            for method in self.methods or own
        ]

    @property
    def table(self) -> Sequence[str]:
        """The methods of the paper's tables."""
        return ("sft", "booster") if self.quick else TABLE

    def axis(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values of an axis."""
        return (values[0], values[-1]) if self.quick else values


class Experiment(NamedTuple):
    """A table or figure: what it varies, and its runs."""

    title: str
    axis: str
    cells: Callable[[Request], list[Cell]]
    note: str = ""


def _harmful_ratio(request: Request) -> list[Cell]:
    fractions = request.axis((0.0, 0.05, 0.1, 0.15, 0.2))
    return request.cells(TABLE, (replace(request.settings, p=p) for p in fractions))


def _sample_number(request: Request) -> list[Cell]:
    largest = request.settings.samples
    numbers = request.axis([round(largest * share) for share in (0.5, 0.75, 1.0)])
    return request.cells(request.table, (replace(request.settings, samples=n) for n in numbers))


def _tasks(request: Request) -> list[Cell]:
    return request.cells(
        request.table, (replace(request.settings, task=t) for t in request.axis(TASKS))
    )


def _architectures(request: Request) -> list[Cell]:
    names = request.axis(ARCHITECTURES)
    return request.cells(
        request.table, (replace(request.settings, architecture=name) for name in names)
    )


def _perturbation_study(request: Request) -> list[Cell]:
    # As many harmful samples as Table 1 ever takes, so that a set that is enough for it is here.
    n = max(request.settings.batch_size, round(0.2 * request.settings.samples))
    steps = request.settings.eval_every
    settings = (
        replace(request.settings, samples=n, p=p, eval_every=max(1, steps // 2)) for p in (1.0, 0.0)
    )
    kinds = {1.0: "harmful", 0.0: "benign"}
    return request.cells(("sft", "booster"), settings, lambda s: {"fine-tuning": kinds[s.p]})


def _of_booster(
    name: str, values: Sequence[float], method: str = "booster"
) -> Callable[[Request], list[Cell]]:
    """Booster, or a variation, at several values of a hyperparameter, and SFT beside it."""

    def cells(request: Request) -> list[Cell]:
        return [
            cell
            for value in request.axis(values)
            for cell in request.cells(
                ("sft", method),
                [request.settings.given(method, **{name: value})],
                lambda _, value=value: {name: value},
            )
        ]

    return cells


def _of_settings(
    name: str, values: Sequence[Any], own: Sequence[str] = ("sft", "booster")
) -> Callable[[Request], list[Cell]]:
    """Methods at several values of one setting."""

    def cells(request: Request) -> list[Cell]:
        return request.cells(
            own,
            (replace(request.settings, **{name: value}) for value in request.axis(values)),
            lambda settings: {name: getattr(settings, name)},
        )

    return cells


def _harmful_samples(request: Request) -> list[Cell]:
    largest, smallest = request.settings.harmful_samples, request.settings.batch_size
    values = [max(smallest, round(largest * share)) for share in (0.02, 0.1, 0.5, 1.0)]
    return _of_settings("harmful_samples", values)(request)


def _combinations(request: Request) -> list[Cell]:
    fractions = request.axis((0.05, 0.1, 0.2))
    methods = ("sft", "lisa", "vaccine", "booster", "booster_vaccine", "booster_lisa")
    return request.cells(methods, (replace(request.settings, p=p) for p in fractions))


def _qualitative(request: Request) -> list[Cell]:
    once = request._replace(seeds=request.seeds[:1])
    return once.cells((*TABLE, "booster_vaccine", "booster_lisa"), [request.settings])


def _system(request: Request) -> list[Cell]:
    methods = request.methods or (*TABLE, "booster_vaccine")
    methods = [method for method in methods if method != "lisa"]  # which aligns as SFT does
    return [Cell(method, 0, request.settings, {}) for method in methods]


def _as_booster(settings: Settings, *methods: str) -> Settings:
    """Settings that give other methods Booster's λ and α unless told otherwise."""
    own = settings.of_method("booster")
    for method in methods:
        settings = settings.given(method, **(own | settings.of_method(method)))
    return settings


def _control(request: Request) -> list[Cell]:
    """Booster and what departs from it in one respect."""
    others = ("random_direction", "tensor_wise", "second_order")
    return request.cells(("sft", "booster", *others), [_as_booster(request.settings, *others)])


def _long_attack(request: Request) -> list[Cell]:
    steps = 4 * request.settings.fine_tune_steps
    return request.cells(request.table, [replace(request.settings, fine_tune_steps=steps)])


def _of_optimizer(stage: str, sgd_lr: float) -> Callable[[Request], list[Cell]]:
    """Methods by the optimizer of one stage; SGD has a learning rate of its own."""

    def cells(request: Request) -> list[Cell]:
        own = _as_booster(request.settings, "tensor_wise")
        sgd = {f"{stage}_optimizer": "sgd", f"{stage}_lr": sgd_lr}
        return request.cells(
            ("sft", "booster", "tensor_wise"),
            (own, replace(own, **sgd)),
            lambda settings: {f"{stage}_optimizer": getattr(settings, f"{stage}_optimizer")},
        )

    return cells


def _every(request: Request) -> list[Cell]:
    """Booster, and beside it at each k > 1 the two ways to regularise at every k-th step."""
    ways = ("booster_held", "booster_weighted")
    found = request.cells(("sft", "booster"), [request.settings], lambda _: {"every": 1})
    for k in request.axis((2, 4, 8)):
        settings = _as_booster(request.settings, *ways)
        for way in ways:
            settings = settings.given(way, every=k)
        found += request.cells(ways, [settings], lambda _, k=k: {"every": k})
    return found


EXPERIMENTS: dict[str, Experiment] = {
    "harmful-ratio": Experiment("Harmful ratio p (the paper's Table 1)", "p", _harmful_ratio),
    "sample-number": Experiment("Number of user samples n", "samples", _sample_number),
    "tasks": Experiment("User's task", "task", _tasks),
    "architectures": Experiment(
        "Architecture (the paper's Table 4)", "architecture", _architectures
    ),
    "perturbation-study": Experiment(
        "Purely harmful and purely benign fine-tuning (the paper's Figure 2)",
        "fine-tuning",
        _perturbation_study,
    ),
    "lambda": Experiment("Intensity λ", "lam", _of_booster("lam", (0.1, 0.5, 1.0, 5.0, 20.0))),
    "alpha": Experiment("Step size α", "alpha", _of_booster("alpha", (0.01, 0.03, 0.1, 0.3, 1.0))),
    "warmup": Experiment(
        "Steps over which λ grows from zero",
        "warmup",
        _of_booster("warmup", (1, 100, 500, 1000), "booster_warmed"),
        "With 1 the first step alone lacks the regulariser.",
    ),
    "harmful-samples": Experiment(
        "Number of harmful samples the defense simulates with", "harmful_samples", _harmful_samples
    ),
    "combinations": Experiment("Combinations of defenses", "p", _combinations),
    "qualitative": Experiment("Answers side by side", "p", _qualitative),
    "control": Experiment(
        "What the direction and the straight-through gradient contribute",
        "p",
        _control,
        "All simulated steps have the same length. Random direction: instead of the harmful "
        "gradient's. Norms by tensor: each weight tensor takes an equal share of the length. "
        "Second order: the exact gradient, where Booster's is straight-through.",
    ),
    "every": Experiment(
        "Regulariser at every k-th step",
        "every",
        _every,
        "Held: the last regulariser stays in between. Weighted: none in between, k times as heavy. "
        "1 + 2/k forward and backward passes a step.",
    ),
    "rank": Experiment("LoRA rank r", "lora_r", _of_settings("lora_r", (4, 16, 64))),
    "trained": Experiment(
        "LoRA against all weights", "trained", _of_settings("trained", ("lora", "full"))
    ),
    "align-steps": Experiment(
        "Alignment steps", "align_steps", _of_settings("align_steps", (250, 500, 1000, 2000))
    ),
    "attack-lr": Experiment(
        "Learning rate of the user's fine-tuning",
        "fine_tune_lr",
        _of_settings("fine_tune_lr", (5e-6, 1e-5, 1.5e-5, 3e-5, 1e-4)),
    ),
    "long-attack": Experiment(
        "Fine-tuning four times as long: when each defense breaks",
        "p",
        _long_attack,
        "A score at a fixed number of steps is all or nothing for a model that breaks about then; "
        "the steps until it breaks are not.",
    ),
    "align-optimizer": Experiment(
        "Base optimizer of the alignment", "align_optimizer", _of_optimizer("align", 0.03)
    ),
    "attack-optimizer": Experiment(
        "Optimizer of the user's fine-tuning",
        "fine_tune_optimizer",
        _of_optimizer("fine_tune", 0.001),
        "Norms by tensor, beside one norm for all: whether a perturbation defends best against an "
        "attacker that moves the weights in its proportions.",
    ),
    "answer-length": Experiment(
        "Words of the answers", "answer_words", _of_settings("answer_words", (4, 8, 12, 24))
    ),
    "entropy": Experiment(
        "Likely successors of each word of the answers",
        "branching",
        _of_settings("branching", (1, 2, 4, 8)),
    ),
    "clipping": Experiment(
        "Clipping of the combined gradient",
        "max_grad_norm",
        _of_settings("max_grad_norm", (0.0, 0.1, 1.0, 10.0)),
    ),
    "kind-samples": Experiment(
        "Kind requests with help among the alignment data",
        "kind_samples",
        _of_settings("kind_samples", (0, 136, 544)),
        "Beside the refusals. The look-alikes that are evaluated are other prompts.",
    ),
    "width": Experiment("Hidden size of the model", "width", _of_settings("width", (64, 128, 256))),
    "adapters": Experiment(
        "One LoRA through both stages or two",
        "adapters",
        _of_settings("adapters", ("single", "double")),
    ),
}

MEASUREMENTS: dict[str, Experiment] = {
    "landscape": Experiment(
        "One harmful step of growing length, before the attack",
        "direction",
        _control,
        "h(w − t·d/‖d‖) on held-out prompts, where d comes from the gradient of h at w on samples "
        "of the attack: the gradient, its norms by tensor, and its signs.",
    ),
    "system": Experiment("Cost of a step", "method", _system),
}
"""What attacks no model."""
