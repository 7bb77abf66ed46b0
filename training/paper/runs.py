"""Trainings stored by what they train, so that tables and figures share them and nothing is trained twice.

A run lies in runs/paper/KEY, where KEY digests its plan and its images. Beside the checkpoint stands
`outcome.npz`: what the finished network says about held-out and test images, from which everything is drawn.
"""

import dataclasses
import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training import checkpoint as checkpoints
from training.bundling import linear_head
from training.checkpoint import Checkpoint, Plan, Source
from training.data import Dataset, Split, split
from training.evaluate import evaluate
from training.exceptions import RunError
from training.losses import make_loss
from training.progress import Progress
from training.recipes import Recipe
from training.run import Stopped, check_room, train
from training.second_stage import Weights, plain_network, stage_on
from training.sources import read

OUTCOME = "outcome.npz"
_PATHS = ("data_dir", "train_file", "test_file")  # where images lie does not say what they are


@dataclass(frozen=True)
class Target:
    """What is to be trained: a plan, or a second stage by `classifier` on what the plan trains."""

    plan: Plan
    classifier: str | None = None
    recipe: Recipe | None = None  # of the second stage
    epochs: int | None = None

    @property
    def first(self) -> "Target":
        """The target itself, or the first stage that a second one stands on."""
        return Target(self.plan)


@dataclass(frozen=True)
class Outcome:
    """What a finished training says, of the last epoch; L classes."""

    test_logits: NDArray[np.float32]  # f (N, L)
    test_labels: NDArray[np.int64]
    holdout_logits: NDArray[np.float32]  # f (n, L), n = 0 where all images were trained on
    holdout_labels: NDArray[np.int64]
    trained: NDArray[np.int64]  # images of each class that the weights saw, (L,)
    class_counts: NDArray[np.int64]  # images of each class in the whole training set, (L,)
    norms: NDArray[np.float64]  # of each class's weights in a linear last layer, (L,); NaN for another
    biases: NDArray[np.float64]  # of it, (L,)
    seconds: NDArray[np.float64]  # spent training, ()


def run_key(target: Target, fingerprint: str) -> str:
    """Return what names the run: all that changes the weights, but not where the images lie.

    Only what differs from a field's default is digested: a field added later leaves old runs findable.
    """
    told = _told(target)
    for name in _PATHS:
        told["plan"]["source"].pop(name, None)
    return hashlib.sha256(json.dumps([told, fingerprint], sort_keys=True).encode()).hexdigest()[:16]


class RunStore:
    """The runs under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, target: Target) -> Path:
        """Return where the target's run lies or would lie. Raises DataError for images that do not."""
        _, fingerprint = loaded(target.plan.source)
        return self.root / run_key(target, fingerprint)

    def finished(self, target: Target) -> Outcome | None:
        """Return the outcome of the target's run, None where it is not finished."""
        return _read_outcome(self.folder(target) / OUTCOME)

    def train(self, target: Target, *, device: torch.device, progress: Progress) -> Outcome | Stopped:
        """Train the target, from its checkpoint where there is one, and keep its outcome.

        A second stage needs its first to be finished. The first Ctrl-C or SIGTERM stops it with its
        checkpoint on disk. Raises TrainingError.
        """
        folder = self.folder(target)
        plan, backbone = self._stage(target)
        dataset, _ = loaded(plan.source)
        cut = split(dataset, plan.holdout, plan.seed)
        check_room(plan.network, len(dataset.class_labels), [folder])
        resume = (folder / checkpoints.FILE).exists()
        result = train(
            plan,
            dataset,
            cut,
            folder,
            device=device,
            progress=progress,
            resume=resume,
            backbone=backbone,
        )
        if isinstance(result, Stopped):
            return result
        outcome = _outcome(result, dataset, cut, device)
        _write_outcome(outcome, folder / OUTCOME)
        return outcome

    def _stage(self, target: Target) -> tuple[Plan, Weights | None]:
        """Return the plan to be trained, and the weights that a second stage stands on."""
        if target.classifier is None or target.recipe is None:
            return target.plan, None
        folder = self.folder(target.first)
        backbone = checkpoints.load(folder / checkpoints.FILE)
        plan = dataclasses.replace(
            target.plan,
            loss="cross-entropy",
            tau=None,
            recipe=target.recipe,
            epochs=target.epochs,
            second_stage=stage_on(backbone, folder.name, target.classifier),
        )
        return plan, backbone.weights


@lru_cache(maxsize=4)
def loaded(source: Source) -> tuple[Dataset, str]:
    """Return the data set and its fingerprint. Raises DataError.

    The sets of the paper bring a test set of their own, so no seed decides what is read.
    """
    dataset = read(source, 0)
    return dataset, dataset.fingerprint()


def _outcome(result: Checkpoint, dataset: Dataset, cut: Split, device: torch.device) -> Outcome:
    plan, n_classes = result.plan, len(dataset.class_labels)
    trained = np.bincount(cut.trained.labels, minlength=n_classes)
    loss = make_loss(plan.loss, trained, plan.tau, device, options=plan.loss_options, head=plan.head)
    network = plain_network(plan, n_classes, loss.head, result.weights).to(device)
    test, held = (
        evaluate(network, part, mean=result.mean, std=result.std, device=device)
        for part in (dataset.test, cut.holdout)
    )
    head = linear_head(network)
    nothing = np.full(n_classes, np.nan)
    return Outcome(
        test_logits=test,
        test_labels=dataset.test.labels,
        holdout_logits=held,
        holdout_labels=cut.holdout.labels,
        trained=trained,
        class_counts=dataset.class_counts,
        norms=nothing if head is None else head.norms,
        biases=nothing if head is None else head.biases,
        seconds=np.array(result.seconds),
    )


def _write_outcome(outcome: Outcome, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("wb") as file:
            np.savez(file, **{f.name: getattr(outcome, f.name) for f in dataclasses.fields(Outcome)})
        scratch.replace(path)
    except OSError as failure:
        raise RunError(f"{path} could not be written: {failure.strerror or failure}") from failure


def _read_outcome(path: Path) -> Outcome | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Outcome(**{f.name: archive[f.name] for f in dataclasses.fields(Outcome)})
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as failure:
        raise RunError(f"{path} is damaged; remove it, and the run is evaluated again") from failure


def _told(value: Any) -> Any:
    """Return a dataclass as plain values, without the fields that are at their default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    told = {}
    for part in dataclasses.fields(value):
        held = getattr(value, part.name)
        if part.default_factory is not dataclasses.MISSING:
            default: Any = part.default_factory()
        else:
            default = part.default
        if default is dataclasses.MISSING or held != default:
            told[part.name] = _told(held)
    return told
