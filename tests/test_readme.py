"""Every block of Python in README.md runs as it stands, each on its own."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks():
    """The line that each block starts on, and its text."""
    text = README.read_text() if README.exists() else ""
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


BLOCKS = _blocks()


def test_there_are_blocks_to_run():
    assert BLOCKS


@pytest.mark.parametrize(("line", "block"), BLOCKS, ids=[f"line-{line}" for line, _ in BLOCKS])
def test_a_block_runs_on_its_own(line, block):
    torch.manual_seed(0)
    torch.compiler.reset()
    # Empty lines before it, so that a traceback tells the line of the page.
    exec(compile("\n" * (line - 1) + block, README, "exec"), {"__name__": "__main__"})
