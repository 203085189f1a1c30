"""The manual names every verb, every option and every exit code that there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from intarsia.cli import app
from intarsia.ir import errors

MANUAL = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
VERBS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_the_manual_names_every_verb_and_its_options(verb: str):
    assert f"### `{verb}" in MANUAL
    for param in VERBS[verb].params:
        for option in param.opts:
            if option.startswith("--") and option not in {"--help", "--output"}:
                assert option in MANUAL, f"docs/cli.md does not say what {verb} {option} means"


def test_the_manual_names_every_exit_code_of_an_error():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for code in {kind.exit_code for kind in kinds} | {0, 1, 124, 130}:
        assert f"| {code} |" in MANUAL
