"""Multi-token prediction modules of published checkpoints, in and out.

transformers' classes drop them, so what they compute is transcribed here: of the module, from the
formula of DeepSeek-V3 (arXiv 2412.19437, 2.2) and the code that serves each family; of its layers,
from their own decoder layers, in a model of one layer whose weights have the names of the module.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hybrid
from hybrid.cli import main as command_line
from hybrid.convert import FAMILIES, export, import_published
from hybrid.convert.opening import on_disk

D, V, N = 24, 61, 3  # model dim, vocabulary, layers of the main stack
QWEN = {
    "hidden_size": D, "num_hidden_layers": N, "head_dim": 16, "num_attention_heads": 3,
    "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 5, "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
QWEN_EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
}  # fmt: skip
LATENT = {
    "hidden_size": D, "num_hidden_layers": N, "intermediate_size": 28, "moe_intermediate_size": 12,
    "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 7, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
NEMOTRON = {
    "hidden_size": D, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 14, "num_nextn_predict_layers": 1,
}  # fmt: skip
ONE = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


@dataclass(frozen=True)
class Case:
    """A family's main stack, and its module as a small model of their class.

    Attributes:
        config: of the main stack.
        module: what differs in the config of the module's layers.
        names: their prefix in that model -> in the checkpoint.
        parts: embedding norm, hidden norm, projection and last norm in the checkpoint.
        copies: tensors that files hold twice.
        centered: whether norms scale by 1 + weight.
    """

    config: dict[str, Any]
    module: dict[str, Any]
    names: dict[str, str]
    parts: tuple[str, str, str, str]
    copies: dict[str, str] = field(default_factory=dict)
    centered: bool = False


def qwen(config, module=ONE):
    parts = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
    return Case(config, module, {"model.layers.": "mtp.layers."}, parts, centered=True)


def appended(config, module, norm, copies=()):
    place = f"model.layers.{N}."
    return Case(
        config,
        module,
        {"model.layers.0.": place},
        (f"{place}enorm", f"{place}hnorm", f"{place}eh_proj", place + norm),
        {place + theirs: main for theirs, main in copies},
    )


CASES = {
    "qwen3_next": qwen({**QWEN, **QWEN_EXPERTS, "intermediate_size": 28}),
    "qwen3_5_text": qwen({**QWEN, "intermediate_size": 28, "mtp_num_hidden_layers": 1}),
    "qwen3_5_moe_text": qwen({**QWEN, **QWEN_EXPERTS, "mtp_num_hidden_layers": 1}),
    "deepseek_v3": appended(
        {**LATENT, "q_lora_rank": 14, "n_routed_experts": 6},
        {"num_hidden_layers": 1, "first_k_dense_replace": 0},
        "shared_head.norm",
        (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        ),
    ),
    "bailing_hybrid": appended(
        {**LATENT, "head_dim": 5, "num_local_experts": 6, "layer_group_size": 3,
         "pad_token_id": 0, "eos_token_id": 2},
        {**ONE, "mlp_layer_types": ["sparse"]},
        "final_layernorm",
    ),
    "nemotron_h": Case(
        {**NEMOTRON, "layers_block_type": ["linear_attention", "moe", "full_attention"],
         "mtp_layers_block_type": ["full_attention", "moe"]},
        {"layers_block_type": ["full_attention", "moe"]},
        {"backbone.layers.": "mtp.layers.", "model.layers.": "mtp.layers."},
        ("mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.0.eh_proj",
         "mtp.layers.1.final_layernorm"),
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("name", CASES)


def their_model(name, seed=0, **changes):
    family = FAMILIES[name]
    if family.architecture not in dir(transformers):
        pytest.skip(f"transformers {transformers.__version__} has no {family.architecture}")
    torch.manual_seed(seed)
    # an eps that is felt, and that is no other norm's
    eps = {"layer_norm_epsilon" if name == "nemotron_h" else "rms_norm_eps": 1e-3}
    values = {"vocab_size": V, **eps, **CASES[name].config, **changes}
    model = getattr(transformers, family.architecture)(family.their_config(values)).eval()
    randomize(model)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def randomize(model):
    """Weights that all matter."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "embed" in name:
            tensor.normal_()
        elif tensor.ndim >= 2 and "norm" not in name:
            tensor.normal_(std=0.5 * tensor.shape[-1] ** -0.5)
        elif isinstance(tensor, torch.nn.Parameter) or "bias" in name:
            tensor.add_(0.2 * torch.randn_like(tensor))


@dataclass
class Published:
    """A checkpoint with a module, and what it was made of."""

    case: Case
    main: Any
    layers: Any
    glue: dict[str, torch.Tensor]
    folder: Any

    @torch.no_grad()
    def logits(self, ids):
        """(B, T) -> (B, T - 1, V): of the token after the next."""
        embedding_norm, hidden_norm, projection, _ = (
            self.glue.get(f"{part}.weight") for part in self.case.parts
        )
        hidden = base(self.main)(ids).last_hidden_state  # behind the norm of the main stack
        embeddings = self.main.get_input_embeddings()(ids)
        both = [
            self.norm(embeddings[:, 1:], embedding_norm),
            self.norm(hidden[:, :-1], hidden_norm),
        ]
        x = torch.cat(both, dim=-1) @ projection.T
        # the last norm of that model is the module's
        return self.main.lm_head(base(self.layers)(inputs_embeds=x).last_hidden_state)

    def norm(self, x, weight):
        config = self.main.config
        eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
        scale = 1 + weight if self.case.centered else weight
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale


def base(model):
    return getattr(model, model.base_model_prefix)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Family -> a checkpoint with a module, written as published ones are."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        case = CASES[name]
        folder = tmp_path_factory.mktemp(name)
        main, layers = their_model(name), their_model(name, seed=1, **case.module)
        with torch.no_grad():  # some favourite tokens, so that a draft is right now and then
            main.lm_head.weight[3:5] *= 8
        main.save_pretrained(folder)
        glue = {
            f"{part}.weight": torch.randn(D, 2 * D) / D**0.5 if i == 2 else torch.randn(D) / 5 + 0.8
            for i, part in enumerate(case.parts[:3])
        }
        tensors = load_file(folder / "model.safetensors")
        for key, tensor in on_disk(layers).items():
            if key in ("model.norm.weight", "backbone.norm_f.weight", "model.norm_f.weight"):
                glue[f"{case.parts[3]}.weight"] = tensor
            for prefix, ours in case.names.items():
                if key.startswith(prefix):
                    tensors[ours + key.removeprefix(prefix)] = tensor
        copies = {key: tensors[of].clone() for key, of in case.copies.items()}
        save_file(tensors | glue | copies, folder / "model.safetensors", {"format": "pt"})
        made[name] = Published(case, main, layers, glue, folder)
        return made[name]

    return make


def tokens(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(5))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def altered(published, tmp_path):
    """A checkpoint with another config or other tensors."""

    def change(name, config=None, change=lambda tensors: None):
        folder = tmp_path / "altered"
        folder.mkdir()
        tensors = tensors_of(published(name).folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((published(name).folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | (config or {})))
        return folder

    return change


# In.


@each_family
@torch.no_grad()
def test_a_module_computes_what_theirs_does(name, published):
    found = published(name)
    ours = hybrid.HybridForCausalLM.from_published(found.folder)
    ids = tokens(2, 15)
    hidden = ours.model(ids).last_hidden_state[:, :-1]
    embeddings = ours.get_input_embeddings()(ids)[:, 1:]
    (module,) = ours.mtp.depths
    logits = ours.compute_logits(module(hidden, embeddings).last_hidden_state)
    expected = found.logits(ids)
    assert (logits - expected).abs().max() / expected.std() < 1e-5
    main = found.main(ids).logits
    assert (ours(ids).logits - main).abs().max() / main.std() < 1e-5


@each_family
def test_speculative_decoding_with_an_imported_module(name, published):
    """Greedy tokens stay as they are, and every draft is the one that theirs would make."""
    found = published(name)
    ours = hybrid.HybridForCausalLM.from_published(found.folder)
    prompt, new = tokens(1, 6), 40
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False,
                "max_new_tokens": new, "eos_token_id": None}  # fmt: skip
    expected = ours.generate(prompt, **settings)
    assert torch.equal(ours.generate(prompt, use_mtp=True, **settings), expected)
    # theirs, of the whole text at once: draft t is made where token t - 1 has just been found
    drafts = found.logits(expected).argmax(-1)[0]
    t, taken = prompt.shape[1] + 1, []
    while t < expected.shape[1] - 1:
        taken.append(bool(drafts[t - 2] == expected[0, t]))
        t += 1 + taken[-1]
    assert (ours.mtp.drafted, ours.mtp.accepted) == (len(taken), sum(taken))


@each_family
def test_folder_to_folder_and_into_a_model_are_the_same(name, published, tmp_path):
    found = published(name)
    import_published(found.folder, tmp_path / "ours")
    read = hybrid.HybridForCausalLM.from_pretrained(tmp_path / "ours")
    model = hybrid.HybridForCausalLM.from_published(found.folder)
    assert model.mtp is not None
    state = read.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@each_family
def test_without_weights_of_a_module(name, published, tmp_path, caplog):
    """As transformers' own classes write it, whatever the config says."""
    found = published(name)
    found.main.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hybrid"):
        ours = hybrid.HybridForCausalLM.from_published(tmp_path)
    assert ours.mtp is None
    lines = [record.getMessage() for record in caplog.records]
    if name == "qwen3_next":  # whose config says nothing
        assert lines == []
    else:
        (line,) = lines
        assert line.endswith("is 1, and there are no weights of such a module: read without"
                             " multi-token prediction")  # fmt: skip


@each_family
@torch.no_grad()
def test_a_module_can_be_left_out(name, published, tmp_path, caplog):
    found = published(name)
    ours = hybrid.HybridForCausalLM.from_published(found.folder, mtp=False)
    assert caplog.records == []
    assert ours.mtp is None
    expected = found.main(tokens(1, 9)).logits
    assert (ours(tokens(1, 9)).logits - expected).abs().max() / expected.std() < 1e-5
    arguments = ["import", str(found.folder), str(tmp_path / "out"), "--no-mtp"]
    assert command_line(arguments) == 0
    assert not any(key.startswith("mtp") for key in tensors_of(tmp_path / "out"))


def test_a_config_that_says_there_is_none(altered, caplog):
    folder = altered("deepseek_v3", {"num_nextn_predict_layers": 0})
    ours = hybrid.HybridForCausalLM.from_published(folder)
    assert ours.mtp is None
    (record,) = caplog.records
    assert "num_nextn_predict_layers is 0: model.layers.3." in record.getMessage()


def test_several_modules(published, altered):
    """They follow one another, and each has its own number."""

    def second(tensors):
        for key in [key for key in tensors if key.startswith("model.layers.3.")]:
            copy = tensors[key].clone()
            is_copy = "embed_tokens" in key or "head.weight" in key
            tensors[key.replace(".3.", ".4.", 1)] = copy if is_copy else copy * 1.5

    folder = altered("deepseek_v3", {"num_nextn_predict_layers": 2}, second)
    ours = hybrid.HybridForCausalLM.from_published(folder)
    first, last = (module.projection.weight for module in ours.mtp.depths)
    assert torch.equal(last, first * 1.5)
    out = folder.parent / "out"
    assert export(ours, out) == "deepseek_v3"
    same_tensors(out, folder)


def test_modules_that_share_a_projection_are_refused(altered):
    folder = altered("qwen3_5_text", {"mtp_num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"mtp_num_hidden_layers: expected .*got 2; try mtp=False"):
        hybrid.HybridForCausalLM.from_published(folder)


def test_a_module_without_feed_forward_is_refused(altered):
    folder = altered("nemotron_h", {"mtp_layers_block_type": ["full_attention"]})
    with pytest.raises(
        ValueError, match=r"mtp_layers_block_type: expected a mixer and a feed-forward"
    ):
        hybrid.HybridForCausalLM.from_published(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("mtp.fc.weight"),
            r"num_nextn_predict_layers is 1, and .* 0 in full; module 0 lacks"
            r" mtp\.fc\.weight; leave them out with mtp=False, --no-mtp on the command line",
        ),
        (
            lambda t: t.pop("mtp.layers.0.self_attn.q_norm.weight"),
            r"module 0 lacks mtp\.layers\.0\.self_attn\.q_norm\.weight; leave them out",
        ),
        (
            lambda t: t.update({"mtp.embed_tokens.weight": torch.zeros(V, D)}),
            r"1 in full; left over: mtp\.embed_tokens\.weight; leave them out",
        ),
        (
            lambda t: t.update({"mtp.fc.weight": torch.zeros(D, D)}),
            r"mtp\.fc\.weight: expected the shape \(24, 48\), found \(24, 24\)",
        ),
    ],
)
def test_weights_of_a_module_that_do_not_fit_are_named(altered, change, message):
    with pytest.raises(ValueError, match=message):
        hybrid.HybridForCausalLM.from_published(altered("qwen3_next", change=change))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["deepseek_v3", "bailing_hybrid", "nemotron_h"])
def test_fewer_modules_than_the_config_counts(altered, tmp_path, capsys, name, count):
    """The absent ones are named, with the way out, which is taken."""
    key = FAMILIES[name].mtp.key
    folder = altered(name, {key: count})
    assert command_line(["import", str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{key} is {count}, and of such modules the checkpoint has 1 in full; module 1" in said
    assert re.findall(r"module (\d) lacks", said) == [str(k) for k in range(1, count)]
    first = "mtp.layers.2." if name == "nemotron_h" else f"model.layers.{N + 1}."
    assert f"module 1 lacks {first}" in said
    assert said.endswith("leave them out with mtp=False, --no-mtp on the command line\n")
    assert not (tmp_path / "out").exists()
    assert command_line(["import", str(folder), str(tmp_path / "out"), "--no-mtp"]) == 0


def test_more_modules_than_the_config_counts(altered):
    def second(tensors):
        for key in [key for key in tensors if key.startswith("model.layers.3.")]:
            tensors[key.replace(".3.", ".4.", 1)] = tensors[key].clone()

    folder = altered("deepseek_v3", change=second)
    message = r"num_nextn_predict_layers is 1, .* left over: model\.layers\.4\..* --no-mtp"
    with pytest.raises(ValueError, match=message):
        hybrid.HybridForCausalLM.from_published(folder)
    assert hybrid.HybridForCausalLM.from_published(folder, mtp=False).mtp is None


def test_copies_may_be_absent_and_must_be_equal(altered, published):
    head = f"model.layers.{N}.shared_head.head.weight"

    def absent(tensors):
        for name in published("deepseek_v3").case.copies:
            del tensors[name]

    folder = altered("deepseek_v3", change=absent)
    ours = hybrid.HybridForCausalLM.from_published(folder)
    assert ours.mtp is not None
    tensors = tensors_of(folder)
    tensors[head] = tensors["lm_head.weight"] + 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{head}: not equal to lm_head\.weight, .* mtp=False"):
        hybrid.HybridForCausalLM.from_published(folder)
    tensors[head] = torch.zeros(V, D + 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{head}: expected the shape \({V}, {D}\)"):
        hybrid.HybridForCausalLM.from_published(folder)


def test_the_copy_of_a_tied_head_is_the_embedding(altered, tmp_path):
    def tie(tensors):
        del tensors["lm_head.weight"]
        head = f"model.layers.{N}.shared_head.head.weight"
        tensors[head] = tensors["model.embed_tokens.weight"].clone()

    folder = altered("deepseek_v3", {"tie_word_embeddings": True}, tie)
    import_published(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out")
    same_tensors(tmp_path / "out", folder)


def test_a_module_inside_a_model_with_images(altered):
    """The text part is under another prefix there, and the module is not."""

    def wrap(tensors):
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[key.replace("model.", "model.language_model.", 1)] = tensors.pop(key)
        tensors["model.visual.patch_embed.weight"] = torch.zeros(2)

    folder = altered("qwen3_5_text", change=wrap)
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(outer))
    assert hybrid.HybridForCausalLM.from_published(folder).mtp is not None


@pytest.mark.parametrize("stacks", [["model.layers.0.", "model.layers.1.", "model.layers.2."],
                                    ["mtp.layers.0."]])  # fmt: skip
def test_experts_stacked_in_the_file(published, altered, stacks):
    """Qwen3.5's files hold those of the main stack so, and those of the module one by one."""

    def stack(tensors):
        def matrices(place, name):
            return [tensors.pop(f"{place}{e}.{name}.weight") for e in range(5)]

        for place in (f"{stack}mlp.experts." for stack in stacks):
            pairs = zip(matrices(place, "gate_proj"), matrices(place, "up_proj"), strict=True)
            tensors[f"{place}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            tensors[f"{place}down_proj"] = torch.stack(matrices(place, "down_proj"))

    folder = altered("qwen3_5_moe_text", change=stack)
    found = hybrid.HybridForCausalLM.from_published(folder).state_dict()
    expected = hybrid.HybridForCausalLM.from_published(published("qwen3_5_moe_text").folder)
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_another_layout_keeps_the_module(published, tmp_path):
    """With its softmax layer, though the stack has none left."""
    found = published("qwen3_5_text")
    ours = hybrid.HybridForCausalLM.from_published(found.folder)
    other = hybrid.HybridForCausalLM.from_published(found.folder, layout="DDL")
    assert other.config.layers[2].mixers == ("L",)
    kept = {key: value for key, value in ours.state_dict().items() if key.startswith("mtp.")}
    state = other.state_dict()
    assert kept.keys() == {key for key in state if key.startswith("mtp.")}
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    import_published(found.folder, tmp_path / "out", layout="DDL")
    read = hybrid.HybridForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(read[key], value) for key, value in kept.items())


# Out.


def text_config(folder):
    """The config of the text model, which Qwen3.5's exports have within that of one with images."""
    values = json.loads((folder / "config.json").read_text())
    return values.get("text_config", values)


def same_tensors(out, expected):
    found, wanted = tensors_of(out), tensors_of(expected)
    if found.keys() != wanted.keys():  # published under other names than transformers writes
        found, wanted = (
            hybrid.HybridForCausalLM.from_published(f).state_dict() for f in (out, expected)
        )
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@each_family
def test_there_and_back_bit_for_bit(
    name, published, tmp_path, assert_same_weights, assert_close_to_rounding
):
    found = published(name)
    import_published(found.folder, tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "out", name) == name
    same_tensors(tmp_path / "out", found.folder)
    family = FAMILIES[name]
    before, after = map(text_config, (found.folder, tmp_path / "out"))
    assert after[family.mtp.key] == 1
    keys = {key for key in before if key in (family.mtp.key, *family.mtp.keys)}
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
    again = type(found.main).from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, found.main)
    with torch.no_grad():
        assert_close_to_rounding(again(tokens(1, 9)).logits, found.main(tokens(1, 9)).logits)


@each_family
def test_an_export_without_modules_says_so(name, published, tmp_path):
    ours = hybrid.HybridForCausalLM.from_published(published(name).folder, mtp=False)
    export(ours, tmp_path / "out", name)
    assert text_config(tmp_path / "out")[FAMILIES[name].mtp.key] == 0
    same_tensors(tmp_path / "out", saved(published(name).main, tmp_path / "theirs"))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_transformers_reads_the_module_of_an_export(published, tmp_path, monkeypatch):
    """transformers has modules in the names of DeepSeek-V3, and raises where a tensor is missing."""
    from transformers.modeling_layers import MtpModel

    found = published("deepseek_v3")
    ours = hybrid.HybridForCausalLM.from_published(found.folder)
    export(ours, tmp_path / "out")
    kind = type(found.main)
    pattern = [rf"model\.layers\.{N}.*"]  # theirs holds the number of layers of the 671B
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", pattern)
    main = kind.from_pretrained(tmp_path / "out").eval()
    module = MtpModel.from_pretrained(main).eval()
    ids = tokens(1, 11)
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state[:, :-1]
        positions = torch.arange(ids.shape[1] - 1)[None]
        logits = module(ids[:, 1:], hidden, torch.ones_like(ids[:, 1:]), positions, None)[1]
        expected = found.logits(ids)[:, -1:]
    assert (logits - expected).abs().max() / expected.std() < 1e-5
