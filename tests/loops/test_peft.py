"""Adapters of PEFT: they alone are perturbed, get the formula's gradient and move."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.interrupts import InterruptAt
from tests.tiny_llama import (
    ALIGNMENT,
    ALPHA,
    HARMFUL,
    SEED,
    assert_close,
    boosted,
    check_step,
    closure,
    distance,
    formula,
    step,
    tiny_llama,
    trainable,
)

peft = pytest.importorskip("peft", reason="PEFT is not installed")

from torch_booster.integrations.peft import MergedOffsets, merged_weights  # noqa: E402

pytestmark = [
    # peft asks models for a property that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "lora_on_embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "modules_to_save": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
}
MERGEABLE = [name for name in ADAPTERS if name != "prompt_tuning"]


def adapted(name: str = "lora") -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_llama(), ADAPTERS[name]).train()


def random_lora(**changes: Any) -> Any:
    """LoRA whose B is not zero, as it is after some training."""
    return peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **changes)


def snapshot(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in params.items()}


def moved(params: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in params.items() if not torch.equal(p, before[n])}


def in_both_passes(
    model: Any, optimizer: Any, weights: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """What the weights are in each harmful pass of one regulariser."""
    seen: list[dict[str, Tensor]] = []

    def harmful() -> Tensor:
        seen.append(snapshot(weights))
        return closure(model, HARMFUL)()

    optimizer.zero_grad()
    optimizer.regularize(harmful)
    return seen


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    result = model(input_ids=HARMFUL).logits
    model.train()
    return result


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradient_is_the_formulas(name: str) -> None:
    model = adapted(name)
    optimizer = boosted(trainable(model).values())
    everything = dict(model.named_parameters())
    before = snapshot(everything)
    for _ in range(2):
        check_step(model, optimizer)

    wanted = formula(model)
    torch.manual_seed(SEED)
    optimizer.zero_grad()
    optimizer.step(closure(model, ALIGNMENT), closure(model, HARMFUL))
    assert_close({n: p.grad for n, p in trainable(model).items()}, wanted)
    assert moved(everything, before) == trainable(model).keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_perturbation_reaches_the_adapter_alone(name: str) -> None:
    model = adapted(name)
    everything = dict(model.named_parameters())
    optimizer = boosted(everything.values())  # the frozen base among them
    step(model, optimizer)  # LoRA's A has no gradient before B has moved
    before = snapshot(everything)
    at_w, at_w_prime = in_both_passes(model, optimizer, everything)
    assert moved(at_w, before) == set()
    assert moved(at_w_prime, before) == trainable(model).keys()
    assert moved(everything, before) == set()
    length = sum(float((at_w_prime[n] - w).square().sum()) for n, w in before.items()) ** 0.5
    assert length == pytest.approx(ALPHA, rel=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "lora_on_embedding", "modules_to_save"])
def test_the_weights_of_a_merged_adapter_are_perturbed(name: str) -> None:
    """What `merged_weights` finds is what merging changes, and what the simulated step moves."""
    model = adapted(name)
    torch.manual_seed(2)
    for p in trainable(model).values():  # a fresh adapter changes nothing
        p.data += 0.1 * torch.randn_like(p)
    weights = {n: p for n, p in model.named_parameters() if "modules_to_save" not in n}
    optimizer = boosted(trainable(model).values(), perturbed=merged_weights(model))
    before = snapshot(weights)
    changed = moved(in_both_passes(model, optimizer, weights)[-1], before)
    assert moved(weights, before) == set()
    model.merge_adapter()
    assert changed == moved(weights, before) != set()


def test_only_layers_of_the_active_adapter_are_merged() -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    names = {p: n for n, p in model.named_parameters()}
    for adapter, target in (("default", "q_proj"), ("two", "v_proj")):
        model.set_adapter(adapter)
        assert all(f"{target}.base_layer" in names[p] for p in merged_weights(model))


def test_what_can_not_be_told_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into Linear already"):
        merged_weights(model)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    model = peft.get_peft_model(attention, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="adapts a MultiheadAttention"):
        merged_weights(model)


def test_a_model_without_an_adapter_has_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="no layer with an active adapter"):
        merged_weights(tiny_llama())


# ---------------------------------------------------- the step beside the merged weights


def regularizer(model: Any, perturbed: Any, **changes: Any) -> dict[str, Tensor | None]:
    optimizer = boosted(trainable(model).values(), perturbed=perturbed, **changes)
    optimizer.zero_grad()
    optimizer.regularize(closure(model, HARMFUL))
    found = {n: None if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize("norm", ["global", "tensor"])
@pytest.mark.parametrize(
    "targets", [TARGETS, ["q_proj", "embed_tokens"]], ids=["linear", "embedding"]
)
def test_a_step_beside_the_merged_weights_is_the_step_in_them(targets: Any, norm: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config).train()
    wanted = regularizer(model, merged_weights(model), norm=norm)
    plain = regularizer(model, None, norm=norm)
    before = snapshot(dict(model.named_parameters()))
    offsets = MergedOffsets(model)
    assert_close(regularizer(model, offsets, norm=norm), wanted, tolerance=1e-5)
    assert distance(wanted, plain) > 1e-3
    assert moved(dict(model.named_parameters()), before) == set()
    assert not any(d.any() or d.requires_grad for d in offsets)


def test_a_step_beside_the_merged_weights_of_gpt2() -> None:
    """Its linear layers keep their weights the other way round."""
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(config)
    lora = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(gpt2, lora).eval()
    wanted = regularizer(model, merged_weights(model))
    assert_close(regularizer(model, MergedOffsets(model)), wanted, tolerance=1e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_what_autocast_leaves_of_a_step_in_the_merged_weights(base: torch.dtype) -> None:
    """Weights of a bfloat16 checkpoint; a step so short that most of it is below their digits."""
    model = peft.get_peft_model(tiny_llama().bfloat16().to(base), random_lora()).train()

    def harmful() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=HARMFUL, labels=HARMFUL).loss
        loss.backward()
        return loss

    def arriving(perturbed: Any) -> float:
        optimizer = boosted(trainable(model).values(), perturbed=perturbed, self_check=False)
        optimizer.alpha = 0.001
        optimizer.zero_grad()
        optimizer.regularize(harmful)
        return optimizer.read_diagnostics()["drop_ratio"]

    assert arriving(MergedOffsets(model)) > 0.5
    assert arriving(merged_weights(model)) < 0.1


def test_the_passes_in_between_know_nothing_of_the_offsets() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    offsets = MergedOffsets(model)
    optimizer = boosted(trainable(model).values(), perturbed=offsets)
    hooks = [m._forward_hooks for m in model.modules()]
    before = logits(model)

    def fails() -> Tensor:
        assert sum(map(len, hooks)) == len([*offsets])
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            optimizer.regularize(fails)
        assert not any(hooks)
    optimizer.regularize(closure(model, HARMFUL))
    assert not any(hooks)
    assert torch.equal(logits(model), before)


def test_a_reference_model_does_not_move_with_the_step() -> None:
    """As DPO's, which is the same model with its adapters disabled, or with others active."""
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    model.add_adapter("reference", random_lora())
    offsets = MergedOffsets(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = logits(model)
        model.set_adapter("reference")
        other = logits(model)
        model.set_adapter("default")
        own = logits(model)
        for offset in offsets:
            offset.fill_(0.1)
        with offsets:
            with model.disable_adapter():
                assert torch.equal(logits(model), base)
            model.set_adapter("reference")
            assert torch.equal(logits(model), other)
            model.set_adapter("default")
            assert not torch.allclose(logits(model), own)
        assert torch.equal(logits(model), own)


def test_offsets_stay_with_the_optimizer_that_enters_them() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    offsets = MergedOffsets(model)
    optimizer = boosted(trainable(model).values(), perturbed=offsets)
    wanted = regularizer(model, offsets)
    assert optimizer.perturbed is offsets
    optimizer.perturbed, kept = None, optimizer.perturbed
    optimizer.perturbed = kept
    optimizer.regularize(closure(model, HARMFUL))
    assert_close({n: p.grad for n, p in trainable(model).items()}, wanted)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="entered twice"), offsets:
        optimizer.regularize(closure(model, HARMFUL))
    assert not any(m._forward_hooks for m in model.modules())


class InterruptEntering(InterruptAt):
    """Interrupts at the k-th such point within the code that enters and leaves offsets."""

    def _point(self, frame: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.name == "peft.py" and name in ("__enter__", "__exit__", "_hooks", "_unhook"):
            super()._point(frame)


def test_an_interruption_around_offsets_leaves_the_next_step_right() -> None:
    """Of what it may leave hooked, the next regulariser knows."""
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    offsets = MergedOffsets(model)
    optimizer = boosted(trainable(model).values(), perturbed=offsets, self_check=False)
    wanted = regularizer(model, offsets)
    with InterruptEntering(None) as counting:
        optimizer.regularize(closure(model, HARMFUL))
    assert counting.count > 10
    for k in range(counting.count):
        optimizer.zero_grad()
        with pytest.raises(KeyboardInterrupt), InterruptEntering(k):
            optimizer.regularize(closure(model, HARMFUL))
        torch.set_grad_enabled(True)
        optimizer.zero_grad()
        optimizer.regularize(closure(model, HARMFUL))
        assert_close({n: p.grad for n, p in trainable(model).items()}, wanted)
        assert not any(m._forward_hooks for m in model.modules())


def test_offsets_come_before_the_hooks_of_others() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    layer.register_forward_hook(lambda module, args, y: 4 * y)
    wanted = regularizer(model, merged_weights(model))
    assert_close(regularizer(model, MergedOffsets(model)), wanted, tolerance=1e-5)
    assert len(layer._forward_hooks) == 1


def test_a_patched_layer_is_refused() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="A Linear that LoRA adapts has a forward of its own"):
        MergedOffsets(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_norm_in_bfloat16_is_refused_under_autocast_on_a_cpu(dtype: torch.dtype) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = peft.get_peft_model(layers.to(dtype), config)

    def harmful() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.ones(3, 4, dtype=dtype)).float().square().mean()
        loss.backward()
        return loss

    optimizer = boosted(trainable(model).values(), perturbed=MergedOffsets(model))
    if dtype is torch.float32:
        optimizer.regularize(harmful)
        return
    with pytest.raises(RuntimeError, match="Load the base in float32"):
        optimizer.regularize(harmful)
    assert not any(m._forward_hooks for m in model.modules())


def test_offsets_in_a_list_are_told_to_be_out_of_reach() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora()).train()
    adapter = trainable(model).values()
    optimizer = boosted(adapter, perturbed=[*MergedOffsets(model), *adapter])
    with pytest.warns(UserWarning, match="MergedOffsets do nothing in a list: pass it alone"):
        optimizer.regularize(closure(model, HARMFUL))


def test_weights_that_serve_two_layers_have_no_offsets() -> None:
    tied = tiny_llama()
    tied.lm_head.weight = tied.get_input_embeddings().weight
    lora = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    model = peft.get_peft_model(tied, lora)
    with pytest.raises(ValueError, match="also serves another layer"):
        MergedOffsets(model)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 4 * self.weight)


@pytest.mark.parametrize(
    "layer", [Scaled(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4, scale_grad_by_freq=True)]
)
def test_layers_that_are_not_known_have_no_offsets(layer: nn.Module) -> None:
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="it is not known how its output depends"):
        MergedOffsets(model)


def test_a_dora_that_is_not_active_is_no_obstacle() -> None:
    model = peft.get_peft_model(tiny_llama(), random_lora())
    model.add_adapter("other", random_lora(use_dora=True))
    assert len(MergedOffsets(model)) == 2 * len(TARGETS)


def test_passes_that_are_narrow_throughout_are_told() -> None:
    model = peft.get_peft_model(
        tiny_llama().bfloat16(), random_lora(), autocast_adapter_dtype=False
    )
    optimizer = boosted(trainable(model).values(), perturbed=MergedOffsets(model), self_check=False)
    with pytest.warns(UserWarning, match="half of the simulated step is rounded away"):
        optimizer.regularize(closure(model, HARMFUL))
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        optimizer.regularize(closure(model, HARMFUL))


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_adapters_that_do_more_than_add_have_no_offsets(name: str) -> None:
    with pytest.raises(ValueError, match="none of plain LoRA"):
        MergedOffsets(adapted(name))


def test_offsets_of_merged_adapters_are_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into Linear already"):
        MergedOffsets(model)
    with pytest.raises(ValueError, match="no layer with an active adapter"):
        MergedOffsets(tiny_llama())


def test_bfloat16_base_rounds_nothing_away() -> None:
    """The advice of the rounding warning: PEFT keeps adapters in float32, so there is none."""
    model = peft.get_peft_model(tiny_llama().bfloat16(), random_lora()).train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    optimizer = boosted(trainable(model).values())
    step(model, optimizer)
    assert optimizer.diagnostics is not None
    assert optimizer.diagnostics.perturbation_norm.item() == pytest.approx(ALPHA, rel=1e-4)


# ---------------------------------------------------------------------- dropout


def dropout_model() -> Any:
    return peft.get_peft_model(tiny_llama(), random_lora(lora_dropout=0.3)).train()


def test_formula_under_lora_dropout() -> None:
    model = dropout_model()
    optimizer = boosted(trainable(model).values())
    for _ in range(2):
        check_step(model, optimizer)


@pytest.mark.parametrize("replay", [True, False])
def test_no_perturbation_leaves_nothing_but_mask_noise(replay: bool) -> None:
    """At α = 0 the two harmful passes differ by their masks alone: not at all when replayed."""
    model = dropout_model()
    optimizer = boosted(trainable(model).values(), replay_rng=replay, self_check=replay)
    optimizer.alpha = 0.0
    optimizer.regularize(closure(model, HARMFUL))
    regularizer = torch.cat([p.grad.flatten() for p in trainable(model).values()])
    assert optimizer.diagnostics is not None
    assert (optimizer.diagnostics.harmful_loss_drop.item() == 0) == replay
    assert (regularizer.abs().max().item() == 0) == replay


# ---------------------------------------------------------------------- several adapters


def two_adapters() -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), random_lora(), adapter_name="first")
    model.add_adapter("second", random_lora())
    return model.train()


def of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unreached"])
def test_only_the_active_adapter_takes_part(frozen: bool) -> None:
    """The optimizer holds both; its decay and its momentum keep off the one that waits.

    PEFT freezes it. Where it is unfrozen by hand, the loss does not reach it.
    """
    model, twin = two_adapters(), two_adapters()
    first, second = of(model, "first"), of(model, "second")
    optimizer = boosted([*first.values(), *second.values()])
    plain = torch.optim.AdamW(
        [*of(twin, "first").values(), *of(twin, "second").values()], lr=1e-2, weight_decay=0.1
    )
    for active, waiting in [(first, second), (first, second), (second, first), (first, second)]:
        for m in (model, twin):
            m.set_adapter("first" if active is first else "second")
            if not frozen:
                m.requires_grad_(False)
                for p in (*of(m, "first").values(), *of(m, "second").values()):
                    p.requires_grad_()
        before = snapshot(waiting)
        grads = check_step(model, optimizer)
        assert {n for n, g in grads.items() if g is not None} == active.keys()
        assert all(p.grad is None for p in waiting.values())
        assert moved(waiting, before) == set()

        # The bare optimizer, given these gradients, does the same bit for bit.
        for n, p in twin.named_parameters():
            p.grad = grads.get(n)
        plain.step()
        both = dict(twin.named_parameters())
        assert all(torch.equal(p, both[n]) for n, p in model.named_parameters())
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0, 1.0}


def test_waiting_adapter_with_zeroed_gradients_decays_as_without_booster() -> None:
    """With `zero_grad(set_to_none=False)` AdamW moves it, Booster or not; that is torch's rule."""
    model, twin = two_adapters(), two_adapters()
    optimizer = boosted([*of(model, "first").values(), *of(model, "second").values()])
    plain = torch.optim.AdamW(
        [*of(twin, "first").values(), *of(twin, "second").values()], lr=1e-2, weight_decay=0.1
    )
    for active in ("first", "second"):
        model.set_adapter(active)
        optimizer.zero_grad(set_to_none=False)
        before = snapshot(of(model, "first"))
        optimizer.step(closure(model, ALIGNMENT), closure(model, HARMFUL))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        plain.step()
        both = dict(twin.named_parameters())
        assert all(torch.equal(p, both[n]) for n, p in model.named_parameters())
        assert moved(of(model, "first"), before) == of(model, "first").keys()


def test_two_active_adapters() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    optimizer = boosted(trainable(model).values())
    grads = check_step(model, optimizer)
    assert grads.keys() == of(model, "first").keys() | of(model, "second").keys()
    assert all(g is not None for g in grads.values())


# ---------------------------------------------------------------------- merge, save, load


@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_after_training(name: str) -> None:
    model = adapted(name)
    untrained = logits(model)
    optimizer = boosted(trainable(model).values())
    for _ in range(3):
        step(model, optimizer)
    trained = logits(model)
    merged = model.merge_and_unload()
    assert not any("lora_" in n or "ia3_" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert (trained - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_goes_on_from_a_saved_adapter(tmp_path: Path, name: str) -> None:
    model = adapted(name)
    optimizer = boosted(trainable(model).values())
    for _ in range(2):
        step(model, optimizer)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    loaded = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path, is_trainable=name in MERGEABLE
    ).train()
    for n in trainable(model):  # PEFT loads virtual tokens frozen and refuses to do otherwise
        loaded.get_parameter(n).requires_grad_()
    assert torch.equal(logits(loaded), logits(model))
    resumed = boosted(trainable(loaded).values())
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for _ in range(2):
        unbroken, again = step(model, optimizer), step(loaded, resumed)
        assert unbroken.keys() == again.keys()
        assert distance(unbroken, again) == 0
    assert torch.equal(logits(loaded), logits(model))
