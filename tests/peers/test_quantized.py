"""Adapters on a quantised base (QLoRA): the base stays as stored, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.tiny_llama import HARMFUL, boosted, check_step, closure, tiny_llama, trainable

peft = pytest.importorskip("peft", reason="PEFT is not installed")

from torch_booster.integrations.peft import MergedOffsets  # noqa: E402

pytestmark = [
    # prepare_model_for_kbit_training uses names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),
]


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


def nf4(**options: Any) -> Any:
    return bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )


def torchao(name: str, *args: Any, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = getattr(quantization, name)(*args, **options)
    try:
        quantization.quantize_(nn.Sequential(nn.Linear(64, 64)), config)
    except Exception as error:
        pytest.skip(f"torchao's {name} does not run here: {type(error).__name__}: {error}")
    return TorchAoConfig(config)


def groups_of_32() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return quantization.PerGroup(32)


BASES: dict[str, Callable[[], Any]] = {
    "bitsandbytes_8bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes_nf4": nf4,
    "bitsandbytes_nf4_double": lambda: nf4(bnb_4bit_use_double_quant=True),
    "torchao_int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao_int4_in_int8": lambda: torchao("IntxWeightOnlyConfig", torch.int4, groups_of_32()),
    "torchao_int4_packed": lambda: torchao("Int4WeightOnlyConfig", group_size=32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(layers=1).save_pretrained(path)
    return path


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    """LoRA on a base loaded by transformers, prepared as PEFT advises."""
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BASES[request.param](),
        dtype=torch.float32,
        device_map="cpu",
        local_files_only=True,
    )
    base = peft.prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).train()
    model(input_ids=HARMFUL)  # bitsandbytes moves its 8-bit weights on first use
    return model


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors in memory that a quantised one consists of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    else:
        yield tensor.detach()


def base_storage(model: nn.Module) -> dict[str, list[Tensor]]:
    """Packed weights and their scales, with everything else that is no adapter."""
    return {
        name: list(plain(value))
        for name, value in model.state_dict().items()
        if "lora_" not in name and isinstance(value, Tensor)
    }


def copied(storage: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.clone() for t in parts] for name, parts in storage.items()}


def assert_same(storage: dict[str, list[Tensor]], before: dict[str, list[Tensor]]) -> None:
    assert storage.keys() == before.keys()
    for name, parts in storage.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, before[name], strict=True)), name


@pytest.mark.parametrize("everything", [False, True], ids=["adapters", "all_parameters"])
def test_adapters_on_a_quantised_base(model: Any, everything: bool) -> None:
    """The formula's gradient, whether or not the optimizer is also handed the frozen base."""
    adapters = trainable(model)
    assert all("lora_" in name and p.dtype is torch.float32 for name, p in adapters.items())
    narrow = [t for ts in base_storage(model).values() for t in ts if t.dtype.itemsize == 1]
    assert len(narrow) >= 7  # the linear layers of the one block

    optimizer = boosted(list(model.parameters() if everything else adapters.values()))
    before, start = copied(base_storage(model)), {n: p.clone() for n, p in adapters.items()}
    for _ in range(2):
        check_step(model, optimizer)
    assert_same(base_storage(model), before)
    assert not any(torch.equal(p, start[n]) for n, p in adapters.items())
    assert set(optimizer.state) == set(adapters.values())


def test_the_perturbation_keeps_off_the_base(model: Any) -> None:
    adapters = trainable(model)
    optimizer = boosted(list(model.parameters()), self_check=False)
    before, start = copied(base_storage(model)), {n: p.clone() for n, p in adapters.items()}
    moved: list[bool] = []

    def harmful() -> Tensor:
        assert_same(base_storage(model), before)
        moved.append(not any(torch.equal(p, start[n]) for n, p in adapters.items()))
        return closure(model, HARMFUL)()

    optimizer.regularize(harmful)
    assert moved == [False, True]
    assert_same(base_storage(model), before)
    assert all(torch.equal(p, start[n]) for n, p in adapters.items())


def test_a_step_beside_the_weights_of_a_quantised_base(model: Any) -> None:
    """They have no gradient; what is added to them has, and the loss falls along it."""
    before = copied(base_storage(model))
    offsets = MergedOffsets(model, torch.float32)
    optimizer = boosted(trainable(model).values(), perturbed=offsets, norm="tensor")
    optimizer.alpha = 1e-2
    optimizer.zero_grad()
    optimizer.regularize(closure(model, HARMFUL))
    found = optimizer.read_diagnostics()
    assert found["perturbation_norm"] == pytest.approx(1e-2, rel=1e-4)
    assert found["drop_ratio"] == pytest.approx(1, abs=0.05)
    assert_same(base_storage(model), before)
