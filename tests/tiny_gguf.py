"""A tiny random Llama as a GGUF file, and wheels that hold files and would betray being run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, HIDDEN = 32, 64  # a block of quantised weights has 32


def write_gguf(file: Path, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Writes the model, its MLP as Q4_1; returns the weights that it stands for."""
    import gguf

    rng = np.random.default_rng(seed)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "th", "he"]
    shapes = {
        "token_embd": (len(tokens), WIDTH),
        "output_norm": (WIDTH,),
        **{f"blk.0.{name}_norm": (WIDTH,) for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (HIDDEN, WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes.items():
        values = rng.normal(0.0, 0.1, shape).astype(np.float32)
        if "ffn_" in name and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            values = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
        weights[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_wheel(folder: Path, name: str, members: dict[str, bytes], marker: Path) -> Path:
    """A wheel of a package that leaves a marker where it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": f"open({str(marker)!r}, 'w').close()\n".encode(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        **members,
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel
