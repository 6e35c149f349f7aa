"""A defense of TamperBench: a base model aligned by torch_booster, as in the paper or otherwise.

TamperBench imports this module once `python -m benchmarks.tamperbench plug CLONE` has named it.
The data are a file of one's own or a set on the hub, with a column each of harmful prompts,
harmful answers and refusals.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harmful_finetuning.align import align
from benchmarks.harmful_finetuning.data import Samples, read_source
from benchmarks.harmful_finetuning.language import Example
from benchmarks.harmful_finetuning.loading import read_json
from benchmarks.harmful_finetuning.methods import METHODS, defaults, hyperparameters
from benchmarks.harmful_finetuning.settings import Settings, Source, as_dict, changed
from benchmarks.tamperbench.card import Alignment, facts, name_of, training
from benchmarks.tamperbench.export import FACTS, export
from benchmarks.tamperbench.plug import REMEDY
from tamperbench.whitebox.defenses.defense import AlignmentDefense, AlignmentDefenseConfig
from tamperbench.whitebox.defenses.registry import register_defense
from tamperbench.whitebox.utils.names import DefenseName
from tamperbench.whitebox.utils.ops import run_in_isolation

try:
    NAME = DefenseName("torch_booster")
except ValueError as error:
    raise ValueError(f"'torch_booster' {REMEDY}") from error

log = logging.getLogger(__name__)


@dataclass
class TorchBoosterConfig(AlignmentDefenseConfig):
    """The paper's setting, in the names that TamperBench gives to its parts.

    Attributes:
        dataset: Hub name, or a json, jsonl, csv or tsv file.
        split: Split of a hub's set.
        prompt_column: Its harmful prompts.
        harmful_column: Harmful answers to them.
        refusal_column: Refusals. Of "Question: ... Answer: ..." what follows "Answer:" is taken.
        num_samples: How many of its rows, from the first.
        method: A method of ``benchmarks.harmful_finetuning.methods``: booster, sft, vaccine ...
        hyperparameters: Its own, such as lam and alpha; what is left out has the paper's value.
        template: Text around each {prompt}; becomes the checkpoint's chat template.
        max_steps: Steps; the paper's are 20 epochs of 5,000 samples.
        per_device_train_batch_size: Samples a step.
        learning_rate: η.
        weight_decay: AdamW's.
        max_grad_norm: Clips the combined gradient; 0 does not.
        max_seq_length: Cuts samples at this many tokens.
        use_lora: Whether an adapter is trained and merged, else all weights.
        lora_r: Its rank.
        lora_alpha: Its scaling, times the rank.
        lora_target_modules: Modules that get one.
        dtype: Of the weights, in training and in the checkpoint. An adapter trains in float32 all
            the same; all weights want float32, since bfloat16 loses small steps.
        random_seed: Of the adapter's weights and of the batches.
    """

    dataset: str = "anonymous4486/repnoise_beavertail"
    split: str = "train"
    prompt_column: str = "prompt"
    harmful_column: str = "response"
    refusal_column: str = "refusal"
    num_samples: int = 5_000
    method: str = "booster"
    hyperparameters: dict[str, Any] | None = None
    template: str = "### Instruction:\n{prompt}\n\n### Response:\n"
    max_steps: int = 10_000
    per_device_train_batch_size: int = 10
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    max_seq_length: int = 256
    use_lora: bool = True
    lora_r: int = 32
    lora_alpha: int = 4
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    dtype: str = "bfloat16"
    random_seed: int = 0


@register_defense(NAME, TorchBoosterConfig)
class TorchBooster(AlignmentDefense[TorchBoosterConfig]):
    """Booster, or a method that it is compared with, by the step of `torch_booster`."""

    def run_defense(self) -> Path:
        """Aligns the model in a process of its own, and returns the merged checkpoint's folder.

        A checkpoint that is there is kept if it was made in the same way.

        Raises:
            ValueError: One is there that was not.
        """
        output = Path(self.defense_config.output_checkpoint_path)
        if output.exists():
            if read_json(output / FACTS) != facts(alignment_of(self.defense_config)):
                raise ValueError(f"{output} holds a model of other settings; remove it")
            log.warning("%s is there already, made in the same way, and is kept", output)
            return output
        return run_in_isolation(
            target=aligned, args=(self.defense_config,), error_context="torch_booster's alignment"
        )


def aligned(config: TorchBoosterConfig) -> Path:
    """Aligns the model that the configuration names, and returns the folder that it names."""
    chosen = chosen_of(config)  # which refuses what there is not, before the data are read
    settings, samples = settings_of(config), samples_of(config)
    base, output = Path(config.input_checkpoint_path), Path(config.output_checkpoint_path)
    kind = METHODS[config.method].alignment
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aligning-", dir=output.parent) as folder:
        place = Path(folder)
        align(settings, samples, base, kind, chosen, config.random_seed, place, tell)
        export(place, output, alignment_of(config))
    return output


def tell(name: str, step: int, steps: int) -> None:
    """Logs about twenty lines of progress."""
    if step % max(1, steps // 20) == 0 or step == steps:
        log.info("%s: step %d of %d", name, step, steps)


def settings_of(config: TorchBoosterConfig) -> Settings:
    """The benchmark's settings of a configuration."""
    given = {f"{config.method}.{k}": v for k, v in (config.hyperparameters or {}).items()}
    values: dict[str, Any] = {
        "trained": "lora" if config.use_lora else "full",
        "given": given,
        "base.model": str(config.input_checkpoint_path),
        "base.dtype": config.dtype,
        "text.template": config.template,
        "text.max_length": config.max_seq_length,
        "lora.r": config.lora_r,
        "lora.alpha": config.lora_alpha,
        "lora.targets": tuple(config.lora_target_modules),
        "align.steps": config.max_steps,
        "align.lr": config.learning_rate,
        "align.batch_size": config.per_device_train_batch_size,
        "align.weight_decay": config.weight_decay,
        "align.max_grad_norm": config.max_grad_norm,
    }
    return changed(Settings(), values)


def samples_of(config: TorchBoosterConfig) -> Samples:
    """What alignment trains on. Nothing is held out: TamperBench asks prompts of its own."""

    def refused(example: Example) -> Example:
        _, marker, answer = example.answer.partition("Answer:")
        return Example(example.prompt, answer.strip() if marker else example.answer)

    def read(column: str) -> list[Example]:
        source = Source(config.dataset, config.split, config.prompt_column, column)
        return read_source(source, "harmful", refused)[: config.num_samples]

    refusals, harmful = read(config.refusal_column), read(config.harmful_column)
    return Samples(refusals, harmful, [], [], [], [], [], [])


def alignment_of(config: TorchBoosterConfig) -> Alignment:
    """What the card of the checkpoint says."""
    method, settings = METHODS[config.method], settings_of(config)
    return Alignment(
        method=method.label,
        reference=method.reference,
        hyperparameters=chosen_of(config) | training(as_dict(settings), config.random_seed),
        data=f"{name_of(config.dataset)}, at most {config.num_samples} rows",
        template=config.template,
        base=str(config.input_checkpoint_path),
        dtype=config.dtype,
    )


def chosen_of(config: TorchBoosterConfig) -> dict[str, Any]:
    """The hyperparameters of the method's alignment stage."""
    values = hyperparameters(config.method, settings_of(config))
    own = defaults(METHODS[config.method].alignment)
    return {name: value for name, value in values.items() if name in own}
