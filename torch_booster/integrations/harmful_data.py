"""The harmful data of trainers: what is refused of it before a run, and its batches by number."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from torch_booster.checks import shown

__all__ = [
    "HarmfulStream",
    "checked_dataset",
    "checked_first_batch",
    "checked_labels",
    "first_rows",
    "repeated",
    "rows_dropped",
]

logger = logging.getLogger(__name__)


def checked_dataset(dataset: Any, prepared: bool = False) -> Any:
    """A dataset that can be read epoch after epoch.

    Args:
        dataset: What was given as `harmful_dataset`.
        prepared: It has been through the trainer's preparation, which drops rows.

    Raises:
        ValueError: It is None or empty.
        TypeError: It is no dataset.
    """
    if dataset is None:
        raise ValueError("harmful_dataset is None. Pass the examples to be resisted.")
    remedy = _remedy(dataset)
    if remedy:
        raise TypeError(f"harmful_dataset is {shown(dataset)}. {remedy}")
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(
            "harmful_dataset is empty"
            + (
                ": the trainer's preparation dropped every row. Raise max_length or shorten the "
                "prompts, which may fill it alone."
                if prepared
                else ". Pass the examples to be resisted."
            )
        )
    return dataset


def _remedy(dataset: Any) -> str:
    """What to pass instead of something that is no dataset."""
    if isinstance(dataset, (str, bytes)) or hasattr(dataset, "__fspath__"):
        return "Pass the dataset, not its path or name: datasets.load_dataset(...)."
    if isinstance(dataset, DataLoader):
        return "Pass its dataset; the trainer makes the loader (get_harmful_dataloader)."
    if isinstance(dataset, Mapping):
        return "Pass one dataset and not a mapping of them: harmful_dataset=splits['train']."
    if isinstance(dataset, Iterator):
        return "It can be read once only. Pass a list of rows, or Dataset.from_generator(...)."
    if isinstance(dataset, IterableDataset):
        return ""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return "Pass a dataset with a length and indices, or an IterableDataset."
    return ""


def first_rows(dataset: Any, number: int) -> list[Any]:
    """The first rows, fewer where there are no more; none of no dataset."""
    if dataset is None:
        return []
    if isinstance(dataset, IterableDataset):
        return list(islice(iter(dataset), number))  # pyright: ignore[reportUnknownArgumentType]
    return [dataset[i] for i in range(min(number, len(dataset)))]


def rows_dropped(before: Any, after: Any) -> Any:
    """What a preparation left, counting aloud the rows that it dropped."""
    counted = hasattr(before, "__len__") and hasattr(after, "__len__")
    if counted and 0 < len(after) < len(before):  # none left is an error, which follows
        warnings.warn(
            f"{len(before) - len(after)} of {len(before)} rows of harmful_dataset were dropped: "
            "cut to max_length, nothing of their completions was left. Raise max_length or "
            "shorten the prompts.",
            stacklevel=2,
        )
    return after


def checked_first_batch(
    harmful: list[Any],
    alignment: list[Any],
    collate_harmful: Callable[[list[Any]], Any],
    collate_alignment: Callable[[list[Any]], Any],
    trainer: str,
) -> None:
    """Looks whether harmful rows make a batch that can stand in the place of a training batch.

    Args:
        harmful: The first rows of the harmful dataset.
        alignment: As many of the training set, or none.
        collate_harmful: Makes a batch of them.
        collate_alignment: Makes a batch of those of the training set.
        trainer: What to call the trainer in an error.

    Raises:
        ValueError: They make none, it lacks something, no token of it carries a loss, or prompts
            of it carry a loss and those of the training set do not.
    """
    if not harmful:
        raise ValueError("harmful_dataset is empty. Pass the examples to be resisted.")
    try:
        theirs = collate_alignment(alignment) if alignment else {}
    except Exception:  # the training set's own trouble, of which the trainer tells
        theirs = {}
    columns = "; ".join(
        f"{name} has {sorted(map(str, rows[0])) if isinstance(rows[0], Mapping) else 'none'}"
        for name, rows in (("harmful_dataset", harmful), ("the training set", alignment))
        if rows
    )
    remedy = (
        f"As {trainer} holds them, the columns differ or do not suit its collator: {columns}. Give "
        "harmful_dataset the training set's columns. Where a trainer prepares its training set by "
        "itself, let another one of its class do that: "
        "harmful_dataset=ThatTrainer(..., train_dataset=harmful).train_dataset."
    )
    try:
        ours = collate_harmful(harmful)
    except Exception as error:
        raise ValueError(
            f"harmful_dataset makes no batch ({type(error).__name__}: {error}). {remedy}"
        ) from error
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        missing: set[Any] = {*theirs} - {*ours}
        if missing or not ours:
            what = sorted(map(str, missing)) or "anything that the model takes"
            raise ValueError(f"A batch of harmful_dataset has not {what}. {remedy}")
        checked_labels(ours)
        _refuse_unmasked_prompts(ours, theirs)


def checked_labels(batch: Any) -> None:
    """Refuses a harmful batch of which no token carries a loss: h would be 0/0."""
    for key, ignored in (("labels", -100), ("completion_mask", 0)):
        marks: Any = batch.get(key) if isinstance(batch, Mapping) else None
        if not isinstance(marks, Tensor) or marks.is_floating_point() or not marks.numel():
            continue
        if bool((marks == ignored).all()):
            raise ValueError(
                f"No token of a batch of harmful_dataset carries a loss: its {key} are all "
                f"{ignored}. Give its rows labels, and leave out those whose completions are cut "
                "off or empty."
            )


def _refuse_unmasked_prompts(ours: Any, theirs: Any) -> None:
    harmful, alignment = _carrying(ours), _carrying(theirs)
    if harmful is None:
        return
    logger.info(
        "%d of %d tokens of the first harmful batch carry a loss; of the training set's %s",
        *harmful,
        "unknown" if alignment is None else f"{alignment[0]} of {alignment[1]}",
    )
    if alignment is not None and harmful[0] == harmful[1] and alignment[0] < alignment[1]:
        raise ValueError(
            f"All {harmful[1]} tokens of the first batch of harmful_dataset carry a loss, prompts "
            f"included, and of the training set's {alignment[0]} of {alignment[1]}. Give it the "
            "training set's format (prompt and completion, or conversations), or labels."
        )


def _carrying(batch: Any) -> tuple[int, int] | None:
    """How many tokens carry a loss, of how many, where padding can be told."""
    names = ("labels", "input_ids", "attention_mask", "position_ids")
    labels, ids, mask, places = (batch.get(name) for name in names)
    if mask is None and isinstance(places, Tensor):
        mask = places > 0  # padding-free: the first token of each sequence carries none
    if not (isinstance(labels, Tensor) and isinstance(ids, Tensor) and isinstance(mask, Tensor)):
        return None
    if not labels.shape == ids.shape == mask.shape:
        return None
    real = mask.bool()
    return int(torch.logical_and(labels != -100, real).sum()), int(real.sum())


# ------------------------------------------------------------------------------------- batches


def repeated(epoch: Callable[[int], Iterable[Any]], empty: str) -> Iterator[Any]:
    """The batches of epoch after epoch, without end.

    Args:
        epoch: Gives the batches of an epoch, by its number.
        empty: What to say where an epoch has none.

    Raises:
        ValueError: An epoch has none.
    """
    for number in count():
        found = False
        for batch in epoch(number):
            found = True
            yield batch
        if not found:
            raise ValueError(empty)


class HarmfulStream:
    """The batches of a stream by their number, of which those before are read past.

    Batch n belongs to the n-th regulariser. A resumed run thus goes on where it was, and a step
    that was not taken has its batch again.

    Args:
        batches: The stream from its beginning.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._drawn = 0
        self._batch: Any = None

    def batch(self, number: int) -> Any:
        """The batch of a number, which is not lower than the last one asked for.

        Raises:
            ValueError: It is lower.
        """
        if number < self._drawn - 1:
            raise ValueError(
                f"harmful batch {number} is asked for after batch {self._drawn - 1}, and the "
                "stream does not go back. Set `every` before training and leave it."
            )
        while self._drawn <= number:
            self._batch = next(self._batches)
            self._drawn += 1
        return self._batch
