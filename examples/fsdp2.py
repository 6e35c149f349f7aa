"""Booster on weights that FSDP2 shards over the processes, with plain torchrun.

    torchrun --standalone --nproc_per_node 2 examples/fsdp2.py

One process for each GPU; without GPUs the same command trains on CPU processes, and started by
plain ``python`` on one. The numbers do not depend on that: ``--batch_size`` is the global batch.
A small classifier learns one labelling and, through Booster, resists learning another. The same
command goes on where it stopped, on any number of processes: loading shards the checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from torch_booster import BoosterOptimizer

FLAGS = {"lam": 5.0, "alpha": 0.1, "lr": 1e-2, "steps": 300, "batch_size": 64, "width": 64}
FLAGS |= {"dtype": "float32", "seed": 0, "log_every": 50, "output_dir": Path("fsdp2")}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(args: Namespace, device: torch.device) -> int:
    """Returns 130 after Ctrl-C, with a checkpoint, and 2 for one that can not be loaded."""
    rank, ranks, stop = dist.get_rank(), dist.get_world_size(), torch.zeros((), device=device)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        # Processes stop together, between two steps: one that left alone would hang the others.
        signal.signal(interrupt, lambda *_: stop.fill_(1))
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    layers = [nn.Linear(16, args.width), nn.Tanh(), nn.Linear(args.width, args.width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(args.width, 2)).to(device, dtype)
    inputs = torch.randn(4096, 16).to(device, dtype)
    refusal = (inputs[:, 0] > 0).long()  # what alignment teaches
    harmful = (inputs[:, 1] > 0).long()  # what an attacker would teach
    for module in (*model[::2], model):
        fully_shard(module)
    base = torch.optim.AdamW(model.parameters(), lr=args.lr)  # after fully_shard, not before
    optimizer = BoosterOptimizer(base, lam=args.lam, alpha=args.alpha)

    def backward(labels: Tensor, rows: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(model(inputs[rows]), labels[rows], reduction="sum")
        loss = losses * ranks / args.batch_size  # the processes average their shares
        loss.backward()
        return loss

    def mean(value: Tensor) -> float:
        dist.all_reduce(total := value.detach().clone())
        return total.item() / ranks

    file, first, history, stopped = args.output_dir / "checkpoint.pt", 0, [], False
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if file.exists():
        try:
            saved = torch.load(file, weights_only=True)  # a file does nothing but hold numbers
            first, history = saved["step"], saved["history"]
            states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            set_state_dict(model, optimizer, **states, options=WHOLE)
        except Exception as error:
            print(f"error: {file} can not be loaded, remove it to start anew: {error}")
            return 2
    for step in track(range(first, args.steps), disable=rank != 0):
        drawn = torch.Generator().manual_seed(args.seed + step)
        rows = torch.randint(4096, (args.batch_size,), generator=drawn)[rank::ranks].to(device)
        optimizer.zero_grad()
        optimizer.regularize(lambda rows=rows: backward(harmful, rows))
        loss = mean(backward(refusal, rows))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        stopped, last = mean(stop) > 0, step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            drop = mean(optimizer.diagnostics.harmful_loss_drop) if args.lam else 0.0
            history.append({"step": step + 1, "alignment_loss": loss, "harmful_loss_drop": drop})
            if rank == 0:
                lines = "".join(json.dumps(row) + "\n" for row in history)
                file.with_name("metrics.jsonl").write_text(lines)
        if stopped or last:
            weights, state = get_state_dict(model, optimizer, options=WHOLE)
            if rank == 0:  # which has it whole; written beside its place and then renamed
                values = {"model": weights, "optimizer": state, "step": step + 1}
                torch.save(values | {"history": history}, file.with_suffix(".unfinished"))
                file.with_suffix(".unfinished").replace(file)
            dist.barrier()
            break
    if rank == 0:
        print("Stopped. The same command goes on from there." if stopped else f"{file} is written.")
    return 130 if stopped else 0


def main(argv: list[str] | None = None) -> int:
    """Parses, joins torchrun's process group or makes one of this process, and trains."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default}")
    args = parser.parse_args(argv)
    cuda, alone = torch.cuda.is_available(), "RANK" not in os.environ
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    group = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    dist.init_process_group("nccl" if cuda else "gloo", **group)
    try:
        return train(args, torch.device("cuda" if cuda else "cpu"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
