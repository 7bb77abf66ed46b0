"""`training.fit` that kills itself with SIGKILL after a given step, so that a test can choose the moment.

As a script, `killed_run.py RANK STEP ...` runs the command that the rest says until RANK dies after STEP.
"""

import os
import signal
import sys

from training import loop, run
from training.fit import main


def fit_and_die(words: list[str], step: int, rank: int = 0) -> None:
    """Run the command in this process; the rank named dies right after the step, before anything is saved."""
    whole = loop.fit

    def cut(*arguments, **options):
        for record in whole(*arguments, **options):
            if record.step == step and rank == int(os.environ.get("RANK", "0")):
                os.kill(os.getpid(), signal.SIGKILL)
            yield record

    run.fit = cut
    sys.exit(main(words))


if __name__ == "__main__":
    fit_and_die(sys.argv[3:], step=int(sys.argv[2]), rank=int(sys.argv[1]))
