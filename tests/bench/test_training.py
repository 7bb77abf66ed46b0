"""The benchmark runs both loops and reports the ratio of medians."""

import re

import pytest
import torch

from bench.training import Round, main, report


@pytest.mark.slow
def test_the_command_measures_both_loops_and_runs_side_by_side(capsys):
    words = ["--rounds", "1", "--steps", "1", "--threads", "1", "--device", "cpu", "--runs", "2"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert re.search(r"flags: .*\(of avx2, .*amx_bf16\)", table)
    for row in ("| most people's: ", "| ours | ", "| ratio | **", "| ours, 2 runs side by side, in all | "):
        assert table.count(row) == 1


def test_the_ratio_is_that_of_the_medians():
    ours = [Round(300, 200), Round(330, 210), Round(1, 1)]
    theirs = [Round(100, 100), Round(150, 50), Round(120, 80)]
    table = report(ours, theirs, torch.device("cpu"))
    assert "| ratio | **2.50** | 2.50 |" in table  # 300 / 120 and 200 / 80
