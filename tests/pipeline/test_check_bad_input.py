"""Every kind of bad pipeline file: exit status 2, the place, what is wrong, what to do, and never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fake_stages import fakes  # noqa: F401 (a fixture)

from compress.cli.main import main

pytestmark = pytest.mark.usefixtures("fakes")

GOOD = """\
name: good
model: MODEL
seed: 1
stages:
  - shrink: {keep: 3}
  - judge
  - tune: {teacher: source}
  - judge
  - pack: {format: int4}
  - judge
  - time: {prompts: [16]}
require:
  perplexity: "<= 1.05x source"
  tpot_ms@16: "<= 0.5x source-int4"
  size_mb: "<= 90"
"""

TABLE: dict[str, tuple[str, str, str, list[str]]] = {
    # what is replaced in GOOD, by what, where the problem is, words of its message
    "no name": ("name: good\n", "", "p.yaml name", ["is missing", "directory"]),
    "name is a number": ("name: good", "name: 2024", ":1 name", ["text", "2024", "quotes"]),
    "name is a path": ("name: good", "name: ../up", ":1 name", ["malformed", "'../up'", "letters"]),
    "name is empty": ("name: good", "name:", ":1 name", ["text", "nothing"]),
    "no model": ("model: MODEL\n", "", "p.yaml model", ["is missing", "hub id"]),
    "unknown key": ("seed: 1", "sead: 1", ":3 sead", ["no option", "did you mean 'seed'"]),
    "key twice": ("seed: 1", "name: again", ":3 name", ["given twice", "line 1"]),
    "key is a list": ("seed: 1", "[a, b]: 1", ":3", ["key must be a word"]),
    "seed is true": ("seed: 1", "seed: true", ":3 seed", ["whole number", "got true"]),
    "seed is text": ("seed: 1", 'seed: "1"', ":3 seed", ["whole number", "without quotes"]),
    "seed is negative": ("seed: 1", "seed: -1", ":3 seed", ["at least 0", "-1"]),
    "seed is a fraction": ("seed: 1", "seed: 1.0", ":3 seed", ["whole number", "write 1"]),
    "seed has 500 digits": ("seed: 1", f"seed: {'9' * 500}", ":3 seed", ["too many digits"]),
    "threads is zero": ("seed: 1", "target: {threads: 0}", ":3 target.threads", ["at least 1", "got 0"]),
    "provider": ("seed: 1", "target: {provider: CUDA}", ":3 target.provider", ["CPUExecutionProvider", "'CUDA'"]),
    "target is a word": ("seed: 1", "target: cpu", ":3 target", ["mapping", "'cpu'"]),
    "unknown data key": ("seed: 1", "data: {trian: x}", ":3 data.trian", ["did you mean 'train'"]),
    "data not there": (
        "seed: 1",
        "data: {train: no/such/*.txt}",
        ":3 data.train",
        ["no file matches", "no/such/*.txt"],
    ),
    "data had this": (
        "seed: 1", "data: {sequence_length: 64}", ":3 data.sequence_length",
        ["no option here any more", "stages have a sequence_length each"],
    ),
    "a range of versions": (
        "seed: 1", "data: {train: npm://a/1/x.txt}", ":3 data.train", ["'1' is a range", "npm://a/1.2.3/x.txt"],
    ),
    "model of a range": ("MODEL", "npm://a/1.2/x", ":2 model", ["'1.2' is a range", "npm://a/1.2.3/x"]),
    "data scheme": ("seed: 1", "data: {train: ftp://x}", ":3 data.train", ["unknown scheme"]),
    "model not there": ("MODEL", "./no/such/model", ":2 model", ["no such model"]),
    "model name too long": ("MODEL", "x" * 999, ":2 model", ["no such model"]),
    "model of no user": ("MODEL", "~no-such-user/x", ":2 model", ["no such model"]),
    "data name too long": ("seed: 1", f"data: {{train: {'x' * 999}}}", ":3 data.train", ["no file matches"]),
    "data of no user": ("seed: 1", "data: {train: ~no-such-user/x.txt}", ":3 data.train", ["no file matches"]),
    "stages is a mapping": ("stages:\n", "stages: {}\nx:\n", ":4 stages", ["list"]),
    "no stages": (GOOD[GOOD.index("stages") : GOOD.index("require")], "stages: []\n", ":4 stages", ["at least 1"]),
    "misspelt stage": ("- tune: {", "- tuen: {", ":7 stages[2]", ["no stage 'tuen'", "did you mean 'tune'"]),
    "stage is a number": ("- judge\n  - tune", "- 7\n  - tune", ":6 stages[1]", ["stage's name", "got 7"]),
    "stage is nothing": ("- judge\n  - tune", "-\n  - tune", ":6 stages[1]", ["stage's name", "nothing"]),
    "options not indented": (
        "- tune: {teacher: source}",
        "- tune:\n    teacher: source",
        ":7 stages[2]",
        ["2 keys", "indent 'teacher' below 'tune'"],
    ),
    "options are a list": ("{keep: 3}", "[3]", ":5 stages[0].shrink", ["mapping", "[3]"]),
    "required option": ("shrink: {keep: 3}", "shrink", ":5 stages[0].shrink.keep", ["is missing", "layers to keep"]),
    "unknown option": ("keep: 3", "keep: 3, bye: last", ":5 stages[0].shrink.bye", ["no option", "did you mean 'by'"]),
    "option not a choice": (
        "keep: 3",
        "keep: 3, by: frist",
        ":5 stages[0].shrink.by",
        ["'first' or 'last'", "mean 'first'"],
    ),
    "option out of bounds": ("keep: 3", "keep: 3, rate: 2", ":5 stages[0].shrink.rate", ["at most 1", "got 2"]),
    "option not a number": ("keep: 3", "keep: 3, rate: x", ":5 stages[0].shrink.rate", ["a number", "'x'"]),
    "option is nan": ("keep: 3", "keep: 3, rate: .nan", ":5 stages[0].shrink.rate", ["got nan"]),
    "option is yes": ("keep: 3", "keep: 3, slow: yes", ":5 stages[0].shrink.slow", ["true or false", "write true"]),
    "option of a union": (
        "keep: 3",
        "keep: all",
        ":5 stages[0].shrink.keep",
        ["whole number or a number or a list", "'all'"],
    ),
    "item of a union": ("keep: 3", "keep: [1, x]", ":5 stages[0].shrink.keep[1]", ["whole number", "'x'"]),
    "item of a list": ("[16]", "[16, x]", ":11 stages[6].time.prompts[1]", ["whole number", "'x'"]),
    "empty list": ("[16]", "[]", ":11 stages[6].time.prompts", ["at least 1"]),
    "impossible count": ("keep: 3", "keep: 40", ":5 stages[0].shrink.keep", ["40 of 4 layers", "keep fewer"]),
    "id is reserved": ("keep: 3", "keep: 3, id: source", ":5 stages[0].shrink.id", ["'source'", "another name"]),
    "id has a slash": ("keep: 3", "keep: 3, id: a/b", ":5 stages[0].shrink.id", ["'a/b'", "letters"]),
    "id is a number": ("keep: 3", "keep: 3, id: 3", ":5 stages[0].shrink.id", ["no name for a stage: 3"]),
    "id twice": ("teacher: source", "id: shrink", ":7 stages[2].tune.id", ["two stages", "line 5"]),
    "teacher unknown": (
        "teacher: source",
        "teacher: shrnk",
        ":7 stages[2].tune.teacher",
        ["no earlier stage", "mean 'shrink'"],
    ),
    "teacher later": (
        "teacher: source",
        "teacher: pack",
        ":7 stages[2].tune.teacher",
        ["no earlier stage", "comes later"],
    ),
    "teacher is itself": (
        "teacher: source",
        "teacher: tune",
        ":7 stages[2].tune.teacher",
        ["no earlier stage", "itself"],
    ),
    "teacher measures": (
        "teacher: source",
        "teacher: judge",
        ":7 stages[2].tune.teacher",
        ["figures and no model", "shrink"],
    ),
    "teacher ambiguous": (
        "- judge\n  - tune: {teacher: source}",
        "- shrink: {keep: 2}\n  - tune: {teacher: shrink}",
        ":7 stages[2].tune.teacher",
        ["'shrink' or 'shrink-2'", "`id:`"],
    ),
    "stage on the wrong format": (
        "- pack: {format: int4}\n",
        "- judge\n",
        ":11 stages[6].time",
        ["takes onnx", "is torch", "put 'pack'"],
    ),
    "stage after export": (
        "- time: {prompts: [16]}",
        "- tune",
        ":11 stages[6].tune",
        ["takes torch", "'pack'", "move it before"],
    ),
    "figure not measured": ("size_mb", "ttft", ":15 require.ttft", ["no stage here measures 'ttft'"]),
    "figure misspelt": ("perplexity:", "perplexty:", ":13 require.perplexty", ["did you mean 'perplexity'"]),
    "figure of no prompt": ("[16]", "[32]", ":14 require.tpot_ms@16", ["no stage", "did you mean 'tpot_ms@32'"]),
    "baseline not measured": ("1.05x source", "1.05x source-int4", ":13 require.perplexity", ["of 'source-int4'"]),
    "baseline misspelt": ("1.05x source", "1.05x shrik", ":13 require.perplexity", ["did you mean 'shrink'"]),
    "comparison is a number": ('"<= 90"', "90", ":15 require.size_mb", ["in quotes", 'write "<= 90"']),
    "comparison unclear": ('"<= 90"', '"about 90"', ":15 require.size_mb", ["no comparison", "'about 90'"]),
    "comparison unquoted": ('"<= 90"', ">= 90", ":15:", ["in quotes"]),
    "comparison is infinite": ('"<= 90"', '"<= 1e999"', ":15 require.size_mb", ["too large"]),
    "require is a list": ("require:\n", "require: []\nx:\n", ":12 require", ["mapping"]),
    "bracket open": ("[16]", "[16", ":11:24", ["not valid YAML"]),
    "tab": ("  - judge\n  - tune", "\t- judge\n  - tune", ":6:1", ["spaces"]),
    "two documents": ("seed: 1", "---\nseed: 1", ":3:1", ["one document"]),
    "python tag": ("seed: 1", "seed: !!python/object/apply:os.getcwd []", ":3 seed", ["tag"]),
    "own tag": ("seed: 1", "seed: !x 1", ":3 seed", ["tag"]),
    "alias unknown": ("seed: 1", "seed: *x", ":3:7", ["alias"]),
    "alias of itself": ("seed: 1", "x: &x [*x]", "p.yaml", ["aliases"]),
    "alias bomb": (
        "seed: 1",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcde", "bcdef", strict=True)),
        "p.yaml",
        ["too many values"],
    ),
    "too deep": ("seed: 1", f"seed: {'[' * 500}{']' * 500}", ":3:", ["nested"]),
    "surrogate": ("seed: 1", r'seed: "\ud800"', ":3 seed", ["surrogate"]),
    "control character": ("seed: 1", "seed: \x07", ":3", ["does not allow"]),
    "line break in a key": ("seed: 1", r'"a\nb": 1', r":3 'a\nb'", ["no option"]),
}


def run_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `compress check path`."""
    monkeypatch.setattr(sys, "argv", ["compress", "check", str(path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with MODEL, a llama of four layers of which there is only what check looks at."""
    model = tmp_path / "MODEL"
    model.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 256,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    (model / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_good_file_passes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.yaml").write_text(GOOD, "utf-8")
    assert run_check(Path("p.yaml"), monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "valid, 7 stages" in out
    assert err == ""


@pytest.mark.parametrize("name", TABLE)
def test_bad_file(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, place, words = TABLE[name]
    assert GOOD.count(old) >= 1
    Path("p.yaml").write_text(GOOD.replace(old, new, 1), "utf-8")
    assert run_check(Path("p.yaml"), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "pydantic" not in err
    lines = [line for line in err.splitlines() if f"{place}: " in line or (place.endswith(":") and place in line)]
    assert lines, f"nothing at {place}:\n{err}"
    assert any(all(word.lower() in line.lower() for word in words) for line in lines), err


def test_all_problems_at_once_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        GOOD.replace("seed: 1", "sead: 1")
        .replace("keep: 3", "keep: 40")
        .replace("[16]", "[x]")
        .replace('"<= 90"', "90")
    )
    Path("p.yaml").write_text(text, "utf-8")
    assert run_check(Path("p.yaml"), monkeypatch) == 2
    places = [line.split(" ")[1] for line in capsys.readouterr().err.splitlines()]
    assert places == ["p.yaml:3", "p.yaml:5", "p.yaml:11", "p.yaml:15"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file", "did you mean 'p.yml'"]),
        (b"", ["is empty", "compress init"]),
        (b"# nothing\n", ["is empty"]),
        (b"- a\n- b\n", ["must hold keys", "['a', 'b']"]),
        (b"name: caf\xe9\n", [":1", "not utf-8", "0xe9"]),
        (b"\xff\xfen\x00", ["not utf-8"]),
        (b"x" * 200_000, ["larger than 100 kb"]),
    ],
)
def test_unreadable_file(
    content: bytes | None, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("p.yml").write_text(GOOD, "utf-8")
    if content is not None:
        Path("p.yaml").write_bytes(content)
    assert run_check(Path("p.yaml"), monkeypatch) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(word in err.lower() for word in words), err


def test_directory_in_place_of_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_check(Path("MODEL"), monkeypatch) == 2
    assert "directory" in capsys.readouterr().err


def test_json(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.yaml").write_text(GOOD.replace("keep: 3", "keep: 40"), "utf-8")
    monkeypatch.setattr(sys, "argv", ["compress", "check", "p.yaml", "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["valid"]
    assert found["problems"] == [
        {"where": "p.yaml:5 stages[0].shrink.keep", "what": "40 of 4 layers", "fix": "keep fewer"}
    ]
