"""The cost of a step under fake quantisation, on a pico model: who takes part, in which turns, and what is said."""

from __future__ import annotations

from compress.benchmarks import qat_step


def test_every_student_takes_as_many_steps_in_rotating_turns():
    order: list[str] = []

    def step(name):
        return lambda: order.append(name) or float(len(name))

    times_ms = qat_step.rounds_of({name: step(name) for name in ("a", "bb", "ccc")}, 3)
    assert times_ms == {"a": [1e3] * 3, "bb": [2e3] * 3, "ccc": [3e3] * 3}
    firsts = [order[start] for start in (3, 6, 9)]
    assert sorted(firsts) == ["a", "bb", "ccc"]


def test_it_times_real_steps(pico, capsys):
    options = ["--rounds", "2", "--batch-size", "1", "--sequence-length", "16", "--threads", "1"]
    qat_step.main([str(pico("llama")), "--schemes", "w4-block32", "w8a8-dynamic", *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == [qat_step.PLAIN, "w4-block32", "w8a8-dynamic"]
    assert "×" in lines[3]
    assert "2 rounds, 1 thread" in lines[-1]


def test_a_step_trains_the_scales_too(pico):
    import torch

    teacher = qat_step.load_model(pico("llama"))
    model = qat_step.student(pico("llama"), "w4-block32")
    before = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    qat_step.step_of(model, teacher, torch.arange(16)[None], bf16=False)()
    moved = {name for name, each in model.named_parameters() if name in before and not torch.equal(each, before[name])}
    assert any(name.endswith("scale") for name in moved)
    assert any(name.endswith("down_proj.weight") for name in moved)
