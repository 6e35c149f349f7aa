"""An aligned model, all its weights or an adapter, as one merged checkpoint that any tool loads."""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.harmful_finetuning.keys import LIBRARIES
from benchmarks.harmful_finetuning.loading import loading, read_json
from benchmarks.harmful_finetuning.models import model_of, tokenizer_of, with_end
from benchmarks.harmful_finetuning.settings import CHAT
from benchmarks.tamperbench import card
from benchmarks.tamperbench.card import Alignment

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PROBE = "Is this review positive or negative?\nA film to see twice, if only for its last scene."
CLOSE = {torch.float32: 1e-4}  # of the logits' norm; in a lower precision merging rounds
CLOSE_ROUNDED = 0.05
FACTS = "alignment.json"


def export(model: Path, output: Path, alignment: Alignment) -> float:
    """Writes an aligned model as a merged Hugging Face checkpoint with a card.

    What was written is loaded again as others would, and compared with the model.

    Args:
        model: Folder of a whole model, or of a PEFT adapter.
        output: A new folder.
        alignment: How it was aligned. Its base is loaded under an adapter, and gives the tokenizer
            where the model's folder has none.

    Returns:
        The difference of the logits, merged from unmerged, in units of their norm.

    Raises:
        ValueError: The folder is there, or is no such model, or its base is missing, or what was
            written differs from it. Nothing is left then.
    """
    if output.exists():
        raise ValueError(f"{output} is there already; remove it, or name another folder")
    if not model.is_dir():
        raise ValueError(f"{model} is no folder; name one with a model or an adapter in it")
    adapter = (model / "adapter_config.json").is_file()
    if not adapter and not (model / "config.json").is_file():
        raise ValueError(
            f"{model} holds neither config.json nor adapter_config.json; name the folder of a "
            "whole model or of a PEFT adapter"
        )
    alignment = _with_base(model, adapter, alignment)
    tokenizer = _tokenizer(model, alignment)
    aligned = _adapted(model, alignment) if adapter else model_of(model, dtype=_dtype(alignment))
    probe = _probe(tokenizer, aligned)
    wanted = _logits(aligned, probe)
    if adapter:
        with loading(model):
            aligned = aligned.merge_and_unload(safe_merge=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=output.parent) as place:
        unfinished = Path(place) / output.name
        aligned.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        dtype: torch.dtype = aligned.dtype
        del aligned  # so that it and its copy need not fit at once
        difference = _difference(wanted, unfinished, probe, dtype)
        _check_tokenizer(tokenizer, unfinished)
        checked = (
            "What is in this folder was loaded again from it. On "
            f"{probe.numel()} tokens its logits differ from those of the model before merging by "
            f"{difference:.1g} of their norm, in {str(dtype).removeprefix('torch.')}; its "
            "tokenizer splits a text into the same tokens."
        )
        names = ("torch_booster", *LIBRARIES)
        versions = {name: version(name) for name in names} | {"python": platform.python_version()}
        words = card.text(output.name, alignment, checked, versions)
        (unfinished / "README.md").write_text(words, encoding="utf-8")
        (unfinished / FACTS).write_text(json.dumps(card.facts(alignment)) + "\n")
        unfinished.replace(output)
    return difference


def _with_base(model: Path, adapter: bool, alignment: Alignment) -> Alignment:
    """The alignment with its base: that which was told, else that which the adapter names."""
    if adapter and not (model / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{model} has no adapter_model.safetensors; save the adapter again as safetensors: "
            "nothing is unpickled here"
        )
    base = alignment.base
    if adapter and not base:
        named = read_json(model / "adapter_config.json").get("base_model_name_or_path")
        base = named or ""
    if not base and (adapter or not _has_tokenizer(model)):
        what = "is an adapter" if adapter else "has no tokenizer"
        raise ValueError(f"{model} {what}; name its base model with --base")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"the base model {base} is no folder; name it with --base")
    return replace(alignment, base=base)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _tokenizer(model: Path, alignment: Alignment) -> Any:
    """The model's own tokenizer or its base's, with the chat template of the alignment."""
    source = model if _has_tokenizer(model) else alignment.base
    tokenizer = with_end(tokenizer_of(source), source, alignment.end_token)
    if alignment.template not in ("", CHAT):
        tokenizer.chat_template = chat_template(alignment.template)
    return tokenizer


def chat_template(template: str) -> str:
    """A chat template that writes user prompts into a text template, and ends each answer.

    Args:
        template: Text with one ``{prompt}``, as ``text.template`` of the benchmark's settings.
    """
    before, after = (json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}"))
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{{ " + before + " + message['content'] + " + after + " }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}"
        "{% else %}"
        "{{ raise_exception('the model was aligned without a ' + message['role'] + ' message') }}"
        "{% endif %}"
        "{% endfor %}"
    )


def _adapted(model: Path, alignment: Alignment) -> Any:
    base = model_of(alignment.base, dtype=_dtype(alignment))
    with loading(model):
        adapted: Any = PeftModel.from_pretrained(base, model)
    if not hasattr(adapted, "merge_and_unload"):
        kind = type(adapted.base_model).__name__
        raise ValueError(f"{model} is of a kind that can not be merged, {kind}; use LoRA")
    return adapted


def _dtype(alignment: Alignment) -> Any:
    return getattr(torch, alignment.dtype) if alignment.dtype != "auto" else "auto"


def _probe(tokenizer: Any, model: Any) -> Tensor:
    """Tokens to compare models on: a text, and some at random."""
    ids = tokenizer(PROBE).input_ids
    size = model.get_input_embeddings().weight.shape[0]
    random = torch.randint(size, (16,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(ids), random])[None]


@torch.no_grad()
def _logits(model: Any, probe: Tensor) -> Tensor:
    return model.eval()(input_ids=probe).logits.float()


def _difference(wanted: Tensor, folder: Path, probe: Tensor, dtype: torch.dtype) -> float:
    found = _logits(model_of(folder, dtype="auto"), probe)
    difference = float((found - wanted).norm() / wanted.norm())
    limit = CLOSE.get(dtype, CLOSE_ROUNDED)
    if not difference <= limit:  # so that NaN is refused as well
        raise ValueError(
            f"the merged model's logits differ from the aligned one's by {difference:.2g} of their "
            f"norm, more than {limit:g}; merge in --dtype float32"
        )
    return difference


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    with loading(folder):
        again: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids, wanted = again(PROBE).input_ids, tokenizer(PROBE).input_ids
    if ids != wanted or again.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"AutoTokenizer reads the tokenizer otherwise than it was used: a text begins with "
            f"{ids[:6]} instead of {wanted[:6]}; save it with the class of its architecture"
        )
