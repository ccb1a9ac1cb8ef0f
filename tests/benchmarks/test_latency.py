"""The `latency` stage and the two verbs, on toy models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from compress.artifact import Artifact, finish
from compress.benchmarks.genai import with_threads
from compress.benchmarks.latency import Latency, _faster_chunk, smallest_vocabulary
from compress.cli.bench import bench
from compress.cli.eval import evaluate
from compress.errors import CompressError, InvalidInput
from compress.models.anatomy import shape_of
from compress.stage import StageContext, Target


def artifact(folder: Path) -> Artifact:
    return finish(folder, format="onnx", stage="test", key=folder.name, lineage=(), metrics={})


def test_figures_files_and_ratios(tmp_path: Path, toy_decoder: Callable[[str], Path]) -> None:
    chunks = (2, 6, 8)
    stage = Latency(prompts=(4, 8), batch_sizes=(1, 2), new_tokens=2, repeats=3, max_seconds=1, chunk_sizes=chunks)
    inputs = {name: artifact(toy_decoder(name)) for name in ("input", "source", "source-int4")}
    out = tmp_path / "out"
    out.mkdir()
    data: Any = None
    metrics = stage.run(StageContext(out, tmp_path, inputs, data, seed=0, target=Target(threads=1)))

    assert set(metrics) == {"result", "source", "source-int4"}
    measured = set(metrics["source"])
    assert measured == {"peak_rss_mb", "load_ms"} | {
        f"{what}@{place}" for what in ("ttft_ms", "prompt_tokens_per_s", "tpot_ms")
        for place in ("4", "8", "4,batch=2", "8,batch=2")
    }  # fmt: skip
    assert set(metrics["result"]) - measured == {"ttft_ms@8,chunk=2", "ttft_ms@8,chunk=6"}
    assert set(metrics["result"]) <= set(stage.produces())
    speed = 1e3 * 2 * 8 / metrics["result"]["ttft_ms@8,batch=2"]
    assert metrics["result"]["prompt_tokens_per_s@8,batch=2"] == pytest.approx(speed)
    written = json.loads((out / "latency.json").read_text())
    assert list(written["ratios"]) == ["source", "source-int4"]
    assert set(written["ratios"]["source"]["tpot_ms@8"]) == {"median", "low", "high", "n"}
    figure = written["subjects"]["result"]["figures"]["tpot_ms@8"]
    assert figure["n"] == 6
    assert len(figure["round_medians"]) == written["method"]["rounds"] == 3
    assert figure["median"] == metrics["result"]["tpot_ms@8"]
    assert {"cpu", "cpu_flags", "governor", "load_average", "threads", "cpus", "versions"} <= set(
        written["environment"]
    )
    table = (out / "latency.md").read_text()
    assert "| time per token, ms @ 8 × 2 rows |" in table
    assert "| prompt read, tokens/s @ 8 |" in table
    assert "|\n\n" in table, "what follows without an empty line is a row to Markdown"
    assert "| time to first token, ms @ 8 in chunks of 6 |" in table
    assert "result / source-int4" in table
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_a_chunk_that_reads_faster_is_named() -> None:
    def found(**times: float) -> dict[str, Any]:
        figures = {f"ttft_ms@1024{place.replace('_', ',chunk=')}": {"median": ms} for place, ms in times.items()}
        return {"subjects": {"result": {"figures": {**figures, "tpot_ms@1024": {"median": 1.0}}}}}

    own = {"ttft_ms@1024": {"median": 100.0}}
    assert _faster_chunk({"subjects": {"result": {"figures": own}}}) == ""
    for ms, told in ((96.0, ""), (90.0, "chunks of 64 read a prompt of 1024 in 0.90x the time")):
        seen = found(_64=ms, _512=97.0)
        seen["subjects"]["result"]["figures"] |= own
        assert _faster_chunk(seen).startswith(told)
        assert bool(told) == bool(_faster_chunk(seen))


def test_encoders_have_one_figure(tmp_path: Path, toy_encoder: Callable[[str], Path]) -> None:
    stage = Latency(prompts=(8,), repeats=3, max_seconds=1, baselines=("source",))
    inputs = {name: artifact(toy_encoder(name)) for name in ("input", "source")}
    out = tmp_path / "out"
    out.mkdir()
    data: Any = None
    metrics = stage.run(StageContext(out, tmp_path, inputs, data, seed=0, target=Target(threads=1)))
    assert set(metrics["result"]) == {"latency_ms@8", "peak_rss_mb", "load_ms"}


def test_baselines_are_the_sources_own_exports() -> None:
    refs = Latency().inputs()
    assert {name: dict(ref.via)["export-onnx"] for name, ref in refs.items()} == {
        "source": {"format": "fp32"}, "source-int4": {"format": "int4"},
    }  # fmt: skip
    assert list(Latency(baselines=("source",)).inputs()) == ["source"]


def test_prompts_longer_than_the_model_reads_are_refused(pico: Callable[[str], Path]) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    problems = list(Latency(prompts=(128, 250)).check(shape))
    assert [problem.where for problem in problems] == ["prompts"]
    assert "282 tokens" in problems[0].what
    assert list(Latency(prompts=(128,)).check(shape)) == []


def test_importing_the_stages_loads_no_torch() -> None:
    program = (
        "import sys, compress.benchmarks.latency, compress.benchmarks.evaluate, compress.cli.bench, compress.cli.eval;"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_thread_count_is_written_into_a_copy(tmp_path: Path, toy_decoder: Callable[[str], Path]) -> None:
    folder = toy_decoder("ours")
    with pytest.raises(CompressError, match=r"has no genai_config\.json"):
        with_threads(folder, 2, tmp_path / "none")
    config = {"model": {"vocab_size": 30, "decoder": {"filename": "model.onnx", "session_options": {"log_id": "x"}}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    copy = with_threads(folder, 2, tmp_path / "copy")
    assert json.loads((copy / "genai_config.json").read_text())["model"]["decoder"]["session_options"] == {
        "log_id": "x", "intra_op_num_threads": 2, "inter_op_num_threads": 1,
    }  # fmt: skip
    assert json.loads((folder / "genai_config.json").read_text()) == config, "the folder itself is left alone"
    assert (copy / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert smallest_vocabulary([folder]) == 30


def command(verb: Callable[..., None]) -> typer.Typer:
    app = typer.Typer()
    app.command()(verb)
    return app


def test_bench_compares_folders(toy_decoder: Callable[[str], Path]) -> None:
    folders = [str(toy_decoder(name)) for name in ("ours", "theirs")]
    options = ["--prompts", "4", "--new-tokens", "2", "--repeats", "3", "--max-seconds", "1", "--threads", "1"]
    done = CliRunner().invoke(command(bench), [*folders, *options])
    assert done.exit_code == 0, done.output
    assert "ours / theirs" in done.stdout
    assert "time to first token, ms @ 4" in done.stdout
    done = CliRunner().invoke(command(bench), [folders[0], *options, "--json"])
    assert set(json.loads(done.stdout)["subjects"]) == {"ours"}


@pytest.mark.parametrize("options", [["--prompts", "4,x"], ["--batch", "0"]])
def test_bench_refuses_bad_lists(toy_decoder: Callable[[str], Path], options: list[str]) -> None:
    done = CliRunner().invoke(command(bench), [str(toy_decoder("ours")), *options])
    assert isinstance(done.exception, InvalidInput)
    assert done.exception.problem.where == options[0]


@pytest.mark.parametrize(
    ("file", "config"),
    [("config.json", {"max_position_embeddings": 64}), ("genai_config.json", {"model": {"context_length": 64}})],
)
def test_bench_refuses_prompts_beyond_the_models_positions(
    file: str, config: Any, toy_decoder: Callable[[str], Path]
) -> None:
    folder = toy_decoder("ours")
    (folder / file).write_text(json.dumps(config))
    done = CliRunner().invoke(command(bench), [str(folder), "--prompts", "8,65"])
    assert isinstance(done.exception, InvalidInput)
    assert str(done.exception.problem).startswith("--prompts: 65 tokens, but the model in")


def test_bench_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(command(bench), [str(tmp_path)])
    assert isinstance(done.exception, InvalidInput)


def test_eval_reads_a_file(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and so did the dog. " * 40)
    folder = str(pico("llama"))
    options = ["--text", str(text), "--sequence-length", "32", "--tokens", "128", "--json"]
    done = CliRunner().invoke(command(evaluate), [folder, *options])
    assert done.exit_code == 0, done.output
    alone = json.loads(done.stdout)
    assert set(alone["figures"][folder]) == {"perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se"}
    assert alone["blocks"]["num_blocks"] == 4
    done = CliRunner().invoke(command(evaluate), [folder, *options, "--against", folder])
    assert json.loads(done.stdout)["figures"][folder]["perplexity"] == alone["figures"][folder]["perplexity"]


def test_eval_refuses_what_is_not_there(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(command(evaluate), [str(tmp_path / "none"), "--text", "python-docs"])
    assert isinstance(done.exception, InvalidInput)
    done = CliRunner().invoke(command(evaluate), [str(pico("llama")), "--text", str(tmp_path / "none.txt")])
    assert isinstance(done.exception, InvalidInput)
    assert done.exception.problem.where == "--text"
