"""Balance of experts: losses against their formulas, the loss-free bias, one process against two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerState, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hybrid.ffn import balance
from hybrid.train import parse_config, run
from hybrid.train.expert_load import ExpertLoad
from hybrid.train.runner import prepare_run

EXPERTS = {"num_experts": 6, "top_k": 2, "intermediate_size": 16}


@pytest.fixture
def moe(build):
    def make(dtype=torch.float32, ffn="E", layout="LS", **options):
        feed_forwards = {"E": {**EXPERTS, **options}}
        model = build(dtype=dtype, layout=layout, ffn=ffn, feed_forwards=feed_forwards)
        return model.train()

    return make


def by_hand(model, ids, mask=None):
    """For each router: probabilities (B, T, E), one-hot choices (B, T, E) and logits (B, T, E)."""
    found = []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_router_logits=True)
    for router, logits in zip(balance.routers(model).values(), out.router_logits, strict=True):
        router.load = None
        logits = logits.unflatten(0, ids.shape)
        if router.options.score_function == "softmax":
            scores = probabilities = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = torch.zeros_like(logits).scatter(-1, scores.topk(2).indices, 1.0)
        found.append((probabilities, chosen, logits))
    return found


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("statistics", ["local", "global"])
def test_auxiliary_loss_is_its_formula(moe, ids, score_function, statistics):
    model = moe(balance_loss=0.3, balance_statistics=statistics, score_function=score_function)
    x = ids(3, 10)
    expected = sum(
        0.3 * 6 * (chosen.sum((0, 1)) / chosen.sum() * p.mean((0, 1))).sum()
        for p, chosen, _ in by_hand(model, x)
    )
    assert_close(model(x, labels=x).aux_loss, expected)


def test_auxiliary_loss_of_one_layer_is_transformers_per_choice(moe, ids):
    """Theirs takes f per token, so that it is k at balance; ours per choice, 1 at balance."""
    model = moe(layout="S", balance_loss=1.0)
    x = ids(3, 10)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    out = model(x, attention_mask=mask, output_router_logits=True)
    theirs = load_balancing_loss_func(out.router_logits, 6, 2, mask)
    assert_close(out.aux_loss, theirs / 2)


def test_an_even_load_costs_alpha():
    even = torch.full((4,), 7.0)
    assert balance.load_balance(even, torch.full((4,), 0.25)) == 1.0


def test_sequence_loss_is_its_formula(moe, ids):
    model = moe(sequence_balance_loss=0.3, score_function="sigmoid")
    x = ids(3, 10)
    expected = 0.0
    for p, chosen, _ in by_hand(model, x):
        frequency = chosen.sum(1) * 6 / (2 * 10)  # E / (k T) times the count
        expected += 0.3 * (frequency * p.mean(1)).sum(-1).mean()
    assert_close(model(x, labels=x).aux_loss, expected)


def test_z_loss_is_its_formula(moe, ids):
    model = moe(router_z_loss=0.01)
    x = ids(3, 10)
    expected = sum(0.01 * z.exp().sum(-1).log().square().mean() for *_, z in by_hand(model, x))
    assert_close(model(x, labels=x).aux_loss, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(moe, ids, side):
    options = {"balance_loss": 0.1, "sequence_balance_loss": 0.1, "router_z_loss": 0.1}
    model = moe(torch.float64, **options)
    x = ids(1, 8)
    expected = model(x).aux_loss
    loads = balance.finish_step(model)
    at = slice(4, 12) if side == "left" else slice(0, 8)
    padded, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    padded[:, at], mask[:, at] = x, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert_close(model(padded, attention_mask=mask, position_ids=positions).aux_loss, expected)
    again = balance.finish_step(model)
    for name, load in loads.items():
        assert load.sum() == 16
        assert torch.equal(again[name], load)


def test_loss_is_the_sum_in_training_and_plain_in_evaluation(moe, ids):
    model = moe(balance_loss=0.5)
    x = ids(2, 9)
    trained = model(x, labels=x)
    plain = model.eval()(x, labels=x)
    assert plain.aux_loss is None
    assert_close(trained.loss, plain.loss + trained.aux_loss)
    assert trained.aux_loss > 0.5


def test_the_loss_reaches_routers_alone_through_the_probabilities(moe, ids):
    model = moe(layout="S", balance_loss=0.5)
    model(ids(2, 9)).aux_loss.backward()
    ffn = model.model.layers[0].ffn
    assert ffn.router.weight.grad.abs().sum() > 0
    assert ffn.experts.down_proj.grad is None


def test_gradient_checkpointing_changes_neither_gradients_nor_counts(moe, ids):
    x = ids(2, 9)
    found = []
    for checkpointed in (False, True):
        model = moe(torch.float64, balance_loss=0.5, router_z_loss=0.1)
        if checkpointed:
            name = "activation_checkpointing_enable"  # newer transformers
            getattr(model, name, model.gradient_checkpointing_enable)()
        model(x, labels=x, use_cache=False).loss.backward()
        loads = balance.finish_step(model)
        found.append(([p.grad for p in model.parameters()], list(loads.values())))
    (grads, loads), (grads_again, loads_again) = found
    for a, b in zip(grads_again, grads, strict=True):
        assert_close(a, b)
    assert all(map(torch.equal, loads_again, loads))


def test_global_statistics_gather_over_accumulation(moe, ids):
    """The second forward of a step sees the load of both; after the step the count starts anew."""
    model = moe(layout="S", balance_loss=1.0)
    first, second = ids(2, 9, seed=1), ids(2, 9, seed=2)
    (_, chosen_1, _), (p, chosen_2, _) = (by_hand(model, x)[0] for x in (first, second))
    for load in (chosen_1 + chosen_2, chosen_2):
        if load is not chosen_2:
            model(first)
        share = load.sum((0, 1)) / load.sum()
        assert_close(model(second).aux_loss, 6 * (share * p.mean((0, 1))).sum())
        balance.finish_step(model)


def test_bias_rule(moe, ids):
    """b += gamma sign(mean load - load), once a step; loads as counted by hand."""
    model = moe(bias_update_rate=0.25)
    x = ids(2, 9)
    chosen = [c.sum((0, 1)) for _, c, _ in by_hand(model, x)]
    model(x, labels=x)
    loads = balance.finish_step(model)
    routers = balance.routers(model)
    assert list(loads) == list(routers)
    for load, router, expected in zip(loads.values(), routers.values(), chosen, strict=True):
        assert torch.equal(load, expected)
        assert torch.equal(router.score_correction_bias, 0.25 * (6 - load).sign())
    before = [r.score_correction_bias.clone() for r in routers.values()]
    assert balance.finish_step(model) == {}  # nothing seen since
    assert all(map(torch.equal, before, (r.score_correction_bias for r in routers.values())))


def test_bias_alone_evens_the_load(moe, ids):
    model = moe(layout="S", bias_update_rate=0.02, score_function="sigmoid")
    x = ids(8, 32)
    violations = []
    for _ in range(60):
        with torch.enable_grad():
            model(x)
        (load,) = balance.finish_step(model).values()
        violations.append((load.max() / load.mean() - 1).item())
    assert violations[-1] < 0.35 * violations[0]


def test_evaluation_counts_nothing(moe, ids):
    model = moe(bias_update_rate=0.1).eval()
    model(ids(2, 5), labels=ids(2, 5))
    assert balance.finish_step(model) == {}


def test_share_of_batch_adds_up():
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    assert balance.share_of_batch(labels, torch.tensor(12)) == 0.25
    assert balance.share_of_batch(labels, None) == 1.0


# Training.


def values(tmp_path, out="run", repeats=4, **more):
    texts = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": f"{i} by {i} is {i * i}. " * repeats}) for i in range(200))
    texts.write_text("\n".join(lines))
    options = {**EXPERTS, "balance_loss": 0.02, "bias_update_rate": 0.01, "router_z_loss": 0.001}
    training = {
        "output_dir": str(tmp_path / out),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        **more.pop("training", {}),
    }
    return {
        "model": {
            "layout": "LS",
            "hidden_size": 32,
            "ffn": "E",
            "feed_forwards": {"E": options},
        },
        "data": str(texts),
        "sequence_length": 32,
        "device": "cpu",
        "training": training,
    }


def test_training_moves_and_saves_the_bias_and_logs_the_load(tmp_path):
    from safetensors.torch import load_file

    run(parse_config(values(tmp_path, training={"logging_steps": 1})))
    lines = (tmp_path / "run" / "expert_load.jsonl").read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    for steps in (2, 4):
        weights = load_file(tmp_path / "run" / f"checkpoint-{steps}" / "model.safetensors")
        for name in lines[0]["load"]:
            loads = torch.tensor([x["load"][name] for x in lines[:steps]], dtype=torch.float32)
            assert (loads.sum(dim=1) == 4 * 32 * 2).all()
            moves = (loads.mean(dim=1, keepdim=True) - loads).sign()
            assert_close(weights[f"{name}.score_correction_bias"], 0.01 * moves.sum(dim=0))
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    last = state["log_history"][-1]
    worst = max(max(x) / (sum(x) / len(x)) for x in lines[3]["load"].values())
    assert last["expert_imbalance"] == pytest.approx(worst - 1, rel=1e-5)
    assert 0 <= last["expert_idle_share"] < 1


def test_a_resumed_run_has_the_bias_and_the_loads_of_one_that_was_not_stopped(tmp_path):
    from safetensors.torch import load_file

    run(parse_config(values(tmp_path, "whole")))
    run(parse_config(values(tmp_path, "halves", training={"max_steps": 2})))
    run(parse_config(values(tmp_path, "halves")))
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "halves"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = ((tmp_path / d / "expert_load.jsonl").read_text() for d in ("whole", "halves"))
    assert one == two


def test_accumulation_weighs_the_auxiliary_loss_once(tmp_path):
    """The loss of 2 x 2 rows of as many targets is that of 4."""
    losses = []
    for name, rows, steps in (("one", 4, 1), ("two", 2, 2)):
        training = {
            "max_steps": 1,
            "learning_rate": 0.0,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": steps,
        }
        # Documents of many rows: none begins inside a row, where it would cost a target.
        config = values(tmp_path, name, repeats=1000, training=training)
        config["model"]["feed_forwards"]["E"] = {**EXPERTS, "router_z_loss": 1.0}
        trainer = prepare_run(parse_config(config))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


WORKER = """
import sys, torch
import torch.distributed as dist
import hybrid
from hybrid.ffn import balance

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
found = {}
for statistics in ("global", "local"):
    torch.manual_seed(0)
    options = {"num_experts": 6, "top_k": 2, "intermediate_size": 16, "balance_loss": 1.0,
               "balance_statistics": statistics, "bias_update_rate": 0.01}
    inner = hybrid.HybridForCausalLM(hybrid.HybridConfig(
        layout="LS", ffn="E", hidden_size=32, vocab_size=61, initializer_range=0.3,
        feed_forwards={"E": options}))
    model = torch.nn.parallel.DistributedDataParallel(inner.double().train())
    x = torch.load(f"{folder}/ids.pt").chunk(2)[rank]
    loss = model(x, labels=x).loss
    loss.backward()
    loads = balance.finish_step(inner)
    dist.all_reduce(loss.detach_())
    found[statistics] = {
        "loss": loss / 2,
        "loads": list(loads.values()),
        "grads": {n: p.grad for n, p in inner.named_parameters()},
        "bias": [b for n, b in inner.named_buffers() if "correction" in n],
    }
if rank == 0:
    torch.save(found, f"{folder}/out.pt")
dist.destroy_process_group()
"""


def by_two(folder, ids):
    torch.save(ids, folder / "ids.pt")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(folder / "worker.py")]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in (0, 1)
    ]
    assert [w.wait() for w in workers] == [0, 0]
    return torch.load(folder / "out.pt")


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradients_of_the_union_of_their_batches(
    moe, ids, tmp_path
):
    x = ids(4, 12)
    x[:2] = x[:1] % 5  # halves that load the experts differently
    model = moe(torch.float64, balance_loss=1.0, bias_update_rate=0.01)
    loss = model(x, labels=x).loss
    loss.backward()
    loads = list(balance.finish_step(model).values())
    both = by_two(tmp_path, x)
    found = both["global"]
    assert_close(found["loss"], loss.detach())
    for name, p in model.named_parameters():
        assert_close(found["grads"][name], p.grad)
    for a, b in zip(found["loads"], loads, strict=True):
        assert torch.equal(a, b)
    for bias, router in zip(found["bias"], balance.routers(model).values(), strict=True):
        assert torch.equal(bias, router.score_correction_bias)
    # And local statistics do not: what the test above would not notice if it could not fail.
    assert (both["local"]["loss"] - loss).abs() > 1e-3


def test_histograms_for_tensorboard(tmp_path):
    """A bar for each expert, of as many tokens as it got."""
    drawn = []

    class Writer:
        def add_histogram_raw(self, tag, **values):
            drawn.append((tag, values))

    load = ExpertLoad()
    load.loads = {"layers.1.ffn.router": torch.tensor([3.0, 0.0, 5.0])}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    load.write(args, TrainerState(global_step=7), [Writer()])
    ((tag, values),) = drawn
    assert tag == "expert_load/layers.1.ffn.router"
    assert values["bucket_limits"] == [1, 2, 3]
    assert values["bucket_counts"] == [3, 0, 5]
    numbers = [0] * 3 + [2] * 5
    assert (values["num"], values["sum"], values["sum_squares"]) == (
        len(numbers),
        sum(numbers),
        sum(n * n for n in numbers),
    )
    assert values["global_step"] == 7
    assert not load.loads
