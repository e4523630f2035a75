"""The simulation of benchmarks/scale.py in its short form: fifty million samples in 5,000 shards."""

from __future__ import annotations

from benchmarks import scale


def test_a_large_set_starts_resumes_and_loses_nothing(capsys):
    assert scale.main(["--shards", "5000"]) == 0
    output = capsys.readouterr().out
    assert "49,999,350 samples in 5,000 shards" in output and "resume at the middle of the eighth" in output


def test_the_exit_code_is_1_where_a_figure_falls_short(monkeypatch, capsys):
    monkeypatch.setattr(scale, "RESUME_AIM", 0.0)
    assert scale.main(["--shards", "50", "--samples", "3000"]) == 1
