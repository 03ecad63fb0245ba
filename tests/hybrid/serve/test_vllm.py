"""Any layout in vLLM: tokens and log-probabilities equal to ours, whatever the server does meanwhile.

Run in an environment that has vLLM (docs/serving.md); skipped elsewhere.
"""

import functools
import gc
import random
from importlib.util import find_spec

import pytest
import torch

import hybrid
from hybrid.config.registry import mixers
from hybrid.serve.parity import Decoded, compare, greedy, random_prompts

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (docs/serving.md)"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

VOCAB, LONGEST = 256, 512
LENGTHS = (1, 3, 17, 40, 130)
REFUSED = {"native_sparse_attention"}
# of whole blocks of vLLM's, and without sinks
CHUNKS = {"chunk_size": 128, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head"}
SHARED = {"lora_rank": 3, "concat_embeddings": True, "depth_projection": True, "output": "next"}
LATENT = {"num_heads": 2, "latent_dim": 40, "head_dim": 24, "rope_dim": 8, "value_head_dim": 20}
STACK = {
    "layout": "[MS]GALQDQ[WH]T",
    "ffn": {"G": "E", "D": "E", "default": "-"},
    "canon": {"T": "ABCD", "L": "AC", "default": ""},
    "shared": {"Q": SHARED},
    "mixers": {
        "S": {"num_heads": 2, "num_kv_heads": 1},
        "T": {"type": "softmax_attention", "num_heads": 2},
        "Q": {"type": "softmax_attention", "num_heads": 4},
        "W": {"num_heads": 2, "window": 9},
        "A": LATENT,
    },
    "num_mtp_layers": 1,
}
"""Side by side, canon layers, shared weights, experts, MTP weights, a window, latents."""


@pytest.fixture
def save(tmp_path):
    """Save a random model, and return its folder."""

    def build(**config):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": LONGEST}
        model = hybrid.HybridForCausalLM(
            hybrid.HybridConfig(**{"initializer_range": 0.15, **sizes, **config})
        )
        model.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


@pytest.fixture
def start(monkeypatch):
    """Start vLLM in this process."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    engines = []

    def run(folder, **options):
        from vllm import LLM

        defaults = {"dtype": "float32", "max_model_len": LONGEST, "enable_prefix_caching": False}
        given = {"enforce_eager": True, "skip_tokenizer_init": True, **defaults, **options}
        engines.append(LLM(folder, **given))
        return engines[-1]

    yield run
    engines.clear()
    gc.collect()
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def ours(folder, prompts, tokens, dtype=torch.float32):
    model = hybrid.HybridForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return [greedy(model, prompt, tokens) for prompt in prompts]


def sampling(tokens, **options):
    from vllm import SamplingParams

    given = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "detokenize": False}
    return SamplingParams(max_tokens=tokens, **{**given, **options})


def decoded(request):
    out = request.outputs[0]
    scores = [each[i].logprob for i, each in zip(out.token_ids, out.logprobs, strict=True)]
    return Decoded(list(out.token_ids), scores)


def generate(engine, prompts, tokens):
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return engine.generate(given, sampling(tokens), use_tqdm=False)


def assert_same(prompts, expected, found, tolerance=2e-4):
    assert compare(prompts, expected, found, tolerance)[0] == []


@pytest.mark.parametrize("name", sorted(set(mixers.names()) - REFUSED))
def test_every_mixer(name, save, start):
    """One layer of each of its samples, twice."""
    samples = [s for s in mixers.get(name).samples() if "dual_chunk_size" not in s]
    if name == "chunked_attention":
        samples = [CHUNKS, {**CHUNKS, "rope_parameters": None}]
    letters = {"QXYZUV"[i]: {"type": name, **options} for i, options in enumerate(samples)}
    folder = save(layout="".join(letters) * 2, mixers=letters)
    prompts = random_prompts(VOCAB, LENGTHS, 0)
    found = [decoded(request) for request in generate(start(folder), prompts, 16)]
    assert_same(prompts, ours(folder, prompts, 16), found)


def test_a_stack_of_everything_with_chunked_prefill(save, start):
    """Chunks of 32 tokens, cut wherever other requests leave room."""
    folder = save(**STACK)
    prompts = random_prompts(VOCAB, (*LENGTHS, 200, 64), 0)
    engine = start(folder, max_num_batched_tokens=32, max_num_seqs=8)
    found = [decoded(request) for request in generate(engine, prompts, 16)]
    assert_same(prompts, ours(folder, prompts, 16), found)


def test_prefix_caching(save, start):
    """Requests that begin with the same tokens go on from pages of those before.

    A page holds 128 tokens of a softmax layer, or the states after them; here its keys take most room.
    """
    mixers = {"S": {"num_heads": 4, "head_dim": 32}, "W": {"num_heads": 2, "window": 9}}
    folder = save(layout="LSM[GS]WKD", canon="AC", mixers=mixers)
    (stem,) = random_prompts(VOCAB, (400,), 0)
    ends = random_prompts(VOCAB, (1, 7, 30, 64), 1)
    prompts = [stem, *(stem[: 400 - 3 * i] + end for i, end in enumerate(ends)), stem]
    engine = start(folder, enable_prefix_caching=True)
    requests = [request for prompt in prompts for request in generate(engine, [prompt], 8)]
    assert sum(request.num_cached_tokens or 0 for request in requests) > 0
    assert_same(prompts, ours(folder, prompts, 8), [decoded(request) for request in requests])


def test_requests_that_come_and_go(save, start):
    """64 of random lengths, over time; some are taken back."""
    folder = save(**STACK)
    chance = random.Random(0)
    lengths = [chance.randint(1, 120) for _ in range(64)]
    prompts = random_prompts(VOCAB, lengths, 0)
    engine = start(folder, max_num_batched_tokens=64, max_num_seqs=12).llm_engine
    waiting, finished = list(range(64)), {}
    aborted = {5, 17, 33}
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), chance.randint(0, 3))):
            i = waiting.pop(0)
            engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, sampling(8))
        for request in engine.step():
            i = int(request.request_id.partition("-")[0])
            if i in aborted and len(request.outputs[0].token_ids) == 3:
                engine.abort_request([request.request_id])
            if request.finished:
                finished[i] = request
    kept = [i for i in sorted(finished) if i not in aborted]
    assert kept == [i for i in range(64) if i not in aborted]
    chosen = [prompts[i] for i in kept]
    assert_same(chosen, ours(folder, chosen, 8), [decoded(finished[i]) for i in kept])


def test_preemption(save, start):
    """A cache too small for all: requests lose their pages, and begin again."""
    folder = save(layout="LSM[GS]", mixers={"S": {"num_heads": 4, "head_dim": 32}})
    prompts = random_prompts(VOCAB, (100,) * 6, 0)
    # three pages of states and one of each softmax layer per 128 tokens: four requests fit at first
    llm = start(folder, num_gpu_blocks_override=24, max_model_len=256)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = count
    found = [decoded(request) for request in generate(llm, prompts, 60)]
    assert preempted
    assert_same(prompts, ours(folder, prompts, 60), found)


def test_a_request_that_is_too_long_is_refused_and_others_go_on(save, start):
    folder = save(layout="LS")
    engine = start(folder, max_model_len=64)
    with pytest.raises(Exception, match="maximum context length is 64"):
        generate(engine, random_prompts(VOCAB, (80,), 0), 4)
    prompts = random_prompts(VOCAB, (20,), 0)
    found = [decoded(request) for request in generate(engine, prompts, 4)]
    assert_same(prompts, ours(folder, prompts, 4), found)


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_ours(save, start):
    """By the log-probabilities that each gives to the tokens of the prompts.

    4,000 tokens: over 500 the ratio of two bfloat16 runs of one model scatters by 5%, over 4,000 by 2%.
    """
    folder = save(**STACK, initializer_range=0.05)
    prompts = random_prompts(VOCAB, (500,) * 8, 0)
    engine = start(folder, dtype="bfloat16")
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(given, sampling(1, prompt_logprobs=0), use_tqdm=False)
    exact, rounded = (
        hybrid.HybridForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    far = torch.zeros(2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        truth, own = (
            model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            for model in (exact, rounded)
        )
        theirs = torch.tensor(
            [
                each[token].logprob
                for token, each in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
            ]
        )
        far += torch.stack([(theirs - truth).square().sum(), (own - truth).square().sum()])
    assert far[0].sqrt() <= 1.1 * far[1].sqrt()


PARALLEL = {
    "layout": "LSTWM",
    "ffn": "E--E-",
    "feed_forwards": {"E": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}},
    "mixers": {
        "S": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": "head", "sinks": True, "bias": True},
        "T": {"type": "softmax_attention", "num_heads": 3, "head_dim": 10},
        "W": {"num_heads": 2, "window": 9, "output_gate": True, "output_bias": True},
    },
}
"""With two processes all but the mixers L, M (states) and T (three heads) are split."""


def test_tensor_parallelism(save, start, monkeypatch):
    """Two processes on a CPU."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `apply_model`
    folder = save(**PARALLEL)
    prompts = random_prompts(VOCAB, LENGTHS, 0)
    engine = start(folder, tensor_parallel_size=2)
    found = [decoded(request) for request in generate(engine, prompts, 12)]
    assert_same(prompts, ours(folder, prompts, 12), found)
    names = ("1.mixer.q_proj", "1.mixer.o_proj", "2.mixer.q_proj", "2.ffn.down_proj")
    shapes = engine.apply_model(functools.partial(linear_sizes, names=names))
    assert shapes == [[(32, 16), (16, 32), (32, 30), (48, 32)]] * 2


def linear_sizes(model, names):
    """Of linear layers, (in, out): their weights are packed."""
    layers = map(model.hybrid.model.layers.get_submodule, names)
    return [
        (
            getattr(layer, "input_size_per_partition", layer.input_size),
            getattr(layer, "output_size_per_partition", layer.output_size),
        )
        for layer in layers
    ]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"layout": "Q", "mixers": {"Q": {"type": "native_sparse_attention", "num_heads": 2}}}, {},
         "mixers.Q: native_sparse_attention is not served by vLLM"),
        ({"layout": "B", "mixers": {"B": {"chunk_size": 8}}}, {}, "expected a multiple of vLLM's block"),
        ({"layout": "S", "mixers": {"S": {"dual_chunk_size": 8}}}, {}, "dual_chunk_size: not served"),
        ({"layout": "LS"}, {"quantization": "fp8", "dtype": "bfloat16"},
         "quantization: not supported"),
        ({"layout": "LS"}, {"enable_lora": True}, "enable_lora: not supported"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(config, options, message, save, start, capfd):
    folder = save(**config)
    with pytest.raises(Exception, match=message):
        start(folder, **options)
