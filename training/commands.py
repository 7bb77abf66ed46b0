"""What the commands share: refusals of one line, and a look at --out before the work begins."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

from bundle import files
from training.exceptions import RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the words of a command, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def at_least(smallest: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from `smallest` on."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, not {value}")
        return value

    return whole_number


def check_out(out: Path, *, force: bool) -> None:
    """Refuse, before the work, a folder that writing the bundle would refuse after it. Raises RunError."""
    try:
        files.check_place(out, force=force)
    except files.BundleError as failure:
        raise RunError(f"--out: {failure.detail}") from failure
