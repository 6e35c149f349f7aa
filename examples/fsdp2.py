"""Booster on weights that FSDP2 shards over the processes, with plain torchrun.

    torchrun --standalone --nproc_per_node 2 examples/fsdp2.py

One process for each GPU; without GPUs the same command trains on CPU processes (gloo). Started by
plain ``python`` it is one process. The numbers do not depend on that: ``--batch_size`` is the size
of the global batch, of which each process takes its rows.

A small classifier learns one labelling and, through Booster, resists learning another. Run the
same command again to go on where it stopped, on any number of processes: the checkpoint is
resharded as it is loaded.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from torch_booster import BoosterOptimizer

FEATURES, ROWS = 16, 4096


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lam", type=float, default=5.0, help="λ, intensity (default: 5)")
    parser.add_argument("--alpha", type=float, default=0.1, help="α, step length (default: 0.1)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: 1e-2)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--batch_size", type=int, default=64, help="global batch (default: 64)")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="clip at (default: 1)")
    parser.add_argument("--width", type=int, default=64, help="of the layers (default: 64)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--save_every", type=int, default=100, help="steps (default: 100)")
    parser.add_argument("--log_every", type=int, default=50, help="steps (default: 50)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("fsdp2"),
        help="metrics.jsonl and the checkpoint to resume from (default: %(default)s)",
    )
    return parser.parse_args(argv)


def start_processes() -> torch.device:
    """Joins torchrun's process group, or makes one of this process alone, and picks the device."""
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def mean(value: Tensor) -> Tensor:
    """Mean over the processes."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def save(folder: Path, model: nn.Module, optimizer: BoosterOptimizer, step: int) -> None:
    """Writes the checkpoint beside the last one, then puts it in its place."""
    new = folder.with_name("checkpoint-unfinished")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=new)
    if dist.get_rank() == 0:
        (new / "step.json").write_text(json.dumps(step))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    dist.barrier()


KNOWN = {
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *("torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib.WindowsPath"),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""All that the description of a checkpoint is made of."""


class Description(pickle.Unpickler):
    """Unpickles the description of a checkpoint, and no call of anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What a name stands for."""
        name = f"{module_name}.{global_name}".replace("pathlib._local", "pathlib")
        if name not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {name}, which no checkpoint holds")
        return super().find_class(module_name, global_name)


class Values(DefaultLoadPlanner):
    """Unpickles numbers and words, and no call of anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Loads a value that is no tensor, once it is known to be harmless."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load(folder: Path, model: nn.Module, optimizer: BoosterOptimizer) -> int:
    """Loads a checkpoint, whatever number of processes wrote it, and returns its step."""
    with (folder / ".metadata").open("rb") as file:
        Description(file).load()  # torch itself would do whatever the file says
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, planner=Values())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return json.loads((folder / "step.json").read_text())


def keep_rows(metrics: Path, last: int) -> None:
    """Drops the rows after the step that a run goes on from, and one that was cut off."""
    metrics.parent.mkdir(parents=True, exist_ok=True)
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [row for row in rows if row.endswith("\n")]
    metrics.write_text("".join(row for row in whole if json.loads(row)["step"] <= last))


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Trains, and returns the exit status: 130 after Ctrl-C, with the checkpoint saved.

    It is 2 where there is a checkpoint that can not be loaded.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stop = torch.zeros((), device=device)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        # Processes stop together, between two steps: one that left alone would hang the others.
        signal.signal(interrupt, lambda *_: stop.fill_(1))

    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    layers = [nn.Linear(FEATURES, args.width), nn.Tanh(), nn.Linear(args.width, args.width)]
    model: Any = nn.Sequential(*layers, nn.Tanh(), nn.Linear(args.width, 2)).to(device, dtype)
    inputs = torch.randn(ROWS, FEATURES).to(device, dtype)
    refusal = (inputs[:, 0] > 0).long()  # what alignment teaches
    harmful = (inputs[:, 1] > 0).long()  # what an attacker would teach

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    # After fully_shard, which replaces the parameters.
    optimizer = BoosterOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr), lam=args.lam, alpha=args.alpha
    )

    def closure(labels: Tensor, rows: Tensor) -> Callable[[], Tensor]:
        def forward_and_backward() -> Tensor:
            losses = nn.functional.cross_entropy(model(inputs[rows]), labels[rows], reduction="sum")
            loss = losses * ranks / args.batch_size  # the processes average their shares
            loss.backward()
            return loss

        return forward_and_backward

    folder, metrics = args.output_dir / "checkpoint", args.output_dir / "metrics.jsonl"
    first = 0
    if folder.is_dir():
        try:
            first = load(folder, model, optimizer)
        except (Exception, CheckpointException) as error:
            if rank == 0:
                reason = " ".join(str(error).split())
                print(f"error: {folder} can not be loaded, remove it to start anew: {reason}")
            return 2
        if rank == 0:
            print(f"Resuming after step {first} from {folder}.")
    if rank == 0:
        keep_rows(metrics, first)

    done, interrupted = first, False
    for step in track(range(first, args.steps), "Aligning", disable=rank != 0):
        drawn = torch.Generator().manual_seed(args.seed + step)
        rows = torch.randint(ROWS, (args.batch_size,), generator=drawn)[rank::ranks].to(device)
        optimizer.zero_grad()
        optimizer.regularize(closure(harmful, rows))
        loss = closure(refusal, rows)()
        clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            row = {"step": done, "alignment_loss": mean(loss).item()}
            if optimizer.diagnostics is not None:
                row["harmful_loss"] = mean(optimizer.diagnostics.harmful_loss).item()
                row["harmful_loss_drop"] = mean(optimizer.diagnostics.harmful_loss_drop).item()
            if rank == 0:
                with metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        interrupted = bool(mean(stop) > 0)
        if interrupted or done % args.save_every == 0:
            save(folder, model, optimizer, done)
        if interrupted:
            break
    if not interrupted and done > first:
        save(folder, model, optimizer, done)
    if rank == 0:
        if interrupted:
            print(f"Stopped after step {done}. The same command goes on from there.")
        print(f"The metrics are in {metrics}.")
    return 130 if interrupted else 0


def main(argv: list[str] | None = None) -> int:
    """Parses, trains, and leaves the process group."""
    args = parse_arguments(argv)
    device = start_processes()
    try:
        return train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
