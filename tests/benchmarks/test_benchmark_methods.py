"""The benchmark's defenses, each against its formula computed another way.

The models are tiny and random: Llama, Gemma 2 and Qwen2, with all weights trained or with LoRA.
Their weights are float64, but transformers normalises and takes the softmax in float32, which
bounds how closely two orders of computing the same thing agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import booster_gradient

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.24 for an attribute that has been renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

peft = pytest.importorskip("peft", reason="the examples extra is absent")
transformers = pytest.importorskip("transformers", reason="the examples extra is absent")

from benchmarks.harmful_finetuning.experiments import EXPERIMENTS, points  # noqa: E402
from benchmarks.harmful_finetuning.methods import METHODS, defaults, hyperparameters  # noqa: E402
from benchmarks.harmful_finetuning.methods.booster import Booster  # noqa: E402
from benchmarks.harmful_finetuning.methods.booster_held import BoosterHeld  # noqa: E402
from benchmarks.harmful_finetuning.methods.booster_merged import BoosterMerged  # noqa: E402
from benchmarks.harmful_finetuning.methods.booster_mixture import BoosterMixture  # noqa: E402
from benchmarks.harmful_finetuning.methods.booster_vaccine import BoosterVaccine  # noqa: E402
from benchmarks.harmful_finetuning.methods.lisa import Lisa  # noqa: E402
from benchmarks.harmful_finetuning.methods.random_direction import RandomDirection  # noqa: E402
from benchmarks.harmful_finetuning.methods.repnoise import RepNoise, mmd  # noqa: E402
from benchmarks.harmful_finetuning.methods.second_order import SecondOrder  # noqa: E402
from benchmarks.harmful_finetuning.methods.sft import SFT  # noqa: E402
from benchmarks.harmful_finetuning.methods.stage import Stage  # noqa: E402
from benchmarks.harmful_finetuning.methods.vaccine import Vaccine  # noqa: E402
from benchmarks.harmful_finetuning.presets import preset  # noqa: E402
from benchmarks.harmful_finetuning.settings import Settings, changed  # noqa: E402

VOCABULARY, LAYERS, WIDTH = 23, 2, 16
ARCHITECTURES = ("llama", "gemma2", "qwen2")
STAGES = (
    *(SFT, Vaccine, RepNoise, Booster, BoosterVaccine, Lisa),
    *(RandomDirection, SecondOrder),
)

Batch = dict[str, Tensor]


def tiny(architecture: str = "llama", lora: bool = False) -> Any:
    """A random model; Gemma 2 with tied embeddings and caps that bend, as it is published."""
    torch.manual_seed(1)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attn_implementation": "eager",
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if architecture == "gemma2":
        config = transformers.Gemma2Config(
            **common, head_dim=8, final_logit_softcapping=2.0, tie_word_embeddings=True
        )
        model = transformers.Gemma2ForCausalLM(config)
    elif architecture == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
        )
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where half of the gradients vanish
            nn.init.normal_(p, std=0.3)
        elif p.ndim == 1:  # ones at the start, where to normalise twice is to normalise once
            nn.init.uniform_(p, 0.2, 1.5)
    return model.double().train()


@pytest.fixture(
    params=[(architecture, lora) for architecture in ARCHITECTURES for lora in (False, True)],
    ids=lambda case: f"{case[0]}, {'LoRA' if case[1] else 'all weights'}",
)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(*request.param)


def batch(seed: int) -> Batch:
    """Three prompts with answers of unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, end) in enumerate([(3, 7), (2, 5), (4, 6)]):
        labels[row, :prompt] = labels[row, end:] = -100
        ids[row, end:] = mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Recorded:
    """Batches 'seed 0, 1, ...' and a log of which were drawn."""

    def __init__(self, name: str, log: list[tuple[str, int]] | None = None, start: int = 0) -> None:
        self.name, self.log, self.next = name, [] if log is None else log, start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.log.append((self.name, self.next))
        self.next += 1
        return batch(self.next - 1)


def learned() -> Recorded:
    return Recorded("batches", start=0)


def auxiliary() -> Recorded:
    return Recorded("auxiliary", start=100)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model).values(), lr=0.1)


def make(stage: type[Stage], model: nn.Module, **values: float) -> Any:
    return stage(model, sgd(model), **values)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_at(model: nn.Module, params: dict[str, Tensor], batch: Batch) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return cross_entropy(functional_call(model, params, kwargs=inputs).logits, batch["labels"])


def gradient_at(model: nn.Module, params: dict[str, Tensor], batch: Batch) -> list[Tensor]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    return list(torch.autograd.grad(loss_at(model, leaves, batch), list(leaves.values())))


def gradient(model: nn.Module, batch: Batch) -> list[Tensor]:
    return gradient_at(model, dict(trained(model)), batch)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in trained(model).values()]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return norm([x - y for x, y in zip(a, b, strict=True)])


def agree(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Equal to 1e-5 of the norm, which every term of the formulas below exceeds by far."""
    assert norm(expected) > 1e-3
    return difference(actual, expected) < 1e-5 * norm(expected)


def hooks(model: nn.Module) -> int:
    """How many there are, but for those by which transformers itself records hidden states."""
    found = [h for m in model.modules() for h in m._forward_hooks.values()]
    return sum(not h.__module__.startswith("transformers") for h in found)


# ---------------------------------------------------------------------- every method


def test_the_methods_of_the_paper_and_their_defaults() -> None:
    composed = {name: (m.alignment, m.attack, m.one_adapter) for name, m in METHODS.items()}
    assert composed == {
        "sft": (SFT, SFT, False),
        "lisa": (SFT, Lisa, False),
        "repnoise": (RepNoise, SFT, False),
        "vaccine": (Vaccine, SFT, False),
        "booster": (Booster, SFT, True),
        "booster_warmed": (Booster, SFT, True),
        "booster_recommended": (Booster, SFT, True),
        "booster_merged": (BoosterMerged, SFT, False),
        "booster_mixture": (BoosterMixture, SFT, True),
        "booster_vaccine": (BoosterVaccine, SFT, True),
        "booster_lisa": (Booster, Lisa, True),
        "booster_held": (BoosterHeld, SFT, True),
        "booster_weighted": (Booster, SFT, True),
        "random_direction": (RandomDirection, SFT, True),
        "tensor_wise": (Booster, SFT, True),
        "second_order": (SecondOrder, SFT, True),
    }
    lisa = {"rho": 0.01, "alignment_steps": 100, "user_steps": 900, "steps": 2000}
    booster = {"lam": 5.0, "alpha": 0.1, "norm": "global", "warmup": 0, "delay": 0, "every": 1}
    booster |= {"trust_region": False}
    grown = {"norm": "tensor", "warmup": 500, "delay": 250}
    assert {name: hyperparameters(name, Settings()) for name in METHODS} == {
        "sft": {},
        "lisa": lisa,
        "repnoise": {"alpha": 0.1, "beta": 0.001},
        "vaccine": {"rho": 2.0},
        "booster": booster,
        "booster_warmed": booster | {"warmup": 500},
        "booster_recommended": booster | grown | {"lam": 20.0, "alpha": 0.2, "trust_region": True},
        "booster_merged": grown | {"lam": 20.0, "alpha": 0.05},
        "booster_mixture": grown | {"lam": 10.0, "alpha": 0.2, "spread": 4.0},
        "booster_vaccine": {"lam": 5.0, "alpha": 0.1, "rho": 5.0},
        "booster_lisa": booster | lisa,
        "booster_held": {"lam": 5.0, "alpha": 0.1, "every": 4},
        "booster_weighted": booster | {"every": 4},
        "random_direction": {"lam": 5.0, "alpha": 0.1},
        "tensor_wise": booster | {"norm": "tensor"},
        "second_order": {"lam": 5.0, "alpha": 0.1},
    }
    assert all(method.reference for method in METHODS.values())


@pytest.mark.parametrize(("architecture", "lora"), [("llama", False), ("gemma2", True)])
@pytest.mark.parametrize("stage_class", STAGES)
def test_backward_leaves_weights_and_hooks_and_the_loop_steps(
    stage_class: type[Stage], architecture: str, lora: bool
) -> None:
    model = tiny(architecture, lora)
    stage = make(stage_class, model, **defaults(stage_class))
    a, b = learned(), auxiliary()
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        stage.optimizer.zero_grad()
        loss = stage.backward(a, b)
        assert loss.ndim == 0
        assert not loss.requires_grad
        assert torch.isfinite(loss)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert hooks(model) == 0
        assert all(torch.isfinite(g).all() for g in grads(model))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stage.optimizer.step()
        assert any(not torch.equal(before[name], p) for name, p in trained(model).items())
    assert all(math.isfinite(value) for value in stage.diagnostics().values())


@pytest.mark.parametrize("stage_class", STAGES)
def test_gradients_already_there_are_added_to(stage_class: type[Stage]) -> None:
    model = tiny(lora=True)
    values = defaults(stage_class)
    torch.manual_seed(5)
    make(stage_class, model, **values).backward(learned(), auxiliary())
    alone = grads(model)
    there = [torch.randn_like(g) for g in alone]
    for p, g in zip(trained(model).values(), there, strict=True):
        p.grad = g.clone()
    torch.manual_seed(5)
    make(stage_class, model, **values).backward(learned(), auxiliary())
    assert agree([g - t for g, t in zip(grads(model), there, strict=True)], alone)


class Stop(Exception):  # noqa: N818 - like StopIteration, not an error
    pass


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
@pytest.mark.parametrize("stage_class", STAGES)
def test_an_exception_leaves_weights_and_hooks_as_they_were(
    stage_class: type[Stage], fails: int
) -> None:
    model = tiny()
    passes = 0

    def stop(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == fails:
            raise Stop

    model.lm_head.register_forward_pre_hook(stop)
    before = copy.deepcopy(model.state_dict())
    stage = make(stage_class, model, **defaults(stage_class))
    try:
        stage.backward(learned(), auxiliary())
    except Stop:
        pass
    else:
        assert passes < fails
    assert hooks(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def off(stage_class: type[Stage]) -> dict[str, float]:
    when = (
        "norm",
        "trust_region",
        "every",
        "warmup",
        "delay",
        "alignment_steps",
        "user_steps",
        "steps",
    )
    return {name: 0 for name in defaults(stage_class) if name not in when}


@pytest.mark.parametrize("stage_class", STAGES)
def test_without_its_term_each_method_is_sft_bit_for_bit(stage_class: type[Stage]) -> None:
    model = tiny("qwen2", lora=True)
    plain = copy.deepcopy(model)
    values = off(stage_class) | ({"alignment_steps": 0} if stage_class is Lisa else {})
    stage = stage_class(model, torch.optim.AdamW(trained(model).values(), lr=1e-2), **values)
    sft = SFT(plain, torch.optim.AdamW(trained(plain).values(), lr=1e-2))
    a, b, c = learned(), learned(), auxiliary()
    for _ in range(3):
        for each, batches in ((stage, a), (sft, b)):
            each.optimizer.zero_grad()
            each.loss = each.backward(batches, c)
            each.optimizer.step()
        assert torch.equal(stage.loss, sft.loss)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("stage_class", STAGES)
def test_its_term_makes_a_difference(stage_class: type[Stage]) -> None:
    model = tiny()
    values = defaults(stage_class)
    if stage_class is Lisa:
        values["steps"] = 0  # the proximal term from the second step on
    stage = make(stage_class, model, **values)
    a, b = learned(), auxiliary()
    stage.backward(a, b)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    stage.backward(a, b)
    drawn = b if stage_class is Lisa else a
    plain = gradient(model, batch(drawn.next - 1))
    assert stage_class is SFT or difference(grads(model), plain) > 1e-4 * norm(plain)


def test_sft_is_the_gradient_of_the_cross_entropy(model: Any) -> None:
    loss = make(SFT, model).backward(learned(), auxiliary())
    assert agree(grads(model), gradient(model, batch(0)))
    assert float(loss) == pytest.approx(loss_at(model, {}, batch(0)).item(), rel=1e-6)


# ---------------------------------------------------------------------- Vaccine


def attentions(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert len(found) == LAYERS
    return found


def attention_gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """g_l, kept by the outputs themselves in a backward pass of a copy."""
    model, outputs = copy.deepcopy(model), []

    def keep(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    for layer in attentions(model):
        layer.register_forward_hook(keep)
    loss_at(model, {}, batch).backward()
    return [out.grad for out in outputs]


def perturbation(model: nn.Module, batch: Batch, rho: float) -> list[Tensor]:
    g = attention_gradients(model, batch)
    return [rho * g_l / (norm(g) + 1e-7) for g_l in g]


def vaccine_gradient(model: nn.Module, batch: Batch, rho: float) -> tuple[list[Tensor], Tensor]:
    """∇f with a constant added inside each attention's forward, on a copy; and that f."""
    e = perturbation(model, batch, rho)
    model = copy.deepcopy(model)
    for layer, e_l in zip(attentions(model), e, strict=True):

        def forward(
            *args: Any, plain: Any = layer.forward, e_l: Tensor = e_l, **kwargs: Any
        ) -> Any:
            out, weights = plain(*args, **kwargs)
            return out + e_l.detach(), weights

        layer.forward = forward
    loss = loss_at(model, {}, batch)
    return list(torch.autograd.grad(loss, list(trained(model).values()))), loss


def test_vaccine_perturbs_by_rho_along_the_gradient(model: Any) -> None:
    e = list(make(Vaccine, model, rho=2.0).perturbation(batch(0)).values())
    assert norm(e) == pytest.approx(2.0, rel=1e-5)
    assert agree(e, perturbation(model, batch(0), 2.0))
    assert all(p.grad is None for p in model.parameters())


def test_vaccine_is_the_gradient_at_shifted_attention_outputs(model: Any) -> None:
    rho = 2.0
    expected, loss = vaccine_gradient(model, batch(0), rho)
    returned = make(Vaccine, model, rho=rho).backward(learned(), auxiliary())
    assert agree(grads(model), expected)
    assert float(returned) == pytest.approx(loss.item(), rel=1e-6)
    assert returned > loss_at(model, {}, batch(0))


def test_vaccine_reaches_layers_that_are_frozen_with_all_before_them() -> None:
    """There the attention's output carries no graph, yet it is perturbed like the others."""
    model, everything = tiny(), tiny()
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    e = list(make(Vaccine, model).perturbation(batch(0)).values())
    assert agree(e, perturbation(everything, batch(0), 2.0))


@pytest.mark.parametrize("stage_class", [Vaccine, BoosterVaccine, RepNoise])
def test_a_model_without_the_layers_is_refused(stage_class: type[Stage]) -> None:
    with pytest.raises(ValueError, match=r"Linear has no submodule called '(self_attn|mlp)'"):
        make(stage_class, nn.Linear(2, 2))


# ---------------------------------------------------------------------- RepNoise


def base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def mmd_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """By loops over pairs of rows, in the words of the definition."""
    rows = [*x, *y]
    pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    mean = sum(float((a - b).detach().square().sum()) for a, b in pairs) / len(pairs)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        d2 = (a - b).square().sum()
        return sum(torch.exp(-d2 / (mean * width)) for width in (0.25, 0.5, 1.0, 2.0, 4.0))

    def average(left: Tensor, right: Tensor) -> Tensor:
        return sum(kernel(a, b) for a in left for b in right) / (len(left) * len(right))

    return average(x, x) + average(y, y) - 2 * average(x, y)


def repnoise_terms(model: Any, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Noise and mean cross-entropy, from states recorded at the decoder's own modules."""
    decoder, head = base(model).model, base(model).lm_head
    states, activations = [], []
    handles = [
        decoder.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *[x.register_forward_hook(lambda _, __, o: states.append(o)) for x in decoder.layers],
        *[
            x.mlp.register_forward_hook(lambda _, __, o: activations.append(o))
            for x in decoder.layers
        ],
    ]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    assert (len(states), len(activations)) == (LAYERS + 1, LAYERS)

    torch.manual_seed(seed)
    noise = torch.zeros(())
    for a in activations:
        gaussian = torch.randn(a.shape, dtype=a.dtype)
        masked = [t.clone() for t in (a, gaussian)]
        for t in masked:
            t[batch["labels"] == -100] = 0.0
        noise = noise + mmd_of_rows(masked[0].flatten(1), masked[1].flatten(1)) / LAYERS

    loss = torch.zeros(())
    for h in states:
        logits = head(decoder.norm(h))
        if type(base(model)).__name__ == "Gemma2ForCausalLM":
            logits = 2.0 * torch.tanh(logits / 2.0)
        loss = loss + cross_entropy(logits, batch["labels"]) / (LAYERS + 1)
    return noise, loss


def test_repnoise_terms_are_their_definitions(model: Any) -> None:
    torch.manual_seed(3)
    terms = make(RepNoise, model).harmful_terms(batch(0))
    for term, expected in zip(terms, repnoise_terms(model, batch(0), seed=3), strict=True):
        assert term.item() == pytest.approx(expected.item(), rel=1e-6)


def test_repnoise_is_the_gradient_of_its_loss(model: Any) -> None:
    alpha, beta = 0.5, 2.0
    noise, harmful_loss = repnoise_terms(model, batch(100), seed=3)
    f = loss_at(model, {}, batch(0))
    total = f + beta * noise - alpha * torch.log(harmful_loss + 1)
    expected = torch.autograd.grad(total, list(trained(model).values()))

    torch.manual_seed(3)
    stage = make(RepNoise, model, alpha=alpha, beta=beta)
    loss = stage.backward(learned(), auxiliary())
    assert agree(grads(model), list(expected))
    assert float(loss) == pytest.approx(f.item(), rel=1e-6)
    seen = {"noise": noise.item(), "harmful_loss": harmful_loss.item()}
    assert stage.diagnostics() == pytest.approx(seen, rel=1e-6)


def test_repnoise_noise_vanishes_for_gaussian_activations() -> None:
    """The noise term is near zero where activations are the noise, and large where far from it."""
    x, y = torch.randn(200, 5), torch.randn(200, 5)
    assert 0 < mmd(x, y) < 0.1
    assert mmd(x + 3, y) > 1
    assert mmd(x, x) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------- Booster


def booster_oracle(
    model: nn.Module, lam: float, alpha: float, learned: int = 0, harmful: int = 100
) -> list[Tensor]:
    """Of two batches, by functional_call and autograd.grad on clones."""
    names = list(trained(model))

    def loss_of(seed: int) -> Any:
        return lambda values: loss_at(model, dict(zip(names, values, strict=True)), batch(seed))

    params = list(trained(model).values())
    f, h = loss_of(learned), loss_of(harmful)
    return booster_gradient(f, h, params, lam, alpha)  # type: ignore[return-value]


@pytest.mark.parametrize(("lam", "alpha"), [(5.0, 0.1), (0.7, 0.5)])
def test_booster_is_its_formula_on_one_harmful_batch(model: Any, lam: float, alpha: float) -> None:
    stage = make(Booster, model, lam=lam, alpha=alpha)
    batches, harmful = learned(), auxiliary()
    loss = stage.backward(batches, harmful)
    assert agree(grads(model), booster_oracle(model, lam, alpha))
    assert float(loss) == pytest.approx(loss_at(model, {}, batch(0)).item(), rel=1e-6)
    assert (batches.log, harmful.log) == ([("batches", 0)], [("auxiliary", 100)])

    seen = stage.diagnostics()
    h = loss_at(model, {}, batch(100)).item()
    assert seen["harmful_loss"] == pytest.approx(h, rel=1e-6)
    assert seen["harmful_grad_norm"] == pytest.approx(norm(gradient(model, batch(100))), rel=1e-5)
    assert seen["perturbation_norm"] == pytest.approx(alpha, rel=1e-5)


def test_the_mixture_steps_a_length_of_its_range_each_time(model: Any) -> None:
    stage = make(BoosterMixture, model, lam=5.0, alpha=0.1, spread=4.0)
    drawn: list[float] = []
    for _ in range(20):
        stage.optimizer.zero_grad()
        stage.backward(learned(), auxiliary())
        drawn.append(stage.diagnostics()["perturbation_norm"])
    assert 0.025 <= min(drawn) < 0.06
    assert 0.16 < max(drawn) <= 0.4 * (1 + 1e-5)
    stage.optimizer.zero_grad()
    stage.backward(learned(), auxiliary())
    assert agree(grads(model), booster_oracle(model, 5.0, stage.optimizer.alpha))


def test_booster_merged_perturbs_what_the_adapter_will_be_merged_into() -> None:
    model = tiny(lora=True)
    stage = make(BoosterMerged, model, lam=5.0, alpha=0.1)
    below = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    assert [id(p) for p in stage.optimizer.perturbed] == [id(p) for p in below]
    stage.backward(learned(), auxiliary())
    assert stage.diagnostics()["perturbation_norm"] == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="no layer with an active adapter"):
        make(BoosterMerged, tiny())


def test_booster_merged_keeps_the_step_beside_narrow_weights() -> None:
    model = tiny(lora=True).bfloat16()
    stage = make(BoosterMerged, model, lam=5.0, alpha=0.1)
    below = {p for name, p in model.named_parameters() if name.endswith("base_layer.weight")}
    assert len(stage.optimizer.perturbed) == len(below)
    assert not below & {*stage.optimizer.perturbed}


def test_booster_vaccine_is_vaccine_plus_the_regulariser(model: Any) -> None:
    lam, alpha, rho = 3.0, 0.2, 1.5
    f, loss = vaccine_gradient(model, batch(0), rho)
    with_plain_f = booster_oracle(model, lam, alpha)
    plain_f = gradient(model, batch(0))
    expected = [v + b - p for v, b, p in zip(f, with_plain_f, plain_f, strict=True)]

    stage = make(BoosterVaccine, model, lam=lam, alpha=alpha, rho=rho)
    batches, harmful = learned(), auxiliary()
    returned = stage.backward(batches, harmful)
    assert agree(grads(model), expected)
    assert float(returned) == pytest.approx(loss.item(), rel=1e-6)
    assert (batches.log, harmful.log) == ([("batches", 0)], [("auxiliary", 100)])
    assert stage.diagnostics()["perturbation_norm"] == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize(("zero", "plain"), [("lam", Vaccine), ("rho", Booster)])
def test_booster_vaccine_with_one_half_off_is_the_other(zero: str, plain: type[Stage]) -> None:
    model, values = tiny(lora=True), {"lam": 3.0, "alpha": 0.2, "rho": 1.5}
    make(BoosterVaccine, model, **(values | {zero: 0.0})).backward(learned(), auxiliary())
    combined = grads(model)
    model.zero_grad()
    values = {name: values[name] for name in defaults(plain) if name in values}
    make(plain, model, **values).backward(learned(), auxiliary())
    assert all(torch.equal(a, b) for a, b in zip(combined, grads(model), strict=True))


@pytest.mark.parametrize("held", [True, False], ids=["held", "weighted"])
def test_the_regulariser_at_every_second_step_only(held: bool) -> None:
    model, lam, alpha = tiny(lora=True), 3.0, 0.2
    kind = BoosterHeld if held else Booster
    stage = make(kind, model, lam=lam, alpha=alpha, every=2)
    batches, harmful = learned(), auxiliary()
    weight = 1.0 if held else 2.0
    for step in range(4):
        plain = gradient(model, batch(step))
        if step % 2 == 0:
            combined = booster_oracle(model, lam, alpha, step, 100 + step // 2)
            regularizer = [weight * (c - p) for c, p in zip(combined, plain, strict=True)]
        stage.optimizer.zero_grad()
        stage.backward(batches, harmful)
        now = regularizer if held or step % 2 == 0 else [torch.zeros_like(p) for p in plain]
        assert agree(grads(model), [p + r for p, r in zip(plain, now, strict=True)])
        stage.optimizer.step()
    assert harmful.next == 102


@pytest.mark.parametrize("kind", [BoosterHeld, Booster])
def test_the_regulariser_at_every_step_is_booster(kind: type[Stage]) -> None:
    model = tiny(lora=True)
    make(kind, model, every=1).backward(learned(), auxiliary())
    found = grads(model)
    model.zero_grad()
    make(Booster, model).backward(learned(), auxiliary())
    assert all(torch.equal(a, b) for a, b in zip(found, grads(model), strict=True))


def test_the_intensity_grows_over_the_warm_up() -> None:
    model, lam, alpha = tiny(lora=True), 3.0, 0.2
    stage = make(Booster, model, lam=lam, alpha=alpha, warmup=2)
    batches, harmful = learned(), auxiliary()
    for step, share in enumerate((0.0, 0.5, 1.0, 1.0)):
        expected = booster_oracle(model, share * lam, alpha, step, 100 + max(step - 1, 0))
        stage.optimizer.zero_grad()
        stage.backward(batches, harmful)
        assert agree(grads(model), expected)
        stage.optimizer.step()
    assert harmful.next == 103  # the first step has none


def test_passes_of_a_step() -> None:
    """The cost that the docstrings name, in forward passes."""
    counted = {}
    for stage_class in STAGES:
        model, passes = tiny(), []
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        stage = make(stage_class, model, **defaults(stage_class))
        stage.backward(learned(), auxiliary())
        counted[stage_class] = len(passes)
    assert counted == {
        SFT: 1,
        Vaccine: 2,
        RepNoise: 2,
        Booster: 3,
        BoosterVaccine: 4,
        Lisa: 1,
        RandomDirection: 3,
        SecondOrder: 3,
    }


# ---------------------------------------------------------------------- Lisa


@pytest.mark.parametrize(
    ("alignment_steps", "user_steps", "expected"),
    [(2, 3, "AAUUUAAUUUAA"), (1, 1, "AUAUAUAUAUAU"), (0, 3, "U" * 12), (3, 0, "A" * 12)],
)
def test_lisa_states_alternate_with_alignment_first(
    alignment_steps: int, user_steps: int, expected: str
) -> None:
    model, log = tiny(lora=True), []
    stage = make(Lisa, model, alignment_steps=alignment_steps, user_steps=user_steps)
    user, alignment = Recorded("U", log), Recorded("A", log)
    for _ in range(12):
        stage.backward(user, alignment)
    assert "".join(name for name, _ in log) == expected
    for source in (user, alignment):  # each goes on where it stopped
        drawn = [i for name, i in log if name == source.name]
        assert drawn == list(range(len(drawn)))


def test_lisa_without_steps_in_either_state_is_refused() -> None:
    with pytest.raises(ValueError, match="one state needs steps"):
        make(Lisa, tiny(), alignment_steps=0, user_steps=0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("alignment_steps", [2, 0])
def test_lisa_pulls_to_where_the_other_state_ended(lora: bool, alignment_steps: int) -> None:
    """From the first step after 10 % of 20 on, which is the fourth."""
    model, rho, log = tiny(lora=lora), 0.5, []
    stage = make(Lisa, model, rho=rho, alignment_steps=alignment_steps, user_steps=3, steps=20)
    user, alignment = Recorded("U", log), Recorded("A", log, start=100)
    ended = {"A": None, "U": None}  # the weights with which each state ended last
    start = [p.detach().clone() for p in trained(model).values()]
    for step in range(9):
        w = [p.detach().clone() for p in trained(model).values()]
        stage.optimizer.zero_grad()
        stage.backward(user, alignment)
        state, seed = log[-1]
        other = ended["U" if state == "A" else "A"] or start
        expected = gradient(model, batch(seed))
        if step > 2:
            pull = [rho * (p - o) for p, o in zip(w, other, strict=True)]
            first_of_state = (step % 5 in (0, 2)) and alignment_steps > 0  # there w is w_other
            assert first_of_state or norm(pull) > 1e-2 * norm(expected)
            expected = [g + d for g, d in zip(expected, pull, strict=True)]
        assert agree(grads(model), expected)
        stage.optimizer.step()
        ended[state] = [p.detach().clone() for p in trained(model).values()]


# ---------------------------------------------------------------------- the comparisons


def test_the_control_compares_at_boosters_hyperparameters_unless_told_otherwise() -> None:
    given = {"booster.lam": 1.0, "booster.alpha": 0.3, "tensor_wise.alpha": 0.7}
    settings = changed(preset("quick"), {"given": given})
    runs = [run for _, run in points(EXPERIMENTS["control"], settings, [0])]
    own = {"lam": 1.0, "alpha": 0.3}
    rest = {"norm": "global", "warmup": 0, "delay": 0, "every": 1, "trust_region": False}
    assert {run.method: dict(run.hyperparameters) for run in runs} == {
        "sft": {},
        "booster": own | rest,
        "random_direction": own,
        "tensor_wise": own | rest | {"alpha": 0.7, "norm": "tensor"},
        "second_order": own,
    }


def assert_diagnosed(stage: Stage, model: Any, w: Any, moved: Any, g: list[Tensor]) -> None:
    """The stage has seen h at w and at the weights it moved to, and the norm of ∇h(w)."""
    h, h_prime = (loss_at(model, at, batch(100)).item() for at in (w, moved))
    assert stage.diagnostics() == pytest.approx(
        {
            "harmful_loss": h,
            "perturbed_harmful_loss": h_prime,
            "harmful_loss_drop": h - h_prime,
            "harmful_grad_norm": norm(g),
        },
        rel=1e-4,
        abs=1e-6,
    )


@pytest.mark.parametrize("kind", [RandomDirection])
def test_a_perturbed_stage_is_its_formula_at_the_weights_it_moved_to(
    kind: type[Stage], model: Any
) -> None:
    lam, alpha, visited = 5.0, 0.1, []
    model.register_forward_pre_hook(
        lambda *_: visited.append({n: p.detach().clone() for n, p in trained(model).items()})
    )
    stage = make(kind, model, lam=lam, alpha=alpha)
    batches, harmful = learned(), auxiliary()
    loss = stage.backward(batches, harmful)
    actual, (w, moved, restored) = grads(model), visited
    moves = [moved[n] - w[n] for n in w]
    assert norm(moves) == pytest.approx(alpha, rel=2e-6)
    assert all(torch.equal(restored[n], w[n]) for n in w)

    f, g, q = (gradient_at(model, at, batch(seed)) for at, seed in ((w, 0), (w, 100), (moved, 100)))
    expected = [a + lam * (b - c) for a, b, c in zip(f, g, q, strict=True)]
    assert agree(actual, expected)
    assert difference(actual, f) > 1e-2 * norm(f)
    assert float(loss) == pytest.approx(loss_at(model, w, batch(0)).item(), rel=1e-6)
    assert (batches.log, harmful.log) == ([("batches", 0)], [("auxiliary", 100)])

    assert_diagnosed(stage, model, w, moved, g)


def test_random_direction_is_random_and_over_all_weights() -> None:
    """Each direction is new, far from the harmful gradient, and each weight moves alike."""
    model, visited = tiny(), []
    parameters = list(model.parameters())
    model.register_forward_pre_hook(
        lambda *_: visited.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    )
    stage = make(RandomDirection, model)
    for _ in range(2):
        stage.backward(learned(), auxiliary())
    one, two = visited[1] - visited[0], visited[4] - visited[3]
    harmful = nn.utils.parameters_to_vector(gradient(model, batch(100)))
    cosine = nn.functional.cosine_similarity
    bound = 5 / math.sqrt(len(one))  # five standard deviations of the cosine of random directions
    assert abs(cosine(one, two, dim=0)) < bound
    assert abs(cosine(one, harmful, dim=0)) < bound
    standardised = one / one.square().mean().sqrt()
    assert abs(standardised.mean()) < bound
    assert float(standardised.pow(4).mean()) == pytest.approx(3, abs=0.5)  # Gaussian kurtosis


@pytest.mark.parametrize("kind", [RandomDirection, SecondOrder])
def test_a_comparison_repeats_dropout_masks_as_booster_does(kind: type[Stage]) -> None:
    """With α = 0 both harmful gradients are equal only where their masks are."""
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in attentions(model):
        layer.attention_dropout = 0.5
    stage = make(kind, model, alpha=0.0)
    losses = []
    for _ in range(2):
        stage.regularize(batch(100))
        losses.append(stage.diagnostics()["harmful_loss"])
    assert norm(grads(model)) == 0
    assert losses[0] != losses[1]  # there are masks, new ones at each step


def objective(
    model: nn.Module, lam: float, alpha: float, along: list[Tensor], step: float
) -> float:
    """f + λ·(h − h(w′)) a step away from the weights, where the simulated step is another too."""
    w = {
        name: p.detach() + step * d
        for (name, p), d in zip(trained(model).items(), along, strict=True)
    }
    g = gradient_at(model, w, batch(100))
    length = alpha / (norm(g) + 1e-7)
    moved = {name: p - length * g_p for (name, p), g_p in zip(w.items(), g, strict=True)}
    with torch.no_grad():
        f, h, h_prime = (
            loss_at(model, at, batch(seed)).item() for at, seed in ((w, 0), (w, 100), (moved, 100))
        )
    return f + lam * (h - h_prime)


def slope(model: nn.Module, lam: float, alpha: float, along: list[Tensor]) -> float:
    """Derivative of the objective, by central differences extrapolated to a step of zero."""
    near, far = (
        (objective(model, lam, alpha, along, t) - objective(model, lam, alpha, along, -t)) / (2 * t)
        for t in (0.001, 0.002)
    )
    return (4 * near - far) / 3


def unit(tensors: list[Tensor]) -> list[Tensor]:
    return [t / norm(tensors) for t in tensors]


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def test_second_order_is_the_gradient_of_the_objective(model: Any) -> None:
    """Along random directions, and along that in which it differs most from the straight-through.

    The loss is rounded to float32, which the steps of the differences are wide enough for.
    """
    lam, alpha = 5.0, 0.05
    batches, harmful = learned(), auxiliary()
    versions = [p._version for p in model.parameters()]
    stage = make(SecondOrder, model, lam=lam, alpha=alpha)
    loss = stage.backward(batches, harmful)
    assert versions == [p._version for p in model.parameters()]  # nothing is written in place
    exact, straight_through = grads(model), booster_oracle(model, lam, alpha)
    apart = [a - b for a, b in zip(exact, straight_through, strict=True)]
    assert norm(apart) > 0.05 * norm(exact)
    torch.manual_seed(7)
    random = [[torch.randn_like(g) for g in exact] for _ in range(3)]
    for along in map(unit, [apart, *random]):
        expected = slope(model, lam, alpha, along)
        assert dot(exact, along) == pytest.approx(expected, abs=5e-3 * norm(apart))
    assert float(loss) == pytest.approx(loss_at(model, {}, batch(0)).item(), rel=1e-6)
    assert (batches.log, harmful.log) == ([("batches", 0)], [("auxiliary", 100)])

    w, g = dict(trained(model)), gradient(model, batch(100))
    moved = {n: p - alpha * d for (n, p), d in zip(w.items(), unit(g), strict=True)}
    assert_diagnosed(stage, model, w, moved, g)


def test_second_order_differs_from_booster_by_the_square_of_alpha(model: Any) -> None:
    """Hence both regularisers agree to first order in α."""

    def regularizer(kind: type[Stage], alpha: float) -> list[Tensor]:
        model.zero_grad()
        make(kind, model, lam=1.0, alpha=alpha).backward(learned(), auxiliary())
        return [g - f for g, f in zip(grads(model), gradient(model, batch(0)), strict=True)]

    of_booster, apart = [], []
    for alpha in (0.004, 0.002):
        straight_through = regularizer(Booster, alpha)
        of_booster.append(norm(straight_through))
        apart.append(difference(regularizer(SecondOrder, alpha), straight_through))
    assert apart[0] / apart[1] == pytest.approx(4, rel=0.1)
    assert of_booster[0] / of_booster[1] == pytest.approx(2, rel=0.1)


class Quadratic(nn.Module):
    """½·wᵀAw + bᵀw."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return SimpleNamespace(loss=self.w @ a @ self.w / 2 + b @ self.w)


@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=["", "gradient as small as the ε of 1e-7"])
@pytest.mark.parametrize("curved", [1.0, 0.0], ids=["curved", "linear"])
def test_second_order_of_a_quadratic(curved: float, scale: float) -> None:
    """By the Jacobian of the simulated step, written out. A linear h leaves no regulariser."""
    lam, alpha, model = 5.0, 0.3, Quadratic()
    a = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 3.0]], dtype=torch.float64)
    a, b = curved * scale * a, scale * torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    w = model.w.detach()
    g = a @ w + b
    n, eps = g.norm(), 1e-7
    jacobian = a / (n + eps) - torch.outer(g, a @ g) / (n * (n + eps) ** 2)
    q = a @ (w - alpha * g / (n + eps)) + b
    expected = lam * (g - q + alpha * jacobian.T @ q)

    make(SecondOrder, model, lam=lam, alpha=alpha).regularize({"a": a, "b": b})
    assert norm([grads(model)[0] - expected]) < 1e-12 * scale
    straight_through = lam * (g - q)
    assert (norm([expected - straight_through]) > 0.1 * scale) == bool(curved)
    assert (norm([straight_through]) > 0.1 * scale) == bool(curved)


def test_second_order_without_a_gradient_is_no_regulariser() -> None:
    """At a flat point the norm has no derivative."""
    model, zeros = Quadratic(), torch.zeros(3, 3, dtype=torch.float64)
    make(SecondOrder, model).regularize({"a": zeros, "b": zeros[0]})
    assert norm(grads(model)) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_second_order_through_the_attention_of_torch(lora: bool) -> None:
    """Its fused kernels have no second derivative; eager attention has."""
    model = tiny(lora=lora)
    make(SecondOrder, model).backward(learned(), auxiliary())
    eager = grads(model)
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    make(SecondOrder, model).backward(learned(), auxiliary())
    assert difference(grads(model), eager) < 1e-4 * norm(eager)
