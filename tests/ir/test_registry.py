"""Names to import paths, and what is said about a name that nobody has."""

from __future__ import annotations

import pytest

from intarsia.ir import registry
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph

TABLE = {"graph": "intarsia.ir.graph:Graph", "node": "intarsia.ir.graph:Node"}


def test_a_known_name_is_imported_only_when_it_is_asked_for() -> None:
    table = {**TABLE, "broken": "intarsia.no_such_module:Thing"}
    assert registry.find("graph", table, group="intarsia.none", kind="thing") is Graph
    assert registry.known_names(table, group="intarsia.none") == ("graph", "node", "broken")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"^thing 'grpah' is unknown; did you mean graph\? Known: graph, node$"):
        registry.find("grpah", TABLE, group="intarsia.none", kind="thing")
    with pytest.raises(UsageError, match=r"^thing 'zzz' is unknown\. Known: graph, node$"):
        registry.find("zzz", TABLE, group="intarsia.none", kind="thing")


def test_entry_points_of_installed_packages_join_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", "intarsia.ir.graph:Value", "intarsia.test")
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == "intarsia.test" else [])
    assert registry.known_names(TABLE, group="intarsia.test") == ("graph", "node", "theirs")
    found = registry.find("theirs", TABLE, group="intarsia.test", kind="thing")
    assert found.__name__ == "Value"
