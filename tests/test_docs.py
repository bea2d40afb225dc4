"""Every block of Python in docs/ runs, in order, as a reader would run it."""

from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
FENCE = "```"


def _blocks(page):
    """The line that each block starts on, and its text."""
    lines, found = page.read_text().splitlines(), []
    start = None
    for number, line in enumerate(lines, 1):
        if start is None and line.strip() == FENCE + "python":
            start = number
        elif start is not None and line.strip() == FENCE:
            found.append((start, "\n".join(lines[start : number - 1])))
            start = None
    assert start is None, f"{page.name}:{start}: the block has no end"
    return found


PAGES = [page for page in sorted(DOCS.glob("**/*.md")) if _blocks(page)]


def test_there_are_pages_with_blocks():
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page):
    torch.manual_seed(0)
    torch.compiler.reset()
    names = {"__name__": "__main__"}
    for line, block in _blocks(page):
        # Empty lines before it, so that a traceback tells the line of the page.
        exec(compile("\n" * line + block, page, "exec"), names)
