"""The command that makes the paper's tables and figures: `python -m training.paper NAME`."""

import argparse
import math
import shlex
import sys
import time
from itertools import zip_longest
from pathlib import Path

from training.cifar import cache_folder
from training.commands import OneLineParser, at_least
from training.exceptions import RunError, TrainingError
from training.paper.panels import KNOWN
from training.paper.registry import ENTRIES, Entry
from training.paper.reports import write
from training.paper.rows import ROWS
from training.paper.schedule import Ended, Job, train_all
from training.paper.study import Request, Study
from training.progress import Progress
from training.recipes import RECIPES


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 all is there, 1 a training failed, 2 refused, 130 stopped by Ctrl-C or --minutes.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    progress = Progress()
    try:
        return _paper(options, shlex.join(["python", "-m", "training.paper", *words]), progress)
    except TrainingError as failure:
        progress.say(f"training.paper: {failure}")
        return 2
    except KeyboardInterrupt:
        progress.say("training.paper: interrupted; the same command goes on")
        return 130


def _paper(options: argparse.Namespace, command: str, progress: Progress) -> int:
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    study = Study(_request(options))
    entries = list(ENTRIES.values()) if options.name == "all" else [ENTRIES[options.name]]
    jobs = _jobs(entries, study)
    if jobs:
        progress.say(f"{len(jobs)} trainings are wanted that are not under {options.runs}")
    ended = train_all(jobs, options.runs, device=options.device, at_once=options.jobs, deadline=deadline)
    for entry in entries:
        write(entry.report(study), options.out, command)
        print(options.out / f"{entry.name}.md")
    return _say_what_is_left(ended, progress)


def _jobs(entries: list[Entry], study: Study) -> list[Job]:
    """Return what is to be trained, each once: the first seed of everything before the second of anything."""
    of_panels = [study.jobs(panel, trainings) for entry in entries for panel, trainings in entry.needs(study)]
    ordered = [job for seed in zip_longest(*of_panels, fillvalue=[]) for jobs in seed for job in jobs]
    return list({job.target: job for job in ordered}.values())


def _say_what_is_left(ended: list[Ended], progress: Progress) -> int:
    failed = [end for end in ended if end.reason]
    left = [end for end in ended if not end.finished and not end.reason]
    for end in failed:
        progress.say(f"failed: {end.job.name}: {end.reason}")
    if left:
        progress.say(f"left to train: {'; '.join(end.job.name for end in left)}. The same command goes on.")
        return 130
    return 1 if failed else 0


def _request(options: argparse.Namespace) -> Request:
    return Request(
        quick=options.quick,
        seeds=options.seeds or (1 if options.quick else 3),
        data_dir=options.data_dir or cache_folder(),
        runs=options.runs,
        recipe=None if options.recipe is None else RECIPES[options.recipe],
        epochs=options.epochs,
        rows=_listed(options.rows, "--rows", list(ROWS)),
        datasets=_listed(options.datasets, "--datasets", KNOWN),
    )


def _listed(text: str | None, option: str, known: list[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(text.split(","))
    for word in words:
        if word not in known:
            raise RunError(f"{option}: unknown '{word}'; known are {', '.join(known)}")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="training.paper", description=__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", choices=[*ENTRIES, "all"], help=f"one of {', '.join(ENTRIES)}, or all")
    add("--quick", action="store_true", help="a small version on drawn images, in minutes and without data")
    add("--out", type=Path, default=Path("runs/paper/out"), help="folder of the pages (default %(default)s)")
    add("--seeds", type=at_least(1), help="trainings of each row, seeds 0, 1 ... (default 3, quick 1)")
    add("--data-dir", type=Path, help="folder with the data (default: the user's cache)")
    add(
        "--runs", type=Path, default=Path("runs/paper"), help="where trainings are kept (default %(default)s)"
    )
    add("--recipe", choices=list(RECIPES), help="another recipe than the paper's")
    add("--epochs", type=at_least(1), help="passes over the data (default: the recipe's)")
    add("--rows", help="of tables, by commas: train no more than these rows need")
    add("--datasets", help="by commas: train on these only; the others' panels are empty")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    add("--jobs", type=at_least(1), default=1, help="trainings side by side on the device (default 1)")
    add("--minutes", type=_minutes, help="stop in good order after so many; the same command goes on")
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number of minutes above zero, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
