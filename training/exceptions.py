"""What can be wrong with a request to train, so that one place turns it into one line and exit code 2.

TrainingError
├── DataError        a data set that is unknown, missing, empty or corrupt
├── RunError         a run folder or checkpoint that does not fit what was asked for
└── BundleError      a bundle that cannot be written, or whose network does not answer as the trained one
"""


class TrainingError(Exception):
    """Base of what the command line reports without a trace."""


class DataError(TrainingError):
    """The training or test images cannot be used."""


class RunError(TrainingError):
    """The run folder, its checkpoint or the requested schedule does not allow this run."""


class BundleError(TrainingError):
    """The bundle cannot be written."""


def first_line(failure: Exception) -> str:
    """Return the first line of a library's message that says something; torch adds many of advice."""
    lines = (line.strip() for line in str(failure).splitlines())
    return next((line for line in lines if line), type(failure).__name__).rstrip(".")
