"""The command that makes bundles, `python -m training.export`: of an ONNX file from anywhere, or of a run.

The first needs no torch, so that a person who only serves may import a model too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Final

from training.commands import OneLineParser, check_out
from training.exceptions import RunError, TrainingError
from training.import_inputs import NORMALISATIONS
from training.importing import Imported, Request, import_onnx
from training.post_hoc import PostHoc, add_options, choices_of
from training.precision import LEAST_AGREEMENT, NAMES, Wanted, notes_of

_PRECISION: Final = ("precision", "force_precision")
_CHOICES: Final = tuple(field.name for field in dataclasses.fields(PostHoc))
_NORMALISATION_HELP: Final = (
    "what the network takes for a pixel p of 0 to 255: unit p / 255 (default), symmetric p / 127.5 - 1,"
    " imagenet (p / 255 - mean) / std, raw p"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 refused."""
    parser = _parser()
    options = parser.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    try:
        if options.checkpoint is not None:
            imported = _from_checkpoint(options, given)
        else:
            imported = _from_onnx(options, given)
    except TrainingError as failure:
        print(f"training.export: {failure}", file=sys.stderr)
        return 2
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    manifest, version = imported.bundle.manifest, imported.bundle.version
    if options.json:
        print(json.dumps({"folder": str(options.out), "version": version, "notes": imported.notes}))
    else:
        tau = "none" if manifest.tau is None else f"{manifest.tau:g}"
        print(
            f"{options.out}: {len(manifest.classes)} classes, version {version},"
            f" T = {manifest.temperature:.3g} ({manifest.calibration.temperature}), tau* = {tau}"
        )
    return 0


def _from_checkpoint(options: argparse.Namespace, given: set[str]) -> Imported:
    foreign = sorted(given - {"checkpoint", "data_dir", "out", "force", "json", *_PRECISION, *_CHOICES})
    if foreign:
        raise RunError(
            f"--{foreign[0].replace('_', '-')} does not go with --checkpoint, which knows by itself"
        )
    if options.force_precision and options.precision is None:
        raise RunError("--force-precision goes with --precision")
    check_out(options.out, force=options.force)
    try:
        from training.bundling import bundle_from_checkpoint  # noqa: PLC0415  (takes torch, imports do not)
    except ImportError as failure:
        raise RunError(f"--checkpoint needs {failure.name}: pip install 'tare[training]'") from failure
    path: Path = options.checkpoint
    if path.is_dir():
        path /= "checkpoint.pt"
    precision = None
    if options.precision is not None:
        run = path.absolute().parent.name
        precision = Wanted(options.precision, force=options.force_precision, run=run)
    bundle = bundle_from_checkpoint(
        path,
        options.out,
        data_dir=options.data_dir,
        choices=choices_of(options),
        precision=precision,
        force=options.force,
    )
    return Imported(bundle, notes_of(bundle.manifest))


def _from_onnx(options: argparse.Namespace, given: set[str]) -> Imported:
    if options.onnx is None or options.classes is None:
        raise RunError("--onnx FILE and --classes FILE.csv are needed, or --checkpoint FILE")
    if "data_dir" in given:
        raise RunError("--data-dir goes with --checkpoint")
    if given.intersection(_PRECISION):
        raise RunError(
            "--precision goes with --checkpoint: it needs a run's images, some trained on and some held out"
        )
    for name in _CHOICES:
        if name in given and name != "tau_rule":
            raise RunError(
                f"--{name.replace('_', '-')} goes with --checkpoint: the last layer of an ONNX file is not"
                " looked at"
            )
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Request)}
    return import_onnx(Request(**{**fields, "name": options.name or options.out.name}))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="training.export", description=__doc__)
    add = parser.add_argument
    add("--onnx", type=Path, metavar="FILE", help="the classifier; its output is logits")
    add("--classes", type=Path, metavar="FILE.csv", help="label,count a line, by output index")
    add("--checkpoint", type=Path, metavar="FILE", help="instead: a finished run of training.fit, runs/NAME")
    add("--data-dir", type=Path, metavar="DIR", help="with --checkpoint: its images, if they have moved")
    add("--holdout", type=Path, metavar="FILE.npz", help="arrays logits and labels of unseen images")
    add("--images", type=Path, metavar="DIR", help="unseen images in folders named by label")
    add("--out", type=Path, required=True, help="folder of the bundle, such as models/NAME")
    add("--name", help="the model's name (default: that of the folder)")
    add("--input", choices=("image", "tensor"), default="image", help="what it takes (default %(default)s)")
    add("--input-shape", type=_shape, metavar="AxB", help="with --input tensor: a row's, where it is open")
    add("--input-range", type=_range, metavar="LOW:HIGH", help="with --input tensor: of each of its numbers")
    add("--input-size", type=_size, metavar="HxW", help="needed where the graph leaves it open")
    add("--layout", choices=("NCHW", "NHWC"), help="needed where the graph's shape does not say")
    add("--colour", choices=("RGB", "BGR", "L"), help="order of the channels (default RGB, or L for one)")
    add("--normalisation", choices=list(NORMALISATIONS), help=_NORMALISATION_HELP)
    add("--scale", type=float, help="of (p * scale - mean) / std (default 1/255)")
    add("--mean", type=_numbers, metavar="M,M,M", help="one number, or one a channel (default 0)")
    add("--std", type=_numbers, metavar="S,S,S", help="one number, or one a channel (default 1)")
    add("--resize", choices=("stretch", "crop"), default="stretch", help="default %(default)s")
    add("--shorter-side", type=int, metavar="N", help="with --resize crop: the shorter side before it")
    add(
        "--interpolation",
        choices=("bilinear", "bicubic", "lanczos", "nearest"),
        default="bilinear",
        help="default %(default)s",
    )
    add("--output", metavar="NAME", help="which output, where the graph has several")
    add(
        "--loss-offset",
        choices=("none", "log-prior", "fitted"),
        help="log-prior: trained with the logit-adjusted or balanced loss; none: with plain cross-entropy"
        " (the default, then called assumed); fitted: with another, fit on the held-out images",
    )
    add("--loss-tau", type=float, metavar="TAU", help="the loss's tau (default 1); fitted starts from it")
    add("--smoothing", type=float, default=0.0, help="added to each count, for counts of zero (default 0)")
    add_options(parser)
    add(
        "--precision", choices=NAMES, help="with --checkpoint: a faster variant, int8 for CPUs, fp16 for GPUs"
    )
    add(
        "--force-precision",
        action="store_true",
        help="write the variant even where it agrees with the network on fewer held-out images than"
        f" {100 * LEAST_AGREEMENT['int8']:g} %% (int8) or {100 * LEAST_AGREEMENT['fp16']:g} %% (fp16)",
    )
    add("--force", action="store_true", help="replace an existing bundle")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"HEIGHTxWIDTH is expected, such as 224x224, not '{text}'")
    return int(match[1]), int(match[2])


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8}){0,6}", text):
        raise argparse.ArgumentTypeError(f"sizes with x between them are expected, not '{text}'")
    return tuple(int(part) for part in text.split("x"))


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = text.split(":")
        return float(low), float(high)
    except ValueError as failure:
        raise argparse.ArgumentTypeError(f"LOW:HIGH is expected, such as 0:29999, not '{text}'") from failure


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as failure:
        raise argparse.ArgumentTypeError(
            f"numbers separated by commas are expected, not '{text}'"
        ) from failure


if __name__ == "__main__":
    sys.exit(main())
