"""What was asked for, and the finished trainings that answer it: the middle between command and picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtail import tau
from longtail.intervals import largest_variance
from longtail.metrics import ClassErrors, class_errors, mean_error
from longtail.priors import Floats, prior_from_counts, uniform_prior
from training.checkpoint import Plan
from training.paper.panels import Panel, cifar_panels, deep_panels, large_panels, quick_panel
from training.paper.reports import Measured
from training.paper.rows import ERM, ERM_HELD_OUT, ROWS, Row, Training
from training.paper.runs import Outcome, RunStore, Target
from training.paper.schedule import Job
from training.recipes import Recipe, with_optimizer


@dataclass(frozen=True)
class Request:
    """What the command line asked for. None is the paper's own choice, or no restriction."""

    quick: bool
    seeds: int
    data_dir: Path
    runs: Path
    recipe: Recipe | None = None
    epochs: int | None = None
    rows: tuple[str, ...] | None = None  # keys of rows.py
    datasets: tuple[str, ...] | None = None  # keys of panels.py


class Study:
    """Plans the trainings of a request and finds the finished ones."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.quick = request.quick
        self._store = RunStore(request.runs)
        self._found: dict[Target, Outcome] = {}

    def panels(self, profile: str = "exp", *, large: bool = False) -> list[Panel]:
        """Return the panels of a figure: the CIFAR sets, and the large ones where it shows them."""
        if self.quick:
            return [quick_panel(profile)]
        shown = cifar_panels(profile, self.request.data_dir)
        return shown + large_panels(self.request.data_dir) if large else shown

    def deep_panels(self) -> list[Panel]:
        """Return the columns of table 3."""
        return [quick_panel("exp")] if self.quick else deep_panels(self.request.data_dir)

    def wants(self, panel: Panel) -> bool:
        """Say whether the panel's data is at hand and was not left out."""
        asked = self.request.datasets
        return panel.source is not None and (asked is None or panel.key in asked)

    def rows(self, keys: Iterable[str]) -> list[Row]:
        """Return the rows with these keys."""
        return [ROWS[key] for key in keys]

    def trains(self, row: Row) -> bool:
        """Say whether the row was asked for."""
        return self.request.rows is None or row.key in self.request.rows

    def jobs(self, panel: Panel, trainings: Sequence[Training]) -> list[list[Job]]:
        """Return the runs of each seed that are not finished, nothing for a panel that is left out."""
        if not self.wants(panel):
            return [[] for _ in range(self.request.seeds)]
        return [
            [
                Job(f"{panel.title} {training.name}, seed {seed}", target)
                for training in trainings
                if self._outcome(target := self.target(panel, training, seed)) is None
            ]
            for seed in range(self.request.seeds)
        ]

    def target(self, panel: Panel, training: Training, seed: int) -> Target:
        """Return what is to be trained on a panel whose data is at hand, a second stage on its first."""
        plan = self.plan(panel, training, seed)
        if training.classifier is None:
            return Target(plan)
        recipe = panel.second_recipe
        return Target(plan, training.classifier, recipe, self.request.epochs or recipe.epochs)

    def plan(self, panel: Panel, training: Training, seed: int) -> Plan:
        """Return the plan of the training, of the first stage where there are two."""
        if panel.source is None:
            raise ValueError(f"{panel.title} is not at hand")
        recipe = self.request.recipe or panel.recipe
        own_epochs = recipe.epochs if self.request.recipe or panel.epochs is None else panel.epochs
        return Plan(
            source=panel.source,
            network=panel.network,
            loss=training.loss,
            tau=training.tau,
            recipe=with_optimizer(recipe, training.optimizer),
            epochs=self.request.epochs or own_epochs,
            steps=None,
            holdout=training.holdout,
            seed=seed,
            loss_options=training.options,
        )

    def outcomes(self, panel: Panel, training: Training) -> list[Outcome]:
        """Return the finished runs, one a seed, in the order of the seeds."""
        if not self.wants(panel):
            return []
        found = [self._outcome(self.target(panel, training, seed)) for seed in range(self.request.seeds)]
        return [outcome for outcome in found if outcome is not None]

    def pairs(self, panel: Panel) -> list[tuple[Outcome, Outcome]]:
        """Return ERM on all images beside ERM with a tenth held out, for the seeds that have both."""
        if not self.wants(panel):
            return []
        both = [
            (
                self._outcome(self.target(panel, ERM, seed)),
                self._outcome(self.target(panel, ERM_HELD_OUT, seed)),
            )
            for seed in range(self.request.seeds)
        ]
        return [(whole, held) for whole, held in both if whole is not None and held is not None]

    def _outcome(self, target: Target) -> Outcome | None:
        if target not in self._found:
            outcome = self._store.finished(target)
            if outcome is None:
                return None
            self._found[target] = outcome
        return self._found[target]


def described(study: Study, panel: Panel, trainings: Sequence[Training]) -> str:
    """Return a sentence on what the panel's figures rest on: images, recipe, seeds, time."""
    found = [outcome for training in dict.fromkeys(trainings) for outcome in study.outcomes(panel, training)]
    if not found:
        return f"{panel.title}: not run here."
    plan = study.plan(panel, trainings[0], 0)
    images, test = int(found[0].class_counts.sum()), len(found[0].test_labels)
    seconds = sum(float(outcome.seconds) for outcome in found)
    return (
        f"{panel.title}: {images:,} training and {test:,} test images, {plan.network}, recipe"
        f" {plan.recipe.name} over {plan.epochs} epochs; {len(found)} trainings took {seconds / 60:.1f}"
        " minutes in all."
    )


def source_prior(outcome: Outcome) -> Floats:
    """Return the training distribution of the images that the weights saw, (L,)."""
    return prior_from_counts(outcome.trained)


def plain_errors(outcome: Outcome) -> ClassErrors:
    """Return the test errors of argmax f: how every trained loss is ranked in the paper."""
    return class_errors(outcome.test_labels, outcome.test_logits.argmax(axis=1), outcome.test_logits.shape[1])


def adjusted_curve(outcome: Outcome, taus: Sequence[float]) -> list[tau.TauPoint]:
    """Return the test errors of argmax f - tau log pi (eq. 9) at each tau, for a network trained by ERM."""
    n_classes = outcome.test_logits.shape[1]
    return tau.tau_curve(
        outcome.test_logits, outcome.test_labels, source_prior(outcome), uniform_prior(n_classes), taus
    )


def normalised_curve(outcome: Outcome, taus: Sequence[float]) -> list[tau.TauPoint]:
    """Return the test errors of argmax f_y / |w_y|^tau (eq. 3) at each tau."""
    return tau.normalisation_curve(outcome.test_logits, outcome.test_labels, outcome.norms, taus)


def chosen_tau(row: Row, held_out: Outcome) -> float:
    """Return the row's tau*: of least class-mean log loss on the images held out from this other fit."""
    logits, labels = held_out.holdout_logits, held_out.holdout_labels
    if row.after == "weight normalisation":
        return tau.choose_normalisation_tau(logits, labels, held_out.norms).tau
    return tau.choose_tau(logits, labels, source_prior(held_out)).tau


def measured(by_seed: Sequence[ClassErrors], classes: Sequence[int] | None = None) -> Measured | None:
    """Return the balanced error in per cent over seeds, of all classes or of some; None without a seed.

    The interval is the test sample's, about the mean over seeds: each class's errors averaged over the seeds,
    resting on its own test images once.
    """
    if not by_seed:
        return None
    members = list(range(len(by_seed[0].errors))) if classes is None else list(classes)
    values = tuple(100 * mean_error(errors, members).error for errors in by_seed)
    means = np.mean([errors.errors[members] for errors in by_seed], axis=0)
    interval = largest_variance(means, by_seed[0].effective[members])
    return Measured(values, 100 * interval.low, 100 * interval.high)
