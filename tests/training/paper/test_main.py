"""The command as a person types it."""

import csv
import re

import pytest

from training.paper.__main__ import main
from training.paper.registry import ENTRIES


def refusal(capsys, words):
    try:
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def test_an_unknown_name_lists_the_known_ones(capsys):
    err = refusal(capsys, ["figure11"])
    assert all(name in err for name in ENTRIES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "erm,magic"], "unknown 'magic'; known are erm"),
        (["--datasets", "mnist"], "unknown 'mnist'; known are cifar10-lt"),
        (["--seeds", "0"], "at least 1"),
        (["--minutes", "-1"], "above zero"),
        (["--jobs", "0"], "at least 1"),
        (["--recipe", "magic"], "magic"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(words, said, capsys):
    assert said in refusal(capsys, ["table2", "--quick", *words])


def test_a_figure_that_needs_no_training_is_three_files(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["figure6", "--out", str(out), "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"{out / 'figure6.md'}\n"
    assert sorted(path.name for path in out.iterdir()) == ["figure6.csv", "figure6.md", "figure6.png"]
    rows = list(csv.DictReader((out / "figure6.csv").read_text().splitlines()))
    at_zero = {row["curve"]: float(row["y"]) for row in rows if row["g"] == "1" and float(row["x"]) == 0}
    assert at_zero == pytest.approx(
        {"Balanced": 0.2, "Unequal margin": 0.2, "Balanced + margin": 0.161}, abs=5e-4
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute on a core of its own, many where others work
def test_all_of_the_paper_runs_in_its_quick_version_and_the_second_time_trains_nothing(tmp_path, capsys):
    words = ["all", "--quick", "--epochs", "1", "--device", "cpu"]
    words += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "trained in" in first.err
    for name in ENTRIES:
        page = (tmp_path / "out" / f"{name}.md").read_text()
        assert f"]({name}.png)" in page
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
        assert len((tmp_path / "out" / f"{name}.csv").read_text().splitlines()) > 1
    table = (tmp_path / "out" / "table2.csv").read_text()
    assert "not run here" not in table
    assert re.search(r"shapes-lt,\"?Logit adjusted loss", table)
    assert main(["table4", *words[1:]]) == 0
    assert "trained in" not in capsys.readouterr().err
