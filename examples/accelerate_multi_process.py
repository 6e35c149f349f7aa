"""Align a small language model with Booster on several processes, through Accelerate.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_multi_process.py

One process for each GPU; without GPUs the same command trains on CPU processes, and started by
plain ``python`` on one. The numbers do not depend on that: ``--batch_size`` is the global batch.
Run the same command again to go on where it stopped, after Ctrl-C as well.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from rich.progress import track
from transformers import HfArgumentParser

from inputs import draw, tiny_llama
from torch_booster import BoosterOptimizer
from torch_booster.integrations.accelerate import regularize


@dataclass
class Arguments:
    """Flags."""

    lam: float = 5.0
    alpha: float = 0.1
    lr: float = 1e-3
    steps: int = 200
    batch_size: int = 16
    accumulation: int = 2
    width: int = 64
    seed: int = 0
    log_every: int = 10
    output_dir: Path = Path("accelerate_multi_process")


def main(argv: list[str] | None = None) -> int:
    """Returns 130 after Ctrl-C, with the state saved, and 2 for a state that can not be loaded."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulation,
        # The batch is split among the processes, so a step is one step of the schedule.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        # Processes stop together, between two steps: one that left alone would hang the others.
        signal.signal(interrupt, lambda *_: accelerator.set_trigger())
    model = tiny_llama(args.width, args.seed).train()
    base = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    booster = BoosterOptimizer(base, args.lam, args.alpha)
    scheduler = torch.optim.lr_scheduler.LinearLR(booster, 0.1, 1.0, total_iters=20)
    model, optimizer, scheduler = accelerator.prepare(model, booster, scheduler)
    own = slice(accelerator.process_index, None, accelerator.num_processes)

    def backward(name: str, *key: int) -> torch.Tensor:
        """Forward and backward of this process's share of a batch."""
        batch = draw(name, args.batch_size, f"{args.seed} {key}")
        tokens = (batch["labels"] != -100).sum().item()  # of all, who average their losses
        share = {key: value[own].to(accelerator.device) for key, value in batch.items()}
        loss = model(**share, num_items_in_batch=tokens).loss * accelerator.num_processes
        accelerator.backward(loss)
        return loss.detach()

    state, first, rows, stopped = args.output_dir / "state", 0, [], False
    if state.is_dir():
        try:  # of all that it holds, Accelerate unpickles nothing but tensors and numbers
            accelerator.load_state(str(state))
            first, rows = json.loads((state / "progress.json").read_text())
        except Exception as error:
            accelerator.print(f"error: {state} can not be loaded, remove it: {error}")
            return 2
    for step in track(range(first, args.steps), disable=not accelerator.is_main_process):
        for micro in range(args.accumulation):
            with accelerator.accumulate(model):
                regularize(optimizer, lambda step=step: backward("harmful", step))
                loss = backward("alignment", step, micro)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        stopped, last = accelerator.check_trigger(), step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            seen = {"alignment_loss": loss}
            if args.lam:
                seen["harmful_loss_drop"] = booster.diagnostics.harmful_loss_drop
            means = accelerator.reduce(seen, "mean")
            rows.append({"step": step + 1} | {name: mean.item() for name, mean in means.items()})
            if accelerator.is_main_process:
                args.output_dir.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (args.output_dir / "metrics.jsonl").write_text(text)
        if stopped or last:
            new = state.with_name("state-unfinished")  # put in its place when it is whole
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (new / "progress.json").write_text(json.dumps([step + 1, rows]))
                shutil.rmtree(state, ignore_errors=True)
                new.rename(state)
            accelerator.wait_for_everyone()
            break
    goes_on = "Stopped. The same command goes on from there. "
    accelerator.print(f"{goes_on if stopped else ''}The metrics are in {args.output_dir}.")
    accelerator.end_training()
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
