"""The rows of the paper's tables: what each trains, and how it ranks what the network says."""

from dataclasses import dataclass, field
from typing import Literal

from training.losses import LossOptions
from training.recipes import OptimizerName

HELD_OUT = 0.1  # of the training images, in the second fit that chooses tau*


@dataclass(frozen=True)
class Training:
    """What is trained, apart from data, recipe and seed."""

    name: str
    loss: str
    tau: float | None = None
    options: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerName = "sgd"
    holdout: float = 0.0
    classifier: str | None = None  # of a second stage on what the rest says


@dataclass(frozen=True)
class Row:
    """A row of a table. `tau` is for what is done after training; None there is tau*."""

    key: str
    name: str
    training: Training
    after: Literal["nothing", "logit adjustment", "weight normalisation"] = "nothing"
    tau: float | None = None

    @property
    def needs(self) -> list[Training]:
        """The trainings that the row is made of."""
        if self.training.classifier is not None:
            return [ERM, self.training]
        tuned = self.after != "nothing" and self.tau is None
        return [self.training, ERM_HELD_OUT] if tuned else [self.training]


ERM = Training("ERM", "cross-entropy")
ERM_ADAM = Training("ERM, Adam", "cross-entropy", optimizer="adam")
ERM_HELD_OUT = Training("ERM, a tenth held out", "cross-entropy", holdout=HELD_OUT)
CLASS_BALANCED = Training("Class-balanced", "class-balanced")
ADAPTIVE = Training("Adaptive", "adaptive")
ADAPTIVE_DRW = Training("Adaptive + DRW", "adaptive", options=LossOptions(deferred_reweighting=True))
LDAM = Training("LDAM", "ldam")
LDAM_DRW = Training("LDAM + DRW", "ldam", options=LossOptions(deferred_reweighting=True))
EQUALISED = Training("Equalised", "equalised", options=LossOptions(gamma=0.9))  # Tan et al.'s threshold F
CRT = Training("cRT", "cross-entropy", classifier="crt")
LWS = Training("LWS", "cross-entropy", classifier="lws")
LOGIT_ADJUSTED = Training("Logit adjusted", "logit-adjusted", tau=1.0)
LOGIT_ADJUSTED_ADAPTIVE = Training("Logit adjusted + adaptive", "logit-adjusted-adaptive", tau=1.0)

FOUR_LOSSES = (ERM, ADAPTIVE, EQUALISED, LOGIT_ADJUSTED)

ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        Row("erm", "ERM", ERM),
        Row("weight-normalisation", "Weight normalisation, tau = 1", ERM, "weight normalisation", 1.0),
        Row("weight-normalisation-best", "Weight normalisation, tau*", ERM, "weight normalisation"),
        Row("lws", "LWS", LWS),
        Row("crt", "cRT", CRT),
        Row("class-balanced", "Class-balanced", CLASS_BALANCED),
        Row("adaptive", "Adaptive", ADAPTIVE),
        Row("adaptive-drw", "Adaptive + DRW", ADAPTIVE_DRW),
        Row("ldam", "LDAM", LDAM),
        Row("ldam-drw", "LDAM + DRW", LDAM_DRW),
        Row("equalised", "Equalised", EQUALISED),
        Row("post-hoc", "Logit adjustment post-hoc, tau = 1", ERM, "logit adjustment", 1.0),
        Row("post-hoc-best", "Logit adjustment post-hoc, tau*", ERM, "logit adjustment"),
        Row("logit-adjusted", "Logit adjusted loss, tau = 1", LOGIT_ADJUSTED),
        Row("logit-adjusted-adaptive", "Logit adjusted + adaptive", LOGIT_ADJUSTED_ADAPTIVE),
    )
}

TABLE2 = tuple(key for key in ROWS if key not in ("lws", "crt"))
TABLE4 = (
    *("erm", "weight-normalisation", "adaptive", "equalised"),
    *("post-hoc", "post-hoc-best", "logit-adjusted"),
)
TABLE3 = tuple(key for key in ROWS if key not in ("class-balanced", "adaptive-drw", "ldam", "ldam-drw"))
