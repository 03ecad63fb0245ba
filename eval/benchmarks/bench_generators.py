"""Time of sample generation, compared with lm-eval's RULER generators.

``python eval/benchmarks/bench_generators.py`` runs both in turn (A B A B ...), in one process, on
one thread, with one tokenizer and the same haystack words, and prints the median process time of
each, including true token counts and needle positions. The two question answering tasks are
omitted, because lm-eval downloads their data.
"""

import argparse
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybrid_eval.corpus import Corpus, Document
from hybrid_eval.errors import nearest
from hybrid_eval.text.material import NOISE, filler_from, sentence_ends
from hybrid_eval.text.ruler_niah import NIAH
from hybrid_eval.text.tasks import Material, samples

TASKS = (*NIAH, "vt", "cwe", "fwe")


@dataclass(frozen=True)
class Timing:
    """One task: median milliseconds per sample and true tokens of the prompts, of both."""

    task: str
    ours_ms: float
    stock_ms: float
    ours_tokens: float
    stock_tokens: float

    @property
    def ratio(self) -> float:
        """Our time divided by lm-eval's time; below 1, ours is faster."""
        return self.ours_ms / self.stock_ms


def python_topics() -> Corpus:
    """Return Python's own reference topics: English prose that ships with Python."""
    documents = tuple(Document(name, text) for name, text in sorted(topics.items()))
    return Corpus(documents, f"pydoc_data.topics of Python {platform.python_version()}")


def trained_tokenizer(corpus: Corpus, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the corpus: a real tokenizer that needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for d in corpus.documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _split_sentences(text: str) -> list[str]:
    """Split like our generator."""
    words = text.split()
    ends = sentence_ends(words)
    starts = [0, *ends]
    pieces = [words[a:b] for a, b in zip(starts, [*ends, len(words)], strict=True)]
    return [" ".join(piece) for piece in pieces if piece]


def stock_generators() -> tuple[Any, str]:
    """Return lm-eval's module, and a note on replaced parts.

    Raises:
        ValueError: lm-eval, wonderwords or nltk is not installed.
    """
    try:
        import nltk
        from lm_eval.tasks.ruler import prepare_niah
    except ImportError as error:
        raise ValueError(
            f"lm-eval's RULER generators cannot be imported ({error}): "
            "pip install lm-eval wonderwords nltk"
        ) from error
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        prepare_niah.cached_sent_tokenize.cache_clear()
        prepare_niah.sent_tokenize = _split_sentences
        return prepare_niah, "nltk's punkt data are not here: lm-eval splits sentences as we do"
    return prepare_niah, "nltk's punkt splits lm-eval's sentences, once per text"


def _stock_needles(
    module, name: str, tokenizer, words: Sequence[str], length: int, n: int
) -> list[str]:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    kind = NIAH[name]
    needle = "One of the special magic {type_needle_v} for {key} is: {value}."
    haystack = {"essay": list(words), "repeat": NOISE, "needle": needle}[kind.haystack]
    made = module.generate_samples(
        haystack,
        max_seq_length=length,
        template=TEMPLATE,
        type_haystack=kind.haystack,
        type_needle_k=kind.key,
        type_needle_v=kind.value,
        num_needle_k=kind.keys,
        num_needle_v=kind.values,
        num_needle_q=kind.queries,
        num_samples=n,
        TOKENIZER=tokenizer,
    )
    return [sample["input"] for sample in made]


def _stock_variables(tokenizer, length: int, n: int) -> list[str]:
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random as generate

    # the arguments of its get_dataset, which has no number of samples
    (example,) = generate(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)
    made = generate(tokenizer=tokenizer, num_samples=n, max_seq_length=length, icl_example=example)
    return [sample["input"] for sample in made]


def _stock_common_words(tokenizer, length: int, n: int) -> list[str]:
    from lm_eval.tasks.ruler.cwe_utils import sys_word_pair_random

    made = sys_word_pair_random(num_samples=n, max_seq_length=length, tokenizer=tokenizer)
    return [f"{sample['input_example']}\n{sample['input']}" for sample in made]


def _stock_frequent_words(tokenizer, length: int, n: int) -> list[str]:
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    made = sys_kwext(tokenizer=tokenizer, max_seq_length=length, num_samples=n)
    return [sample["input"] for sample in made]


_STOCK_OTHERS = {
    "vt": _stock_variables,
    "cwe": _stock_common_words,
    "fwe": _stock_frequent_words,
}


def _stock(module, name: str, tokenizer, words: Sequence[str], length: int, n: int) -> list[str]:
    """Generate with lm-eval; return the prompts."""
    # it prints its search for the length
    with redirect_stdout(io.StringIO()):
        if name in NIAH:
            return _stock_needles(module, name, tokenizer, words, length, n)
        return _STOCK_OTHERS[name](tokenizer, length, n)


def _ours(name: str, tokenizer, corpus: Corpus, length: int, n: int) -> list[str]:
    """Generate with this package; return the prompts."""
    made = samples(
        f"long_{name}", tokenizer=tokenizer, lengths=(length,), n=n, material=Material(corpus)
    )
    return [sample.prompt for sample in made]


def _timed(make: Callable[[], list[str]]) -> tuple[float, list[str]]:
    began = time.process_time()
    prompts = make()
    return time.process_time() - began, prompts


def _mean_tokens(tokenizer, prompts: Sequence[str]) -> float:
    """Return the mean true length of the first few prompts."""
    return statistics.mean(len(tokenizer(prompt)["input_ids"]) for prompt in prompts[:20])


def compare(
    module, name: str, *, tokenizer, corpus: Corpus, length: int, n: int, rounds: int
) -> Timing:
    """Time both generators on one task in turn, after one uncounted sample of each."""
    words = filler_from(corpus).words
    ours = partial(_ours, name, tokenizer, corpus, length)
    stock = partial(_stock, module, name, tokenizer, words, length)
    ours(1)
    stock(1)
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    tokens: dict[str, float] = {}
    for _ in range(rounds):
        for label, make in (("ours", ours), ("stock", stock)):
            seconds, prompts = _timed(partial(make, n))
            times[label].append(1000 * seconds / n)
            tokens[label] = _mean_tokens(tokenizer, prompts)
    return Timing(
        name,
        statistics.median(times["ours"]),
        statistics.median(times["stock"]),
        tokens["ours"],
        tokens["stock"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; return 1 if ours is slower on any task."""
    parser = argparse.ArgumentParser(prog="python eval/benchmarks/bench_generators.py")
    parser.add_argument("--samples", type=int, default=500, help="per task and round")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="of A and B each")
    parser.add_argument("--tokenizer", help="folder or name (default: a BPE trained here)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of RULER, by commas")
    arguments = parser.parse_args(argv)
    names = arguments.tasks.split(",")
    for name in names:
        if name not in TASKS:
            parser.error(f"unknown task {name!r}{nearest(name, TASKS)}")
    # process time includes all threads, so use one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    corpus = python_topics()
    try:
        module, words = stock_generators()
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.tokenizer is None:
        tokenizer = trained_tokenizer(corpus)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    packages = ("hybrid-language-models", "lm_eval", "transformers", "tokenizers", "wonderwords")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"haystack of both: {corpus.description}; {words}")
    print(
        f"{arguments.samples} samples of {arguments.length} tokens, median process time of "
        f"{arguments.rounds} rounds in turn"
    )
    timings = [
        compare(
            module,
            name,
            tokenizer=tokenizer,
            corpus=corpus,
            length=arguments.length,
            n=arguments.samples,
            rounds=arguments.rounds,
        )
        for name in names
    ]
    print(f"{'task':<18}{'ours':>22}{'lm-eval':>22}{'ours / lm-eval':>16}")
    for found in timings:
        ours = f"{found.ours_ms:.1f} ms ({found.ours_tokens:.0f} tok)"
        stock = f"{found.stock_ms:.1f} ms ({found.stock_tokens:.0f} tok)"
        print(f"{found.task:<18}{ours:>22}{stock:>22}{found.ratio:>16.2f}")
    return int(any(found.ratio > 1 for found in timings))


if __name__ == "__main__":
    sys.exit(main())
