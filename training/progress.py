"""How a person follows a run: a bar on a terminal, a line an epoch elsewhere, and TensorBoard."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rich.progress
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.checkpoint import Checkpoint
from training.loop import StepRecord

_BAR_EVERY_S = 0.5  # between looks at the loss: reading it from a GPU waits for the GPU


class Progress:
    """Talks on stderr; stdout is for results. Says nothing in a process that does not lead."""

    def __init__(self, *, leads: bool = True) -> None:
        self._leads = leads
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)
        self._total_steps = 0
        self._writer: SummaryWriter | None = None
        self._losses: list[Tensor] = []  # since the bar last moved
        self._moved_at = 0.0

    def say(self, sentence: str) -> None:
        """Print one sentence above the bar."""
        if self._leads:
            self.insist(sentence)

    def insist(self, sentence: str) -> None:
        """Print a sentence whoever leads."""
        self._console.print(sentence, markup=False)

    @contextmanager
    def showing(self, start: Checkpoint, folder: Path) -> Iterator[None]:
        """Show a run from its starting point on until the block ends."""
        self._total_steps = start.total_steps
        if not self._leads:
            yield
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(
                "loss {task.fields[loss]:.3f}  {task.fields[images_per_s]:.0f} images/s"
            ),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=start.total_steps, completed=start.step, loss=float("nan"), images_per_s=0.0
        )
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=start.step + 1)
        try:
            with self._bar:
                yield
        finally:
            self._writer.close()
            self._bar = self._writer = None

    def step(self, record: StepRecord) -> None:
        """Move the bar."""
        if self._bar is None or self._bar.disable:
            return
        self._losses.append(record.loss)
        if time.monotonic() - self._moved_at >= _BAR_EVERY_S:
            speed = self._bar.tasks[0].speed or 0.0
            self._bar.update(
                self._task,
                completed=record.step,
                loss=float(torch.stack(self._losses).mean()),
                images_per_s=speed * record.images,
            )
            self._losses, self._moved_at = [], time.monotonic()

    def epoch(self, row: dict[str, float]) -> None:
        """Log what the last epoch came to."""
        step = int(row["step"])
        if self._writer is not None:
            for name in ("loss", "rate", "images_per_s"):
                self._writer.add_scalar(name, row[name], step)
            self._writer.flush()
        if self._leads and not self._console.is_terminal:
            left = (self._total_steps - step) * row["seconds"] / step
            self.say(
                f"epoch {row['epoch']:.4g}: loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s,"
                f" about {left / 60:.1f} min left"
            )
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
