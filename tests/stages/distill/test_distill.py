"""The stage `distill`: what it writes, what it refuses, every family, quantised teachers, and several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))

from launched import distil
from safetensors.torch import load_file

from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_model, save_model
from compress.stage import OtherModel, Ref
from compress.stages.distill.stage import Distill
from compress.train.teacher import layer_map, load_teacher
from pico import make_pico


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"input": make_pico("llama", folder / "input", seed=1), "teacher": make_pico("llama", folder / "teacher")}


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """(folder, metrics) of a distillation in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, distil(folder, models)


def kl(teacher: torch.nn.Module, student: torch.nn.Module, ids_BT: torch.Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (model(ids_BT).logits.float().log_softmax(-1) for model in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_it_writes_a_model_that_reloads_and_is_nearer_to_its_teacher(models, alone):
    folder, metrics = alone
    out = folder / "out"
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]
    assert metrics["result"]["kl_to_teacher_se"] > 0
    assert metrics["result"]["train_tokens"] == 6 * 64
    ids = torch.arange(1, 17)[None]
    student, teacher, before = (load_model(path) for path in (out, models["teacher"], models["input"]))
    assert kl(teacher, student, ids) < kl(teacher, before, ids)
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (out, models["input"]))
    assert config == given | {"rope_theta": 10000.0}
    assert (out / "LICENSE").is_file()
    assert (out / "tokenizer.json").is_file()


def test_it_leaves_its_history(alone):
    out = alone[0] / "out"
    history = json.loads((out / "history.json").read_text())
    assert [entry["step"] for entry in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history["eval"]] == [0, 3, 6]
    assert {"kl", "kl_se", "ce", "loss"} <= history["eval"][0].keys()
    assert (out / "loss.png").stat().st_size > 1000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert len(events.Scalars("loss")) == 6
    assert len(events.Scalars("eval/kl")) == 3


def killed_before_its_end(folder: Path, copy: Path) -> Path:
    """A copy of a distillation that was killed after its first checkpoint."""
    shutil.copytree(folder / "work", copy / "work", ignore=shutil.ignore_patterns("checkpoint-6"))
    return copy


def difference(one: Path, other: Path) -> float:
    tensors, others = (load_file(folder / "out" / "model.safetensors") for folder in (one, other))
    return max((tensors[name] - others[name]).abs().max().item() for name in tensors)


def test_two_processes_equal_one_also_where_they_go_on_from_it_or_it_from_them(models, alone, tmp_path, caplog):
    fresh, resumed, back = (tmp_path / name for name in ("fresh", "resumed", "back"))
    fresh.mkdir()
    killed_before_its_end(alone[0], resumed)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(Path(__file__).with_name("launched.py")), *map(str, (*models.values(), fresh, resumed)),
    ]  # fmt: skip
    launched = subprocess.run(command, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr
    assert "checkpoint-3 has no random state for 2 processes" in launched.stderr
    distil(killed_before_its_end(fresh, back), models)
    assert "checkpoint-3 has no random state for 1 process" in caplog.text
    for folder in (fresh, resumed, back):
        assert difference(alone[0], folder) <= 1e-5  # 2e-6 on a CPU without AVX-512
    states = [{file.name for file in (folder / "work").glob("checkpoint-?/rng_state*")} for folder in (fresh, resumed)]
    assert states == [{"rng_state_0.pth", "rng_state_1.pth"}, {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}]
    assert (resumed / "work" / "checkpoint-3" / "rng_state.pth").exists(), "one process's is deleted"


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen3"])
def test_other_decoders(model_type, tmp_path):
    models = {"input": make_pico(model_type, tmp_path / "s", seed=1), "teacher": make_pico(model_type, tmp_path / "t")}
    metrics = distil(tmp_path, models, learning_rate=1e-2)
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [(None, {"kl": 0, "hidden": 1}), ("BertForMaskedLM", {"kl": 1}), ("BertForSequenceClassification", {"kl": 1})],
)
def test_encoders(architecture, loss, tmp_path):
    models = {
        role: make_pico("bert", tmp_path / role, seed=seed, architecture=architecture)
        for seed, role in enumerate(("input", "teacher"))
    }
    metrics = distil(tmp_path, models, loss=loss)
    assert metrics["result"]["eval_loss"] < metrics["input"]["eval_loss"]


def test_a_bare_encoder_has_no_logits(tmp_path):
    models = {role: make_pico("bert", tmp_path / role, seed=seed) for seed, role in enumerate(("input", "teacher"))}
    with pytest.raises(StageFailed, match=r"without logits; use loss: \{kl: 0, hidden: 1\}"):
        distil(tmp_path, models, loss={"kl": 1})
    metrics = distil(tmp_path, models)
    assert metrics["result"]["eval_loss"] < metrics["input"]["eval_loss"], "hidden states where nothing was asked for"
    assert "kl_to_teacher" not in metrics["result"]


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.3)])
def test_a_quantised_teacher_says_almost_the_same(tmp_path, bits, tolerance):
    models = {
        role: make_pico("llama", tmp_path / role, seed=seed, intermediate_size=128)
        for seed, role in enumerate(("teacher", "input"))
    }
    ids = torch.arange(1, 65).reshape(2, 32)
    teacher, quantised = load_teacher(models["teacher"]), load_teacher(models["teacher"], bits)
    names = {type(module).__name__ for module in quantised.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in names
    assert 0 < kl(teacher, quantised, ids) < tolerance
    metrics = distil(tmp_path, models, teacher_bits=bits)
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "bert"])
def test_a_teacher_of_bf16_products_says_the_same_to_the_bit(model_type, pico):
    ids = torch.arange(1, 65).reshape(2, 32)
    whole, half = (load_teacher(pico(model_type), bf16=bf16) for bf16 in (False, True))
    sizes = [sum(weight.nbytes for weight in model.parameters()) for model in (whole, half)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        said = [model(ids)[0] for model in (whole, half)]
    assert torch.equal(*said)
    assert sizes[1] < 0.8 * sizes[0]


def test_distillation_in_bf16(models, tmp_path):
    metrics = distil(tmp_path, models, precision="bf16")
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]


def test_another_model_as_the_teacher(models, tmp_path):
    metrics = distil(tmp_path, models, teacher_model=str(models["teacher"]))
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]


def padded(folder: Path, out: Path, num_rows: int) -> Path:
    """The same model with so many more embeddings, of no token, that its head likes best of all."""
    model = load_model(folder)
    vocab_size = model.config.vocab_size
    model.resize_token_embeddings(vocab_size + num_rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[vocab_size:] = 3 * model.lm_head.weight[:num_rows]
    save_model(model, folder, out)
    return out


@pytest.mark.parametrize("loss", [{"kl": 1}, {"kl": 0, "skew_kl": 1}])
def test_a_teacher_with_a_padded_vocabulary_is_the_teacher_without_it(models, loss, tmp_path):
    """Qwen's sizes have one tokenizer and embeddings for 151,936 or 152,064 tokens."""
    wide = padded(models["teacher"], tmp_path / "teacher", 64)
    stage = Distill.model_validate({"teacher_model": str(wide), "loss": loss})
    assert not list(stage.check(shape_of(json.loads((models["input"] / "config.json").read_text()))))
    stage.check_source(models["input"], TextData(DataConfig()))
    found = distil(tmp_path / "wide", {**models, "teacher": wide}, loss=loss)
    assert found["result"] == distil(tmp_path / "plain", models, loss=loss)["result"]


def test_a_student_with_a_padded_vocabulary(models, tmp_path):
    wide = {**models, "input": padded(models["input"], tmp_path / "input", 64)}
    found, plain = distil(tmp_path / "wide", wide), distil(tmp_path / "plain", models)
    assert found["input"]["kl_to_teacher"] == pytest.approx(plain["input"]["kl_to_teacher"])
    assert found["result"]["kl_to_teacher"] < found["input"]["kl_to_teacher"]


def test_a_teacher_of_other_tokens_is_refused_before_the_dry_run(models, tmp_path):
    with pytest.raises(StageFailed, match="its tokenizer is not the student's"):
        Distill(teacher_model=str(of_other_tokens(tmp_path / "teacher"))).check_source(
            models["input"], TextData(DataConfig())
        )


def of_other_tokens(folder: Path) -> Path:
    """A pico model whose end has another name."""
    make_pico("llama", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    tokenizer["model"]["vocab"]["<|other|>"] = tokenizer["model"]["vocab"].pop("<|end|>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(bos_token="<|other|>", eos_token="<|other|>", pad_token="<|other|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_teacher_with_another_tokenizer_is_refused(models, tmp_path):
    with pytest.raises(StageFailed, match="tokenizer is not the student's"):
        distil(tmp_path, {"input": models["input"], "teacher": of_other_tokens(tmp_path / "teacher")})


def test_layers_answer_to_what_the_next_kept_layer_was_given():
    assert layer_map(4, 6, dropped=(2, 4)) == [(1, 1), (2, 3), (3, 5), (4, 6)]
    assert layer_map(3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert layer_map(2, 2) == [(1, 1), (2, 2)]


def test_what_check_refuses(pico):
    llama, bert = (shape_of(json.loads((pico(name) / "config.json").read_text())) for name in ("llama", "bert"))

    def wheres(shape, **options):
        return [problem.where for problem in Distill(**options).check(shape)]

    assert wheres(llama, sequence_length=128) == []
    assert wheres(llama, sequence_length=512, loss={"kl": 0}) == ["loss", "sequence_length"]
    assert wheres(llama, batch_size=6, gradient_accumulation_steps=4) == ["gradient_accumulation_steps"]
    assert wheres(bert, sequence_length=128, loss={"ce": 1}) == ["loss.ce"]
    assert wheres(llama, sequence_length=128, teacher_bits=4) == ["teacher_bits"]
    assert wheres(llama, sequence_length=128, teacher_model="./nowhere") == ["teacher_model"]
    with pytest.raises(ValidationError):
        Distill(loss={"kll": 1})


def test_whom_it_asks():
    assert Distill().inputs() == {"teacher": Ref("source")}
    assert Distill(teacher="first").inputs() == {"teacher": Ref("first")}
    assert Distill(loss={"kl": 0, "ce": 1}).inputs() == {}
    assert Distill(teacher_model="org/name").inputs() == {"teacher": OtherModel("org/name", ("bitsandbytes",))}
    assert Distill(teacher_model="org/name", loss={"kl": 0, "ce": 1}).inputs() == {}


def test_its_twin_is_two_steps(pico):
    twin = Distill(batch_size=64, gradient_accumulation_steps=2, tokens=10**9, teacher_model="org/name").twin()
    assert twin.num_steps == 2
    assert twin.teacher_model is None
