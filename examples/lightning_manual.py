r"""Booster in Lightning: manual optimization, with everything else left to the Trainer.

    python examples/lightning_manual.py                    # tiny model, seconds on a CPU
    python examples/lightning_manual.py --steps 400 --resume lightning_manual/checkpoints/last.ckpt

A tiny Llama learns to refuse mischief (see ``mini_language.py``), while Booster's regulariser
attenuates what a step on the answers to mischief would gain. The lines that Booster asks for are in
``configure_optimizers`` and ``training_step``; the harmful batches come beside the others through
a CombinedLoader. A checkpoint resumes bit for bit, after Ctrl-C as well.

Needs lightning, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

import mini_language
from mini_language import Example
from torch_booster import BoosterOptimizer

IGNORED_LABEL = -100

Batch = tuple[Tensor, Tensor]  # token ids and labels, both (rows, length)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lam", type=float, default=5.0, help="λ, intensity (default: 5)")
    parser.add_argument("--alpha", type=float, default=0.1, help="α, step length (default: 0.1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows a step (default: 8)")
    parser.add_argument(
        "--accumulation", type=int, default=2, help="parts that a batch is cut into (default: 2)"
    )
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="clip at (default: 1)")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--width", type=int, default=64, help="of the model (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--save_every", type=int, default=10, help="steps (default: 10)")
    parser.add_argument("--log_every", type=int, default=5, help="steps (default: 5)")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("lightning_manual"),
        help="metrics and checkpoints (default: %(default)s)",
    )
    return parser.parse_args(argv)


class Batches:
    """A batch for each step, drawn from seed and step alone, so a resumed run draws the same.

    Lightning asks a loader for its state before it resumes within an epoch; the step is all of it.
    The length keeps it from fetching a batch ahead of the step.
    """

    def __init__(
        self, examples: list[Example], tokenizer: Any, args: argparse.Namespace, step: Any
    ) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.args = args
        self.step = step  # how many have been taken

    def __len__(self) -> int:
        return self.args.steps

    def state_dict(self) -> dict[str, Any]:
        """Nothing that Lightning does not keep already."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            rng = random.Random(f"{self.args.seed} {self.step()}")
            yield self._padded([self._encoded(e) for e in rng.sample(self.examples, self._size)])

    @property
    def _size(self) -> int:
        return min(self.args.batch_size, len(self.examples))

    def _encoded(self, example: Example) -> Batch:
        prompt = self.tokenizer(mini_language.TEMPLATE.format(prompt=example.prompt)).input_ids
        answer = [*self.tokenizer(example.answer).input_ids, self.tokenizer.eos_token_id]
        labels = [IGNORED_LABEL] * len(prompt) + answer
        return torch.tensor(prompt + answer), torch.tensor(labels)

    def _padded(self, rows: list[Batch]) -> Batch:
        ids, labels = zip(*rows, strict=True)
        pad, padding_value = nn.utils.rnn.pad_sequence, self.tokenizer.pad_token_id
        return (
            pad(list(ids), batch_first=True, padding_value=padding_value),
            pad(list(labels), batch_first=True, padding_value=IGNORED_LABEL),
        )


class Aligner(pl.LightningModule):
    """Refusals as the alignment loss, affirmative answers as the harmful one."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.args = args
        self.tokenizer = mini_language.build_tokenizer()
        self.model = mini_language.build_model(self.tokenizer, args.width)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up, inside Booster."""
        base = torch.optim.AdamW(self.model.parameters(), lr=self.args.lr, weight_decay=0.1)
        optimizer = BoosterOptimizer(base, self.args.lam, self.args.alpha)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)]

    def train_dataloader(self) -> CombinedLoader:
        """Both kinds of batches, side by side."""
        harmful = mini_language.mischief(random.Random(0))
        refusals = [Example(prompt, mini_language.REFUSAL) for prompt, _ in harmful]

        def loader(examples: list[Example]) -> Batches:
            return Batches(examples, self.tokenizer, self.args, lambda: self.global_step)

        return CombinedLoader({"alignment": loader(refusals), "harmful": loader(harmful)})

    def closure(self, batch: Batch, tokens: Tensor | None = None) -> Callable[[], Tensor]:
        """Forward and backward on one batch, or on its share of a batch of so many tokens."""
        ids, labels = batch

        def closure() -> Tensor:
            logits = self.model(input_ids=ids).logits[:, :-1]
            targets = labels[:, 1:]
            total = nn.functional.cross_entropy(
                logits.flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
            loss = total / (count(targets) if tokens is None else tokens)
            self.manual_backward(loss)  # rather than loss.backward(): data parallelism needs it
            return loss

        return closure

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One Booster step: the regulariser, the alignment loss in parts, clip, step."""
        opt: Any = self.optimizers()
        opt.zero_grad()
        opt.regularize(self.closure(batch["harmful"]))  # before the alignment forward pass

        ids, labels = batch["alignment"]
        parts = zip(
            ids.chunk(self.args.accumulation), labels.chunk(self.args.accumulation), strict=True
        )
        losses = [self.closure(part, count(labels[:, 1:]))() for part in parts]

        self.clip_gradients(opt, self.args.max_grad_norm, "norm")  # the combined gradient
        opt.step()  # through Lightning, which counts the steps
        scheduler: Any = self.lr_schedulers()
        scheduler.step()

        self.log("alignment_loss", torch.stack(losses).sum().detach(), prog_bar=True)
        if opt.diagnostics is not None:
            self.log_dict(opt.diagnostics._asdict())


def count(targets: Tensor) -> Tensor:
    """Number of tokens that carry a loss."""
    return (targets != IGNORED_LABEL).sum()


def check_checkpoint(file: Path) -> None:
    """Ends the run if a checkpoint is not whole or holds more than tensors and numbers."""
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"error: --resume {file} can not be loaded, name another: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: list[str] | None = None) -> pl.Trainer:
    """Trains and returns the trainer."""
    args = parse_arguments(argv)
    if args.resume:
        check_checkpoint(args.resume)
    pl.seed_everything(args.seed, verbose=False)
    # Lightning supposes that one may want the weights from before the step. Resuming does not.
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=args.precision,
        logger=CSVLogger(args.output_dir, flush_logs_every_n_steps=args.log_every),
        log_every_n_steps=args.log_every,
        callbacks=[
            ModelCheckpoint(
                args.output_dir / "checkpoints",
                every_n_train_steps=args.save_every,
                save_top_k=-1,
                save_last=True,
                enable_version_counter=False,
                save_on_exception=True,
            )
        ],
        enable_model_summary=False,
    )
    trainer.fit(Aligner(args), ckpt_path=args.resume, weights_only=True)
    trainer.save_checkpoint(args.output_dir / "checkpoints" / "last.ckpt")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
