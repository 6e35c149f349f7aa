"""The experiments: for each question, what it varies and which methods it compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from benchmarks.harmful_finetuning.methods import METHODS, defaults
from benchmarks.harmful_finetuning.runs import Run, run_of
from benchmarks.harmful_finetuning.settings import Architecture, Settings, Task, changed, value_at

PAPER = ("sft", "lisa", "repnoise", "vaccine", "booster")
"""The methods of the paper's tables."""
TABLE = (*PAPER, "booster_warmed")
TWO = ("sft", "booster", "booster_warmed")
LONGER = 4
"""How many times as long as usual the long attacks are."""


class Times(NamedTuple):
    """A multiple of what the preset says."""

    factor: float
    least: int = 1

    def of(self, value: float) -> int:
        """The multiple, a whole number."""
        return max(self.least, round(self.factor * value))


@dataclass(frozen=True)
class Experiment:
    """One question and the runs that answer it."""

    question: str
    axis: str
    """what varies: a setting by its path, or ``given.NAME``, a hyperparameter NAME"""
    values: tuple[Any, ...] = ()
    """its values (none: the preset's own)"""
    methods: tuple[str, ...] = TWO
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """what it sets otherwise than the preset"""
    along: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict[Any, Any])
    """what it sets beside a value of the axis"""
    note: str = ""
    seeds: int | None = None
    """how many of the seeds it takes (None: all)"""


P = "attack.p"
LONG = {"attack.steps": Times(LONGER), "score.every": Times(0.5)}
"""The long attack, looked at for the step at which a model breaks."""
EXPERIMENTS: dict[str, Experiment] = {
    "harmful-ratio": Experiment(
        "How does each defense do against more harmful data? (the paper's Table 1)",
        *(P, (0.0, 0.05, 0.1, 0.15, 0.2), TABLE),
    ),
    "long-attack": Experiment(
        "When does each defense break under an attack four times as long?",
        *(P, (), TABLE),
        fixed={"attack.steps": Times(LONGER)},
        note="A score at a fixed step is all or nothing for a model that breaks about then; the "
        "steps until it breaks are not.",
    ),
    "recommended": Experiment(
        "How long does the recommended setting hold, on bases that no choice has seen?",
        *(P, (0.2,), (*PAPER, "booster_recommended")),
        fixed=LONG,
        note="Booster: the paper's, with the λ and α tuned on other bases.",
    ),
    "pretrained": Experiment(
        "How do they do on a pretrained language model, with the paper's data?",
        *(P, (), ("sft", "booster", "booster_merged")),
        note="For --preset real, or a model of one's own.",
    ),
    "sample-number": Experiment(
        "Does the number of the user's samples matter?",
        *("attack.samples", (Times(0.5), Times(0.75), Times(1)), TABLE),
    ),
    "tasks": Experiment("Does it depend on the user's task?", "data.task", get_args(Task), TABLE),
    "architectures": Experiment(
        "Does it depend on the architecture? (the paper's Table 4)",
        *("base.architecture", get_args(Architecture)),
    ),
    "perturbation-study": Experiment(
        "What do purely harmful and purely benign data do? (the paper's Figure 2)",
        *(P, (1.0, 0.0)),
        # As many harmful samples as Table 1 ever takes, so that a set that serves it serves here.
        fixed={"attack.samples": Times(0.2, least=10), "score.every": Times(0.5)},
    ),
    "combinations": Experiment(
        "Do defenses add up?",
        *(P, (0.05, 0.1, 0.2)),
        ("sft", "lisa", "vaccine", "booster", "booster_vaccine", "booster_lisa"),
    ),
    "lambda": Experiment(
        "How large should λ be?", "given.lam", (0.1, 0.5, 1.0, 5.0, 20.0), ("sft", "booster")
    ),
    "alpha": Experiment(
        "How long should the simulated step α be?",
        *("given.alpha", (0.01, 0.03, 0.1, 0.3, 1.0), ("sft", "booster")),
    ),
    "warmup": Experiment(
        "Over how many steps should λ grow?",
        *("given.warmup", (1, 100, 500, 1000), ("sft", "booster_warmed")),
        note="With 1 the first step alone lacks the regulariser.",
    ),
    "every": Experiment(
        "Is a regulariser at every k-th step enough?",
        *("given.every", (2, 4, 8), ("sft", "booster", "booster_held", "booster_weighted")),
        note="Held: the last regulariser stays in between. Weighted: none in between, k times as "
        "heavy. 1 + 2/k forward and backward passes a step.",
    ),
    "control": Experiment(
        "What do the direction and the straight-through gradient contribute?",
        *(P, (), ("sft", "booster", "random_direction", "tensor_wise", "second_order")),
        note="All simulated steps have the same length. Random direction: instead of the harmful "
        "gradient's. Norms by tensor: each weight tensor takes an equal share of the length. "
        "Second order: the exact gradient, where Booster's is straight-through.",
    ),
    "harmful-samples": Experiment(
        "How many harmful samples does the defense need?",
        *("data.harmful_samples", tuple(Times(f, least=10) for f in (0.02, 0.1, 0.5, 1))),
    ),
    "unseen-kinds": Experiment(
        "Does it hold against kinds of harm that were not simulated?",
        *("data.simulated_kinds", (0, 3), ("sft", "booster_recommended")),
        fixed={"data.attacked_kinds": 5, "data.harmful_samples": 250, **LONG},
        note="Attack and test prompts are of five kinds. 0: the simulation shows all eight; 3: the "
        "other three alone, as many samples.",
    ),
    "kind-samples": Experiment(
        "Do kind requests among the alignment data help?",
        *("data.kind_samples", (0, 136, 544)),
        note="Beside the refusals. The look-alikes that are evaluated are other prompts.",
    ),
    "align-steps": Experiment(
        "How long should the alignment be?", "align.steps", (250, 500, 1000, 2000)
    ),
    "clipping": Experiment(
        "Does clipping of the combined gradient matter?",
        *("align.max_grad_norm", (0.0, 0.1, 1.0, 10.0)),
    ),
    "align-optimizer": Experiment(
        "Does the alignment's optimizer matter?",
        *("align.optimizer", ("adamw", "sgd"), ("sft", "booster", "tensor_wise")),
        along={"sgd": {"align.lr": 0.03}},
    ),
    "attack-optimizer": Experiment(
        "Does the attack's optimizer matter?",
        *("attack.optimizer", ("adamw", "sgd"), ("sft", "booster", "tensor_wise")),
        along={"sgd": {"attack.lr": 0.001}},
        note="Norms by tensor, beside one norm for all: whether a perturbation defends best "
        "against an attacker that moves the weights in its proportions.",
    ),
    "attack-lr": Experiment(
        "What does a faster attack do?", "attack.lr", (5e-6, 1e-5, 1.5e-5, 3e-5, 1e-4)
    ),
    "answer-length": Experiment(
        "Does the answers' length matter?", "data.answer_words", (4, 8, 12, 24)
    ),
    "entropy": Experiment("Does the answers' entropy matter?", "data.branching", (1, 2, 4, 8)),
    "width": Experiment("Does the model's width matter?", "base.width", (64, 128, 256)),
    "trained": Experiment("LoRA or all weights?", "trained", ("lora", "full")),
    "rank": Experiment("Does the rank of LoRA matter?", "lora.r", (4, 16, 64), ("sft", "booster")),
    "adapters": Experiment(
        "One LoRA through both stages, or the first merged and a second one?",
        *("attack.adapters", ("single", "double")),
    ),
    "qualitative": Experiment(
        "What do the models answer?",
        *(P, (), (*PAPER, "booster_vaccine", "booster_lisa")),
        seeds=1,
    ),
}

NEED_PRETRAINING = {"architectures", "width"}
NEED_LANGUAGE = {"answer-length", "entropy", "kind-samples", "unseen-kinds"}


class Point(NamedTuple):
    """A run's place in an experiment."""

    value: Any  # on the axis
    run: Run


def points(
    experiment: Experiment,
    settings: Settings,
    seeds: Sequence[int],
    methods: Sequence[str] = (),
    ends_only: bool = False,
) -> Iterator[Point]:
    """The runs of an experiment. What a method does not have, such as λ in SFT, leaves it as it is.

    Args:
        experiment: What is asked.
        settings: The preset's, with what the user changed.
        seeds: Of the runs.
        methods: Instead of the experiment's own.
        ends_only: The first and the last value alone.

    Raises:
        ValueError: There is no such method or hyperparameter, or a value does not fit.
    """
    start = changed(settings, dict(_resolved(settings, experiment.fixed)))
    hyperparameter = experiment.axis.removeprefix("given.")
    swept = hyperparameter != experiment.axis
    values = experiment.values or (value_at(start, experiment.axis),)
    for value in (values[0], values[-1]) if ends_only and len(values) > 1 else values:
        beside = experiment.along.get(value, {})
        if not swept:
            at = dict(_resolved(start, {experiment.axis: value, **beside}))
            here, value = changed(start, at), at[experiment.axis]
        for seed in list(seeds)[: experiment.seeds]:
            for method in methods or experiment.methods:
                own = start if swept else here  # pyright: ignore[reportPossiblyUnboundVariable]
                if swept and hyperparameter in _hyperparameters(method):
                    own = changed(start, {f"given.{method}.{hyperparameter}": value})
                yield Point(value, run_of(method, seed, own))


def _hyperparameters(method: str) -> set[str]:
    found = METHODS.get(method)
    return {*defaults(found.alignment), *defaults(found.attack)} if found else set()


def _resolved(settings: Settings, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, value in values.items():
        yield path, value.of(value_at(settings, path)) if isinstance(value, Times) else value


CANDIDATES: dict[str, list[dict[str, float]]] = {
    "sft": [{}],
    "lisa": [
        {"rho": 0.01, "alignment_steps": 100, "user_steps": 900},
        {"rho": 1.0, "alignment_steps": 100, "user_steps": 900},
        {"rho": 0.01, "alignment_steps": 10, "user_steps": 90},
        {"rho": 1.0, "alignment_steps": 10, "user_steps": 90},
    ],
    "repnoise": [
        {"alpha": 0.1, "beta": 0.001},
        {"alpha": 1.0, "beta": 0.001},
        {"alpha": 0.1, "beta": 0.1},
        {"alpha": 1.0, "beta": 0.1},
    ],
    "vaccine": [{"rho": 1.0}, {"rho": 2.0}, {"rho": 5.0}, {"rho": 10.0}],
    "booster": [
        {"lam": 1.0, "alpha": 0.1},
        {"lam": 5.0, "alpha": 0.1},
        {"lam": 1.0, "alpha": 0.3},
        {"lam": 2.0, "alpha": 0.2},
    ],
    "booster_warmed": [
        {"lam": 5.0, "alpha": 0.1, "warmup": 500},
        {"lam": 1.0, "alpha": 0.3, "warmup": 500},
        {"lam": 5.0, "alpha": 0.3, "warmup": 500},
        {"lam": 5.0, "alpha": 0.3, "warmup": 1000},
    ],
}
"""What `tune` tries: each method's published values and three around them.

Those of ``booster_warmed`` come from eight that were tried with LoRA on validation seed 101 alone.
"""


def tuning_points(
    settings: Settings, seeds: Sequence[int], methods: Sequence[str]
) -> Iterator[Point]:
    """Each candidate at p = 0.2 on the validation prompts, scored after the attack."""
    attacked = {"score.split": "validation", "attack.p": 0.2, "score.every": settings.attack.steps}
    for method in methods:
        for candidate in CANDIDATES[method]:
            given = {f"given.{method}.{name}": value for name, value in candidate.items()}
            own = changed(settings, attacked | given)
            for seed in seeds:
                yield Point(candidate, run_of(method, seed, own))
