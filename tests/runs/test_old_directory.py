"""Run directories of the first format, written before the rooms were laid out anew, still read, resume and report."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedfuse
from fedfuse.results.report import report
from fedfuse.runs.configuration import load_config
from fedfuse.runs.experiment import resume, run

KEPT = Path(__file__).parents[1] / "fixtures" / "run_of_format_1"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    shutil.copytree(KEPT, tmp_path / "kept")
    return tmp_path / "kept"


def test_a_run_that_had_begun_goes_on_to_the_same_end(kept: Path, tmp_path: Path) -> None:
    assert "metric:" in (kept / "begun/config.yaml").read_text()  # stop.metric, which is gone
    config = load_config(kept / "begun")
    whole = run(replace(config, out=str(tmp_path / "whole")), quiet=True)
    resumed = resume(kept / "begun", quiet=True)
    model, wanted = (fedfuse.load(path).model(client=0).state_dict() for path in (resumed, whole))
    for name, value in model.items():  # its first round was played on another processor: not the same bits
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    metrics = fedfuse.load(resumed).metrics
    assert sorted(set(metrics["round"].to_list())) == [1, 2, 3]


def test_a_run_that_had_ended_reads_and_reports(kept: Path, tmp_path: Path) -> None:
    done = fedfuse.load(kept / "done")
    assert done.summary["digest"]
    assert done.summary["rounds_done"] == 3
    assert done.model() is not None
    report([kept / "done"], tmp_path / "page")
    assert "fedavg" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "fedavg" in (tmp_path / "page" / "table.md").read_text(encoding="utf-8")
