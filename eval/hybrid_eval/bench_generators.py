"""What it costs to generate needle samples, ours beside lm-eval's own RULER generators.

``python -m hybrid_eval.bench_generators`` runs the two in turn (A B A B ...), in one process, with
one tokenizer and the same haystack words, and prints the median process time of each.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .corpus import Corpus, Document
from .text.material import NOISE, filler_from, sentence_ends
from .text.ruler_niah import NIAH, NiahKind
from .text.tasks import Material, samples

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_2")


@dataclass(frozen=True)
class Timing:
    """One task: median milliseconds and mean true tokens per sample, of both generators."""

    task: str
    ours_ms: float
    stock_ms: float
    ours_tokens: float
    stock_tokens: float

    @property
    def ratio(self) -> float:
        """Our time over stock time; below 1 ours is cheaper."""
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
    """Split as our own generator does."""
    words = text.split()
    ends = sentence_ends(words)
    starts = [0, *ends]
    pieces = [words[a:b] for a, b in zip(starts, [*ends, len(words)], strict=True)]
    return [" ".join(piece) for piece in pieces if piece]


def stock_generators() -> tuple[Any, str]:
    """Return lm-eval's module, and words on what of it had to be replaced.

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


def _stock_haystack(kind: NiahKind, words: Sequence[str]) -> list[str] | str:
    needle = "One of the special magic {type_needle_v} for {key} is: {value}."
    return {"essay": list(words), "repeat": NOISE, "needle": needle}[kind.haystack]


def _stock(module, name: str, tokenizer, words: Sequence[str], length: int, n: int) -> float:
    """Generate with lm-eval; return the mean number of true tokens."""
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    kind = NIAH[name]
    made = module.generate_samples(
        _stock_haystack(kind, words),
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
    # its "length" has 128 tokens for the answer in it
    return statistics.mean(sample["length"] - 128 for sample in made)


def _ours(name: str, tokenizer, corpus: Corpus, length: int, n: int) -> float:
    """Generate with this package; return the mean number of true tokens."""
    made = samples(
        f"long_{name}", tokenizer=tokenizer, lengths=(length,), n=n, material=Material(corpus)
    )
    return statistics.mean(sample.prompt_tokens for sample in made)


def _timed(make: Callable[[], float]) -> tuple[float, float]:
    began = time.process_time()
    tokens = make()
    return time.process_time() - began, tokens


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
            seconds, tokens[label] = _timed(partial(make, n))
            times[label].append(1000 * seconds / n)
    return Timing(
        name,
        statistics.median(times["ours"]),
        statistics.median(times["stock"]),
        tokens["ours"],
        tokens["stock"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; return 1 where ours costs more on a task."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_eval.bench_generators")
    parser.add_argument("--samples", type=int, default=500, help="per task and round")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="of A and B each")
    parser.add_argument("--tokenizer", help="folder or name (default: a BPE trained here)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="needle tasks of RULER")
    arguments = parser.parse_args(argv)
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
    print(", ".join(f"{name} {metadata.version(name)}" for name in packages))
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
        for name in arguments.tasks.split(",")
    ]
    print(f"{'task':<18}{'ours':>22}{'lm-eval':>22}{'ours / lm-eval':>16}")
    for found in timings:
        ours = f"{found.ours_ms:.1f} ms ({found.ours_tokens:.0f} tok)"
        stock = f"{found.stock_ms:.1f} ms ({found.stock_tokens:.0f} tok)"
        print(f"{found.task:<18}{ours:>22}{stock:>22}{found.ratio:>16.2f}")
    return int(any(found.ratio > 1 for found in timings))


if __name__ == "__main__":
    sys.exit(main())
