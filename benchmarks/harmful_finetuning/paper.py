"""The paper's numbers that were available to us, as data.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586. The tables and the plot were read by
eye from the images on the authors' project page, which show an early arXiv version; the final
version may differ. No other table of the paper was available to us, and none is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = (
    "Huang et al., ICLR 2025 (arXiv 2409.01586), read by eye from the images on the authors' "
    "project page, an early version of the paper"
)
UNAVAILABLE = "The paper's numbers for this table were not available to us."

METHODS = ("sft", "lisa", "repnoise", "vaccine", "booster")
POISON_RATIOS = (0.05, 0.1, 0.15, 0.2)  # the p of Table 1 beside clean data


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper: scores in percent by method, the last column the printed average."""

    name: str
    setting: str
    columns: tuple[str, ...]
    harmful_score: dict[str, tuple[float, ...]]
    finetune_accuracy: dict[str, tuple[float, ...]]


TABLE_1 = PaperTable(
    name="Table 1",
    setting="Llama2-7B, SST2, 1,000 samples",
    columns=("p = 0 (clean)", "p = 0.05", "p = 0.1", "p = 0.15", "p = 0.2", "mean"),
    harmful_score={
        "sft": (1.30, 21.90, 33.70, 49.30, 61.70, 33.58),
        "lisa": (0.90, 14.50, 23.70, 31.20, 39.10, 21.88),
        "repnoise": (1.20, 20.70, 32.10, 45.60, 55.50, 31.02),
        "vaccine": (1.30, 12.10, 28.30, 44.10, 55.20, 28.20),
        "booster": (1.90, 4.80, 8.30, 14.20, 25.50, 10.94),
    },
    finetune_accuracy={
        "sft": (81.54, 91.74, 93.12, 92.66, 92.89, 90.39),
        "lisa": (86.93, 91.86, 92.32, 92.20, 92.32, 91.13),
        "repnoise": (90.25, 92.89, 93.00, 92.89, 92.89, 92.38),
        "vaccine": (90.83, 93.58, 93.69, 93.23, 93.23, 92.91),
        "booster": (92.89, 92.32, 93.23, 93.35, 93.35, 93.03),
    },
)

TABLE_4 = PaperTable(
    name="Table 4",
    setting="p = 0.1, SST2, 1,000 samples",
    columns=("Llama2-7B", "Gemma2-9B", "Qwen2-7B", "mean"),
    harmful_score={
        "sft": (33.70, 64.30, 25.50, 41.17),
        "lisa": (23.70, 30.80, 9.50, 21.33),
        "repnoise": (32.10, 63.60, 33.90, 43.20),
        "vaccine": (28.30, 45.00, 16.80, 30.03),
        "booster": (8.30, 11.20, 1.60, 7.03),
    },
    finetune_accuracy={
        "sft": (93.12, 94.50, 94.84, 94.15),
        "lisa": (92.32, 94.04, 93.92, 93.43),
        "repnoise": (93.00, 94.50, 94.61, 94.04),
        "vaccine": (93.69, 93.69, 92.55, 93.31),
        "booster": (93.23, 93.69, 95.64, 94.19),
    },
)

BY_EXPERIMENT = {"harmful-ratio": TABLE_1, "architectures": TABLE_4}

# Figure 2: a model aligned with SFT, fine-tuned on harmful data alone or on SST2 alone. Read off
# the plot, within about 3 percentage points. None where no point was read.
FIGURE_2_STEPS = (0, 200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000)
FIGURE_2 = {
    "harmful data: harmful score, %": (1, 8, 20, 27, 38, 48, 60, 69, 71, 72, 75),
    "harmful data: harmful train loss": (4.1, 1.72, *(None,) * 8, 1.47),
    "harmful data: harmful test loss": (None, 1.70, *(None,) * 8, 1.42),
    "SST2: harmful train loss": (4.1, *(None,) * 9, 4.37),
}
FIGURE_2_NOTE = "On SST2 the harmful score stays between 0 and 3 %."

# Headline reductions of the harmful score, SFT − Booster, in points: Table 1 averaged over all five
# p, clean data included, and Table 4 averaged over the three models.
HEADLINE_P = 22.64
HEADLINE_ARCHITECTURE = 34.14
