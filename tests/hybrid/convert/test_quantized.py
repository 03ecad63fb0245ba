"""Checkpoints that are published quantized, encoded here bit by bit from the formats' specifications."""

import json
import logging
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hybrid import HybridForCausalLM
from hybrid.cli import main
from hybrid.convert import export
from hybrid.convert.checkpoint import Checkpoint
from hybrid.convert.opening import on_disk
from hybrid.convert.quantized import Dequantized
from hybrid.convert.tensor_sources import Held

SMALL = {
    "vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 32, "head_dim": 10, "num_hidden_layers": 2,
    "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5,
}  # fmt: skip
DEEPSEEK = {
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 14,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "num_mtp_layers": 0,
}  # fmt: skip
QWEN3 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
}  # fmt: skip
KINDS = {
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM, GPT_OSS),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, DEEPSEEK),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, QWEN3),
}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
       "weight_block_size": [16, 8]}  # fmt: skip


def four_bits(codes):
    """e2m1: sign, two bits of exponent of bias 1, one of mantissa (OCP MX 1.0, 5.3.3)."""
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return torch.where(sign == 1, -size, size)


def eight_bits(codes):
    """e4m3: sign, four bits of exponent of bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    size = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return torch.where(sign == 1, -size, size)


def mxfp4(shape):
    """Random blocks and scales of (E, R, C), and the (E, C, R) that they stand for."""
    codes = torch.randint(16, shape)
    exponents = torch.randint(-7, -2, (*shape[:-1], shape[-1] // 32))
    values = four_bits(codes) * (2.0**exponents).repeat_interleave(32, dim=-1)
    pairs = codes.unflatten(-1, (-1, 16, 2))
    blocks = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), values.transpose(1, 2).contiguous()


def fp8(shape, block, dtype=torch.float32):
    """Random values and scales of a matrix, and the matrix; it has at most eight bits of mantissa."""
    codes = torch.randint(256, shape) & 0b1_0111_111  # exponents up to 0: sizes below 2
    grid = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    scales = torch.randint(8, 16, grid) * 2.0 ** torch.randint(-7, -4, grid)
    rows, columns = (torch.arange(size) // b for size, b in zip(shape, block, strict=True))
    values = eight_bits(codes) * scales[rows][:, columns]
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scales.to(dtype), values


def gpt_oss(tensors):
    """The experts as gpt-oss publishes them; `tensors` get what they stand for."""
    packed = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        blocks, scales, tensors[name] = mxfp4((experts, rows, columns))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return packed


def in_blocks(tensors, dtype=torch.float32):
    """All projections as DeepSeek-V3 publishes them; `tensors` get what they stand for."""
    packed = {}
    for name, tensor in list(tensors.items()):
        if "proj" in name:
            block = FP8["weight_block_size"]
            packed[name], packed[f"{name}_scale_inv"], tensors[name] = fp8(
                tensor.shape, block, dtype
            )
    return packed


def publish(kind, folder, dtype=torch.float32):
    """Write a small quantized checkpoint; returns transformers' model of what it stands for."""
    torch.manual_seed(0)
    config_class, model_class, sizes = KINDS[kind]
    theirs = model_class(config_class(**SMALL | sizes)).eval()
    tensors = {name: tensor.bfloat16() for name, tensor in on_disk(theirs).items()}
    packed = gpt_oss(tensors) if kind == "gpt_oss" else in_blocks(tensors, dtype)
    theirs.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    theirs = model_class.from_pretrained(folder, dtype=torch.float32)
    rest = {n: t for n, t in tensors.items() if n not in packed and f"{n}_blocks" not in packed}
    save_file(rest | packed, folder / "model.safetensors")
    configure(folder, MXFP4 if kind == "gpt_oss" else FP8)
    return theirs


def configure(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_dequantized_weights(kind, tmp_path):
    theirs = publish(kind, tmp_path)
    ours = HybridForCausalLM.from_published(tmp_path, dtype="float32")
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    assert (ours(ids).logits - expected).abs().max() / expected.std() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_to_plain_bfloat16_there_and_back(kind, tmp_path, caplog):
    expected = {n: t.bfloat16() for n, t in on_disk(publish(kind, tmp_path / "theirs")).items()}
    ours, back = tmp_path / "ours", tmp_path / "back"
    with caplog.at_level(logging.WARNING, "hybrid.convert"):
        assert main(["import", str(tmp_path / "theirs"), str(ours)]) == 0
    count = 2 * 2 if kind == "gpt_oss" else sum("proj" in name for name in expected)
    said = f"{count} tensors of {'mxfp4' if kind == 'gpt_oss' else 'fp8'} become bfloat16"
    assert [record.message.split(": ")[1] for record in caplog.records] == [f"{said}, and stay so"]
    assert export(ours, back, kind) == kind
    for folder in (ours, back):
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
    with Checkpoint(back) as files:
        assert files.specs.keys() == expected.keys()
        assert {spec.dtype for spec in files.specs.values()} == {torch.bfloat16}
        assert all(torch.equal(files.read(name), expected[name]) for name in expected)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt_oss", None), ("qwen3", torch.bfloat16)])
def test_transformers_reads_the_same_from_those_files(kind, dtype, tmp_path):
    publish(kind, tmp_path, dtype)
    settings = {"gpt_oss": transformers.Mxfp4Config, "qwen3": transformers.FineGrainedFP8Config}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings[kind](dequantize=True), dtype=torch.bfloat16
    )
    ours = HybridForCausalLM.from_published(tmp_path, dtype="bfloat16")
    again = HybridForCausalLM.from_published(theirs)
    for name, tensor in again.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@torch.no_grad()
def test_another_layout_from_quantized_weights(tmp_path):
    theirs = publish("qwen3", tmp_path)
    ours = HybridForCausalLM.from_published(tmp_path, layout="SD", dtype="float32")
    kept = theirs.state_dict()["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(ours.state_dict()["model.layers.0.mixer.o_proj.weight"], kept)


# The formats


def test_every_code_of_four_bits():
    codes = torch.arange(16).repeat(2)
    blocks = (codes[0::2] + 16 * codes[1::2]).to(torch.uint8).view(1, 1, 1, 16)
    for exponent in (1, 100, 127, 130, 250):
        scales = torch.full((1, 1, 1), exponent, dtype=torch.uint8)
        held = Held({"w_blocks": blocks, "w_scales": scales})
        found = Dequantized(held, MXFP4, torch.float32).read("w")
        assert torch.equal(found.view(-1), four_bits(codes) * 2.0 ** (exponent - 127))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_of_eight_bits(dtype):
    codes = torch.tensor([code for code in range(256) if code & 127 != 127])  # those two are NaN
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn).view(2, 127)
    scales = torch.tensor([[0.5, 3.0], [2.0**-20, 1.5]])
    held = Held({"w": values, "w_scale_inv": scales})
    found = Dequantized(held, FP8 | {"weight_block_size": [1, 100]}, dtype).read("w")
    wide = scales.repeat_interleave(torch.tensor([100, 27]), dim=1)
    assert torch.equal(found, (eight_bits(codes).view(2, 127) * wide).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_of_a_whole_matrix(shape):
    values = torch.randn(5, 7).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": values,
        "a.weight_scale_inv": torch.full(shape, 0.25),
        "a.activation_scale": torch.ones(()),
        "b.weight": torch.ones(3),
    }
    read = Dequantized(Held(tensors), {"quant_method": "fp8", "weight_block_size": None})
    assert read.specs.keys() == {"a.weight", "b.weight"}
    assert torch.equal(read.read("a.weight"), (values.float() * 0.25).bfloat16())
    assert torch.equal(read.read("b.weight"), tensors["b.weight"])


def test_scales_that_are_powers_of_two_in_eight_bits(tmp_path):
    values, _, _ = fp8((24, 16), (16, 8))
    scales = torch.tensor([[0.5, 2.0], [2.0**-9, 1.0]]).to(torch.float8_e8m0fnu)
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as files:
        found = Dequantized(files, FP8, torch.float32).read("w")
    assert torch.equal(found[17:, :8], values[17:, :8].float() * 2.0**-9)
    assert torch.equal(found[:16, 8:], values[:16, 8:].float() * 2.0)


# What does not fit is named


def remove(name):
    return lambda tensors: tensors.pop(name)


def replace(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


EXPERTS, UP = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("gpt_oss", remove(f"{EXPERTS}_scales"), f"by mxfp4, and {EXPERTS}_scales is not there"),
        ("gpt_oss", remove(f"{EXPERTS}_blocks"), f"by mxfp4, and {EXPERTS}_blocks is not there"),
        ("gpt_oss", replace(f"{EXPERTS}_blocks", lambda t: t[..., :8]),
         rf"{EXPERTS}_blocks: expected the shape \(experts, rows, groups, 16\), found \(3, 64, 1, 8\)"),
        ("gpt_oss", replace(f"{EXPERTS}_scales", lambda t: t[:, :5]),
         rf"{EXPERTS}_scales: expected the shape \(3, 64, 1\) .*, found \(3, 5, 1\)"),
        ("gpt_oss", replace(f"{EXPERTS}_scales", lambda t: t.float()),
         f"{EXPERTS}_scales: expected uint8, found float32"),
        ("qwen3", remove(f"{UP}_scale_inv"), f"by fp8, and its scales {UP}_scale_inv are not"),
        ("qwen3", replace(f"{UP}_scale_inv", lambda t: t[:2]),
         rf"{UP}_scale_inv: expected the shape \(3, 4\) .*\(48, 32\).*, found \(2, 4\)"),
        ("qwen3", replace(f"{UP}_scale_inv", lambda t: t.to(torch.uint8)),
         f"{UP}_scale_inv: expected float32 or .*, found uint8"),
        ("qwen3", replace(UP, lambda t: t.bfloat16()),
         f"map of 'qwen3' has no place for {UP}_scale_inv"),
        ("qwen3", replace(UP, lambda t: t[0]),
         rf"{UP}: expected a matrix, as fp8 has blocks of, found \(32,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(kind, edit, message, tmp_path, rewrite):
    publish(kind, tmp_path)
    rewrite(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        HybridForCausalLM.from_published(tmp_path)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt"]
)
def test_other_formats_are_refused_by_name(method, tmp_path):
    publish("qwen3", tmp_path)
    configure(tmp_path, {"quant_method": method})
    with pytest.raises(ValueError, match=f"{tmp_path}: .* '{method}', and only mxfp4 and fp8 are"):
        HybridForCausalLM.from_published(tmp_path)


@pytest.mark.parametrize(
    "block", [128, [128], [16, 8, 1], [16, 0], [16, -8], [16.0, 8], "16x8", {"rows": 16}, []]
)
def test_blocks_of_no_size(block):
    held = Held({"w": torch.zeros(16, 8).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)})
    message = r"weight_block_size: expected rows and columns above 0, such as \[128, 128\], found "
    with pytest.raises(ValueError, match=message + re.escape(repr(block))):
        Dequantized(held, FP8 | {"weight_block_size": block})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("fp8", "quantization_config: expected an object, found 'fp8'"),
        ({"quant_method": ["fp8"]}, r"quantized by \['fp8'\], and only mxfp4 and fp8 are read"),
        ({}, "quantized by None, and only mxfp4 and fp8 are read"),
    ],
)
def test_settings_that_say_nothing(settings, message, tmp_path):
    publish("qwen3", tmp_path)
    configure(tmp_path, settings)
    with pytest.raises(ValueError, match=message):
        HybridForCausalLM.from_published(tmp_path)


def test_a_quantized_model_in_memory(tmp_path):
    publish("qwen3", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    # as it is where there is a GPU to multiply in 8 bits
    part = theirs.model.layers[0].mlp.up_proj
    part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"the model is quantized; give the result of its dequ"):
        HybridForCausalLM.from_published(theirs)
