"""The command that trains: `python -m training.fit` reads images, trains a network and writes its bundle."""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

import torch

from training import checkpoint as checkpoints
from training.bundling import write_bundle
from training.checkpoint import Checkpoint, Plan, Source
from training.commands import OneLineParser, at_least, check_out
from training.data import PROFILES, split
from training.exceptions import RunError, TrainingError
from training.loop import choose_device
from training.losses import LOSSES, LossOptions, default_tau, make_loss
from training.networks import HEADS, NETWORKS, default_image_size
from training.post_hoc import add_options, choices_of
from training.progress import Progress
from training.ranks import Ranks, joined
from training.recipes import FAST, OPTIMIZERS, RECIPES, SECOND_STAGE, Recipe, with_optimizer
from training.run import CHECKPOINT_EVERY_S, Stopped, check_room, train
from training.second_stage import CLASSIFIERS, stage_on
from training.sources import DATASETS, IN_FILES, read


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 refused, 130 stopped by Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    nothing = argparse.Namespace(**dict.fromkeys(vars(options)))
    given = {name for name, value in vars(parser.parse_args(arguments, nothing)).items() if value is not None}
    with joined() as ranks:
        progress = Progress(leads=ranks.leads)
        try:
            return _fit(options, given, progress, ranks)
        except TrainingError as failure:
            if ranks.first_to_fail():
                progress.insist(f"training.fit: {failure}")
            return 2
        except KeyboardInterrupt:
            progress.say("training.fit: interrupted")
            return 130


def _fit(options: argparse.Namespace, given: set[str], progress: Progress, ranks: Ranks) -> int:
    out: Path = options.out
    run_folder: Path = options.runs / out.name
    check_out(out, force=options.force)
    device = choose_device(options.device, ranks.place)
    backbone = None if options.backbone is None else _backbone(options.backbone)
    plan = _plan(options) if backbone is None else _second_plan(options, given, backbone)
    _refuse_early(plan, (run_folder, out.parent))
    saved = run_folder / checkpoints.FILE
    if options.resume and not saved.exists():
        raise RunError(f"--resume: there is no checkpoint {saved}")
    if saved.exists() and not (options.resume or options.force):
        raise RunError(f"{saved} is there already; --resume goes on from it, --force starts anew")
    dataset = read(plan.source, plan.seed, workers=options.workers)
    cut = split(dataset, plan.holdout, plan.seed)
    progress.say(
        f"{dataset.name}: {len(dataset.class_labels)} classes, {len(cut.trained):,} images to train on,"
        f" {len(cut.holdout):,} held out, {len(dataset.test):,} to test; {plan.network} on {device.type}"
    )
    if backbone is not None and dataset.fingerprint() != backbone.data_fingerprint:
        raise RunError(f"--backbone {options.backbone} was trained on other images or labels than those here")
    check_room(plan.network, len(dataset.class_labels), (run_folder, out.parent))
    if device.type == "cpu":
        _warn_of_busy_cores(progress)
    result = train(
        plan,
        dataset,
        cut,
        run_folder,
        device=device,
        progress=progress,
        resume=options.resume,
        checkpoint_every_s=options.checkpoint_every,
        ranks=ranks,
        backbone=None if backbone is None else backbone.weights,
    )
    if isinstance(result, Stopped):
        progress.say(f"stopped after step {result.step}; the same command with --resume goes on")
        return 130
    if not ranks.leads:
        return 0
    choices = choices_of(options)
    bundle = write_bundle(result, dataset, cut, out, device, choices=choices, force=options.force)
    print(f"{out} version {bundle.version}")
    return 0


def _refuse_early(plan: Plan, folders: tuple[Path, Path]) -> None:
    """Refuse what can be told before the images are read, as if there were two classes of one image."""
    cpu = torch.device("cpu")
    make_loss(plan.loss, (1, 1), plan.tau, cpu, options=plan.loss_options, head=plan.head)
    check_room(plan.network, 2, folders)


def _plan(options: argparse.Namespace) -> Plan:
    if options.classifier is not None:
        raise RunError("--classifier needs --backbone, the run whose features it classifies")
    if options.dataset is None:
        raise RunError("--dataset is needed, or --backbone for a second stage")
    if options.dataset not in DATASETS:
        raise RunError(f"unknown data set '{options.dataset}'; known are {', '.join(DATASETS)}")
    recipe, epochs = _recipe(options, FAST)
    size = options.image_size
    if size is None and options.dataset in IN_FILES:
        size = default_image_size(options.network)
    loss_options = LossOptions(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(LossOptions)}
    )
    return Plan(
        source=Source(
            dataset=options.dataset,
            data_dir=_absolute(options.data_dir),
            train_file=_absolute(options.train_file),
            test_file=_absolute(options.test_file),
            profile=options.profile,
            imbalance_ratio=options.imbalance_ratio,
            image_size=size,
        ),
        network=options.network,
        loss=options.loss,
        tau=default_tau(options.loss) if options.tau is None else options.tau,
        recipe=recipe,
        epochs=epochs,
        steps=options.steps,
        holdout=options.holdout,
        seed=options.seed,
        loss_options=loss_options,
        head=options.head,
    )


def _warn_of_busy_cores(progress: Progress) -> None:
    """Say so where threads would wait for cores: the slowest of them holds up every operation."""
    threads, cores, load = torch.get_num_threads(), len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if threads > 1 and load > cores - threads + 0.5:
        progress.say(
            f"other work keeps {load:.1f} of {cores} cores busy: {threads} threads beside it may be slower"
            " than one (OMP_NUM_THREADS=1)"
        )


def _backbone(path: Path) -> Checkpoint:
    return checkpoints.load(path / checkpoints.FILE if path.is_dir() else path)


def _second_plan(options: argparse.Namespace, given: set[str], backbone: Checkpoint) -> Plan:
    """Return the plan of a second stage: the backbone decides data, network, holdout and seed."""
    if options.classifier is None:
        raise RunError(f"--backbone needs --classifier: {' or '.join(CLASSIFIERS)}")
    first = backbone.plan
    decided = {**dataclasses.asdict(first), **dataclasses.asdict(first.source)}
    for name in ("dataset", "profile", "imbalance_ratio", "image_size", "network", "holdout", "seed"):
        asked = getattr(options, name)
        if name in given and asked != decided[name]:
            raise RunError(f"--{name.replace('_', '-')} {asked}: the backbone has {decided[name]}")
    foreign = {"loss", "tau", "head", *(field.name for field in dataclasses.fields(LossOptions))} & given
    if foreign - {"loss"} or ("loss" in given and options.loss != "cross-entropy"):
        name = min(foreign).replace("_", "-")
        raise RunError(f"--{name} does not go with --classifier, which trains by cross-entropy")
    recipe, epochs = _recipe(options, SECOND_STAGE)
    path: Path = options.backbone
    run = path if path.is_dir() else path.parent
    return Plan(
        source=dataclasses.replace(
            first.source,
            data_dir=_absolute(options.data_dir) or first.source.data_dir,
            train_file=_absolute(options.train_file) or first.source.train_file,
            test_file=_absolute(options.test_file) or first.source.test_file,
        ),
        network=first.network,
        loss="cross-entropy",
        tau=None,
        recipe=recipe,
        epochs=epochs,
        steps=options.steps,
        holdout=first.holdout,
        seed=first.seed,
        second_stage=stage_on(backbone, run.absolute().name, options.classifier),
    )


def _recipe(options: argparse.Namespace, usual: Recipe) -> tuple[Recipe, int | None]:
    """Return the recipe asked for, and its epochs, None where steps are counted."""
    if options.epochs is not None and options.steps is not None:
        raise RunError("--epochs and --steps exclude each other")
    named = usual if options.recipe is None else RECIPES[options.recipe]
    recipe = with_optimizer(named, options.optimizer)
    return recipe, None if options.steps is not None else options.epochs or recipe.epochs


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="training.fit", description=__doc__)
    add = parser.add_argument
    add("--dataset", metavar="D", help=f"one of {', '.join(DATASETS)}")
    add("--data-dir", type=Path, help="folder with the data; CIFAR is downloaded without it")
    add("--train-file", type=Path, help="npz: the training images")
    add("--test-file", type=Path, help="npz: the test images")
    add("--profile", choices=PROFILES, default="exp", help="shape of the long tail (default %(default)s)")
    add("--imbalance-ratio", type=float, default=100.0, help="largest over smallest class (default 100)")
    add(
        "--image-size",
        type=at_least(1),
        help="side in pixels that images in files are brought to (default: the network's own)",
    )
    add(
        "--workers",
        type=at_least(0),
        help="processes that decode images in files (default: one a core, at most 16; 0: none but this one)",
    )
    add("--holdout", type=float, default=0.1, help="share held out for tau and temperature (default 0.1)")
    add("--network", choices=list(NETWORKS), default="resnet32", help="default %(default)s")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="default %(default)s")
    _add_loss_options(parser)
    _add_second_stage(parser)
    add("--recipe", choices=list(RECIPES), help=f"default {FAST.name}, {SECOND_STAGE.name} with --backbone")
    add("--optimizer", choices=OPTIMIZERS, help="instead of the recipe's; adam peaks at a rate of 1e-3")
    add("--epochs", type=at_least(1), help="passes over the data (default: the recipe's)")
    add("--steps", type=at_least(1), help="batches, instead of --epochs")
    add("--seed", type=at_least(0), default=0, help="default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    add(
        "--checkpoint-every",
        type=_seconds,
        default=CHECKPOINT_EVERY_S,
        metavar="SECONDS",
        help="time between checkpoints, 0 for one a step (default %(default)g)",
    )
    add_options(parser)
    add("--resume", action="store_true", help="go on from the checkpoint in the run folder")
    add("--force", action="store_true", help="replace an existing run and bundle")
    add("--runs", type=Path, default=Path("runs"), help="where checkpoints and logs go (default runs/)")
    add("--out", type=Path, required=True, help="folder of the bundle, such as models/NAME")
    return parser


def _add_second_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        type=Path,
        metavar="RUN",
        help="train a classifier over this finished run, such as runs/NAME, which stays as it is and decides"
        " data set, network, holdout and seed",
    )
    parser.add_argument(
        "--classifier",
        choices=CLASSIFIERS,
        help="with --backbone: crt, a new linear head; lws, a scale for each class of the head there is",
    )


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tau", type=float, help="of the logit-adjusted losses (default 1)")
    add("--tau1", type=float, help="pairwise: D[y, j] = tau2 log p_j - tau1 log p_y (default 1)")
    add("--tau2", type=float, help="pairwise (default 1)")
    add("--beta", type=float, help="class-balanced and deferred weights (1 - B) / (1 - B^n) (default 0.9999)")
    add("--gamma", type=float, help="equalised-mask: chance of leaving a rare class out (default 0.9)")
    add("--rare-below", type=float, help="equalised: the share below which a class is rare (default 1/(2L))")
    add("--margin", type=float, help="ldam: the largest margin, on the cosine (default 0.5)")
    add("--label-smoothing", type=float, help="share of each label spread over all classes (default 0)")
    add("--deferred-reweighting", action="store_true", help="weigh by class after 0.8 of the steps")
    add(
        "--head",
        choices=list(HEADS),
        help="normalised: class weights of norm 1 (ldam: cosine)",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, zero or more, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
