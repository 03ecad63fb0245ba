"""The pages lead somewhere: their links and the files that they name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text)]
    files = re.findall(r"\b(?:configs|docs|tests|hybrid|eval|kernels)/[\w./-]+\.\w+", text)
    assert [
        str(path) for path in (*links, *(ROOT / file for file in files)) if not path.exists()
    ] == []


def test_every_page_is_linked_from_the_first():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name
