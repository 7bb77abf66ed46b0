"""The data sets of the paper, one a panel or column, and where they are at hand."""

from dataclasses import dataclass, replace
from pathlib import Path

from training import imagenet_lt, inaturalist
from training.checkpoint import Source
from training.recipes import (
    PAPER_200,
    PAPER_IMAGENET,
    PAPER_INATURALIST,
    PAPER_INATURALIST_152,
    SECOND_STAGE,
    SECOND_STAGE_IMAGENET,
    SECOND_STAGE_INATURALIST,
    Recipe,
)

# The quick version's: enough steps to fall below chance on a small network, in seconds.
QUICK = Recipe("quick", 4, 64, 0.1, 0.1, (), 5e-4)


@dataclass(frozen=True)
class Panel:
    """A data set of the paper with the network and recipe that it is trained by there."""

    key: str
    title: str
    source: Source | None  # None: not at hand
    network: str
    recipe: Recipe
    epochs: int | None = None  # None: the recipe's
    second_recipe: Recipe = SECOND_STAGE  # of cRT and LWS


def quick_panel(profile: str) -> Panel:
    """Return the drawn images that stand in for all data sets in the quick version."""
    title = "shapes-lt" if profile == "exp" else "shapes-lt (Step)"
    second = replace(SECOND_STAGE, epochs=QUICK.epochs)
    source = Source("shapes-lt", profile=profile)
    return Panel("shapes-lt", title, source, "resnet8", QUICK, second_recipe=second)


def cifar_panels(profile: str, data_dir: Path) -> list[Panel]:
    """Return CIFAR-10-LT and CIFAR-100-LT at ratio 100, of the profile `exp` or `step`.

    CIFAR-10 is cut from the original files, or taken as prepared archives where only these are there.
    """
    suffix = "" if profile == "exp" else " (Step)"
    folder = str(data_dir.absolute())
    prepared = data_dir / "cifar-10-lt"
    train_file = prepared / ("train_lt100.npz" if profile == "exp" else "train_step100.npz")
    cifar10 = cifar100 = None
    if (data_dir / "cifar-10-batches-py").is_dir():
        cifar10 = Source("cifar10-lt", data_dir=folder, profile=profile)
    elif train_file.is_file():
        cifar10 = Source(
            "npz", train_file=str(train_file.absolute()), test_file=str((prepared / "test.npz").absolute())
        )
    if (data_dir / "cifar-100-python").is_dir():
        cifar100 = Source("cifar100-lt", data_dir=folder, profile=profile)
    return [
        Panel("cifar10-lt", f"CIFAR-10-LT{suffix}", cifar10, "resnet32", PAPER_200),
        Panel("cifar100-lt", f"CIFAR-100-LT{suffix}", cifar100, "resnet32", PAPER_200),
    ]


def large_panels(data_dir: Path) -> list[Panel]:
    """Return ImageNet-LT and iNaturalist 2018 with a ResNet-50, as in table 2."""
    return [panel for panel in deep_panels(data_dir) if panel.key in ("imagenet-lt", "inaturalist2018")]


def deep_panels(data_dir: Path) -> list[Panel]:
    """Return the columns of table 3: ImageNet-LT and iNaturalist 2018, ResNet-50 and ResNet-152."""
    imagenet = _files(data_dir / "imagenet-lt", "imagenet-lt", imagenet_lt.TRAIN)
    inat = _files(data_dir / "inaturalist2018", "inaturalist2018", inaturalist.TRAIN)
    on_imagenet = SECOND_STAGE_IMAGENET
    on_inat = SECOND_STAGE_INATURALIST
    return [
        Panel("imagenet-lt", "ImageNet-LT", imagenet, "resnet50", PAPER_IMAGENET, second_recipe=on_imagenet),
        Panel(
            "imagenet-lt-resnet152",
            "ImageNet-LT, ResNet-152",
            imagenet,
            "resnet152",
            PAPER_IMAGENET,
            second_recipe=on_imagenet,
        ),
        Panel("inaturalist2018", "iNaturalist", inat, "resnet50", PAPER_INATURALIST, second_recipe=on_inat),
        Panel(
            "inaturalist2018-resnet152",
            "iNaturalist, ResNet-152",
            inat,
            "resnet152",
            PAPER_INATURALIST_152,
            second_recipe=on_inat,
        ),
        Panel(
            "inaturalist2018-resnet152-200",
            "iNaturalist, ResNet-152, 200 epochs",
            inat,
            "resnet152",
            PAPER_INATURALIST_152,
            epochs=200,
            second_recipe=on_inat,
        ),
    ]


def _files(folder: Path, dataset: str, list_file: str) -> Source | None:
    if not (folder / list_file).is_file():
        return None
    return Source(dataset, data_dir=str(folder.absolute()), image_size=224)


KNOWN = [
    *("cifar10-lt", "cifar100-lt", "shapes-lt"),
    *(panel.key for panel in deep_panels(Path())),
]
