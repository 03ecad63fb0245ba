"""Distillation of a tiny Llama: the stages, resuming, the report, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid
from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.distill import distill, load_config, parse_config
from hybrid.distill.config import PARTS
from hybrid.distill.measure import RowLosses, knock_outs, output_errors, row_losses
from hybrid.distill.parts import hold_still, part_of, silenced, watch
from hybrid.distill.report import markdown, recovered
from hybrid.distill.solve import RIDGE, Equations
from hybrid.distill.stages import divergence
from hybrid.tokenizer import byte_tokenizer

T = 32


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A Llama that has learnt its text a little, so that its mixers matter."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=259, **sizes, **heads, initializer_range=0.1)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    data = torch.tensor(list(_text().encode()))
    for _ in range(60):
        starts = torch.randint(len(data) - T, (8,))
        ids = torch.stack([data[i : i + T] for i in starts])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _text():
    return "".join(f"{i}: {i * i % 97} squared is {i * i % 89}\n" for i in range(400))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(_text())
    return str(path)


@pytest.fixture
def values(teacher_folder, text_file, tmp_path):
    """A distillation of seconds."""
    return {
        "teacher": {"path": str(teacher_folder)},
        "layout": "SD",
        "data": text_file,
        "eval_data": text_file,
        "sequence_length": T,
        "eval_rows": 6,
        "knockout_rows": 4,
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 12,
            "logging_steps": 1,
            "learning_rate": 5e-3,
            "save_steps": 4,
            "disable_tqdm": True,
        },
        "outputs": {"solve_rows": 8},
        "logits": {"freeze": ["ffn", "embeddings"]},
    }


@pytest.fixture(scope="module")
def pair(teacher_folder):
    """Teacher and student, S S S S and S D S D."""
    teacher = hybrid.HybridForCausalLM.from_published(teacher_folder)
    return teacher, replace_mixers(teacher, "SD")


@pytest.fixture(scope="module")
def rows():
    ids = np.frombuffer(_text().encode(), np.uint8).astype(np.int64)[: 6 * T].reshape(6, T)
    return [{"input_ids": row, "labels": row, "position_ids": np.arange(T)} for row in ids]


@pytest.fixture(scope="module")
def finished(teacher_folder, text_file, tmp_path_factory):
    """All three stages, and the folder."""
    out = tmp_path_factory.mktemp("finished") / "out"
    training = {"per_device_train_batch_size": 4, "max_steps": 25, "learning_rate": 5e-3}
    config = parse_config(
        {
            "teacher": {"path": str(teacher_folder)},
            "layout": "SD",
            "data": text_file,
            "eval_data": text_file,
            "sequence_length": T,
            "eval_rows": 6,
            "knockout_rows": 4,
            "output_dir": str(out),
            "device": "cpu",
            "training": {**training, "logging_steps": 1, "disable_tqdm": True,
                         "save_strategy": "no"},
            "outputs": {"training": {"max_steps": 6}},
            "logits": {"freeze": ["ffn", "embeddings"], "training": {"learning_rate": 2e-3}},
            "language": {"freeze": ["embeddings"]},
        }
    )  # fmt: skip
    return config, distill(config), out


# The stages


def test_stage_1_lowers_the_error_of_each_layer(finished):
    errors = finished[1]["output_errors"]
    assert set(errors["student"]) == {"1", "3"}
    for layer, before in errors["student"].items():
        assert errors["outputs"][layer] < 0.8 * before


def test_stage_1_trains_new_mixers_alone(finished):
    before, after = (_weights(finished[2] / name) for name in ("student", "outputs"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    new = {name for name in before if ".1.mixer." in name or ".3.mixer." in name}
    assert moved == new


def test_stage_2_lowers_the_divergence(finished, pair, rows):
    teacher = pair[0]
    found = []
    for name in ("outputs", "logits"):
        student = hybrid.HybridForCausalLM.from_pretrained(finished[2] / name).eval()
        ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
        with torch.no_grad():
            found.append(_kl(teacher(ids).logits, student(ids).logits))
    assert found[1] < 0.8 * found[0]


def test_stage_2_holds_still_what_it_should(finished):
    before, after = (_weights(finished[2] / name) for name in ("outputs", "logits"))
    moved = {part_of(name, (1, 3)) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"replaced", "kept", "norms"}


def test_stage_3_lowers_the_training_loss(finished):
    found = json.loads((finished[2] / "language" / "train_result.json").read_text())["losses"]
    assert sum(x for _, x in found[-5:]) < sum(x for _, x in found[:5])


def test_the_report_has_every_stage_and_every_branch(finished):
    config, report, out = finished
    assert list(report["losses"]) == ["teacher", "student", "outputs", "logits", "language"]
    names = ["layer 0", "layer 1", "layer 2", "layer 3", "all 2 replaced", "all 2 kept"]
    assert [branch["name"] for branch in report["knock_outs"]] == names
    assert [b["replaced"] for b in report["knock_outs"]] == [False, True, False, True, True, False]
    assert report == json.loads((out / "report.json").read_text())
    text = (out / "report.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert "| layer 1 | D gated_delta_net | new |" in text
    for name in ("student", *config.stages):
        model = hybrid.HybridForCausalLM.from_pretrained(out / name)
        assert model.config.layout == "SDSD"


def test_a_finished_distillation_is_not_done_again(finished, monkeypatch):
    config, report, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert distill(config) == report
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_a_stopped_distillation_goes_on_to_the_same_weights(values, tmp_path, monkeypatch):
    from hybrid.train.trainer import HybridTrainer

    whole = distill(parse_config({**values, "output_dir": str(tmp_path / "whole")}))
    stopped = parse_config(values)
    step, taken = HybridTrainer.training_step, []

    def dies(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 12 + 6:  # in the second stage, after its checkpoint of step 4
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HybridTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        distill(stopped)
    assert (tmp_path / "out" / "logits" / "checkpoint-4").is_dir()
    taken.clear()
    monkeypatch.setattr(HybridTrainer, "training_step", step)
    again = distill(stopped)
    assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    ours, theirs = (_weights(tmp_path / name / "logits") for name in ("out", "whole"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def _weights(folder):
    return hybrid.HybridForCausalLM.from_pretrained(folder).state_dict()


# The pieces


def _kl(theirs, ours):
    """KL(theirs || ours) per token, from its definition."""
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_its_definition_and_so_is_its_gradient(pair, temperature):
    teacher, student = pair
    found = torch.randn(300, 48, requires_grad=True)  # more than one chunk
    wanted = torch.randn(300, 48)
    loss = divergence(student, teacher, found, wanted, temperature)
    (grad,) = torch.autograd.grad(loss, found)
    z, w = student.lm_head(found) / temperature, teacher.lm_head(wanted) / temperature
    expected = _kl(w, z) * len(found) * temperature**2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    slope = (z.softmax(-1) - w.softmax(-1)) * temperature
    assert torch.allclose(grad, slope @ student.lm_head.weight, atol=1e-5)
    assert divergence(teacher, teacher, wanted, wanted).item() == pytest.approx(0, abs=1e-4)


def test_equations_find_the_projection_that_made_the_outputs(pair):
    mixer = replace_mixers(pair[0], "SD").model.layers[1].mixer
    wanted, x = torch.randn(48, 48), torch.randn(2, 400, 48)
    reads, equations = [], Equations()
    handle = mixer.o_proj.register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    for part in x.split(1):
        with torch.no_grad(), equations.reading(mixer):
            mixer(part)
        equations.add(reads[-1] @ wanted.T)
    handle.remove()
    with torch.no_grad():
        equations.solve(mixer)
    assert (mixer.o_proj.weight - wanted).abs().max() < 0.1
    assert 0 < RIDGE < 1e-2


def test_solving_alone_lowers_the_error_of_each_layer(values, pair, rows):
    training = {**values["training"], "max_steps": 1, "learning_rate": 0.0}
    report = distill(
        parse_config({**values, "logits": None, "knockout_rows": 0, "training": training})
    )
    before, after = report["output_errors"]["student"], report["output_errors"]["outputs"]
    assert all(after[layer] < 0.8 * before[layer] for layer in before)
    assert list(report["losses"]) == ["teacher", "student", "outputs"]
    assert "knock_outs" not in report


@torch.no_grad()
def test_what_the_teacher_sees_is_what_its_layers_are_given(pair, rows):
    teacher, _ = pair
    ids = torch.from_numpy(rows[0]["input_ids"])[None]
    seen = watch(teacher, (0, 2), {"input_ids": ids})
    x = teacher.model.embed_tokens(ids)
    assert torch.equal(seen[0].x, teacher.model.layers[0].mixer_residual.norm_in(x))
    assert set(seen) == {0, 2}
    assert not seen[2].y.requires_grad


def test_a_student_of_windows_has_no_error(pair, rows):
    teacher = pair[0]
    student = replace_mixers(teacher, "SW", {"W": {"window": T}})
    errors = output_errors(teacher, student, (1, 3), rows[:2])
    assert max(errors.values()) < 1e-9
    assert min(output_errors(teacher, pair[1], (1, 3), rows[:2]).values()) > 0.05


def test_a_branch_that_gives_zeros_is_shown_to_do_nothing(pair, rows):
    student = replace_mixers(pair[0], "SD")
    with torch.no_grad():
        student.model.layers[1].mixer.o_proj.weight.zero_()
    whole = row_losses(student, rows)
    branches = {b.name: b for b in knock_outs(student, (1, 3), rows, whole)}
    assert branches["layer 1"].increase == 0
    assert branches["layer 1"].idle
    assert not branches["all 2 kept"].idle
    report = {
        "teacher": "t", "teacher_layout": "S4", "layout": "SD", "eval_rows": 6, "knockout_rows": 6,
        "sequence_length": T, "losses": {"teacher": 1.0, "student": 2.0}, "seconds": {},
        "knock_outs": [{**dataclasses.asdict(b), "idle": b.idle} for b in branches.values()],
    }  # fmt: skip
    text = markdown(report)
    assert "hence idle: layer 1" in text
    assert next(x for x in text.splitlines() if "| layer 1 |" in x).endswith("| idle |")
    assert not next(x for x in text.splitlines() if "| all 2 kept |" in x).endswith("nothing |")


def test_a_silenced_mixer_adds_nothing_to_the_stream(pair, rows):
    student = replace_mixers(pair[0], "SD")
    ids = torch.from_numpy(rows[0]["input_ids"])[None]
    with torch.no_grad():
        with silenced(student, [1]):
            without = student(ids).logits
        whole = student(ids).logits
        student.model.layers[1].mixer.o_proj.weight.zero_()
        zeroed = student(ids).logits
    assert torch.equal(without, zeroed)
    assert not torch.equal(without, whole)


def test_losses_are_those_of_the_definition(pair, rows):
    teacher = pair[0]
    short = {**rows[1], "labels": np.where(np.arange(T) < 20, rows[1]["labels"], -100)}
    found = row_losses(teacher, [rows[0], short])
    assert found.counts.tolist() == [T - 1, 19]
    ids = torch.from_numpy(rows[1]["input_ids"])
    with torch.no_grad():
        logits = teacher(ids[None]).logits[0]
    expected = F.cross_entropy(logits[:19], ids[1:20], reduction="sum")
    assert found.sums[1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_standard_errors_are_those_of_paired_rows():
    counts = torch.full((4,), 10.0, dtype=torch.float64)
    one = RowLosses(torch.tensor([10.0, 20.0, 30.0, 40.0]), counts)
    other = RowLosses(torch.tensor([9.0, 18.0, 27.0, 36.0]), counts)
    mean, error = one.above(other)
    assert mean == pytest.approx(0.25)  # of 0.1, 0.2, 0.3, 0.4 a token
    assert error == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2)
    single = RowLosses(one.sums[:1], counts[:1])
    assert single.above(single) == (0, None)


def test_parts_cover_every_parameter(pair):
    student = pair[1]
    names = [name for name, _ in student.named_parameters()]
    assert {part_of(name, (1, 3)) for name in names} == set(PARTS)
    hold_still(student, (1, 3), ["ffn", "kept"])
    free = {part_of(n, (1, 3)) for n, p in student.named_parameters() if p.requires_grad}
    assert free == {"replaced", "norms", "embeddings"}
    hold_still(student, (1, 3), [])


def test_the_share_of_the_way():
    losses = {"teacher": 2.0, "student": 10.0, "logits": 4.0}
    assert recovered(losses, "logits") == 0.75
    assert recovered({**losses, "student": 1.0}, "logits") is None


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "S(D"}, r"S\(D"),
        ({"teacher": {}}, "teacher: expected exactly one of path and package"),
        ({"teacher": {"package": "no_such_thing"}}, "pip install no-such-thing"),
        (
            {"teacher": {"package": "hybrid", "gguf_file": "x.gguf"}},
            "gguf_file: expected a file of .*, got 'x.gguf'",
        ),
        ({"teachers": {}}, "teachers: unknown key, did you mean 'teacher'"),
        ({"outputs": None, "logits": None}, "expected at least one of outputs"),
        (
            {"outputs": {"freeze": ["ffn"]}},
            "outputs.freeze: expected none, since only the new mixers",
        ),
        ({"outputs": {"solve_rows": -1}}, "outputs.solve_rows: expected at least 0"),
        ({"logits": {"freeze": ["mlp"]}}, r"logits.freeze\[0\]: expected one of .*, got 'mlp'"),
        ({"logits": {"freeze": list(PARTS)}}, "logits.freeze: expected at least one part to train"),
        ({"logits": {"temperature": 0.0}}, "logits.temperature: expected above 0"),
        ({"logits": {"temprature": 1.0}}, "logits.temprature: unknown key, did you mean"),
        ({"logits": {"training": {"lr": 1}}}, "logits.training.lr: unknown key"),
        ({"eval_rows": 0}, "eval_rows: expected at least 1"),
        ({"sequence_length": 0}, "sequence_length: expected at least 2"),
        ({"data": {"source": "stdlib", "split": "x"}}, "data.split: expected a split of stdlib"),
        ({"training": {"output_dir": "x"}}, "each stage has its own folder"),
    ],
)
def test_mistakes_of_a_config_are_named(values, change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({**values, **change})


def test_a_mistake_that_stages_share_is_named_once(values):
    with pytest.raises(ConfigError) as caught:
        parse_config({**values, "sequence_length": 0})
    assert len(caught.value.mistakes) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "S"}, "layout: expected a new mixer"),
        ({"layout": "SSX"}, "do not fill num_hidden_layers=4"),
        ({"layout": "SX"}, "mlstm.*cannot inherit"),
        ({"teacher": {"path": "nowhere/at/all"}}, "no such folder"),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_anything_is_written(
    values, change, words, tmp_path
):
    with pytest.raises(ValueError, match=words):
        distill(parse_config({**values, **change}))
    assert not (tmp_path / "out").exists()


def test_label_smoothing_is_refused_in_stages_without_labels(values, tmp_path):
    values["training"] = {**values["training"], "label_smoothing_factor": 0.1}
    with pytest.raises(ConfigError) as caught:
        distill(parse_config(values))
    assert [line.partition(":")[0] for line in caught.value.mistakes] == [
        "outputs.training.label_smoothing_factor",
        "logits.training.label_smoothing_factor",
    ]
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_tokenizer_is_refused(values, teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="teacher: expected a tokenizer"):
        distill(parse_config({**values, "teacher": {"path": str(tmp_path / "bare")}}))


def test_the_folder_of_another_run_is_refused(finished):
    config = finished[0].model_copy(update={"layout": "SSSD"})
    with pytest.raises(ConfigError, match="belongs to a different run") as caught:
        distill(config)
    was = finished[0].layout
    assert caught.value.mistakes == [f"layout: was {was!r}, is 'SSSD'"]
    assert "set another output_dir" in str(caught.value)


def test_several_processes_are_refused(values, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="processes: expected 1"):
        distill(parse_config(values))


# The command


def test_the_command_distils_and_prints_the_report(values, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    del values["logits"]
    path.write_text(yaml.safe_dump({**values, "knockout_rows": 0}))
    assert main(["distill", str(path), "outputs.training.max_steps=1", "layout=SSSD"]) == 0
    printed = capsys.readouterr().out
    assert "| after stage 1, outputs |" in printed
    assert main(["distill", str(path), "layout=SSSS", f"output_dir={tmp_path / 'x'}"]) == 2
    assert "expected a new mixer" in capsys.readouterr().err


def test_the_config_in_the_tree_is_sound():
    from hybrid.config.yaml import find_config

    config = load_config(find_config("distill/smollm2.yaml"))
    assert list(config.stages) == ["outputs", "logits", "language"]
    assert config.output_dir == "runs/smollm2"
    assert [s.training["data_seed"] for s in config.stages.values()] == [42, 43, 44]
