"""Every published family against transformers' own class: one set of tests, generated for each.

How to add a family. Write `hybrid/convert/families/NAME.py` (CONTRIBUTING.md has the recipe), and
beside this file `NAME.py` with

    CASES = {"any_name": {...}, ...}    keyword arguments of their config class, small

A case wants unequal head counts, odd sizes, and every switch that published checkpoints turn on; two
or three cases cover most families, and one test should cost well under a second. Optional, in the
same file:

    RESPELT = {"key", ...}              keys of their config that say the same in other words when
                                        they come back (`decoder_sparse_step` as a list of layers),
                                        or nothing, for no layer of the cases uses them
    NEEDS = {"any_name": "mamba2.modeling_mamba2.MambaRMSNormGated.group_size"}
                                        an argument (here of transformers.models.mamba2...) that older
                                        transformers do not have, and compute something else instead
    SERVED = {"key": value, ...}        changes of the first case for servers, whose kernels want
                                        other sizes (`tests/hybrid/serve/servers_table.py`)

Where their padded or cached forward is wrong does not matter: rows are compared with theirs alone, in
one pass.

Run one family with `pytest tests/hybrid/convert/families -k NAME`. `hybrid` reads what their
`save_pretrained` wrote, so that what is tested is the format on disk. All weights are random, norms,
biases, decays and time steps among them.
"""

import copy
import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

import hybrid
from hybrid.convert import FAMILIES
from hybrid.convert.checkpoint import Checkpoint, read_json
from hybrid.convert.configs import unmapped_keys
from hybrid.convert.tensor_plan import steps
from hybrid.convert.tensor_sources import Held
from hybrid.convert.tensor_streams import read_steps
from published_cases import MODULES, random_published, too_old

TOLERANCE = 1e-5  # of the standard deviation of logits, and of the norm of gradients
TIME, LENGTHS = 17, (17, 11, 6)
HERE = Path(__file__).parent

COMPAT = "falcon_h1"
"""The family that stands for all where several versions of transformers are tried."""
ALL = [
    pytest.param(name, case, id=f"{name}-{case}", marks=[pytest.mark.compat] * (name == COMPAT))
    for name, module in MODULES.items()
    for case in module.CASES
]
each_case = pytest.mark.parametrize(("name", "case"), ALL)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(family, case) -> their model, ours, the folder theirs was saved in, and token ids."""

    @lru_cache(maxsize=2)
    def make(name, case):
        family = FAMILIES[name]
        if reason := too_old(name, case):
            pytest.skip(reason)
        theirs = random_published(name, case)
        folder = tmp_path_factory.mktemp(f"{name}-{case}")
        theirs.save_pretrained(folder, max_shard_size="40KB")
        ours = hybrid.HybridForCausalLM.from_published(folder)
        ids = torch.randint(3, theirs.config.vocab_size, (len(LENGTHS), TIME))
        return SimpleNamespace(family=family, theirs=theirs, ours=ours, folder=folder, ids=ids)

    return make


def left_padded(ids, length):
    """Each row's last tokens, padding before them, and the mask."""
    mask = torch.zeros_like(ids)
    for row, size in enumerate(LENGTHS):
        mask[row, length - min(size, length) :] = 1
    return torch.where(mask.bool(), ids, 0), mask


def assert_close(found, expected, what=""):
    error = (found - expected).abs().max() / expected.std()
    assert error < TOLERANCE, f"{what} {error:.1e}"


def rows_alone(model, ids):
    """Logits of each row without its padding."""
    return [model(ids[row : row + 1, TIME - size :]).logits[0] for row, size in enumerate(LENGTHS)]


def test_every_family_has_cases():
    # what transformers has no class for is compared with a record, in test_convert_fla.py
    recorded = {path.stem for path in (HERE.parent / "fla_formats").glob("*.json")}
    assert {*MODULES, *recorded} == set(FAMILIES)


@each_case
def test_every_option_of_theirs_is_read_or_ignored_on_purpose(name, case, published):
    found = published(name, case)
    assert unmapped_keys(found.family, found.theirs.config) == []


@each_case
@torch.no_grad()
def test_logits(name, case, published):
    found = published(name, case)
    assert_close(found.ours(found.ids).logits, found.theirs(found.ids).logits)


@each_case
@torch.no_grad()
def test_logits_of_a_padded_batch(name, case, published):
    found = published(name, case)
    ids, mask = left_padded(found.ids, TIME)
    padded = found.ours(ids, attention_mask=mask).logits
    for row, expected in enumerate(rows_alone(found.theirs, ids)):
        assert_close(padded[row, TIME - LENGTHS[row] :], expected, f"row {row}")


@each_case
@torch.no_grad()
def test_prefill_and_decode(name, case, published):
    found = published(name, case)
    ids, mask = left_padded(found.ids, TIME)
    expected = rows_alone(found.theirs, ids)
    start = TIME - 3
    out = found.ours(ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
    logits = [out.logits]
    for t in range(start, TIME):
        out = found.ours(
            ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits)
    together = torch.cat(logits, dim=1)
    for row, size in enumerate(LENGTHS):
        assert_close(together[row, TIME - size :], expected[row], f"row {row}")


def gradients(model, ids):
    """Gradients of the loss by name, 0 where there is none."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    named = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def distance(found, expected):
    """|found - expected| / |expected|; 0 for two zeros."""
    apart = (found - expected).norm()
    return (apart / expected.norm()).item() if apart else 0.0


@each_case
def test_gradients_of_all_weights(name, case, published):
    """Within the tolerance; or ten times that, where float32 is too little for a weight's gradient.

    Decays and time steps are such: their gradients are sums of terms that nearly cancel. Then ours in
    float32 and theirs must both be that near to ours in float64.
    """
    found = published(name, case)
    theirs = revert_weight_conversion(found.theirs, gradients(found.theirs, found.ids))
    ours = gradients(found.ours, found.ids)
    planned = [step for step in steps(found.family, found.ours) if set(step.ours) <= set(ours)]
    compared = dict(read_steps(planned, Held(theirs)))
    assert set(compared) == set(ours)
    far = {k for k in ours if distance(ours[k], compared[k]) > TOLERANCE}
    if far:
        wide = hybrid.HybridForCausalLM.from_published(found.folder, dtype=torch.float64)
        exact = gradients(wide, found.ids)
        largest = max(gradient.norm() for gradient in exact.values())
        for key in far:
            if exact[key].norm() < 1e-12 * largest:  # as of a bias of keys without positions: none
                noise = max(ours[key].norm(), compared[key].norm())
                assert noise < TOLERANCE * largest, f"{key}: {noise:.1e} where there is none"
                continue
            own, error = distance(ours[key], exact[key]), distance(compared[key], exact[key])
            assert max(own, error) < 10 * TOLERANCE, f"{key}: {own:.1e} ours, {error:.1e} theirs"


@each_case
def test_export_gives_every_tensor_back_and_their_class_loads_it(
    name, case, published, tmp_path, assert_same_weights, assert_close_to_rounding
):
    found = published(name, case)
    assert hybrid.convert.export(found.ours, tmp_path / "out", name, max_shard_size="50KB") == name
    assert_same_tensors(found, tmp_path / "out")
    again, info = type(found.theirs).from_pretrained(
        tmp_path / "out",
        output_loading_info=True,
        attn_implementation=found.theirs.config._attn_implementation,
    )
    assert not any(info.values()), info
    assert again.config.architectures == [PUBLISHED_AS.get(name, found.family.architecture)]
    assert_same_weights(again, found.theirs)
    with torch.no_grad():
        assert_close_to_rounding(again.eval()(found.ids).logits, found.theirs(found.ids).logits)
    before, after = (
        json.loads(c.to_json_string(False)) for c in (found.theirs.config, again.config)
    )
    mapped = (found.family.written_keys - getattr(MODULES[name], "RESPELT", set())) & before.keys()
    assert {key: after[key] for key in mapped} == {key: before[key] for key in mapped}
    assert_older_words_say_the_same(found.family, type(again.config), tmp_path / "out")


# where transformers' class has another name than the published one
PUBLISHED_AS = {"bailing_hybrid": "BailingMoeV3ForCausalLM", "minimax": "MiniMaxText01ForCausalLM"}


def assert_same_tensors(found, folder):
    """What transformers wrote; where other names were published, what comes back is compared."""
    if not (found.family.filed or found.family.filed_whole):
        with Checkpoint(folder) as written, Checkpoint(found.folder) as read:
            assert written.specs == read.specs
            assert all(torch.equal(written.read(key), read.read(key)) for key in read.specs)
    again = hybrid.HybridForCausalLM.from_published(folder).state_dict()
    assert again.keys() == found.ours.state_dict().keys()
    assert all(torch.equal(again[key], w) for key, w in found.ours.state_dict().items())


def assert_older_words_say_the_same(family, kind, folder):
    """In an export, those of transformers 4 are redundant, and so are the newer ones beside them."""
    values = read_json(folder / "config.json")
    older = family.legacy_rope(values)
    assert older.items() <= values.items()
    without = {key: value for key, value in values.items() if key not in older}
    assert family.legacy_rope(without) == older
    expected = kind.from_dict(copy.deepcopy(without)).to_dict()
    # without a scaling, gpt-oss of transformers 5 takes its own, where transformers 4 took none
    if older and not (family.name == "gpt_oss" and older["rope_scaling"] is None):
        del values["rope_parameters"]
    found = kind.from_dict(copy.deepcopy(values)).to_dict()
    # some classes keep older words as attributes that nothing reads
    assert {k: found[k] for k in expected if k not in older} == {
        k: v for k, v in expected.items() if k not in older
    }


@each_case
def test_same_greedy_tokens(name, case, published):
    found = published(name, case)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    # theirs without a cache, for with one some are wrong: Mamba-2's decode step knows no time_step_limit
    prompt = found.ids[:, :9]
    mask = torch.ones_like(prompt)
    expected = found.theirs.generate(prompt, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(found.ours.generate(prompt, attention_mask=mask, **settings), expected)
    assert expected.shape == (len(LENGTHS), 15)


@each_case
def test_nothing_is_shared_and_a_model_reads_as_its_checkpoint_does(name, case, published):
    found = published(name, case)
    ours = hybrid.HybridForCausalLM.from_published(found.theirs)
    expected = found.ours.state_dict()
    state = ours.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    theirs = {tensor.data_ptr() for tensor in found.theirs.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in state.values()}
