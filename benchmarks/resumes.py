"""Whether a training that is killed, and gone on with by another number of processes, loses anything.

    python -m compress.benchmarks.resumes --write benchmarks/results/resumes_pico-llama.md

A pipeline that prunes a pico Llama and distils it is run once undisturbed, and once in launches of one and two
processes in turn, from two working directories, each of which is killed at a random moment after its next checkpoint;
the last one is let finish. Raises AssertionError where a checkpoint is deleted, a launch does not go on from the
newest one, or the KL at the end is more than 5 % away from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.export_cost import CLI
from compress.data.config import PYTHON_DOCS, DataConfig
from compress.data.text import TextData
from compress.report.tables import Table, as_markdown
from compress.train.checkpoints import newest_complete, read_state

LAUNCHES = (1, 2, 1, 2, 1, 2)
"""Processes of each launch: one more than there are resumes."""
STEPS, EVERY, BATCH, LENGTH = 480, 20, 4, 32
TOLERANCE = 0.05
_NAME = "resumes"
_ON = "going on from "


@dataclass(frozen=True)
class Launch:
    """Processes, the step that it went on from, 0 for none, and those of whole checkpoints when it was killed."""

    processes: int
    began: int
    checkpoints: tuple[int, ...] = ()


def write_pico(folder: Path) -> None:
    """A Llama of four layers, 64 wide, with random weights that make its logits differ, and a tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = TextData(DataConfig(train=(PYTHON_DOCS,))).texts("train")
    bpe.train_from_iterator(texts, 512, special_tokens=["<|end|>"], show_progress=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(folder)


def write_pipeline(file: Path, model: Path) -> None:
    """Prune a layer, distil STEPS steps, a checkpoint EVERY so many."""
    distill = {
        "tokens": STEPS * BATCH * LENGTH, "batch_size": BATCH, "sequence_length": LENGTH, "eval_steps": EVERY,
        "eval_tokens": 1024, "learning_rate": 1e-3, "precision": "fp32",
    }  # fmt: skip
    stages = [{"prune-layers": {"drop": [1]}}, {"distill": distill}]
    file.write_text(json.dumps({"name": _NAME, "model": str(model), "stages": stages}), "utf-8")


class Training:
    """The disturbed run, in `scratch`."""

    def __init__(self, scratch: Path, pipeline: Path, generator: random.Random) -> None:
        self._scratch, self._pipeline, self._random = scratch, pipeline, generator
        self.run_dir = scratch / "disturbed" / _NAME

    def launch(self, processes: int, number: int, *, kill: bool) -> Launch:
        """Launch, look at what it goes on from, and kill it once it has written a checkpoint, or let it finish."""
        before = self.checkpoints()
        cwd = self._scratch / ("here", "there")[number % 2]
        cwd.mkdir(exist_ok=True)
        process = run(self._pipeline, Path("..") / "disturbed", cwd, processes)
        try:
            began = self._began(process, len(self._log()), max(before, default=0))
            assert set(before) <= set(self.checkpoints()), f"of {before}, {self.checkpoints()} are left"
            assert began == max(before, default=0), f"goes on from {began}, and there are {before}"
            while kill and self._newest() <= began:
                assert process.poll() is None, "ended before it was killed: give it more steps"
                time.sleep(0.01)
            if not kill:
                assert process.wait() == 0
                return Launch(processes, began)
            time.sleep(self._random.uniform(0.0, 3.0))
            assert process.poll() is None, "ended before it was killed: give it more steps"
        finally:
            end(process)
        return Launch(processes, began, self.checkpoints())

    def checkpoints(self) -> tuple[int, ...]:
        """The steps of those that have a whole state."""
        folders = self.run_dir.glob("*-distill-*/checkpoints/checkpoint-*")
        return tuple(sorted(state["global_step"] for folder in folders if (state := read_state(folder))))

    def _newest(self) -> int:
        work = next(self.run_dir.glob("*-distill-*/checkpoints"), None)
        newest = newest_complete(work) if work else None
        return int(newest.name.removeprefix("checkpoint-")) if newest else 0

    def _log(self) -> str:
        file = self.run_dir / "run.log"
        return file.read_text("utf-8") if file.exists() else ""

    def _began(self, process: subprocess.Popen[bytes], read: int, expected: int) -> int:
        """The step that the log says it goes on from."""
        while expected and _ON not in self._log()[read:]:
            assert process.poll() is None, "it ended without a word"
            time.sleep(0.01)
        return int(self._log()[read:].split(f"{_ON}checkpoint-")[1].split()[0]) if expected else 0


def run(pipeline: Path, runs: Path, cwd: Path, processes: int) -> subprocess.Popen[bytes]:
    """Start `compress run`, under torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python"]
    command = [*([sys.executable, *launcher] if processes > 1 else []), *CLI, "run", str(pipeline), "--no-twin"]
    with (pipeline.parent / "launches.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--runs", str(runs)], cwd=cwd, stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it has started, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for each in (*launcher.children(recursive=True), launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def final_kl(run_dir: Path) -> float:
    """KL to the teacher of what a finished run has made."""
    record = json.loads((run_dir / "run.json").read_text("utf-8"))
    kl: float = record["stages"][-1]["metrics"]["result"]["kl_to_teacher"]
    return kl


def report(launches: Sequence[Launch], undisturbed: float, disturbed: float, seed: int, written: str) -> str:
    """The page."""
    machine = environment(1, pick_cpus(1))
    rows = tuple(
        (
            f"{number}", f"{launch.processes}", f"{launch.began}" if launch.began else "the start",
            " ".join(map(str, launch.checkpoints)) or "finished",
        )
        for number, launch in enumerate(launches, start=1)
    )  # fmt: skip
    table = Table("", ("launch", "processes", "went on from step", "checkpoints when it was killed"), rows)
    command = f"python -m compress.benchmarks.resumes --seed {seed}{written}"
    return f"""# {len(launches) - 1} resumes with another number of processes: a pico Llama

`{command}`, {datetime.now(UTC).date()}.
{STEPS} steps of `distill`, {BATCH} sequences of {LENGTH} tokens each, a checkpoint every {EVERY}.
Launches of two processes are `torchrun`'s, on the CPU (gloo); odd and even ones run in different working directories
and name the run's by a relative path. SIGKILL to all of their processes came up to three seconds after the first new
checkpoint. Whole checkpoints are listed: the newest and the best are kept.

{as_markdown(table)}

No checkpoint was deleted, and each launch went on from the newest one. KL to the teacher at the end {disturbed:.5f};
undisturbed, in one process, {undisturbed:.5f}: {disturbed / undisturbed - 1:+.3%}.

{machine["cpu"]}, {machine["num_cpus"]} CPUs, commit {machine["commit"]}, torch {machine["versions"]["torch"]},
transformers {machine["versions"]["transformers"]}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, check and print, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--write", type=Path, help="the page's file; left out: it is printed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compress-resumes-") as temporary:
        scratch = Path(temporary)
        write_pico(scratch / "pico-llama")
        pipeline = scratch / "pipeline.yaml"
        write_pipeline(pipeline, scratch / "pico-llama")
        assert run(pipeline, Path("undisturbed"), scratch, 1).wait() == 0
        training = Training(scratch, pipeline, random.Random(options.seed))
        launches = [
            training.launch(processes, number, kill=number < len(LAUNCHES) - 1)
            for number, processes in enumerate(LAUNCHES)
        ]
        undisturbed, disturbed = (final_kl(scratch / runs / _NAME) for runs in ("undisturbed", "disturbed"))
    assert abs(disturbed / undisturbed - 1) <= TOLERANCE, f"KL {disturbed}, undisturbed {undisturbed}"
    page = report(launches, undisturbed, disturbed, options.seed, f" --write {options.write}" if options.write else "")
    if options.write:
        options.write.write_text(page, "utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
