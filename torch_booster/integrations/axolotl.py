"""Booster as a plugin of Axolotl, switched on in its YAML.

    plugins:
      - torch_booster.integrations.axolotl.BoosterPlugin
    booster_lam: 5.0
    booster_alpha: 0.1
    booster_harmful_datasets:          # as `datasets`
      - path: harmful.jsonl
        type: alpaca

Axolotl builds the trainer. The plugin names its class, and gives the harmful examples, loaded and
tokenised as the training set is, once the trainer is there.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict

from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin

__all__ = ["BoosterConfig", "BoosterPlugin"]

# Where a step is more than a function of rows of the training set's kind, by the key in the YAML.
NOT_SERVED = {
    "rl": "preference and online training",
    "reward_model": "reward models",
    "process_reward_model": "process reward models",
    "sample_packing": "sample packing, whose loader packs and the harmful one does not",
    "streaming": "streamed datasets",
    "pretraining_dataset": "pretraining datasets",
    "deepspeed": "DeepSpeed",
}


class BoosterConfig(BaseModel):
    """The plugin's keys in the YAML; the values are those of `BoosterArguments`."""

    model_config = ConfigDict(extra="allow")  # Axolotl merges it with classes of its own

    booster_harmful_datasets: list[dict[str, Any]] | None = None
    booster_lam: float = 5.0
    booster_alpha: float = 0.1
    booster_norm: Literal["global", "tensor"] = "global"
    booster_every: int = 1
    booster_lam_warmup_steps: int = 0
    booster_lam_delay_steps: int = 0
    booster_trust_region: bool = False
    booster_perturb_merged: bool = False
    booster_harmful_batch_size: int | None = None


class BoosterPlugin(BasePlugin):  # pyright: ignore[reportUntypedBaseClass]
    """Gives Axolotl a trainer that steps on the Booster gradient, and the harmful data."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the plugin's keys."""
        return "torch_booster.integrations.axolotl.BoosterConfig"

    def get_trainer_cls(self, cfg: Any) -> type[Any]:
        """Axolotl's trainer for supervised fine-tuning, with the mixin before it.

        Raises:
            ValueError: The YAML asks for what is not served, or names no harmful data.
        """
        for key, what in NOT_SERVED.items():
            if cfg.get(key):
                raise ValueError(
                    f"BoosterPlugin does not serve {what}: {key}={cfg.get(key)!r}. Take the key "
                    "out, or the plugin."
                )
        lam = arguments(cfg).lam
        if lam > 0 and not cfg.get("booster_harmful_datasets"):
            raise ValueError(
                "booster_harmful_datasets is missing. List there, as in `datasets`, the harmful "
                "prompts with harmful answers, or set booster_lam: 0."
            )
        from axolotl.core.trainers.base import (  # pyright: ignore[reportMissingImports]
            AxolotlTrainer,
        )

        class AxolotlBoosterTrainer(
            BoosterMixin,
            AxolotlTrainer,  # pyright: ignore[reportUntypedBaseClass]
        ):
            """AxolotlTrainer on the Booster gradient."""

        return AxolotlBoosterTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Gives the trainer λ, α and the harmful examples."""
        trainer.booster_args = arguments(cfg)
        if cfg.get("booster_harmful_datasets"):
            trainer.harmful_dataset = harmful_examples(cfg, trainer.processing_class)


def arguments(cfg: Any) -> BoosterArguments:
    """The plugin's keys as the trainer's arguments."""
    keys = BoosterConfig.model_fields.keys() - {"booster_harmful_datasets"}
    given = {key.removeprefix("booster_"): cfg.get(key) for key in keys if cfg.get(key) is not None}
    size = given.pop("harmful_batch_size", None)
    return BoosterArguments(per_device_harmful_batch_size=size, **given)


def harmful_examples(cfg: Any, tokenizer: Any) -> Any:
    """The harmful datasets, prepared as Axolotl prepares `datasets`."""
    from axolotl.utils.data import prepare_datasets  # pyright: ignore[reportMissingImports]
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    # Loading writes token counts and step numbers into the configuration that it is given.
    harmful = DictDefault(
        {
            **cfg.to_dict(),
            "datasets": cfg.get("booster_harmful_datasets"),
            "test_datasets": None,
            "val_set_size": 0,
            "push_dataset_to_hub": None,
        }
    )
    dataset, *_ = prepare_datasets(harmful, tokenizer)
    return dataset
