"""What a run keeps on disk: enough to go on after a kill as if nothing had been, and to write the bundle."""

import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.exceptions import RunError, first_line
from training.losses import LossOptions
from training.recipes import Recipe

FILE = "checkpoint.pt"
_FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Where the images come from, as the command line said it; paths are absolute."""

    dataset: str
    data_dir: str | None = None
    train_file: str | None = None
    test_file: str | None = None
    profile: str = "exp"
    imbalance_ratio: float = 100.0
    image_size: int | None = None


@dataclass(frozen=True)
class SecondStage:
    """A classifier trained anew over a frozen backbone: by which method, and on which weights."""

    classifier: str
    backbone: str  # sha256 of its weights
    backbone_run: str  # what the run was called, for people


@dataclass(frozen=True)
class Plan:
    """What is to be trained. Equal plans on equal data give equal weights."""

    source: Source
    network: str
    loss: str
    tau: float | None
    recipe: Recipe
    epochs: int | None  # exactly one of epochs and steps is set
    steps: int | None
    holdout: float
    seed: int
    loss_options: LossOptions = field(default_factory=LossOptions)
    head: str | None = None  # None: the one that the loss is made for
    second_stage: SecondStage | None = None


@dataclass(frozen=True)
class Machine:
    """What besides the plan decides the last bits of the weights."""

    device: str
    threads: int
    torch: str
    bf16: bool
    ranks: int = 1  # processes that trained together: each normalises its own share of a batch


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` of `total_steps` steps. Everything is plain values and tensors."""

    plan: Plan
    machine: Machine
    data_fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    git_commit: str | None
    step: int
    total_steps: int
    seconds: float  # spent training so far
    network: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)  # of the steps since the last whole epoch
    average: dict[str, Any] | None = None  # the mean of the network over its steps, where the recipe keeps it

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total_steps

    @property
    def weights(self) -> dict[str, Any]:
        """What the run is for: the mean of the network where there is one, else the network as it stands."""
        return self.network if self.average is None else self.average


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint whole: a kill at any moment leaves the old one or the new one. Raises RunError."""
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("wb") as file:
            torch.save(
                {"format": _FORMAT, **{name: getattr(checkpoint, name) for name in _PLAIN}}
                | {"plan": asdict(checkpoint.plan), "machine": asdict(checkpoint.machine)},
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, RuntimeError) as failure:
        scratch.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {first_line(failure)}") from failure


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises RunError for one that is missing, damaged or of another kind."""
    if not path.is_file():
        raise RunError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is not a whole checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise RunError(f"{path} has format {content['format']}, this release reads {_FORMAT}")
        raw = content["plan"]
        recipe = Recipe(**{**raw["recipe"], "drops": tuple(raw["recipe"]["drops"])})
        options = LossOptions(**raw.get("loss_options", {}))  # older runs have none
        stage = raw.get("second_stage")
        plan = Plan(
            **{
                **raw,
                "source": Source(**raw["source"]),
                "recipe": recipe,
                "loss_options": options,
                "second_stage": stage and SecondStage(**stage),
            }
        )
        return Checkpoint(
            plan=plan,
            machine=Machine(**content["machine"]),
            **{name: content[name] for name in _PLAIN if name not in _ADDED or name in content},
        )
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as failure:
        raise RunError(f"{path} is not a whole checkpoint: {first_line(failure)}") from failure
    except (KeyError, TypeError) as failure:
        raise RunError(f"{path} is not a checkpoint of this program ({failure})") from failure


def differences(old: Plan, new: Plan) -> list[str]:
    """Return, in words, what two plans disagree about; where the images lie may change."""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    return [
        f"{name} was {before.get(name)}, now {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and name not in _NAMES_OF_PLACES
    ]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("source", "loss_options") or (name == "second_stage" and value is not None):
            flat |= _flat(value)
        elif name == "recipe":
            flat["recipe"] = value["name"]
            flat |= {f"recipe's {part}": inner for part, inner in _flat(value).items() if part != "name"}
        else:
            flat[name.replace("_", " ")] = value
    return flat


_NAMES_OF_PLACES = {"data dir", "train file", "test file", "backbone run"}
_PLAIN = (
    "data_fingerprint",
    "mean",
    "std",
    "git_commit",
    "step",
    "total_steps",
    "seconds",
    "network",
    "optimizer",
    "history",
    "epoch_losses",
    "average",
)
_ADDED = {"epoch_losses", "average"}  # not in files of earlier releases
