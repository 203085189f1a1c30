"""What the pages point to is there, and the commands that they show are known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
VERB = re.compile(r"^intarsia ([a-z]+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_every_verb_that_a_page_shows_is_one_of_the_command_line() -> None:
    shown = {verb for page in PAGES for verb in VERB.findall(page.read_text())}
    help_text = subprocess.run([sys.executable, "-m", "intarsia", "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"^\s+([a-z]+)  ", help_text.stdout, re.MULTILINE))
    assert shown <= known
    assert {"optimize", "verify"} <= shown
