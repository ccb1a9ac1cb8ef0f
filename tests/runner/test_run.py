"""The runner on stages that do nothing: what is cached, kept, recorded, refused and judged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from packed import Registry
from safetensors.numpy import save_file

from compress import registry
from compress.cli.gc import unreferenced
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.errors import CompressError, ExitCode, InvalidInput, is_full_disk
from compress.pipeline.file import load_pipeline
from compress.runner.lock import locked
from compress.runner.record import RunRecord, State, load_record
from compress.runner.run import run_pipeline
from compress.stage import Reporter

Run = Callable[..., RunRecord]


@pytest.fixture(autouse=True)
def _fake_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_points", fakes.points)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Write the pipeline with these changes and run it, without a dry run."""
    model = fakes.make_model(tmp_path / "model")

    def go(from_stage: str | None = None, **changes: Any) -> RunRecord:
        pipeline = load_pipeline(fakes.make_pipeline(tmp_path, model, **changes))
        return run_pipeline(pipeline, runs=tmp_path / "runs", reporter=Reporter(), from_stage=from_stage, twin=False)

    return go


def states(record: RunRecord) -> dict[str, str]:
    return {stage.id: stage.state.value for stage in record.stages}


def test_runs_every_stage_and_records_it(run: Run, tmp_path: Path) -> None:
    record = run()
    run_dir = tmp_path / "runs" / "pico"
    assert record == load_record(run_dir)
    assert record.state is State.DONE
    assert set(states(record).values()) == {"done"}
    visible = ["fake-shrink", "fake-measure", "fake-export", "fake-measure-2"]
    assert list(states(record)) == [visible[0], "source/fake-export", *visible[1:]]
    assert (run_dir / "pipeline.yaml").read_text() == (tmp_path / "pipeline.yaml").read_text()
    assert record.source.parameters == 68
    shrink = record.stage("fake-shrink")
    assert shrink.directory == f"01-fake-shrink-{shrink.key[:12]}"
    assert shrink.metrics["result"]["parameters"] == 68
    assert shrink.seconds is not None
    assert shrink.peak_rss_mb is not None
    assert not (run_dir / shrink.directory / "checkpoints").exists()
    assert not (run_dir / shrink.directory / "half-written").exists()
    export = record.stage("fake-export").metrics["result"]
    assert export == {"parameters": 68, "size_mb": 68 * 4 / 1e6}
    assert record.deploy == record.stage("fake-export")
    for name in ("python", "torch", "onnxruntime"):
        assert record.versions[name]
    assert {"run.log", "report.md", "report.html"} <= {path.name for path in run_dir.iterdir()}


def test_the_source_is_weighed_again_whatever_an_earlier_run_noted(run: Run, tmp_path: Path) -> None:
    weighed, file = run().source, tmp_path / "runs/pico/run.json"
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({**noted, "source": {**noted["source"], "size_mb": 9999.0, "parameters": 9.0}}))
    assert run().source == weighed


def test_a_second_run_is_all_cached_with_the_same_figures(run: Run, tmp_path: Path) -> None:
    first, second = run(), run()
    assert set(states(second).values()) == {"cached"}
    assert [(s.metrics, s.seconds) for s in first.stages] == [(s.metrics, s.seconds) for s in second.stages]
    assert (tmp_path / "runs/pico/steps.txt").read_text() == "0\n1\n2\n"


def test_a_change_reaches_what_comes_after_and_nothing_else(run: Run, tmp_path: Path) -> None:
    run()
    stages = [{"fake-shrink": {}}, "fake-measure", "fake-export", {"fake-measure": {"value": 13.0}}]
    assert states(run(stages=stages)) == {
        "fake-shrink": "cached", "source/fake-export": "cached", "fake-measure": "cached", "fake-export": "cached",
        "fake-measure-2": "done",
    }  # fmt: skip
    inserted = run(stages=["fake-measure", *stages])  # what was there is found under its old number
    assert [s.directory for s in inserted.stages if s.state is State.DONE] == [inserted.stage("fake-measure").directory]
    changed = run(shrink={"by": 4.0})
    assert states(changed) == {
        "fake-shrink": "done", "source/fake-export": "cached", "fake-measure": "done", "fake-export": "done",
        "fake-measure-2": "done",
    }  # fmt: skip
    assert set(states(run()).values()) == {"cached"}  # and going back loses nothing
    assert len(unreferenced(tmp_path / "runs/pico")) == 6


def test_other_weights_in_the_teachers_folder_are_another_teacher(run: Run, tmp_path: Path) -> None:
    teacher = fakes.make_model(tmp_path / "teacher")
    stages = ["fake-measure", {"fake-shrink": {"teacher_model": str(teacher)}}, "fake-export"]
    first = run(stages=stages)
    shrink = first.stage("fake-shrink")
    assert shrink.inputs == {"input": "source", "teacher": f"teacher:{teacher}"}
    assert first.models[shrink.inputs["teacher"]].name == str(teacher)
    manifest = json.loads((tmp_path / "runs/pico" / shrink.directory / "artifact.json").read_text())
    assert manifest["lineage"][1] == f"teacher: teacher:{teacher} {first.models[f'teacher:{teacher}'].key}"
    assert str(teacher) in (tmp_path / "runs/pico/report.md").read_text()
    assert set(states(run(stages=stages)).values()) == {"cached"}
    save_file({"a.weight": np.zeros((8, 8), np.float32)}, teacher / "model.safetensors")
    again = states(run(stages=stages))
    assert again == {
        "source/fake-export": "cached", "fake-measure": "cached", "fake-shrink": "done", "fake-export": "done",
    }  # fmt: skip
    shutil.move(teacher, tmp_path / "moved")
    stages[1] = {"fake-shrink": {"teacher_model": str(tmp_path / "moved")}}
    assert set(states(run(stages=stages)).values()) == {"cached"}, "it is known by its content, not by its place"


def test_what_a_package_was_is_recorded_and_reported(run: Run, tmp_path: Path) -> None:
    texts = {split: "".join(f"{split} line {i} of it, {i * i}.\n" for i in range(50)) for split in ("train", "eval")}
    registry = Registry({f"{split}.txt": text.encode() for split, text in texts.items()})
    data = {split: f"npm://texts/1.2.3/{split}.txt" for split in texts} | {"max_overlap": 1.0}
    TextData(DataConfig(**data), registry).digest("train")
    record = run(data=data)
    (sha256,) = {facts["sha256"] for facts in record.resolved.values()}
    assert set(record.resolved) == {data["train"], data["eval"]}
    assert len(sha256) == 64
    for report in ("report.md", "report.html"):
        assert f"{data['train']}: sha256 {sha256}" in (tmp_path / "runs/pico" / report).read_text()


def test_a_teacher_that_can_not_be_used_is_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    teacher = fakes.make_model(tmp_path / "teacher")
    (teacher / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InvalidInput, match="is not a whole safetensors file"):
        run(stages=[{"fake-shrink": {"teacher_model": str(teacher)}}])
    shutil.rmtree(teacher)
    with pytest.raises(InvalidInput, match=r"teacher:.*no such model"):
        run(stages=[{"fake-shrink": {"teacher_model": str(teacher)}}])
    assert not list((tmp_path / "runs/pico").glob("01-*"))


def test_from_runs_a_stage_and_those_after_it_again(run: Run) -> None:
    run()
    assert states(run(from_stage="fake-export")) == {
        "fake-shrink": "cached", "source/fake-export": "cached", "fake-measure": "cached", "fake-export": "done",
        "fake-measure-2": "done",
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="did you mean 'fake-export'"):
        run(from_stage="fake-exprot")


def test_deleting_a_directory_reruns_that_stage_alone(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs/pico" / run().stage("fake-shrink").directory)
    again = states(run())
    assert again.pop("fake-shrink") == "done"
    assert set(again.values()) == {"cached"}


def test_a_failing_stage_is_recorded_and_what_came_before_is_kept(run: Run, tmp_path: Path) -> None:
    stages = ["fake-measure", {"fake-shrink": {"fail": "user"}}]
    with pytest.raises(CompressError, match="can't shrink this") as caught:
        run(stages=stages)
    assert caught.value.exit_code is ExitCode.STAGE_FAILED
    record = load_record(tmp_path / "runs/pico")
    assert record.state is State.FAILED
    assert record.stage("fake-shrink").state is State.FAILED
    assert "can't shrink this" in (record.stage("fake-shrink").error or "")
    assert record.stage("fake-measure").state is State.DONE


def test_a_failed_stage_goes_on_from_its_checkpoints(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CompressError):
        run(shrink={"fail": "user"})
    directory = next((tmp_path / "runs/pico").glob("01-fake-shrink-*"))
    assert (directory / "half-written").exists()
    (directory / "checkpoints" / "step.json").write_text("2")
    with pytest.raises(CompressError):
        run(shrink={"fail": "user"})
    assert (tmp_path / "runs/pico/steps.txt").read_text() == "0\n1\n2\n" + "2\n"


def test_a_bug_keeps_its_traceback_and_names_the_stage(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(shrink={"fail": "bug"})
    assert any("fake-shrink" in note for note in caught.value.__notes__)
    assert load_record(tmp_path / "runs/pico").stage("fake-shrink").state is State.FAILED
    assert "ZeroDivisionError" in (tmp_path / "runs/pico/run.log").read_text()


def test_interrupting_is_recorded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(shrink={"fail": "interrupt"})
    record = load_record(tmp_path / "runs/pico")
    assert (record.state, record.stage("fake-shrink").state) == (State.INTERRUPTED, State.INTERRUPTED)


def test_a_full_disk_in_a_stage_is_one_message(run: Run) -> None:
    with pytest.raises(CompressError, match="fake-shrink: no space is left on the disk"):
        run(shrink={"fail": "disk"})


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        RuntimeError("basic_ios::clear: iostream error"),
        OSError("1000000 requested and 262112 written"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        Exception("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
    ids=str,
)
def test_a_full_disk_in_the_words_of_libraries_is_one_message(
    error: Exception, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(how: str) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fakes, "_fail", fail)
        with pytest.raises(CompressError, match=r"fake-shrink: no space is left on the disk.*free some and run again"):
            run()
    recorded = load_record(tmp_path / "runs/pico").stage("fake-shrink").error
    assert recorded is not None
    assert "no space is left on the disk" in recorded
    assert run().state is State.DONE


def test_other_errors_are_no_full_disk() -> None:
    for error in (RuntimeError("CUDA out of memory"), OSError(errno.EIO, os.strerror(errno.EIO)), ValueError("28")):
        assert not is_full_disk(error)


def test_a_full_disk_outside_a_stage_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("compress.runner.run.weighed", full)
    with pytest.raises(CompressError, match="no space is left on the disk"):
        run()


@pytest.mark.parametrize(
    ("limit", "state", "error"),
    [
        ("<= 12", State.DONE, ValueError("no such font")),
        ("<= 11", State.MISSED, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_report_that_can_not_be_written_is_a_warning(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    limit: str, state: State, error: Exception,
) -> None:  # fmt: skip
    def fails(*_: object) -> None:
        raise error

    report = tmp_path / "runs/pico/report.html"
    with monkeypatch.context() as patch:
        patch.setattr("compress.report.write._html", fails)
        record = run(require={"perplexity": limit})
    assert (record.state, load_record(tmp_path / "runs/pico").state) == (state, state)
    (warning,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("warning: the report can't be written (")
    assert (error.strerror if isinstance(error, OSError) else str(error)) in warning
    assert type(error).__name__ in (tmp_path / "runs/pico/run.log").read_text(), "the log has the traceback"
    assert not report.exists()
    run(require={"perplexity": limit})
    assert report.is_file(), "what could not be written is tried again"


def test_plots_that_can_not_be_written_leave_the_report(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plots = tmp_path / "runs/pico/plots"
    plots.parent.mkdir(parents=True)
    plots.write_text("a file where the folder should be")
    assert run().state is State.DONE
    assert "warning: the plots of the report can't be written (File exists)" in caplog.messages
    assert "12.00 ± 0.25" in (tmp_path / "runs/pico/report.html").read_text()


def test_a_report_of_other_figures_does_not_stay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.report.write._put", fails)
    run(shrink={"by": 3.0})
    assert not list((tmp_path / "runs/pico").glob("report.*"))


def test_an_estimate_that_does_not_fit_is_refused_before_anything_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("compress.runner.estimate.shutil.disk_usage", lambda path: usage)
    with pytest.raises(InvalidInput, match="MB free, and the run needs about"):
        run()
    assert not list((tmp_path / "runs/pico").glob("01-*"))


def test_a_run_directory_that_can_not_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the directory should be")
    with pytest.raises(InvalidInput, match="can't write the run directory"):
        run()


def test_two_runs_at_once_are_refused(run: Run, tmp_path: Path) -> None:
    with locked(tmp_path / "runs/pico"), pytest.raises(InvalidInput, match=rf"process {os.getpid()}\b"):
        run()
    assert run().state is State.DONE


def test_a_missed_requirement_marks_the_run_and_keeps_everything(run: Run) -> None:
    record = run(require={"perplexity": "<= 1.4x source", "tpot_ms@128": "<= 0.5x source", "size_mb": "<= 1"})
    assert record.state is State.MISSED
    assert {verdict.metric: verdict.met for verdict in record.verdicts} == {
        "perplexity": False, "tpot_ms@128": True, "size_mb": True,
    }  # fmt: skip
    assert record.verdicts[0].limit == pytest.approx(11.2)
    assert "missed by 7.1" in record.verdicts[0].sentence
    assert run(require={"perplexity": "<= 1.6x source"}).state is State.DONE


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "artifact.json").write_text('{"format": "torch"'),
        lambda folder: (folder / "artifact.json").write_text("[]"),
        lambda folder: _edit(folder / "artifact.json", key="0" * 64),
    ],
    ids=["missing", "truncated", "half a manifest", "another manifest", "another key"],
)
def test_a_damaged_artifact_names_the_directory_to_delete(
    run: Run, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "runs/pico" / run().stage("fake-shrink").directory
    damage(folder)
    with pytest.raises(CompressError, match=f"delete {folder} and run again"):
        run()
    shutil.rmtree(folder)
    assert states(run())["fake-shrink"] == "done"


def test_a_damaged_record_is_written_anew(run: Run, tmp_path: Path) -> None:
    run()
    (tmp_path / "runs/pico/run.json").write_text("{")
    with pytest.raises(InvalidInput, match="is damaged"):
        load_record(tmp_path / "runs/pico")
    assert set(states(run()).values()) == {"cached"}


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
