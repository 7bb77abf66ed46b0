"""One training run as a folder, runs/NAME: checkpoint, logs, and the loop between them."""

import csv
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from training import checkpoint as checkpoints
from training.batches import Batches, MemoryBatches, steps_per_epoch
from training.checkpoint import Checkpoint, Machine, Plan
from training.course import Course
from training.data import Dataset, Split, normalisation_of
from training.exceptions import RunError
from training.file_batches import FileBatches
from training.image_files import ImageFiles
from training.loop import (
    StepRecord,
    Trainee,
    fit,
    load_optimizer,
    new_trainee,
    seed_weights,
)
from training.losses import make_loss
from training.networks import count_weights, make_network
from training.progress import Progress
from training.ranks import ALONE, Ranks, lost_ranks_reported
from training.recipes import Recipe
from training.second_stage import Weights, stage_network
from training.step import has_bf16

CHECKPOINT_EVERY_S = 30.0
LOG_COLUMNS = ("epoch", "step", "loss", "rate", "images_per_s", "seconds")


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
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    ranks: Ranks = ALONE,
    backbone: Weights | None = None,
) -> Checkpoint | Stopped:
    """Train what the plan says in the run folder, from its checkpoint or anew, and log as it goes.

    A second stage needs the weights of the `backbone` it stands on.

    The checkpoint is replaced whole before the first step, then every so many seconds whatever the step, at
    the end, and on the first Ctrl-C or SIGTERM. Of several ranks the leader alone touches the folder. Raises
    RunError.
    """
    check_shares(plan.recipe, len(split.trained), ranks)
    n_classes = len(dataset.class_labels)
    class_counts = np.bincount(split.trained.labels, minlength=n_classes)
    loss = make_loss(plan.loss, class_counts, plan.tau, device, options=plan.loss_options, head=plan.head)
    seed_weights(plan.seed)
    trainee = new_trainee(stage_network(plan, n_classes, loss.head, backbone), plan.recipe, device)
    fresh = _starting_point(plan, dataset, split, trainee=trainee, device=device, ranks=ranks)
    try:
        with _alone_in(folder) if ranks.leads else nullcontext(), lost_ranks_reported():
            now = ranks.from_leader(lambda: _start(fresh, dataset, split, folder, progress, resume=resume))
            _restore(trainee, now)
            batches = _batches(now, split, device)
            course = Course(
                epoch_steps=steps_per_epoch(batches.n_images, plan.recipe.batch_size),
                total_steps=now.total_steps,
                seconds=now.seconds,
                epoch_losses=now.epoch_losses,
                device=device,
            )
            steps = fit(
                trainee,
                batches,
                loss,
                plan.recipe,
                total_steps=now.total_steps,
                seed=plan.seed,
                ranks=ranks,
            )
            with progress.showing(now, folder), _interruptions() as interrupted:
                saved = _checkpoints(
                    steps,
                    course,
                    trainee,
                    now,
                    every_s=checkpoint_every_s,
                    progress=progress,
                    interrupted=interrupted,
                    ranks=ranks,
                )
                for now in saved:
                    if ranks.leads:
                        _save(now, folder)
    except OSError as failure:
        raise RunError(f"{folder} cannot be used: {failure.strerror or failure}") from failure
    return now if now.finished else Stopped(now.step)


def check_shares(recipe: Recipe, n_images: int, ranks: Ranks) -> None:
    """Refuse a number of ranks that cannot share out a batch evenly: the mean over them would be off."""
    batch = min(recipe.batch_size, n_images)
    if batch % ranks.size:
        raise RunError(f"{ranks.size} processes cannot share a batch of {batch} images evenly")


def check_room(network: str, n_classes: int, folders: Iterable[Path]) -> None:
    """Refuse a run whose checkpoints (weights, mean and momentum, old and new) or bundle will not fit."""
    with torch.device("meta"):
        n_weights = count_weights(make_network(network, n_classes))
    needed = n_weights * 4 * 8 + 20 * 2**20
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


def _checkpoints(
    steps: Iterator[StepRecord],
    course: Course,
    trainee: Trainee,
    start: Checkpoint,
    *,
    every_s: float,
    progress: Progress,
    interrupted: list[int],
    ranks: Ranks,
) -> Iterator[Checkpoint]:
    """Take the steps; yield what is to be saved now and then, at the end, and once interrupted."""
    now, history, saved_at = start, [*start.history], time.monotonic()
    for record in steps:
        course.add(record)
        progress.step(record)
        stopping = ranks.any(bool(interrupted))
        saving = stopping or record.step == start.total_steps or time.monotonic() - saved_at >= every_s
        if saving or course.epoch_ends or course.look_is_due:
            _check_finite(course, now)
        if course.epoch_ends:
            history.append(course.close_epoch())
            progress.epoch(history[-1])
        if saving:
            now = _at(now, trainee, course, history)
            yield now
            saved_at = time.monotonic()
        if stopping:
            return


def _check_finite(course: Course, last_saved: Checkpoint) -> None:
    step = course.first_not_finite()
    if step is not None:
        raise _diverged(f"the loss is no longer finite at step {step}", last_saved)


def _diverged(what: str, last_saved: Checkpoint) -> RunError:
    return RunError(
        f"{what}; the checkpoint after step {last_saved.step} is kept, try a recipe with a smaller learning"
        f" rate than {last_saved.plan.recipe.peak_rate:g}"
    )


def _starting_point(
    plan: Plan, dataset: Dataset, split: Split, *, trainee: Trainee, device: torch.device, ranks: Ranks
) -> Checkpoint:
    epoch_steps = steps_per_epoch(len(split.trained), plan.recipe.batch_size)
    total_steps = plan.steps if plan.steps is not None else (plan.epochs or plan.recipe.epochs) * epoch_steps
    return Checkpoint(
        plan=plan,
        machine=Machine(
            device.type, torch.get_num_threads(), str(torch.__version__), has_bf16(device), ranks.size
        ),
        data_fingerprint=dataset.fingerprint(),
        mean=(),  # until a new run starts: it takes a look at the images
        std=(),
        git_commit=_git_commit(),
        step=0,
        total_steps=total_steps,
        seconds=0.0,
        network={name: tensor.cpu() for name, tensor in trainee.network.state_dict().items()},
        optimizer=trainee.optimizer.state_dict(),
        average=None if trainee.average is None else trainee.average.state,
    )


def _batches(now: Checkpoint, split: Split, device: torch.device) -> Batches:
    mean, std = torch.tensor(now.mean, device=device), torch.tensor(now.std, device=device)
    augmentation, balanced = now.plan.recipe.augmentation, now.plan.second_stage is not None
    if isinstance(split.trained, ImageFiles):
        return FileBatches(split.trained, mean, std, augmentation=augmentation, class_balanced=balanced)
    (images,) = split.trained.blocks(len(split.trained))
    return MemoryBatches(
        torch.from_numpy(images).to(device),
        torch.from_numpy(split.trained.labels).to(device),
        mean,
        std,
        augmentation=augmentation,
        class_balanced=balanced,
    )


def _start(
    fresh: Checkpoint, dataset: Dataset, split: Split, folder: Path, progress: Progress, *, resume: bool
) -> Checkpoint:
    """Return where the run goes on from: its checkpoint, or a new one in a cleared folder."""
    if resume:
        return _resumed(fresh, folder / checkpoints.FILE, progress)
    for name in (checkpoints.FILE, "log.csv"):
        (folder / name).unlink(missing_ok=True)
    if (folder / "tensorboard").exists():
        shutil.rmtree(folder / "tensorboard")
    mean, std = normalisation_of(dataset, split.trained)
    started = replace(fresh, mean=mean, std=std)
    _save(started, folder)
    return started


def _resumed(fresh: Checkpoint, path: Path, progress: Progress) -> Checkpoint:
    """Return the saved run; RunError if it is not the one asked for."""
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
    if saved.machine.ranks != fresh.machine.ranks:
        progress.say(
            f"resumed with {fresh.machine.ranks} ranks instead of {saved.machine.ranks}: batch normalisation"
            " sees other shares of a batch, and the weights will differ"
        )
    return saved


def _restore(trainee: Trainee, saved: Checkpoint) -> None:
    trainee.network.load_state_dict(saved.network)
    if trainee.average is not None and saved.average is not None:
        trainee.average.load(saved.average)
    load_optimizer(trainee, saved.optimizer)
    trainee.step = saved.step


def _at(before: Checkpoint, trainee: Trainee, course: Course, history: list[dict[str, float]]) -> Checkpoint:
    """Return the run as it stands; RunError if its weights are not fit to be kept."""
    network = trainee.network.state_dict()
    if not torch.stack([tensor.isfinite().all() for tensor in network.values()]).all():
        raise _diverged(f"the weights are no longer finite after step {trainee.step}", before)
    return replace(
        before,
        step=trainee.step,
        seconds=course.seconds,
        network=network,
        optimizer=trainee.optimizer.state_dict(),
        average=None if trainee.average is None else trainee.average.state,
        history=[*history],
        epoch_losses=course.epoch_losses,
    )


def _save(now: Checkpoint, folder: Path) -> None:
    checkpoints.save(now, folder / checkpoints.FILE)
    _write_log(now.history, folder / "log.csv")


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
        rows = csv.DictWriter(file, fieldnames=LOG_COLUMNS)
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
