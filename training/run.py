"""One training run as a folder, runs/NAME: checkpoint, logs, and the loop between them."""

import csv
import fcntl
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from longtail.priors import prior_from_counts
from training import checkpoint as checkpoints
from training.batches import Batches, MemoryBatches, steps_per_epoch
from training.checkpoint import Checkpoint, Machine, Plan
from training.data import Dataset, Split, channel_statistics
from training.exceptions import RunError
from training.file_batches import FileBatches
from training.image_files import PIECE, ImageFiles
from training.loop import (
    StepRecord,
    Trainee,
    fit,
    has_bf16,
    new_trainee,
    seed_weights,
)
from training.losses import make_loss
from training.networks import count_weights, make_network
from training.progress import Progress


@dataclass(frozen=True)
class Stopped:
    """The run was interrupted after this many steps; its checkpoint is on disk."""

    step: int


def train(
    plan: Plan,
    dataset: Dataset,
    split: Split,
    folder: Path,
    *,
    device: torch.device,
    progress: Progress,
    resume: bool,
) -> Checkpoint | Stopped:
    """Train what the plan says in the run folder, from its checkpoint or anew, and log as it goes.

    After each epoch, and on the first Ctrl-C or SIGTERM, the checkpoint is replaced whole. Raises RunError.
    """
    source_prior = prior_from_counts(np.bincount(split.trained.labels, minlength=len(dataset.class_labels)))
    loss = make_loss(plan.loss, source_prior, plan.tau, device)
    seed_weights(plan.seed)
    trainee = new_trainee(make_network(plan.network, len(dataset.class_labels)), plan.recipe, device)
    now = _starting_point(plan, dataset, split, device)
    try:
        with _alone_in(folder):
            if resume:
                now = _resumed(now, folder / checkpoints.FILE, trainee, progress)
            else:
                _clear(folder)
            batches = _batches(now, split, device)
            steps = fit(trainee, batches, loss, plan.recipe, total_steps=now.total_steps, seed=plan.seed)
            epoch_steps = steps_per_epoch(batches.n_images, plan.recipe.batch_size)
            with progress.showing(now, folder), _interruptions() as interrupted:
                for row in _rows(steps, epoch_steps, now, progress, interrupted):
                    now = _at(now, trainee, row)
                    checkpoints.save(now, folder / checkpoints.FILE)
                    _write_log(now.history, folder / "log.csv")
                    progress.epoch(row)
    except OSError as failure:
        raise RunError(f"{folder} cannot be used: {failure.strerror or failure}") from failure
    return now if now.finished else Stopped(now.step)


def check_room(network: str, n_classes: int, folders: Iterable[Path]) -> None:
    """Refuse a run whose checkpoints (weights and momentum, old and new at once) or bundle will not fit."""
    with torch.device("meta"):
        n_weights = count_weights(make_network(network, n_classes))
    needed = n_weights * 4 * 6 + 20 * 2**20
    for folder in folders:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise RunError(f"nothing can be written under {existing}")
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise RunError(
                f"the disk under {existing} has {free / 2**20:.0f} MiB left; the checkpoints and the bundle"
                f" of this run need {needed / 2**20:.0f}"
            )


def _rows(
    steps: Iterator[StepRecord],
    epoch_steps: int,
    start: Checkpoint,
    progress: Progress,
    interrupted: list[int],
) -> Iterator[dict[str, float]]:
    """Take the steps; yield a row of the log after each epoch, at the end, and once interrupted."""
    losses: list[torch.Tensor] = []
    images, seconds, since = 0, start.seconds, time.monotonic()
    for record in steps:
        losses.append(record.loss)
        images += record.images
        progress.step(record, losses)
        if not (record.step % epoch_steps == 0 or record.step == start.total_steps or interrupted):
            continue
        mean_loss, elapsed = float(torch.stack(losses).mean()), time.monotonic() - since
        if not math.isfinite(mean_loss):
            raise RunError(
                f"the loss is no longer finite at step {record.step}; the checkpoint before it is kept,"
                f" try a recipe with a smaller learning rate than {start.plan.recipe.peak_rate}"
            )
        seconds += elapsed
        yield {
            "epoch": record.step / epoch_steps,
            "step": record.step,
            "loss": mean_loss,
            "rate": record.rate,
            "images_per_s": images / elapsed,
            "seconds": seconds,
        }
        if interrupted:
            return
        losses, images, since = [], 0, time.monotonic()


def _starting_point(plan: Plan, dataset: Dataset, split: Split, device: torch.device) -> Checkpoint:
    mean, std = dataset.normalisation or channel_statistics(split.trained.blocks(PIECE))
    epoch_steps = steps_per_epoch(len(split.trained), plan.recipe.batch_size)
    total_steps = plan.steps if plan.steps is not None else (plan.epochs or plan.recipe.epochs) * epoch_steps
    return Checkpoint(
        plan=plan,
        machine=Machine(device.type, torch.get_num_threads(), str(torch.__version__), has_bf16(device)),
        data_fingerprint=dataset.fingerprint(),
        mean=mean,
        std=std,
        git_commit=_git_commit(),
        step=0,
        total_steps=total_steps,
        seconds=0.0,
        network={},
        optimizer={},
    )


def _batches(now: Checkpoint, split: Split, device: torch.device) -> Batches:
    mean, std = torch.tensor(now.mean, device=device), torch.tensor(now.std, device=device)
    crop_padding = now.plan.recipe.crop_padding
    if isinstance(split.trained, ImageFiles):
        return FileBatches(split.trained, mean, std, crop_padding=crop_padding)
    (images,) = split.trained.blocks(len(split.trained))
    return MemoryBatches(
        torch.from_numpy(images).to(device),
        torch.from_numpy(split.trained.labels).to(device),
        mean,
        std,
        crop_padding=crop_padding,
    )


def _resumed(fresh: Checkpoint, path: Path, trainee: Trainee, progress: Progress) -> Checkpoint:
    """Put the saved state into the trainee and return it as the new start; RunError if it differs."""
    saved = checkpoints.load(path)
    differing = checkpoints.differences(saved.plan, fresh.plan)
    if differing:
        raise RunError(f"{path} is a run of another recipe: {'; '.join(differing)}")
    if saved.data_fingerprint != fresh.data_fingerprint:
        raise RunError(f"{path} was trained on other images or labels than those found now")
    for name in ("device", "threads", "torch", "bf16"):
        before, now = getattr(saved.machine, name), getattr(fresh.machine, name)
        if before != now:
            progress.say(
                f"resumed with {name} {now} instead of {before}: the weights may differ in the last bits"
            )
    trainee.network.load_state_dict(saved.network)
    trainee.optimizer.load_state_dict(saved.optimizer)
    trainee.step = saved.step
    return saved


def _at(before: Checkpoint, trainee: Trainee, row: dict[str, float]) -> Checkpoint:
    return replace(
        before,
        step=trainee.step,
        seconds=row["seconds"],
        network=trainee.network.state_dict(),
        optimizer=trainee.optimizer.state_dict(),
        history=[*before.history, row],
    )


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in (checkpoints.FILE, "log.csv"):
        (folder / name).unlink(missing_ok=True)
    if (folder / "tensorboard").exists():
        shutil.rmtree(folder / "tensorboard")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: two runs in one would replace each other's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            raise RunError(f"another process is training in {folder}") from failure
        yield


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM instead of raising it amid a step; the second acts at once."""
    seen: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_log(history: list[dict[str, float]], path: Path) -> None:
    """Write the whole log anew: a resumed run never holds an epoch twice."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=list(history[0]))
        rows.writeheader()
        rows.writerows(history)
    scratch.replace(path)


def _git_commit() -> str | None:
    """Return the commit of this source tree, marked if the tree has changes, or None outside git."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-changed" if changes else "")
