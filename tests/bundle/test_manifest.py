"""The manifest's rules: what fits together passes and survives JSON; what does not is refused by field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from bundle.manifest import ImageInput, Manifest, Resize
from tests import tiny


def fault(**changes: Any) -> str:
    """Return the message that a changed manifest is refused with."""
    fields = tiny.manifest().model_dump(mode="json")
    with pytest.raises(ValidationError) as refusal:
        Manifest.model_validate(fields | changes)
    return str(refusal.value)


@pytest.mark.parametrize("n_classes", [1, 2, 100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_manifest_survives_json_to_the_last_bit(n_classes: int) -> None:
    manifest = tiny.manifest(n_classes=n_classes)
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest
    assert np.array_equal(again.source_prior, manifest.source_prior)


def test_a_manifest_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValidationError):
        tiny.manifest().temperature = 2.0


def test_counts_and_labels_come_by_index() -> None:
    manifest = tiny.manifest()
    assert manifest.labels == list(tiny.LABELS)
    assert manifest.class_counts.tolist() == [entry.count for entry in manifest.classes]
    assert manifest.class_counts.dtype == np.int64


PRIOR = tiny.manifest().source_prior


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": []}, "classes"),
        ({"classes": [{"label": "a", "count": 1, "trained": 1}] * 4}, "two classes are called 'a'"),
        ({"classes": [{"label": "", "count": 1, "trained": 1}] * 4}, "classes.0.label"),
        ({"classes": [{"label": "a" * 1001, "count": 1, "trained": 1}] * 4}, "classes.0.label"),
        ({"classes": [{"label": "a", "count": -1, "trained": 1}] * 4}, "classes.0.count"),
        ({"classes": [{"label": "a", "count": 1.5, "trained": 1}] * 4}, "classes.0.count"),
        ({"source_prior": PRIOR[:3]}, "source_prior has 3 entries for 4 classes"),
        ({"source_prior": [0.5, 0.5, 0.0, 0.0]}, "source_prior"),
        ({"source_prior": [0.5, 0.5, 0.5, -0.5]}, "source_prior"),
        ({"source_prior": [0.3, 0.3, 0.3, 0.3]}, "source_prior"),
        ({"source_prior": [float("nan")] * 4}, "source_prior"),
        ({"logit_offset": [0.0] * 5}, "logit_offset has 5 entries for 4 classes"),
        ({"logit_offset": [0.0, 0.0, 0.0, float("inf")]}, "logit_offset"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"tau": -0.1}, "tau"),
        ({"tau": 100.1}, "tau"),
        ({"name": "no spaces"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"format": 2}, "format"),
        ({"files": {"model.onnx": "abc"}}, "files"),
        ({"groups": [{"name": "g", "indices": [4]}]}, "group 'g' names a class that is not there"),
        ({"groups": [{"name": "g", "indices": [-1]}]}, "group 'g'"),
        ({"groups": [{"name": "g", "indices": [1, 1]}]}, "group 'g'"),
        ({"groups": [{"name": "g", "indices": []}]}, "indices"),
        ({"groups": [{"name": "g", "indices": [1]}, {"name": "g", "indices": [2]}]}, "share a name"),
        ({"surprise": 1}, "surprise"),
        ({"created": "yesterday"}, "created"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused_by_field(
    changes: dict[str, Any], says: str
) -> None:
    assert says in fault(**changes)


@pytest.mark.parametrize("prior", [1e-6, 1e-300])
def test_a_tiny_source_prior_is_a_prior(prior: float) -> None:
    rest = (1 - prior) / 3
    assert tiny.manifest(source_prior=[rest, rest, rest, prior]).source_prior[3] == prior


def test_groups_may_overlap_and_leave_classes_out_for_a_user_may_want_so() -> None:
    groups = [{"name": "warm", "indices": [0]}, {"name": "loud", "indices": [0, 1]}]
    assert [group.indices for group in tiny.manifest(groups=groups).groups] == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": [0.5]}, "one number a channel (3)"),
        ({"std": [1.0, 1.0, 0.0]}, "std.2"),
        ({"std": [1.0, 1.0, -1.0]}, "std.2"),
        ({"mean": [0.0, 0.0, float("nan")]}, "mean.2"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"height": 0}, "height"),
        ({"width": 4097}, "width"),
        ({"colour": "CMYK"}, "colour"),
        ({"colour": "L"}, "one number a channel (1)"),
        ({"layout": "CHW"}, "layout"),
        ({"kind": "text"}, "kind"),
        ({"resize": {"rule": "crop"}}, "shorter_side goes with the rule crop"),
        ({"resize": {"rule": "stretch", "shorter_side": 40}}, "shorter_side goes with the rule crop"),
        ({"resize": {"rule": "crop", "shorter_side": 31}}, "smaller than the crop"),
        ({"resize": {"interpolation": "cubic"}}, "interpolation"),
    ],
)
def test_an_input_that_no_image_fits_is_refused_by_field(changes: dict[str, Any], says: str) -> None:
    fields = {"height": 32, "width": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    with pytest.raises(ValidationError) as refusal:
        ImageInput.model_validate(fields | changes)
    assert says in str(refusal.value)


def test_a_crop_may_be_all_of_the_shorter_side() -> None:
    spec = ImageInput(
        height=32, width=32, mean=[0.0], std=[1.0], colour="L", resize=Resize(rule="crop", shorter_side=32)
    )
    assert spec.channels == 1
