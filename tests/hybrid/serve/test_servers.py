"""Small exports in real servers: a handful of families of the table in docs/servers.md.

An environment variable names each server's interpreter (in `.ci/run`: mlx-lm's); without it a server is
skipped.
"""

import os

import pytest

from hybrid.serve.parity import parities
from hybrid.serve.servers import get_server
from servers_table import save_export

SERVERS = {"mlx": "HYBRID_MLX_PYTHON", "llama.cpp": "HYBRID_LLAMA_CPP_PYTHON"}
"""Server -> the environment variable with its interpreter."""

FAMILIES = {
    "mlx": ["llama", "qwen3", "olmo2"],
    "llama.cpp": ["llama"],
}


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.filterwarnings("default")
def test_families(server, tmp_path):
    python = os.environ.get(SERVERS[server])
    if not python:
        pytest.skip(f"{SERVERS[server]} is not set")
    names = FAMILIES[server]
    folders = [save_export(name, tmp_path / name, server) for name in names]
    found = parities(folders, get_server(server, python))
    assert [str(each) for each in found if isinstance(each, ValueError) or not each.identical] == []
