"""docs/settings.md names every setting with its default, and nothing else."""

import re
from pathlib import Path

from service.settings import ELSEWHERE, LATER, PREFIX, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
ROW = re.compile(r"^\| `(TARE_\w+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def test_every_setting_is_documented_with_its_default_and_nothing_else_is():
    rows = {name: default for name, default, _ in ROW.findall(PAGE) if name not in ELSEWHERE}
    assert sorted(rows) == sorted(PREFIX + name.upper() for name in Settings.model_fields)
    for name, field in Settings.model_fields.items():
        documented = rows[PREFIX + name.upper()]
        if field.default_factory is not None:
            assert documented == "`$XDG_STATE_HOME/tare`, else `~/.local/state/tare`"
        elif field.default is None:
            assert documented == "unset", name
        else:
            assert documented == f"`{str(field.default).lower()}`", name


def test_what_other_parts_read_is_documented():
    assert sorted(name for name, _, _ in ROW.findall(PAGE) if name in ELSEWHERE) == sorted(ELSEWHERE)


def test_no_other_variable_is_mentioned():
    known = {PREFIX + name.upper() for name in Settings.model_fields} | set(ELSEWHERE) | set(LATER)
    patterns = {"TARE_", "TARE_SERVICE_", "TARE_PORT_"}
    assert set(re.findall(r"TARE_\w*", PAGE)) - known - patterns == set()
