"""The pages on bundles name every field and every option, so that neither can be added in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bundle.manifest import ImageInput, Manifest, TensorInput
from bundle.preprocessing import MAX_PIXELS
from training.export import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "field", [*Manifest.model_fields, *ImageInput.model_fields, *TensorInput.model_fields]
)
def test_every_field_of_the_manifest_is_explained(field: str) -> None:
    assert f"`{field}`" in (DOCS / "bundles.md").read_text()


def test_every_option_of_the_import_is_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", capsys.readouterr().out)) - {"--help"}
    assert len(options) > 20
    page = (DOCS / "bundles.md").read_text()
    assert not [option for option in sorted(options) if option not in page]


def test_the_pixel_limit_is_the_one_written_down() -> None:
    assert f"{MAX_PIXELS // 1_000_000} million pixels" in (DOCS / "preprocessing.md").read_text()
