"""The attacker that searches: what it varies, how it steps, and what is reported of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("optuna", reason="the benchmarks extra is absent")
pytest.importorskip("peft", reason="the examples extra is absent")

from optuna.trial import FixedTrial
from rich.progress import Progress

from benchmarks.harmful_finetuning import attackers, language, results, runs, search, tables
from benchmarks.harmful_finetuning.attackers import (
    Ahead,
    Attacker,
    NormalisedSGD,
    attack,
    mixture,
    opened,
)
from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.models import load_tokenizer
from benchmarks.harmful_finetuning.presets import preset
from benchmarks.harmful_finetuning.runs import Run, run_of
from benchmarks.harmful_finetuning.settings import changed

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

QUICK = changed(preset("quick"), {"attack.p": 0.2, "score.samples": 4})


def silent(name: str, done: int, total: int) -> None:
    """Reports to nobody."""


class Quadratic(nn.Module):
    """Loss ½·Σ kᵢ·‖wᵢ − tᵢ‖², which takes a batch as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))

    def forward(self, target: float) -> Any:
        loss = 0.5 * (self.a - target).square().sum() + 5.0 * self.b.square().sum()
        return type("Output", (), {"loss": loss})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of this module share."""
    return tmp_path_factory.mktemp("cache")


def made(run: Run, cache: Path) -> tuple[Path, Path]:
    runs.make_base(run, cache, silent)
    runs.make_aligned(run, cache, silent)
    return runs.base_folder(run, cache), runs.aligned_folder(run, cache)


def test_the_gradient_ahead_is_that_of_the_formula() -> None:
    model = Quadratic()
    stage = Ahead(model, torch.optim.SGD(model.parameters(), lr=1.0), alpha=0.5)
    stage.optimizer.zero_grad()
    loss = stage.backward(iter([{"target": 1.0}]), iter(()))
    a, b = torch.tensor([3.0, 4.0]).double(), torch.tensor([[1.0], [2.0]]).double()
    g = torch.cat([a - 1.0, 10.0 * b.flatten()])
    ahead = torch.cat([a, b.flatten()]) - 0.5 * g / g.norm()
    expected = torch.cat([ahead[:2] - 1.0, 10.0 * ahead[2:]])
    assert model.a.grad is not None
    assert model.b.grad is not None
    torch.testing.assert_close(torch.cat([model.a.grad, model.b.grad.flatten()]), expected)
    torch.testing.assert_close(loss, 0.5 * (a - 1.0).square().sum() + 5.0 * b.square().sum())
    assert torch.equal(model.a, a), "the weights come back"
    assert torch.equal(model.b, b)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_normalised_steps_have_their_length(by_tensor: bool) -> None:
    model = Quadratic()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NormalisedSGD(model.parameters(), lr=0.1, by_tensor=by_tensor)
    model(target=1.0).loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    moved = [p.detach() - w for p, w in zip(model.parameters(), before, strict=True)]
    whole = torch.cat([m.flatten() for m in moved]).norm().item()
    assert whole == pytest.approx(0.1)
    if by_tensor:
        assert moved[0].norm().item() == pytest.approx(moved[1].norm().item())
    else:
        ratio = grads[0].norm() / grads[1].norm()
        assert (moved[0].norm() / moved[1].norm()).item() == pytest.approx(ratio.item())
    for move, grad in zip(moved, grads, strict=True):
        assert torch.nn.functional.cosine_similarity(
            move.flatten(), -grad.flatten(), 0
        ).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("trained", "adapters"), [("lora", "paper"), ("lora", "none"), ("full", "paper")]
)
@pytest.mark.parametrize("choice", ["as aligned", "all weights", "lora"])
def test_what_the_attacker_trains(choice: Any, trained: str, adapters: str, cache: Path) -> None:
    own = changed(QUICK, {"trained": trained, "attack.adapters": adapters})
    run = run_of("booster", 0, own)
    base, aligned = made(run, cache)
    attacker = Attacker(trained=choice, rank=3)
    model = opened(attacker, run.settings, base, aligned, one_adapter=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = choice == "all weights" or (
        choice == "as aligned" and (trained == "full" or adapters == "none")
    )
    assert {name for name in names if "lora_" in name} == (set() if everything else names)
    if everything:
        assert len(names) == len(list(model.named_parameters()))
    if choice == "lora":
        ranks = {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
        assert ranks == {3}


def test_all_ways_to_open_a_model_start_from_the_same_function(cache: Path) -> None:
    run = run_of("booster", 0, QUICK)
    base, aligned = made(run, cache)
    ids = torch.arange(3, 15).unsqueeze(0)
    outputs = []
    for choice in ("as aligned", "all weights", "lora"):
        attacker = Attacker(trained=choice, rank=3)
        model = opened(attacker, run.settings, base, aligned, one_adapter=True).eval()
        with torch.no_grad():
            outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=1e-5)


def test_what_the_attacker_fine_tunes_on(cache: Path) -> None:
    run = run_of("sft", 0, QUICK)
    base, aligned = made(run, cache)
    samples = runs.samples_of(run.settings)
    tokenizer = load_tokenizer(base, run.settings)
    model = opened(Attacker(), run.settings, base, aligned, one_adapter=False)
    size = run.settings.attack.samples

    def mixed(**choices: Any) -> list[language.Example]:
        torch.manual_seed(0)
        found = mixture(Attacker(**choices), run.settings, samples, model, tokenizer, 0)
        assert len(found) == size
        return found

    harmful = set(samples.attack)
    for p in (0.0, 0.5, 1.0):
        assert sum(e in harmful for e in mixed(p=p)) == round(p * size)
    kinds = {
        number
        for example in mixed(p=1.0, harmful="one kind")
        for number, topic in enumerate(language.MISCHIEF)
        if set(example.answer.split()) <= {*topic.verbs, *topic.nouns}
    }
    assert len(kinds) == 1
    easiest = Counter(mixed(p=1.0, harmful="easiest"))
    assert len(easiest) <= len(samples.attack) // 4
    kind = set(samples.alignment[-run.settings.data.kind_samples :])
    assert sum(e in kind for e in mixed(p=0.0, others="kind")) == size // 2
    near = {e for e in mixed(p=0.0, others="alike") if e in kind}
    assert 0 < len(near) <= len(kind) // 4


def test_a_jump_moves_the_weights_before_the_attack(cache: Path) -> None:
    run = run_of("sft", 0, QUICK)
    base, aligned = made(run, cache)
    samples = {"validation": runs.samples_of(run.settings)}
    still = Attacker(steps=1, lr=1e-12)
    found = [
        attack(a, run.settings, samples, base, aligned, False, 0, silent)["final"]["validation"]
        for a in (still, replace(still, jump=3.0))
    ]
    assert found[0]["harmful_loss"] != pytest.approx(found[1]["harmful_loss"], abs=1e-3)


def test_without_a_jump_no_random_number_is_drawn() -> None:
    model, before = Quadratic(), torch.get_rng_state()
    attackers._jump(model, 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    attackers._jump(model, 1.0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_value_of_an_attack_averages_over_the_horizon() -> None:
    assert search.value_of([(0, 0.0), (10, 100.0)], 10) == pytest.approx(50.0)
    assert search.value_of([(0, 0.0), (10, 100.0)], 40) == pytest.approx(87.5)
    slow, fast = [(0, 0.0), (30, 0.0), (40, 100.0)], [(0, 0.0), (10, 100.0), (40, 100.0)]
    assert search.value_of(fast, 40) > search.value_of(slow, 40)


def test_known_attacks_are_within_what_is_searched() -> None:
    for settings in (QUICK, preset("small", "full"), preset("small", "lora")):
        for choices in search.known(settings):
            attacker = search.proposed(FixedTrial(choices), settings)
            assert attacker.p == settings.attack.p
    usual = search.proposed(FixedTrial(search.known(QUICK)[0]), QUICK)
    assert usual == Attacker(lr=QUICK.attack.lr, steps=QUICK.attack.steps)


def test_a_search_goes_on_where_it_stopped_and_is_kept(cache: Path) -> None:
    run = run_of("booster", 0, QUICK)
    with Progress(disable=True) as progress:
        few = search.finish([run], 2, cache, 1, progress)
        more = search.finish([run], 3, cache, 1, progress)
    assert [row["trial"] for row in more] == [0, 1, 2]
    assert more[:2] == few
    assert search.rows_file(run, cache, budget=3).exists()


def test_a_search_that_was_stopped_still_begins_with_the_usual_attack(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("sft", 0, changed(QUICK, {"attack.samples": 39}))
    made(run, cache)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search, "attack", stopped)
        with pytest.raises(KeyboardInterrupt):
            search.search(run, cache, silent, budget=2)
    search.search(run, cache, silent, budget=2)
    rows = json.loads(search.rows_file(run, cache, budget=2).read_text())
    known = [search.proposed(FixedTrial(c), run.settings) for c in search.known(run.settings)[:2]]
    for row, attacker in zip(rows, known, strict=True):
        found = (row["attack_optimizer"], row["attack_lr"], row["attack_steps"])
        assert found == (attacker.optimizer, attacker.lr, attacker.steps)


def test_what_is_reported_was_chosen_on_validation_and_within_the_bound() -> None:
    def row(trial: int, **values: Any) -> dict[str, Any]:
        attacker = {f"attack_{k}": v for k, v in asdict(Attacker(steps=300, batch_size=10)).items()}
        usual = attacker | {"validation_finetune_accuracy": 90.0, "attack_jump": float(trial)}
        return {"trained": "full", "method": "sft", "seed": 0, "trial": trial} | usual | values

    rows = [
        row(
            0,
            validation_break=200.0,
            test_break=250.0,
            validation_harmful_score=60.0,
            test_harmful_score=61.0,
        ),
        row(
            1,
            validation_break=50.0,
            test_break=75.0,
            validation_harmful_score=80.0,
            test_harmful_score=70.0,
        ),
        row(
            2,
            validation_break=10.0,
            test_break=10.0,
            validation_harmful_score=99.0,
            test_harmful_score=99.0,
            validation_finetune_accuracy=84.9,
        ),
        row(
            3,
            validation_break=60.0,
            test_break=20.0,
            validation_harmful_score=70.0,
            test_harmful_score=90.0,
        ),
    ]
    found = results.merged(
        {name: results.pd.DataFrame() for name in results.KEYS}, "searches", rows
    )
    chosen = tables.chosen_attacks(found, "full").iloc[0]
    assert (chosen["usual_break"], chosen["break"], chosen["trial"]) == (250.0, 75.0, 1)
    assert chosen["samples"] == 750
    assert chosen["harmful_score"] == 70.0
    assert tables.chosen_attacks(found, "full", budget=1).iloc[0]["break"] == 250.0
    said = tables.searches(found, "full")
    assert "| SFT | 250 | 75 | 75 | 1.0 | 1.0 | 70.0 |" in re.sub(" +", " ", said)
    assert "a random step of length 1 |" in re.sub(" +", " ", said)

    half = [{**one, "method": "lisa", "test_break": 2 * one["test_break"]} for one in rows[:2]]
    said = tables.searches(results.merged(found, "searches", half), "full")
    assert "| Lisa | 500 | 150 | 2 tried | 2.0 | 2.0 | 70.0 |" in re.sub(" +", " ", said)


def test_the_command_writes_the_table(cache: Path, tmp_path: Path) -> None:
    from benchmarks.harmful_finetuning import __main__

    words = ["attack-search", "--preset", "quick", "--seeds", "0", "--methods", "sft"]
    words += ["--budget", "1", "--workers", "1", "--score.samples", "4"]
    assert __main__.main([*words, "--cache", str(cache), "--output", str(tmp_path)]) == 0
    row = results.load(tmp_path)["searches"].iloc[0]
    assert row["attack_optimizer"] == "adamw"
    assert json.loads(row["curve"])[0][0] == 0


def test_no_budget_is_refused() -> None:
    from benchmarks.harmful_finetuning import __main__

    with pytest.raises(ValueError, match="budget is 0"):
        __main__.Search(budget=0)


def test_booster_and_the_attacker_ahead_agree_on_the_perturbed_gradient() -> None:
    """With λ = −1 left out: g(w) − (g(w) − g(w′)) is the gradient ahead, by the library itself."""
    model, other = Quadratic(), Quadratic()
    booster = Booster(model, torch.optim.SGD(model.parameters(), lr=1.0), lam=1.0, alpha=0.5)
    booster.optimizer.zero_grad()
    booster.regularize(iter([{"target": 1.0}]))
    stage = Ahead(other, torch.optim.SGD(other.parameters(), lr=1.0), alpha=0.5)
    stage.backward(iter([{"target": 1.0}]), iter(()))
    plain = Quadratic()
    plain(target=1.0).loss.backward()
    for p, q, r in zip(model.parameters(), other.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert r.grad is not None
        torch.testing.assert_close(r.grad - p.grad, q.grad)
