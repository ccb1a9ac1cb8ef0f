"""What brings a narrower model back, and which groups it can spare: arms of pruning, before and after one recovery.

    python -m compress.benchmarks.group_pruning MODEL_FOLDER --train python-docs --judge python-docs "novel/*.txt" \\
        --out DIR [--arms ARMS.json]

An arm is a stage that prunes, with its options: `{"mlp": {"prune-groups": {"keep": {"intermediate": 0.75}}}}`. Left
out: importance by activation, Taylor, magnitude and at random, a quarter of the MLP each. Every arm is judged against
the full model as it was cut, and after the same tokens of distillation, by seeds; a `random` one is drawn anew by each.
Finished rows are kept in DIR, so that a run that was interrupted goes on; DIR/group_pruning.md is the report.
Differences to the first arm are paired by block, over the mean of seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress.artifact import Artifact, write_json
from compress.benchmarks.recovery import blocks_to_judge, judge, per_block, plus_minus
from compress.data.config import PYTHON_DOCS, DataConfig
from compress.data.text import TextData
from compress.models.load import load_model, load_tokenizer
from compress.registry import stage_class
from compress.stage import INPUT, Reporter, StageContext, Target
from compress.train.engine import Ids, recover
from compress.train.options import TrainingOptions
from compress.train.teacher import answering_layers

Arms = Mapping[str, Mapping[str, Mapping[str, Any]]]
ARMS: Arms = {
    by: {"prune-groups": {"keep": {"intermediate": 0.75}, "by": by}}
    for by in ("activation", "taylor", "magnitude", "random")
}


@dataclass(frozen=True)
class Bench:
    """What all rows share. train_data: what arms are scored on."""

    folder: Path
    teacher: PreTrainedModel
    train_data: TextData
    train_NT: Ids
    judged: Mapping[str, Ids]
    options: TrainingOptions
    out: Path

    def measure(self, name: str, arm: Mapping[str, Mapping[str, Any]], seed: int, trained: bool) -> dict[str, Any]:
        """Make one model and judge it: figures per text and block, parameters, seconds of training."""
        student = load_model(self._pruned(name, arm, seed))
        num_parameters = sum(parameter.numel() for parameter in student.parameters())
        started = time.monotonic()
        if trained:
            own_eval = next(iter(self.judged.values()))[:2]  # the last step or, if it made things worse, none
            work = self.out / "work"
            shutil.rmtree(work, ignore_errors=True)
            layers = answering_layers(student, self.teacher)
            recover(student, self.teacher, self.train_NT, own_eval, self.options, layers, work, seed, Reporter())
            shutil.rmtree(work)
        seconds = time.monotonic() - started
        student.train(False)
        figures = {text: judge(student, self.teacher, ids_NT) for text, ids_NT in self.judged.items()}
        return {"arm": name, "seed": seed, "trained": trained, "parameters": num_parameters, "seconds": seconds,
                "figures": figures}  # fmt: skip

    def _pruned(self, name: str, arm: Mapping[str, Mapping[str, Any]], seed: int) -> Path:
        """The folder of the arm's model, made where it is not there yet."""
        (stage_name, options), *_ = arm.items()
        stage = stage_class(stage_name).model_validate(options)
        folder = self.out / (f"{name}-{seed}" if stage.uses_seed() else name)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            inputs = {INPUT: Artifact(self.folder, "torch", "source", "key")}
            stage.run(StageContext(folder, folder / "work", inputs, self.train_data, seed, Target.model_validate({})))
            (folder / "done").touch()
        return folder


def report(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table for each text, cut and after recovery."""
    lines = ["# Groups cut, and brought back", "", f"Settings: `{json.dumps(settings, default=str)}`", ""]
    return "\n".join([*lines, *tables(rows, settings["options"]["tokens"])])


def tables(rows: Sequence[Mapping[str, Any]], tokens: int) -> Iterator[str]:
    """For each text that was judged on, a table as cut and one after so many `tokens` of recovery, with headings."""
    for text in rows[0]["figures"]:
        for trained, when in ((False, "as cut"), (True, f"after {tokens} tokens")):
            if found := [row for row in rows if row["trained"] is trained]:
                yield from (f"## Judged on {text}, {when}", "", *table(found, text), "")


def table(rows: Sequence[Mapping[str, Any]], text: str) -> Iterator[str]:
    """A line for each arm of `rows`, of one text: figures, and what they are beside the first arm's."""
    names = list(dict.fromkeys(row["arm"] for row in rows))
    yield f"| arm | parameters, M | seeds | KL ± SE | top-1 agreement ± SE | KL − {names[0]} | each seed's KL |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    first = per_block([row for row in rows if row["arm"] == names[0]], text, "kl")
    for name in names:
        own = [row for row in rows if row["arm"] == name]
        kl_N, agreement_N = (per_block(own, text, figure) for figure in ("kl", "top1_agreement"))
        seeds = " ".join(f"{sum(row['figures'][text]['kl']) / len(row['figures'][text]['kl']):.4f}" for row in own)
        against = plus_minus(kl_N - first) if name != names[0] else ""
        cells = [name, f"{own[0]['parameters'] / 1e6:.1f}", str(len(own)), plus_minus(kl_N), plus_minus(agreement_N)]
        yield f"| {' | '.join([*cells, against, seeds])} |"


def main() -> None:
    """Measure what is missing and write the report after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("--train", default=PYTHON_DOCS, help="text to train on: a spec as under data.train")
    parser.add_argument("--judge", nargs="+", default=[PYTHON_DOCS], help="texts to judge on, SPEC or NAME=SPEC")
    parser.add_argument("--out", type=Path, required=True, help="where rows and the report are kept")
    parser.add_argument("--arms", type=Path, help="JSON: by name, a stage with its options")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--options", type=json.loads, default={}, help='of the training, as JSON: {"tokens": 10000}')
    args = parser.parse_args()
    options = TrainingOptions(**{"tokens": 16_384, **args.options})
    options = options.model_copy(update={"eval_steps": options.num_steps})
    arms: Arms = json.loads(args.arms.read_text("utf-8")) if args.arms else ARMS
    settings = {
        "model": args.model.name, "train": args.train, "judge": args.judge, "eval_tokens": args.eval_tokens,
        "options": {"tokens": options.tokens, **options.model_dump(exclude_defaults=True)},
    }  # fmt: skip
    tokenizer, length = load_tokenizer(args.model), options.sequence_length
    judged = blocks_to_judge(args.judge, args.train, tokenizer, length, args.eval_tokens)
    train_data = TextData(DataConfig(train=args.train))
    train_NT = train_data.blocks("train", tokenizer, length, options.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, load_model(args.model), train_data, train_NT, judged, options, args.out)
    rows = []
    for trained, seed in [(False, 0), *((True, seed) for seed in range(args.seeds))]:
        for name, arm in arms.items():
            drawn = range(args.seeds) if not trained and "random" in str(arm) else [seed]
            for own_seed in drawn:
                key = hashlib.sha256(json.dumps([name, arm, own_seed, trained, settings], sort_keys=True).encode())
                file = args.out / f"{key.hexdigest()[:16]}.json"
                if not file.exists():
                    write_json(file, bench.measure(name, arm, own_seed, trained))
                rows.append(json.loads(file.read_text("utf-8")))
                (args.out / "group_pruning.md").write_text(report(rows, settings) + "\n", "utf-8")
    print(report(rows, settings))


if __name__ == "__main__":
    main()
