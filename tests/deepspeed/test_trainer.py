"""The Trainer and Accelerate under DeepSpeed on two processes equal the formula on one process."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.deepspeed.runs import (
    LR,
    WORLD,
    Run,
    Values,
    batch,
    booster_on,
    config,
    difference,
    harmful_closure,
    launch,
    loss_on,
    noise,
    oracle,
    param_groups,
    values,
)
from tests.multi_process import run_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make test-deepspeed",
)

STAGES = (0, 1, 2, 3)
PER_RANK = 8 // WORLD


class Task(nn.Module):
    """A net that returns its loss, as the Trainer's models do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor, harmful: Tensor) -> dict[str, Tensor]:
        out = self.net(x, bool(harmful[0]))
        return {"loss": nn.functional.mse_loss(out.float(), y.float())}


def rows(run: Run, harmful: bool) -> list[dict[str, Tensor]]:
    """The batches of `runs.batch` one after the other; a rank's part is one batch of the loader."""
    micros = 1 if harmful else run.accumulation
    pairs = [batch(step, k, harmful) for step in range(run.steps) for k in range(micros)]
    flag = torch.tensor(harmful)
    return [
        {"x": x.float(), "y": y.float(), "harmful": flag}
        for xs, ys in pairs
        for x, y in zip(xs, ys, strict=True)
    ]


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([x[key] for x in examples]) for key in examples[0]}


def on_a_cpu() -> None:
    """Accelerate takes DeepSpeed beside a GPU only, and low precision is refused without one."""
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]
    training_args.is_torch_bf16_gpu_available = lambda: True
    deepspeed.get_accelerator().is_fp16_supported = lambda: True


def surroundings(rank: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}.items():
        os.environ[name] = str(value)
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # an Accelerator leaves it behind
    on_a_cpu()


def kinds() -> tuple[type[Any], type[Any]]:
    """A trainer whose batches and whose optimizer are those of the oracle, and the same by us."""
    from torch_booster.integrations.transformers import BoosterMixin

    class Plain(Trainer):
        run: Run

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def create_optimizer(self, *_: Any) -> Any:
            if self.optimizer is None:  # else it is in DeepSpeed's configuration
                groups = param_groups(self.run, self.model.net)  # type: ignore[union-attr, arg-type]
                self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
            return self.optimizer

    class Ours(BoosterMixin, Plain):
        def _next_harmful_batch(self, turn: int) -> Any:
            self.turns.append(turn)
            return super()._next_harmful_batch(turn)

        turns: list[int]

        def get_harmful_dataloader(self) -> Any:
            return DataLoader(self._harmful_dataset, PER_RANK, collate_fn=collate)

    return Plain, Ours


def trainer(
    run: Run,
    rank: int,
    folder: str,
    booster: bool = True,
    optimizers: tuple[Any, Any] = (None, None),
    **changes: Any,
) -> Any:
    surroundings(rank)
    from torch_booster.integrations.transformers import BoosterArguments

    given = config(run) | {"train_batch_size": "auto", "gradient_clipping": "auto"}
    args = TrainingArguments(
        folder,
        deepspeed=given,
        per_device_train_batch_size=PER_RANK,
        gradient_accumulation_steps=run.accumulation,
        max_grad_norm=run.clip,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        bf16=run.dtype == "bfloat16",
        fp16=run.dtype == "float16",
        **{
            "max_steps": run.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "log_level": "error",
            **changes,
        },
    )
    plain, ours = kinds()
    kind = ours if booster else plain
    kind.run, kind.turns = run, []
    told = BoosterArguments(run.lam, run.alpha, lam_warmup_steps=run.warmup, norm=run.norm)  # type: ignore[arg-type]
    more = {"harmful_dataset": rows(run, True), "booster_args": told} if booster else {}
    made = kind(
        model=Task(run.net()),
        args=args,
        train_dataset=rows(run, False),
        data_collator=collate,
        optimizers=optimizers,
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


def weights(made: Any) -> Values:
    """Those of the net, after which the engine is given up."""
    found = values(made.accelerator.deepspeed_engine_wrapped.engine)
    made.accelerator.free_memory()
    return {name.removeprefix("net."): x for name, x in found.items()}


def trained(run: Run, rank: int, folder: str, booster: bool = True, **changes: Any) -> Any:
    made = trainer(run, rank, folder, booster, **changes)
    made.train()
    return made


def is_the_formula(name: str, run: Run, rank: int, found: Values) -> None:
    if rank == 0:
        expected = oracle(run)
        off, own = difference(found, expected), noise(run)
        effect = difference(oracle(run, booster=False), expected)
        print(f"trainer {name}: off {off:.2e}, noise {own:.2e}, effect {effect:.1e}")
        assert off <= 2 * own, f"{off} off, where float32 alone is {own}"
        assert effect > 1e4 * off


def the_trainer_follows_the_formula(name: str, run: Run, folder: str, rank: int) -> None:
    is_the_formula(name, run, rank, weights(trained(run, rank, folder)))


def exact() -> dict[str, Run]:
    made: dict[str, Run] = {}
    for stage in STAGES:
        run = Run(stage=stage)
        made[f"{stage}"] = run
        made[f"{stage}-accumulated-clipped"] = replace(run, accumulation=2, clip=1.0)
        many = replace(run, accumulation=2, groups=True, norm="tensor", warmup=4)
        made[f"{stage}-groups-tensor-warmup"] = many
        configured = {"optimizer": {"type": "AdamW", "params": ADAMW}}
        made[f"{stage}-configured"] = replace(run, more=configured)
        if stage:
            made[f"{stage}-offload"] = replace(run, accumulation=2, clip=1.0, offload=True)
    return made


# As `runs.oracle` has it; in an optimizer that DeepSpeed makes, and that is torch's.
ADAMW = {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}


def the_trainer_follows_in_low_precision(name: str, run: Run, folder: str, rank: int) -> None:
    """The bounds are those of `test_deepspeed`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rounding to")
        found = weights(trained(run, rank, folder))
    if rank == 0:
        expected = oracle(run)
        off, effect = difference(found, expected), difference(oracle(run, booster=False), expected)
        print(f"trainer {name}: off {off:.2e}, effect {effect:.1e}")
        assert off <= (0.4 if run.dtype == "bfloat16" else 0.02) * effect


def an_overflow_is_not_counted(stage: int, folder: str, rank: int) -> None:
    """The harmful batch of a step that fp16 has skipped is that of the next."""
    more = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    run = Run(stage=stage, dtype="float16", steps=14, more=more)
    made = trained(run, rank, folder)
    engine, booster = made.model_wrapped, made.accelerator.deepspeed_engine_wrapped
    assert 0 < engine.skipped_steps < run.steps
    taken = run.steps - engine.skipped_steps
    assert booster.step_count == taken
    assert made.turns == [0] * engine.skipped_steps + list(range(taken))
    assert len(recorded(made, "harmful_loss")) == taken
    assert all(x.isfinite().all() for x in weights(made).values())


def harmful_passes_leave_nothing_behind(stage: int, folder: str, rank: int) -> None:
    """λ = 0, and a λ of which float32 leaves 0 but whose passes are run, are the plain Trainer."""
    run = Run(stage=stage, accumulation=2, clip=1.0)
    plain = trained(run, rank, folder, booster=False)
    records, bare = recorded(plain, "loss", "grad_norm"), weights(plain)
    assert len(records) == run.steps
    for lam in (0.0, 1e-60):
        made = trained(replace(run, lam=lam), rank, folder)
        assert recorded(made, "loss", "grad_norm") == records
        assert len(recorded(made, "harmful_loss")) == (run.steps if lam else 0)
        found = weights(made)
        assert all(torch.equal(found[n], bare[n]) for n in bare), f"λ = {lam}"


def recorded(made: Any, *keys: str) -> list[list[float | None]]:
    """What the trainer has recorded of its steps."""
    return [[x.get(key) for key in keys] for x in made.state.log_history if keys[0] in x]


def a_resumed_run_goes_on(stage: int, folder: str, rank: int) -> None:
    run = Run(stage=stage, accumulation=2, clip=1.0, warmup=5)
    folder, keys = f"{folder}/{stage}", ("loss", "grad_norm")
    made = trained(run, rank, folder, save_strategy="steps", save_steps=3)
    records, unbroken = recorded(made, *keys), weights(made)
    checkpoint = f"{folder}/checkpoint-3"
    made = trainer(run, rank, folder)
    made.train(resume_from_checkpoint=checkpoint)
    assert made.accelerator.deepspeed_engine_wrapped.step_count == run.steps
    assert recorded(made, *keys) == records
    found = weights(made)
    assert all(torch.equal(found[n], unbroken[n]) for n in unbroken)

    other = trainer(replace(run, lam=1.0, warmup=0), rank, folder)
    with pytest.warns(UserWarning, match=r"lam=1\.0 \(5\.0\), lam_warmup_steps=0 \(5\)"):
        other.train(resume_from_checkpoint=checkpoint)
    assert other.accelerator.deepspeed_engine_wrapped.lam == 1.0
    found = weights(other)
    assert any(not torch.equal(found[n], unbroken[n]) for n in unbroken)


def the_records_are_of_the_whole_batch(stage: int, folder: str, rank: int) -> None:
    """As a plain loop's `BoosterEngine` reads them, of which another test says what they are."""
    run = Run(stage=stage, accumulation=2)
    made = trained(run, rank, folder)
    keys = ("harmful_loss", "harmful_loss_drop", "perturbation_norm", "drop_ratio")
    records = recorded(made, *keys)
    weights(made)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    expected: list[list[float]] = []
    for step in range(run.steps):
        for micro in range(run.accumulation):
            booster.regularize(harmful_closure(engine, rank, step))
            if not micro:
                read = booster.read_diagnostics()
                expected.append([read[key] for key in keys])
            engine.backward(loss_on(engine, rank, step, micro, False))
            booster.step()
    engine.destroy()
    for record, wanted in zip(records, expected, strict=True):
        assert record == pytest.approx(wanted, rel=1e-4)


def arguments_are_followed_between_steps(stage: int, folder: str, rank: int) -> None:
    """λ set between two micro-batches counts from the next step on, and none is left out."""
    run = Run(stage=stage, accumulation=2)

    class Late(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            made.booster_args.lam = run.lam if state.global_step == 2 else made.booster_args.lam

    made = trainer(replace(run, lam=0.0), rank, folder)
    made.add_callback(Late())
    made.train()
    assert [x.get("harmful_loss", 0.0) > 0 for x in made.state.log_history[:-1]] == [
        step > 2 for step in range(run.steps)
    ]
    assert made.accelerator.deepspeed_engine_wrapped.lam == run.lam
    weights(made)


def accelerates_loop_follows_the_formula(name: str, run: Run, rank: int) -> None:
    surroundings(rank)
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from torch_booster.integrations.accelerate import AcceleratedEngine

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = DeepSpeedPlugin(hf_ds_config=config(run))
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=run.accumulation)
    model = run.net()
    optimizer = torch.optim.AdamW(param_groups(run, model), lr=LR, weight_decay=0.1)
    engine, optimizer = accelerator.prepare(model, optimizer)
    booster = AcceleratedEngine(accelerator, run.lam, run.alpha, norm=run.norm)  # type: ignore[arg-type]

    def backward(step: int, micro: int, harmful: bool) -> Tensor:
        loss = loss_on(engine, rank, step, micro, harmful)
        accelerator.backward(loss)
        return loss

    seen: list[bool] = []
    for step in range(run.steps):
        for micro in range(run.accumulation):
            with accelerator.accumulate(engine):
                seen.append(booster.regularize(partial(backward, step, 0, True)) is not None)
                backward(step, micro, False)
                optimizer.step()
                optimizer.zero_grad()
    assert seen == ([True] + [False] * (run.accumulation - 1)) * run.steps
    assert booster.step_count == run.steps
    found = values(engine)
    accelerator.free_memory()
    is_the_formula(f"accelerate {name}", run, rank, found)


def a_language_model_trains_as_under_ddp(kind: str, folder: str, rank: int) -> None:
    """Of unequal lengths, whose tokens are counted; loaded, on stage 3, into partitions."""
    surroundings(rank)
    from tests.loops.test_transformers import tiny_llama

    saved = f"{folder}/llama"
    if rank == 0:
        tiny_llama(dropout=0.0).save_pretrained(saved)
    torch.distributed.barrier()

    def run(booster: bool = True, **engine: Any) -> Values:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        made = LANGUAGE_MODELS[kind](saved, {**SETTINGS, **engine}, 3.0 * booster)
        made.remove_callback(PrinterCallback)
        made.train()
        if engine.get("use_cpu"):
            held = made.model.named_parameters()
            return {n: p.detach().double() for n, p in held if p.requires_grad}
        found = values(made.accelerator.deepspeed_engine_wrapped.engine)
        made.accelerator.free_memory()
        return found

    expected, plain = run(use_cpu=True), run(booster=False, use_cpu=True)
    effect = difference(expected, plain)
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    for stage in (0, 2, 3):
        off = difference(run(deepspeed=config(Run(stage=stage, clip=1.0)) | auto), expected)
        if rank == 0:
            print(f"trainer llama {kind} {stage}: off {off:.2e}, effect {effect:.1e}")
        assert off < 1e-3 * effect


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "log_level": "error",
}


def llama(saved: str, settings: dict[str, Any], lam: float, adapter: bool = False) -> Any:
    from tests.loops.test_transformers import collate, sentences
    from torch_booster.integrations.transformers import BoosterArguments, BoosterTrainer

    args = TrainingArguments(saved, **settings)
    model: Any = LlamaForCausalLM.from_pretrained(saved, attn_implementation="eager")
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(init_lora_weights="gaussian"))
    return BoosterTrainer(
        model,
        args,
        collate,
        sentences(32, seed=1),
        harmful_dataset=sentences(7, seed=2),
        booster_args=BoosterArguments(lam, 0.5, norm="tensor"),
    )


def sft(saved: str, settings: dict[str, Any], lam: float) -> Any:
    from trl import SFTConfig, SFTTrainer

    from tests.loops.test_trainer_faults import texts, word_tokenizer
    from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin

    class BoosterSFTTrainer(BoosterMixin, SFTTrainer):
        pass

    args = SFTConfig(saved, bf16=False, gradient_checkpointing=False, **settings)
    return BoosterSFTTrainer(
        LlamaForCausalLM.from_pretrained(saved, attn_implementation="eager"),
        args,
        train_dataset=texts(22, 1, "prompt", "completion"),
        harmful_dataset=texts(7, 2, "prompt", "completion"),
        processing_class=word_tokenizer(),
        booster_args=BoosterArguments(lam, 0.5, norm="tensor"),
    )


LANGUAGE_MODELS: dict[str, Callable[..., Any]] = {
    "whole": llama,
    "adapter": partial(llama, adapter=True),
    "sft": sft,
}


def what_cannot_work_is_refused(folder: str, rank: int) -> None:
    surroundings(rank)
    from accelerate import Accelerator, DeepSpeedPlugin

    from torch_booster import BoosterOptimizer
    from torch_booster.integrations.accelerate import AcceleratedEngine, regularize

    run = Run(stage=2, steps=1)
    with pytest.raises(RuntimeError, match="not supported with Booster under DeepSpeed"):
        trained(replace(run, more={"torch_autocast": {"enabled": True}}), rank, folder)
    made = trained(run, rank, folder)
    with pytest.raises(RuntimeError, match="make another trainer"):
        made.train()
    made.accelerator.free_memory()
    base = torch.optim.AdamW(run.net().parameters())
    with pytest.raises(ValueError, match="Under DeepSpeed the trainer drops an optimizer"):
        trainer(run, rank, folder, optimizers=(base, None))

    surroundings(rank)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(run)))
    with pytest.raises(RuntimeError, match="no DeepSpeed engine"):
        AcceleratedEngine(accelerator)
    model = run.net()
    wrapped = BoosterOptimizer(torch.optim.AdamW(param_groups(run, model)))
    accelerator.prepare(model, wrapped)
    with pytest.raises(TypeError, match="steps a BoosterOptimizer"):
        AcceleratedEngine(accelerator)
    with pytest.raises(RuntimeError, match="AcceleratedEngine"):
        regularize(wrapped, lambda: torch.ones(()))
    accelerator.free_memory()


def cases(folder: str) -> dict[str, Callable[[int], None]]:
    made: dict[str, Callable[[int], None]] = {}
    for name, run in exact().items():
        made[f"trainer-{name}"] = partial(the_trainer_follows_the_formula, name, run, folder)
    for stage in STAGES:
        run = Run(stage=stage, accumulation=2, clip=1.0)
        made[f"accelerate-{stage}"] = partial(accelerates_loop_follows_the_formula, f"{stage}", run)
        made[f"plain-{stage}"] = partial(harmful_passes_leave_nothing_behind, stage, folder)
        made[f"resumed-{stage}"] = partial(a_resumed_run_goes_on, stage, folder)
        made[f"records-{stage}"] = partial(the_records_are_of_the_whole_batch, stage, folder)
        if stage:
            made[f"overflow-{stage}"] = partial(an_overflow_is_not_counted, stage, folder)
            for dtype in ("bfloat16", "float16"):
                name, narrow = f"{dtype}-{stage}", replace(run, dtype=dtype)
                made[name] = partial(the_trainer_follows_in_low_precision, name, narrow, folder)
    made["followed"] = partial(arguments_are_followed_between_steps, 2, folder)
    for kind in LANGUAGE_MODELS:
        made[f"llama-{kind}"] = partial(a_language_model_trains_as_under_ddp, kind, folder)
    made["refused"] = partial(what_cannot_work_is_refused, folder)
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """All of them in one set of processes, whose start takes longer than they do."""
    return run_cases(cases(str(tmp_path_factory.mktemp("runs"))), WORLD)


@pytest.mark.parametrize("name", list(cases(tempfile.gettempdir())))
def test_two_processes(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
