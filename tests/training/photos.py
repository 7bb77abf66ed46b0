"""Small trees of JPEGs laid out as the published data sets are, for the tests of their readers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30), grey: int = 128) -> Path:
    """Write a JPEG of blurred noise around a grey level; seed and size decide its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(grey, 50, (6, 8, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, format="JPEG")
    return path


def imagenet_lt(root: Path, counts=(12, 6, 3), val: int = 2, test: int = 2) -> Path:
    """Lay out a data folder with the three list files; return it."""
    for part, folder, per_class in (
        ("train", "train", counts),
        ("val", "train", (val,) * len(counts)),
        ("test", "val", (test,) * len(counts)),
    ):
        lines = []
        for label, count in enumerate(per_class):
            for n in range(count):
                name = f"{folder}/{WNIDS[label]}/{part}_{label}_{n:05}.JPEG"
                photo(root / name, seed=len(lines), size=(30 + n, 24 + 5 * label), grey=60 + 60 * label)
                lines.append(f"{name} {label}")
        (root / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def inaturalist(root: Path, counts=(12, 6, 3), val: int = 2) -> Path:
    """Lay out a data folder with the two json files, annotations in another order than images; return it."""
    categories = [
        {"id": 7 * c, "name": f"Species {c}", "supercategory": "Aves"} for c in reversed(range(len(counts)))
    ]
    for part, per_class, first in (("train", counts, 0), ("val", (val,) * len(counts), 1000)):
        images, annotations = [], []
        for label, count in enumerate(per_class):
            for n in range(count):
                number = first + len(images)
                name = f"train_val2018/Aves/{label}/{part}{number}.jpg"
                photo(root / name, seed=number, size=(30 + n, 24 + 5 * label), grey=60 + 60 * label)
                images.append({"id": number, "file_name": name, "width": 1, "license": 3})
                annotations.append({"id": number + 5, "image_id": number, "category_id": 7 * label})
        content = {"images": images, "annotations": annotations[::-1], "categories": categories}
        (root / f"{part}2018.json").write_text(json.dumps(content))
    return root
