"""Every tutorial runs, from another folder, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.passes.base import find_pass

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("script", sorted((DOCS / "tutorial").glob("*.py")), ids=lambda path: path.stem)
def test_the_tutorial_runs_and_writes_nothing(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_pass_of_the_tutorial_is_one_for_the_command_line() -> None:
    made = find_pass(f"{DOCS / 'tutorial' / '01_custom_pass.py'}:SkipAttention(within='attn1')")
    assert str(made) == "skip-attention(within='attn1')"
