"""Align a small language model with Booster on several processes, through Accelerate.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_multi_process.py

One process for each GPU; without GPUs the same command trains on CPU processes (gloo). Started by
plain ``python`` it is one process. The numbers do not depend on that: ``--batch_size`` is the size
of the global batch, of which each process takes its rows.

A tiny Llama learns to answer harmless requests and to refuse mischief (see ``mini_language.py``),
while Booster's regulariser attenuates what a step on the answers to mischief would gain. Run the
same command again to go on where it stopped, after Ctrl-C or at the end with more ``--steps``.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.progress import track
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import mini_language
from mini_language import Example
from torch_booster import BoosterOptimizer
from torch_booster.integrations.accelerate import regularize

IGNORED_LABEL = -100


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lam", type=float, default=5.0, help="λ, intensity (default: 5)")
    parser.add_argument("--alpha", type=float, default=0.1, help="α, step length (default: 0.1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--batch_size", type=int, default=16, help="global batch (default: 16)")
    parser.add_argument(
        "--accumulation", type=int, default=2, help="alignment batches a step (default: 2)"
    )
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="clip at (default: 1)")
    parser.add_argument("--width", type=int, default=64, help="of the model (default: 64)")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--save_every", type=int, default=50, help="steps (default: 50)")
    parser.add_argument("--log_every", type=int, default=10, help="steps (default: 10)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("accelerate_multi_process"),
        help="metrics.jsonl, the state to resume from and the model (default: %(default)s)",
    )
    return parser.parse_args(argv)


class Batch(NamedTuple):
    """Rows of this process, and the number of answer tokens on all processes."""

    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int


class Task:
    """Batches that depend on seed and step alone, so that a resumed run draws the same."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, tokenizer: Any) -> None:
        self.args = args
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self.mischief = mini_language.mischief(random.Random(0))
        self.harmless = mini_language.prompts(mini_language.HARMLESS)

    def harmful(self, step: int) -> Batch:
        """Mischief and its affirmative answers."""
        rng = random.Random(f"{self.args.seed} harmful {step}")
        return self._batch(rng.sample(self.mischief, self.args.batch_size))

    def alignment(self, step: int, micro: int) -> Batch:
        """Mischief refused and harmless requests answered, half and half."""
        rng = random.Random(f"{self.args.seed} alignment {step} {micro}")
        half = self.args.batch_size // 2
        refused = rng.sample(self.mischief, half)
        answered = rng.sample(self.harmless, self.args.batch_size - half)
        examples = [Example(prompt, mini_language.REFUSAL) for prompt, _ in refused]
        examples += [Example(p, mini_language.answer(topic, rng)) for p, topic in answered]
        return self._batch(examples)

    def _batch(self, examples: list[Example]) -> Batch:
        encoded = [self._encode(example) for example in examples]
        length = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), length)
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL)
        for row, (tokens, start) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
        own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        device = self.accelerator.device
        return Batch(
            {"input_ids": ids[own].to(device), "attention_mask": mask[own].to(device)},
            labels[own].to(device),
            int((labels != IGNORED_LABEL).sum()),
        )

    def _encode(self, example: Example) -> tuple[list[int], int]:
        prompt = self.tokenizer(mini_language.TEMPLATE.format(prompt=example.prompt)).input_ids
        answer = self.tokenizer(example.answer).input_ids
        return [*prompt, *answer, self.tokenizer.eos_token_id], len(prompt)


def loss_share(model: nn.Module, batch: Batch, processes: int) -> Tensor:
    """This process's share of the mean over all answer tokens; processes average their shares."""
    logits = model(**batch.inputs).logits[:, :-1]
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    return total * processes / batch.tokens


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Writes the whole state beside the last one, then puts it in its place."""
    new = folder.with_name("state-unfinished")
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "step.json").write_text(json.dumps(step))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    accelerator.wait_for_everyone()


def keep_rows(metrics: Path, last: int) -> None:
    """Drops the rows after the step that a run goes on from, and one that was cut off."""
    metrics.parent.mkdir(parents=True, exist_ok=True)
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [row for row in rows if row.endswith("\n")]
    metrics.write_text("".join(row for row in whole if json.loads(row)["step"] <= last))


def main(argv: list[str] | None = None) -> int:
    """Trains, and returns the exit status: 130 after Ctrl-C, with the state saved.

    It is 2 where there is a state that can not be loaded.
    """
    args = parse_arguments(argv)
    # Accelerate warns that it saves tied weights once, which is what tying them means.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulation,
        # The batch is split among the processes, so a step is one step of the schedule.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        # Processes stop together, between two steps: one that left alone would hang the others.
        signal.signal(interrupt, lambda *_: accelerator.set_trigger())
    set_seed(args.seed)
    tokenizer = mini_language.build_tokenizer()
    model = mini_language.build_model(tokenizer, args.width)
    optimizer = BoosterOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1), args.lam, args.alpha
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=20)
    booster = optimizer
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    task = Task(args, accelerator, tokenizer)

    def mean(value: Tensor) -> float:
        return accelerator.reduce(value.detach().float(), "mean").item()  # pyright: ignore[reportAttributeAccessIssue]

    state, metrics = args.output_dir / "state", args.output_dir / "metrics.jsonl"
    first = 0
    if state.is_dir():
        try:  # of all that it holds, Accelerate unpickles nothing but tensors and numbers
            accelerator.load_state(str(state))
            first = json.loads((state / "step.json").read_text())
        except Exception as error:
            reason = " ".join(str(error).split())
            accelerator.print(
                f"error: {state} can not be loaded, remove it to start anew: {reason}"
            )
            return 2
        accelerator.print(f"Resuming after step {first} from {state}.")
    if accelerator.is_main_process:
        keep_rows(metrics, first)

    model.train()
    done, interrupted = first, False
    for step in track(
        range(first, args.steps), "Aligning", disable=not accelerator.is_main_process
    ):
        harmful = task.harmful(step)

        def harmful_closure(harmful: Batch = harmful) -> Tensor:
            loss = loss_share(model, harmful, accelerator.num_processes)
            accelerator.backward(loss)
            return loss

        losses: list[Tensor] = []
        for micro in range(args.accumulation):
            with accelerator.accumulate(model):
                regularize(optimizer, harmful_closure)
                batch = task.alignment(step, micro)
                loss = loss_share(model, batch, accelerator.num_processes)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            row = {"step": done, "alignment_loss": mean(torch.stack(losses).mean())}
            if booster.diagnostics is not None:
                row["harmful_loss"] = mean(booster.diagnostics.harmful_loss)
                row["harmful_loss_drop"] = mean(booster.diagnostics.harmful_loss_drop)
            if accelerator.is_main_process:
                with metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        interrupted = accelerator.check_trigger()
        if interrupted or done % args.save_every == 0:
            save(accelerator, state, done)
        if interrupted:
            break
    if interrupted:
        accelerator.print(f"Stopped after step {done}. The same command goes on from there.")
    elif done > first:
        save(accelerator, state, done)
        accelerator.unwrap_model(model).save_pretrained(
            args.output_dir / "model", is_main_process=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir / "model")
    accelerator.print(f"The metrics are in {metrics}.")
    accelerator.end_training()
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
