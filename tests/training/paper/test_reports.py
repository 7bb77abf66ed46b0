"""The pages: what is said of a cell, and what is left empty."""

import csv
import io

import pytest

from training.exceptions import RunError
from training.paper.plotting import NOT_RUN, new_figure
from training.paper.reports import Measured, Report, Value, comparison, csv_text, value_rows, write

VALUES = [
    Value("A", "ours and theirs", 20.0, Measured((18.0, 20.0), 17.5, 20.5)),
    Value("A", "copied", 30.0, Measured((29.0,), 28.0, 30.0), copied="Someone"),
    Value("A", "not run", 40.0, None),
    Value("A", "not printed", None, Measured((50.0,), 49.0, 51.0), note="tau* = 1.2"),
]


def report(folder_name="x"):
    return Report(folder_name, "A title", new_figure(1), value_rows(VALUES), [comparison("Errors", VALUES)])


def test_a_difference_is_ours_less_the_papers_and_absent_where_either_is():
    assert [value.difference for value in VALUES] == [-1.0, -1.0, None, None]


def test_a_copied_value_is_shown_and_not_counted():
    rows = value_rows(VALUES)
    assert [row["counted"] for row in rows] == [True, False, False, False]
    assert [row["paper"] for row in rows] == [20.0, 30.0, 40.0, None]
    cells = comparison("Errors", VALUES).rows[1]
    assert cells[2] == "30.00 copied"
    assert "not counted" in cells[-1]


def test_a_cell_that_was_not_run_says_so_and_has_no_number():
    cells = comparison("Errors", VALUES).rows[2]
    assert cells[3] == NOT_RUN
    assert cells[4:7] == ("", "", "")
    assert value_rows(VALUES)[2]["note"] == NOT_RUN


def test_one_seed_has_no_standard_deviation_and_two_have():
    assert Measured((1.0,)).sd is None
    assert Measured((18.0, 20.0)).sd == pytest.approx(2**0.5)


def test_the_table_of_the_page_has_a_cell_for_each_column(tmp_path):
    write(report(), tmp_path / "deep" / "out", "python -m it")
    page = (tmp_path / "deep" / "out" / "x.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(VALUES)
    assert len({line.count("|") for line in lines}) == 1
    assert "`python -m it`" in page
    assert (tmp_path / "deep" / "out" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_csv_reads_back_with_empty_cells_for_what_is_absent():
    rows = list(csv.DictReader(io.StringIO(csv_text(value_rows(VALUES)))))
    assert float(rows[0]["difference"]) == -1.0
    assert rows[2]["ours"] == rows[3]["paper"] == ""
    assert csv_text([{"a": float("nan"), "b": 1}]) == "a,b\n,1\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        write(report(), tmp_path / "file" / "below", "")
