"""Tensor parallelism: logits of two processes are those of one, and what cannot be split is refused."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

from hybrid.config.hybrid_config import HybridConfig
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.parallel_plans import check_world, tensor_plan

DRIVER = """
import sys, torch
from transformers.distributed import DistributedConfig
from hybrid.modeling.model import HybridForCausalLM
for folder in sys.argv[1:]:
    config = DistributedConfig(tp_size=2)
    model = HybridForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    widths = {n: list(p.to_local().shape) for n, p in model.named_parameters() if hasattr(p, "to_local")}
    split = {n.split(".")[-2] for n in widths}
    assert ("q_proj" in split) == ("L" not in folder[-2:]), split
    assert ("down_proj" in split) == (not folder.endswith("/S")), split
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
    print("same", folder, flush=True)
torch.distributed.destroy_process_group()
"""

LAYOUTS = [("SS", "-"), ("LS", "-"), ("S", "E")]


def build(layout, **more):
    return HybridConfig(layout=layout, hidden_size=32, vocab_size=64, **more)


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_resolve_parallel_plans"), reason="transformers without plans"
)
def test_logits_of_two_processes(tmp_path):
    folders = []
    for layout, ffn in LAYOUTS:
        mixers = {"S": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": "head", "output_gate": True}}
        torch.manual_seed(0)
        config = build(layout, ffn=ffn, mixers=mixers, initializer_range=0.3)
        model = HybridForCausalLM(config).eval()
        ids = torch.randint(64, (2, 9))
        folder = str(tmp_path / layout)
        model.save_pretrained(folder)
        with torch.no_grad():
            torch.save({"ids": ids, "logits": model(ids).logits}, folder + "/expected.pt")
        folders.append(folder)
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "driver.py"), *folders],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2 * len(folders)


def test_heads_that_do_not_divide():
    config = build("SS", ffn="-", mixers={"S": {"num_heads": 4, "num_kv_heads": 1}})
    with pytest.raises(ValueError, match=r"mixer 'S' has num_kv_heads 1.*tp_size"):
        check_world(config, 2)


def test_mixers_are_whole_where_heads_meet():
    for options in ({"sinks": True}, {"qk_norm": "layer"}, {"conv_size": 3}):
        plan = tensor_plan(build("SS", ffn="-", mixers={"S": {"num_heads": 4, **options}}))
        assert not any("mixer" in name for name in plan)
        assert plan["layers.*.ffn.down_proj"] == "rowwise"


def test_nothing_to_split():
    with pytest.raises(ValueError, match="layout 'L' has nothing to split"):
        check_world(build("L", ffn="E"), 2)
