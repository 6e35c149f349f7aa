"""No example, but what they read: a tiny Llama with its rows, or files of your own.

`data/` holds mild, templated requests: mischief with its answers in harmful.jsonl; the same
refused, and harmless requests answered, in alignment.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers.trainer_pt_utils import safe_globals

DATA = Path(__file__).parent / "data"
TOKENIZER: Any = AutoTokenizer.from_pretrained(DATA / "tiny_llama")


def tiny_llama(width: int, seed: int) -> Any:
    """A Llama with random weights, whose tokenizer is `TOKENIZER`."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(DATA / "tiny_llama", hidden_size=width)
    return AutoModelForCausalLM.from_config(config)


def draw(name: str, size: int, key: str) -> dict[str, Tensor]:
    """A batch of a file in `data/` that the key decides, so that a resumed run draws the same."""
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    rows = [
        tokenized(json.loads(line), TOKENIZER) for line in random.Random(key).sample(lines, size)
    ]
    return dict(DataCollatorForSeq2Seq(TOKENIZER)(rows))


def tokenized(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Prompt and completion, cut at the context; only the completion carries a loss."""
    prompt, longest = tokenizer(row["prompt"]).input_ids, tokenizer.model_max_length
    if len(prompt) >= longest:
        raise ValueError(
            f"the prompt's {len(prompt)} tokens fill the context of {longest}; shorten it"
        )
    answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
    answer = [*answer, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + answer
    return {"input_ids": (prompt + answer)[:longest], "labels": labels[:longest]}


# ------------------------------------------------------------------------------ files of others


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Ends the program with one line and status 2 where something can not be read."""
    try:
        yield
    except Exception as error:  # libraries raise whatever they meet in a file
        reason = " ".join(str(error).split())
        print(f"error: {source} can not be loaded: {reason}; mend or remove it", file=sys.stderr)
        raise SystemExit(2) from None


def read_model(name: str, end_token: str) -> tuple[Any, Any]:
    """A model, whole and from safetensors alone, and its tokenizer; no code of theirs is run."""
    with reading(name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        options = {"use_safetensors": True, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(name, **options)
        if found["missing_keys"]:  # which would be random, without a word
            raise ValueError(f"it lacks weights, such as {min(found['missing_keys'])}")
        tokenizer.eos_token = end_token or tokenizer.eos_token
        if tokenizer.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"{tokenizer.eos_token!r} is no end of text of it; set --end_token")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        context = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return model, tokenizer


def read_rows(file: str, prepared: Callable[[Any], Any]) -> list[Any]:
    """The rows of a jsonl file, each prepared; where that fails, the message names the line."""
    rows: list[Any] = []
    with reading(file):
        lines = Path(file).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with reading(f"{file}, line {number}"):
            if len(line) > 100_000:
                raise ValueError(f"it has {len(line):,} characters")
            rows.append(prepared(json.loads(line.decode())))
    with reading(file):
        if not rows:
            raise ValueError("it has no rows")
    return rows


def text(row: Any, *columns: str) -> list[str]:
    """What stands in the columns of a row."""
    if not isinstance(row, dict) or not row.keys() >= set(columns):
        raise ValueError(f"expected an object with {columns}, not {list(row)}")
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"its {column!r} is empty or no text")
        row[column].encode()  # half of a character can be written in JSON, but not be encoded
    return [row[column] for column in columns]


def check_checkpoint(folder: str) -> None:
    """Reads what the Trainer will read: it would go on without a file that is missing."""
    needed = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt")
    with reading(folder), safe_globals():
        for file in (*(Path(folder) / name for name in needed), *Path(folder).glob("rng_state*")):
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                load_file(file)
            else:
                torch.load(file, map_location="meta", weights_only=True)
