r"""Booster in Lightning: manual optimization, with everything else left to the Trainer.

    python examples/lightning_manual.py                    # tiny model, seconds on a CPU
    python examples/lightning_manual.py --steps 400 --resume lightning_manual/checkpoints/last.ckpt

Booster's lines are in ``configure_optimizers`` and ``training_step``; harmful batches come beside
the others through a CombinedLoader. A checkpoint resumes bit for bit, after Ctrl-C as well.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from inputs import draw, tiny_llama
from torch_booster import BoosterOptimizer

FLAGS = {"lam": 5.0, "alpha": 0.1, "lr": 1e-3, "steps": 20, "batch_size": 8, "accumulation": 2}
FLAGS |= {"precision": "32-true", "width": 64, "seed": 0, "save_every": 10, "resume": ""}
FLAGS |= {"output_dir": Path("lightning_manual")}


class Batches:
    """A batch for each step, drawn from seed and step alone, so a resumed run draws the same."""

    state_dict = load_state_dict = dict  # Lightning asks for a state; the step is all of it

    def __init__(self, name: str, module: Aligner) -> None:
        self.name, self.module = name, module

    def __len__(self) -> int:
        return self.module.args.steps  # known, so that no batch is fetched ahead of the step

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        args = self.module.args
        for _ in range(args.steps):
            yield draw(self.name, args.batch_size, f"{args.seed} {self.module.global_step}")


class Aligner(pl.LightningModule):
    """Refusals as the alignment loss, affirmative answers as the harmful one."""

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.args = args
        self.model = tiny_llama(args.width, args.seed)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up, inside Booster."""
        base = torch.optim.AdamW(self.model.parameters(), lr=self.args.lr, weight_decay=0.1)
        optimizer = BoosterOptimizer(base, self.args.lam, self.args.alpha)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)]

    def run(self, rows: dict[str, Tensor], of: dict[str, Tensor]) -> Tensor:
        """Forward and backward on a batch, or on its share of a larger one."""
        loss = self.model(**rows, num_items_in_batch=(of["labels"] != -100).sum()).loss
        self.manual_backward(loss)  # rather than loss.backward(): data parallelism needs it
        return loss.detach()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One Booster step: the regulariser, the alignment loss in parts, clip, step."""
        opt: Any = self.optimizers()
        alignment, harmful, parts = batch["alignment"], batch["harmful"], self.args.accumulation
        opt.zero_grad()
        opt.regularize(lambda: self.run(harmful, of=harmful))  # before the forward pass
        shares = ({key: rows[n::parts] for key, rows in alignment.items()} for n in range(parts))
        loss = sum(self.run(share, of=alignment) for share in shares)
        self.clip_gradients(opt, 1.0, "norm")  # the combined gradient
        opt.step()  # through Lightning, which counts the steps
        self.lr_schedulers().step()
        self.log("alignment_loss", loss, prog_bar=True)
        if self.args.lam:
            self.log("harmful_loss_drop", opt.diagnostics.harmful_loss_drop)


def main(argv: list[str] | None = None) -> pl.Trainer:
    """Trains and returns the trainer."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default}")
    args = parser.parse_args(argv)
    if args.resume:
        try:  # a checkpoint is to be whole, and to hold numbers alone
            torch.load(args.resume, map_location="meta", weights_only=True)
        except Exception as error:
            parser.exit(2, f"error: {args.resume} can not be loaded, name another: {error}\n")
    # Lightning supposes that one may want the weights from before the step. Resuming does not.
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    folder = args.output_dir / "checkpoints"
    saving = {"every_n_train_steps": args.save_every, "save_top_k": -1, "save_last": True}
    saving |= {"enable_version_counter": False, "save_on_exception": True}
    trainer = pl.Trainer(
        max_steps=args.steps,
        devices=1,
        precision=args.precision,
        logger=CSVLogger(args.output_dir),
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(folder, **saving)],
        enable_model_summary=False,
    )
    module = Aligner(args)
    loaders = CombinedLoader({name: Batches(name, module) for name in ("alignment", "harmful")})
    trainer.fit(module, loaders, ckpt_path=args.resume or None, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


if __name__ == "__main__":
    main()
