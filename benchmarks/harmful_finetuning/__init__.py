"""The paper's experiments: defenses against harmful fine-tuning, side by side.

Data sets, batches and generation are those of ``examples/lora_alignment.py``; what is here are the
methods, the grid of runs and what is made of its results.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
