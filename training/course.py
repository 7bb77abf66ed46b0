"""What a run has come to: the losses of the epoch under way, its row once it ends, the watch for NaN."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from training.loop import StepRecord

_GPU_LOOKS_EVERY_S = 1.0  # to look at a loss is to wait for the GPU


class Course:
    """Follows the steps of one run from where it starts or goes on."""

    def __init__(
        self,
        *,
        epoch_steps: int,
        total_steps: int,
        seconds: float,
        epoch_losses: Sequence[float],
        device: torch.device,
    ) -> None:
        """Go on from a run of so many seconds that is `epoch_losses` into an epoch."""
        self._epoch_steps, self._total_steps = epoch_steps, total_steps
        self._losses: list[Tensor] = [torch.tensor(loss, device=device) for loss in epoch_losses]
        self._seen_finite = len(self._losses)
        self._looks_every_s = _GPU_LOOKS_EVERY_S if device.type == "cuda" else 0.0
        self._began = time.monotonic() - seconds
        self._last_look = self._epoch_began = time.monotonic()
        self._epoch_images = 0  # since this process started
        self._last = StepRecord(0, torch.tensor(0.0), 0.0, 0)

    @property
    def seconds(self) -> float:
        """Time spent training, by all processes that took the run further."""
        return time.monotonic() - self._began

    @property
    def epoch_losses(self) -> list[float]:
        """The loss of each step since the last whole epoch; waits for the device."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @property
    def epoch_ends(self) -> bool:
        """Whether the last step taken completes an epoch or the run."""
        return self._last.step % self._epoch_steps == 0 or self._last.step == self._total_steps

    @property
    def look_is_due(self) -> bool:
        """Whether it is time to look for NaN: after each step on a CPU, each second on a GPU."""
        return time.monotonic() - self._last_look >= self._looks_every_s

    def add(self, record: StepRecord) -> None:
        """Take a step into account."""
        self._last = record
        self._losses.append(record.loss)
        self._epoch_images += record.images

    def first_not_finite(self) -> int | None:
        """Return the first step of this epoch whose loss is not a finite number; waits for the device."""
        self._last_look = time.monotonic()
        fresh = self._losses[self._seen_finite :]
        finite = torch.isfinite(torch.stack(fresh)).tolist() if fresh else []
        if not all(finite):
            return self._last.step - len(fresh) + 1 + finite.index(False)
        self._seen_finite = len(self._losses)
        return None

    def close_epoch(self) -> dict[str, float]:
        """Return the epoch's row for the log and begin the next."""
        row = {
            "epoch": self._last.step / self._epoch_steps,
            "step": self._last.step,
            "loss": float(torch.stack(self._losses).mean()),
            "rate": self._last.rate,
            "images_per_s": self._epoch_images / (time.monotonic() - self._epoch_began),
            "seconds": self.seconds,
        }
        self._losses, self._seen_finite, self._epoch_images = [], 0, 0
        self._epoch_began = time.monotonic()
        return row
