"""What to cut first: a table and a plot of what `bench` and `eval` wrote."""

from __future__ import annotations

import json

from compress.benchmarks import first_cut


def test_arms_are_ranked_by_quality_beside_their_times(tmp_path, capsys):
    def judged(name, value):
        figures = {"mine": {"bits_per_byte_ratio": value, "bits_per_byte_ratio_se": 0.01}, "source": {"kl": 1.0}}
        (tmp_path / name).write_text(json.dumps({"figures": figures}))
        return str(tmp_path / name)

    def timed(size_mb, *medians):
        return {"size_mb": size_mb, "figures": {first_cut.FIGURE: {"round_medians": medians}}}

    times = {"subjects": {"source": timed(80, 10, 20, 40), "a": timed(70, 9, 18, 36), "b": timed(60, 5, 10, 20)}}
    arms = {name: {"timed": name, "judged": {"novel": judged(f"{name}.json", value)}}
            for name, value in (("a", 1.5), ("b", 1.25))}  # fmt: skip
    for name, value in (("times", times), ("arms", arms)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    files = [str(tmp_path / name) for name in ("arms.json", "times.json", "plot.png")]
    first_cut.main([files[0], "--times", files[1], "--source", "source", "--plot", files[2]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| b | 0.50× [0.50, 0.50] | 60.0 | 1.250 ± 0.010 |",
                         "| a | 0.90× [0.90, 0.90] | 70.0 | 1.500 ± 0.010 |"]  # fmt: skip
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
