"""Which tile a call of a Triton engine is launched with: a record of tuning that is about it, or its default."""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.ir.errors import CacheMiss
from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels.launch import Launch, launch_of, space_of
from intarsia.kernels.records import Database, Key, Record
from intarsia.kernels.tiling import Space, Tile
from intarsia.kernels.tuned import key_of


class Tiles:
    """Tiles by the records of ``database`` (None: by default) for ``target``, and what became of each kernel.

    Records are of a machine: what is compiled for other architectures beside the target's has its defaults.
    """

    def __init__(self, database: Database | None, target: Target) -> None:
        self._database, self._target = database, target
        self._found: dict[Key, Record | None] = {}

    def of(self, node: Node, graph: Graph, architecture: str) -> Tile | None:
        """The recorded tile; None where there is none, or the record names a tile that the call does not offer."""
        if self._database is None or architecture != self._target.architecture:
            return None
        launch = launch_of(node, graph, architecture)
        space = None if launch is None else space_of(node, graph, architecture)
        if launch is None or space is None:
            return None
        record = self._record(node.op, launch, space, self._database)
        return None if record is None else {name: int(record.choice[name]) for name in space.default}

    def require(self, graph: Graph) -> None:
        """Raise CacheMiss, which names them all, if kernels of the graph have no record."""
        for node in graph.nodes:
            self.of(node, graph, self._target.architecture)
        missing = [key for key, record in self._found.items() if record is None]
        if not missing or self._database is None:
            return
        stale = sum(self._database.stale(key) for key in missing)
        told = f" ({stale} of other versions do not count)" if stale else ""
        names = "; ".join(sorted(map(str, missing)))
        raise CacheMiss(
            f"{self._database.path}: no record{told} of {names}; run intarsia tune for it, or leave strict out"
        )

    @property
    def used(self) -> tuple[Record, ...]:
        """The records that tiles were taken from, in one order."""
        return tuple(sorted(filter(None, self._found.values()), key=lambda record: record.to_json()))

    @property
    def facts(self) -> Mapping[str, object]:
        """For the manifest: each kernel and shape with a tile from a record and how it was found, and the others."""
        return {
            "recorded": {str(record.key): f"{_notation(record.choice)}, {_found(record)}" for record in self.used},
            "default": sorted(str(key) for key, record in self._found.items() if record is None),
            "broken_lines": self._database.broken if self._database else 0,
        }

    def _record(self, op: str, launch: Launch, space: Space, database: Database) -> Record | None:
        key = key_of(op, space, launch, self._target)
        if key not in self._found:
            offered = (record for record in database.top(key) if space.offers(record.choice))
            self._found[key] = next(offered, None)
        return self._found[key]


def _notation(choice: Mapping[str, object]) -> str:
    return " ".join(f"{name}={choice[name]}" for name in sorted(choice))


def _found(record: Record) -> str:
    """How the record was found, for people."""
    if record.how == "measured":
        return f"measured on {record.facts.get('device', 'an unnamed device')}"
    return "ranked, not measured"
