"""The graph as networkx sees it: the toolbox for analysis, never the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph import Graph

if TYPE_CHECKING:
    import networkx as nx


def as_networkx(graph: Graph) -> nx.DiGraph[str]:
    """Directed graph over node names, an edge for each value used; ``node`` holds the call, edges list ``values``."""
    import networkx as nx

    view: nx.DiGraph[str] = nx.DiGraph(name=graph.name)
    for node in graph.nodes:
        view.add_node(node.name, node=node)
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            producer = graph.producers.get(name)
            if producer is not None:
                view.add_edge(producer.name, node.name)
                view.edges[producer.name, node.name].setdefault("values", []).append(name)
    return view
