"""Another layout for a published model: what stays, what is inherited, what is refused."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hybrid
from hybrid.config import lookup
from hybrid.config.registry import mixers
from hybrid.convert.engine import import_published
from hybrid.convert.init_from_attention import INIT_FROM_ATTENTION
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.layout import LayoutError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LINEAR = [name for name in INIT_FROM_ATTENTION if mixers.get(name).layer_type == "linear_attention"]
RECURRENT = sorted(set(LINEAR) - {"sliding_window_attention", "chunked_attention"})


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=10, attention_bias=True)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.uniform_(0.5, 1.5)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.bias.normal_()
    return model


@pytest.fixture
def from_llama(llama):
    def convert(layout, **kwargs):
        return hybrid.HybridForCausalLM.from_published(llama, layout=layout, **kwargs)

    return convert


@pytest.fixture
def token_ids():
    return torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(INIT_FROM_ATTENTION))
def test_everything_but_the_new_mixers_is_the_same_bit_for_bit(llama, from_llama, name):
    student = from_llama("SQ", mixers={"Q": {"type": name}})
    teacher = hybrid.HybridForCausalLM.from_published(llama).state_dict()
    kept = {n: t for n, t in student.state_dict().items() if not _new(n, (1, 3))}
    assert set(kept) == {n for n in teacher if not _new(n, (1, 3))}
    assert all(torch.equal(tensor, teacher[n]) for n, tensor in kept.items())
    assert student.config.stack.mixers["Q"].cls.name == name


@pytest.mark.parametrize("name", RECURRENT)
def test_queries_keys_values_and_outputs_are_carried_over(llama, from_llama, name):
    mixer = from_llama("SQ", mixers={"Q": {"type": name}}).model.layers[3].mixer
    attention = llama.model.layers[3].self_attn
    assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight)
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)
    for ours, theirs in ((mixer.k_proj, attention.k_proj), (mixer.v_proj, attention.v_proj)):
        heads = ours.weight.view(6, 8, 48)
        for head in range(6):  # query head h reads key head h // 3
            assert torch.equal(heads[head], theirs.weight.view(2, 8, 48)[head // 3])


@pytest.mark.parametrize("name", RECURRENT)
def test_gates_start_open_and_memory_long(from_llama, name, token_ids):
    student = from_llama("SQ", mixers={"Q": {"type": name}})
    mixer = student.model.layers[1].mixer
    x = torch.randn(1, 64, 48)
    if name != "lightning_attention":  # whose decays are what they are
        log_decay = _log_decay(mixer, x)
        assert (log_decay <= 0).all()
        assert log_decay.min() > -1 / 16  # no head forgets within 16 tokens
    conv = getattr(mixer, "conv", None)
    if conv is not None:
        y, _, _ = conv.split([x[..., :n] for n in _channels(conv)], None, None)
        assert torch.allclose(y, _silu_of(conv, x)[..., : y.shape[-1]])
    gate = getattr(mixer, "gate_proj", None)
    if gate is not None and name != "retention":  # whose SiLU gate has no bias to open it by
        assert torch.equal(gate(x), gate(-x))
        assert gate(x).abs().max() < 1.3


def _log_decay(mixer, x):
    if mixer.name == "mamba2":
        return -torch.nn.functional.softplus(mixer.dt_proj(x) + mixer.dt_bias) * mixer.A_log.exp()
    return mixer.gates(x).get("log_decay", torch.zeros(1))


def _channels(conv):
    total = conv.weight.shape[0]
    return [48, 48, 48] if total == 144 else [total // 3] * 3


def _silu_of(conv, x):
    return torch.nn.functional.silu(x) if conv.activation == "silu" else x


def _new(name, layers):
    return any(name.startswith(f"model.layers.{i}.mixer.") for i in layers)


def test_a_window_that_holds_all_tokens_is_the_teacher(llama, from_llama, token_ids):
    wide, narrow = (from_llama("SW", mixers={"W": {"window": w}}) for w in (21, 5))
    with torch.no_grad():
        expected = llama(token_ids).logits
        assert (wide(token_ids).logits - expected).abs().max() < 1e-5 * expected.std()
        assert (narrow(token_ids).logits - expected).abs().max() > 1e-2 * expected.std()


@pytest.mark.parametrize("letter", "TL")
def test_rotary_positions_are_kept_where_a_mixer_has_them(from_llama, caplog, letter):
    with caplog.at_level(logging.WARNING):
        student = from_llama(f"S{letter}")
    assert not caplog.records
    assert student.config.stack.mixers[letter].options.rope_theta == 10000.0


def test_rotary_positions_that_are_lost_are_named(from_llama, build, caplog):
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = build(torch.float32, layout="SS", mixers={"S": {"num_heads": 2,
                  "rope_parameters": stretched}})  # fmt: skip
    for make in (lambda: from_llama("SD"), lambda: replace_mixers(model, "ST")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make()
        assert "goes without what the layers it replaces had: rope_parameters" in caplog.text


def test_weights_of_query_and_key_norms_go_into_the_projections(qwen, caplog):
    with caplog.at_level(logging.WARNING):
        student = hybrid.HybridForCausalLM.from_published(qwen, layout="SL")
    assert "qk_norm" in caplog.text
    attention, mixer = qwen.model.layers[1].self_attn, student.model.layers[1].mixer
    scale = attention.q_norm.weight.repeat(6)
    assert torch.allclose(mixer.q_proj.weight, attention.q_proj.weight * scale[:, None])
    assert torch.allclose(mixer.q_proj.bias, attention.q_proj.bias * scale)
    assert torch.equal(mixer.v_proj.bias.view(6, 10)[5], attention.v_proj.bias.view(2, 10)[1])


def test_a_qwen_with_windows_is_the_teacher_too(qwen, token_ids):
    student = hybrid.HybridForCausalLM.from_published(
        qwen, layout="W", mixers={"W": {"window": 21}}
    )
    with torch.no_grad():
        expected = qwen(token_ids).logits
        assert (student(token_ids).logits - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.parametrize("letter", "LNTMGDPK")
def test_a_student_trains_generates_and_reloads(
    from_llama, letter, token_ids, tmp_path, assert_same_weights, assert_close_to_rounding
):
    student = from_llama(f"SSS{letter}")
    with torch.no_grad():
        whole = student(token_ids).logits
        first = student(token_ids[:, :13], use_cache=True)
        rest = student(token_ids[:, 13:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 13:], atol=1e-4 * whole.std().item())
    student.save_pretrained(tmp_path)
    again = hybrid.HybridForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, student)
    with torch.no_grad():
        assert_close_to_rounding(again(token_ids).logits, whole)
    student.train()(token_ids, labels=token_ids).loss.backward()
    grads = {n: p.grad for n, p in student.named_parameters() if _new(n, (3,))}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert grads[f"model.layers.3.mixer.{name}.weight"].abs().max() > 0


def test_import_of_a_folder_is_what_from_published_gives(llama, tmp_path):
    llama.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    config = import_published(
        tmp_path / "theirs", tmp_path / "ours", layout="SSSD", dtype="bfloat16"
    )
    assert (config.layout, config.num_hidden_layers) == ("S3D", 4)
    read = hybrid.HybridForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    made = hybrid.HybridForCausalLM.from_published(
        tmp_path / "theirs", layout="SSSD", dtype=torch.bfloat16
    ).state_dict()
    assert read.keys() == made.keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in read.items())
    assert {t.dtype for t in read.values()} == {torch.bfloat16}


def test_a_model_of_ours_changes_its_layout_and_shares_nothing(build, ids):
    model = build(torch.float32, layout="SLSS", mixers={"S": {"num_heads": 4, "num_kv_heads": 1}})
    student = replace_mixers(model, "SLSD")
    assert student.config.layout == "SLSD"
    with torch.no_grad():
        student.model.layers[0].mixer.q_proj.weight.zero_()
    assert model.model.layers[0].mixer.q_proj.weight.abs().max() > 0
    assert torch.equal(student.model.layers[1].mixer.q_proj.weight,
                       model.model.layers[1].mixer.q_proj.weight)  # fmt: skip


def test_settings_by_letter_go_over_to_the_new_letter(build):
    by_letter = {"S": "reordered", "default": "pre"}
    model = build(torch.float32, layout="SS", norm_position=by_letter,
                  ffn={"S": "-", "default": ""}, mixers={"S": {"num_heads": 2}})  # fmt: skip
    student = replace_mixers(model, "SD")
    assert lookup.norm_position_at(student.config, "D") == "reordered"
    assert [layer.ffn for layer in student.config.layers] == ["-", "-"]


@pytest.mark.parametrize(
    ("layout", "mixers", "words"),
    [
        ("SX", None, r"layer 1 \(X, mlstm\) cannot inherit .* those that can: .*gated_delta_net"),
        ("S[SL]", None, r"layer 1 is S- and would become \[SL\]-: one mixer"),
        ("SL", {"S": {"num_heads": 2}}, r"mixers.S: its layers stay as they are"),
        ("SL", {"D": {}}, r"mixers.D: the layout 'SL' has no D"),
        ("SL", {"L": {"num_heads": 3}}, r"mixers.L: q_proj would be .* leave the sizes out"),
        ("SL", {"L": {"featuremap": "relu"}}, r"mixers.L.featuremap: unknown key, did you mean"),
        ("SQ", {"Q": {"type": "gated_deltanet"}}, r"mixers.Q.type: .* 'gated_delta_net'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(from_llama, layout, mixers, words):
    with pytest.raises(ValueError, match=words):
        from_llama(layout, mixers=mixers)


@pytest.mark.parametrize("layout", ["SSS", "SLLLL"])
def test_a_layout_that_does_not_divide_the_depth_is_a_layout_error(from_llama, layout):
    with pytest.raises(LayoutError, match="do not fill num_hidden_layers=4 evenly"):
        from_llama(layout)


def test_a_letter_that_means_nothing_is_a_layout_error(from_llama):
    with pytest.raises(LayoutError, match="unknown symbol 'Q'"):
        from_llama("SQ")


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        ({"layout": "LS"}, "DS", r"layer 0 \(L, lightning_attention\) has no queries"),
        ({"layout": "AS"}, "DS", r"layer 0 \(A, multi_head_latent_attention\) has no queries"),
        ({"layout": "SSSS", "mixers": {"S": {"num_heads": 2, "nope_every": 4}}}, "SSSD",
         r"mixers.S.nope_every: counts the softmax layers"),
        ({"layout": "S-S-"}, "S--D", r"layer 2 is S and would become -:"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_hand_on_are_refused(build, config, layout, words):
    with pytest.raises(ValueError, match=words):
        replace_mixers(build(torch.float32, **config), layout)


def test_the_command_line_takes_a_layout(llama, tmp_path, capsys):
    from hybrid.cli import main

    llama.save_pretrained(tmp_path / "theirs")
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    assert main(["import", theirs, ours, "--layout", "SW"]) == 0
    assert "layout SW" in capsys.readouterr().out
    assert main(["import", theirs, str(tmp_path / "no"), "--layout", "SSL"]) == 2
    assert "do not fill num_hidden_layers=4" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
