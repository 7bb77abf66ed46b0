"""The contract between training and serving: what `manifest.json` may say, checked as it is read.

A manifest that passes here is whole and consistent in itself: lengths agree, labels are unique, every number
is finite. Whether the files beside it are the ones it names is `bundle.files`' work; whether the graph fits
it is checked where the graph is composed.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from longtail.normalisation import BiasRule
from longtail.priors import PriorError, checked_source_prior
from longtail.tau import TauRule

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Probability = Annotated[float, Field(ge=0, le=1)]
_NUMPY_NAMES: Final = {
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
}
_MOST_NUMBERS: Final = 2**26

Datatype = Literal["FP16", "FP32", "FP64", "UINT8", "INT8", "INT32", "INT64"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    """Unknown fields and non-finite numbers are faults: a manifest says what it means or is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassEntry(_Part):
    """One class, at its index.

    `count` is the images in the whole training set and makes the groups; `trained` is the images the weights
    saw (fewer, when some were held out) and makes the source prior.
    """

    label: Label
    count: Annotated[int, Field(ge=0, le=2**53)]  # what a float64 holds exactly, and more than anybody has
    trained: Annotated[int, Field(ge=0, le=2**53)]


class Group(_Part):
    """A named set of classes, with the bounds on `count` that made it (none for a user's own group)."""

    name: Name
    at_least: int | None = None
    at_most: int | None = None
    indices: Annotated[list[int], Field(min_length=1)]


class Resize(_Part):
    """How an image of another size is brought to the network's.

    `stretch`: straight to (height, width), which leaves an image of that size alone. `crop`: the shorter side
    to `shorter_side`, then the centre, whatever the size, as torchvision's Resize and CenterCrop do. Pillow's
    antialiased filters.
    """

    rule: Literal["stretch", "crop"] = "stretch"
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bilinear"
    shorter_side: Annotated[int, Field(ge=1, le=8192)] | None = None

    @model_validator(mode="after")
    def _side_belongs_to_crop(self) -> Self:
        if (self.rule == "crop") != (self.shorter_side is not None):
            raise ValueError("shorter_side goes with the rule crop, and only with it")
        return self


class ImageInput(_Part):
    """What the network eats: pixel p of a uint8 image becomes (p * scale - mean) / std, in `layout`."""

    kind: Literal["image"] = "image"
    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]
    colour: Literal["RGB", "BGR", "L"] = "RGB"
    resize: Resize = Resize()
    scale: Annotated[float, Field(gt=0)] = 1 / 255
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    @property
    def channels(self) -> int:
        """1 for grey, else 3."""
        return 1 if self.colour == "L" else 3

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one decoded image."""
        return (self.height, self.width, self.channels)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its pixels."""
        return np.dtype(np.uint8)

    def noise(self, n: int, seed: int = 0) -> NDArray[Any]:
        """Return n decoded images of uniform noise, (n, height, width, channels)."""
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (n, *self.row_shape), dtype=np.uint8)

    @model_validator(mode="after")
    def _one_mean_and_std_a_channel(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need one number a channel ({self.channels})")
        if self.resize.shorter_side is not None and self.resize.shorter_side < max(self.height, self.width):
            raise ValueError("resize.shorter_side is smaller than the crop")
        return self


class TensorInput(_Part):
    """What a network eats that is no image: rows of numbers as they are, each of `shape`.

    Values outside `low` to `high` are refused. Whole numbers need both: they are often places in a table, and
    one beyond its end makes the network fail.
    """

    kind: Literal["tensor"]
    datatype: Datatype
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=7)]
    low: float | None = None
    high: float | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its numbers."""
        return np.dtype(_NUMPY_NAMES[self.datatype])

    def noise(self, n: int, seed: int = 0) -> NDArray[Any]:
        """Return n rows of uniform noise within the bounds, and within -1 and 1 if it is no whole numbers."""
        rng, size = np.random.default_rng(seed), (n, *self.row_shape)
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if self.dtype.kind == "f":
            near, far = max(low, min(-1.0, high)), min(high, max(1.0, low))
            return np.asarray(rng.uniform(near, far, size).astype(self.dtype))
        return np.asarray(rng.integers(int(low), int(high), size, dtype=self.dtype, endpoint=True))

    @model_validator(mode="after")
    def _bounds_are_bounds(self) -> Self:
        if math.prod(self.shape) > _MOST_NUMBERS:
            raise ValueError(f"a row has at most {_MOST_NUMBERS:,} numbers")
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if bounds != sorted(bounds):
            raise ValueError("low is above high")
        if self.dtype.kind == "f":
            return self
        limits = np.iinfo(self.dtype)
        if len(bounds) < 2 or any(bound != int(bound) for bound in bounds):
            raise ValueError(f"{self.datatype} needs low and high, whole numbers")
        if not limits.min <= bounds[0] <= bounds[1] <= limits.max:
            raise ValueError(f"low and high lie beyond {self.datatype}")
        return self


class Graph(_Part):
    """The names of the tensors in `model.onnx` that carry pixels (or rows) in and logits out."""

    input: str = "input"
    output: str = "logits"


class Estimate(_Part):
    """A mean over classes with its 95 % interval; `classes_with_labels` says how many it runs over.

    `low` and `high` are for the classes with labels, `low_all` and `high_all` for all of them.
    """

    error: Probability | None
    low: Probability
    high: Probability
    low_all: Probability
    high_all: Probability
    labels: Annotated[int, Field(ge=0)]
    classes: Annotated[int, Field(ge=1)]
    classes_with_labels: Annotated[int, Field(ge=0)]


class GroupEstimate(Estimate):
    """The mean error of one group's classes."""

    group: Name


class TauPoint(_Part):
    """Errors with target prior uniform at one tau. `log_loss` is class-mean, at its own best temperature."""

    tau: Annotated[float, Field(ge=0)]
    balanced_error: Estimate
    groups: list[GroupEstimate]
    log_loss: float | None = None
    temperature: float | None = None


class Calibration(_Part):
    """Where `logit_offset`, `temperature` and `tau` come from."""

    logit_offset: Literal["known", "fitted", "assumed"]
    temperature: Literal["fitted", "unfitted"]
    images: Annotated[int, Field(ge=0)]
    classes: Annotated[int, Field(ge=0)]
    tau_rule: TauRule | None = None
    tau_by_error: Annotated[float, Field(ge=0)] | None = None
    tau_at_edge: bool = False


class Metrics(_Part):
    """Errors at a few taus, on images the weights never saw."""

    holdout: list[TauPoint] = []
    test: list[TauPoint] = []


class WeightNormalisation(_Part):
    """Ranking by f_y / nu_y^tau (Menon et al., 2021, eq. 3), where the network ends in a linear layer.

    `norms` are nu by class: the norm of its weights, or its source prior. `biases` are the layer's; `bias`
    says whether they are divided with the rest of f, kept as they are, or dropped. `tau` and what it was
    chosen by are this method's own.
    """

    nu: Literal["norm", "prior"]
    norms: list[Annotated[float, Field(gt=0)]]
    biases: list[float]
    bias: BiasRule = "divide"
    tau: Annotated[float, Field(ge=0, le=100)] | None
    tau_rule: TauRule | None = None
    tau_at_edge: bool = False
    tau_curve: list[TauPoint] = []
    metrics: Metrics = Metrics()


class PrecisionCheck(_Part):
    """How a variant in fewer bits decides labelled images, against the float32 network it was made of.

    `agreement` is the share of equal decisions; the balanced errors are the network's, before, and the
    variant's.
    """

    images: Annotated[int, Field(ge=1)]
    agreement: Probability
    balanced_error_before: Probability
    balanced_error: Probability


class Precision(_Part):
    """The network was brought to fewer bits after training: how, and what that changed.

    Decisions were compared under a uniform target prior at `tau`, the tau* of the float32 network (null: at
    0, nothing was held out). A variant with less than `least_agreement` on held-out images is written only
    if `forced`. `float32_operators` were left as they were; `calibration_images`, of those trained on, gave
    int8 its scales.
    """

    name: Literal["int8", "fp16"]
    method: str
    float32_operators: list[str] = []
    calibration_images: Annotated[int, Field(ge=0)] = 0
    tau: Annotated[float, Field(ge=0, le=100)] | None
    least_agreement: Probability
    forced: bool
    holdout: PrecisionCheck | None
    test: PrecisionCheck | None


class Loss(_Part):
    """The training loss by name, with the tau inside it where it has one, and the head it was trained on."""

    name: str
    tau: float | None = None
    options: dict[str, float | bool] = {}
    head: str = "linear"


class Dataset(_Part):
    """What was trained on, in enough words to find it again."""

    name: str
    detail: dict[str, str | int | float | bool | None] = {}
    train_images: Annotated[int, Field(ge=0)] | None = None
    holdout_images: Annotated[int, Field(ge=0)] | None = None
    test_images: Annotated[int, Field(ge=0)] | None = None


class Manifest(_Part):
    """`manifest.json`, format 1. `files` maps each file beside it to its sha256.

    `precision` is absent from the file where the network is as it was trained.
    """

    format: Literal[1] = 1
    name: Name
    created: datetime
    classes: Annotated[list[ClassEntry], Field(min_length=1)]
    source_prior: list[float]
    logit_offset: list[float]
    temperature: Annotated[float, Field(gt=0)]
    tau: Annotated[float, Field(ge=0, le=100)] | None
    tau_curve: list[TauPoint] = []
    weight_normalisation: WeightNormalisation | None = None
    groups: list[Group]
    input: Annotated[ImageInput | TensorInput, Field(discriminator="kind")]
    graph: Graph = Graph()
    network: str
    precision: Precision | None = None
    loss: Loss
    recipe: dict[str, str | int | float | bool | list[float] | None] = {}
    dataset: Dataset
    calibration: Calibration
    seed: int | None = None
    git_commit: str | None = None
    metrics: Metrics = Metrics()
    files: dict[str, Sha256] = {}

    @property
    def labels(self) -> list[str]:
        """The labels by index."""
        return [entry.label for entry in self.classes]

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Images of each class in the whole training set, shape (L,)."""
        return np.array([entry.count for entry in self.classes], dtype=np.int64)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        n_classes = len(self.classes)
        seen: set[str] = set()
        for entry in self.classes:
            if entry.label in seen:
                raise ValueError(f"two classes are called {entry.label!r}")
            seen.add(entry.label)
        for field in ("source_prior", "logit_offset"):
            if len(getattr(self, field)) != n_classes:
                raise ValueError(f"{field} has {len(getattr(self, field))} entries for {n_classes} classes")
        normalised = self.weight_normalisation
        if normalised is not None and not len(normalised.norms) == len(normalised.biases) == n_classes:
            raise ValueError(f"weight_normalisation needs a norm and a bias for each of {n_classes} classes")
        try:
            checked_source_prior(self.source_prior)
        except PriorError as failure:
            raise ValueError(f"source_prior: {failure}") from failure
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError("two groups share a name")
        for group in self.groups:
            if len(set(group.indices)) != len(group.indices) or not all(
                0 <= index < n_classes for index in group.indices
            ):
                raise ValueError(f"group {group.name!r} names a class that is not there, or one twice")
        return self
