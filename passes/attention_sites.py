"""Self-attention over the tokens of a video, found in the graph by what its tokens are made of."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.fuse_attention import OP as FUSED
from intarsia.passes.fuse_attention import attention
from intarsia.passes.token_axes import Axis, is_known, length
from intarsia.passes.token_flow import TokenAxes
from intarsia.passes.token_layout import described, layout_of

DENSE = "aten.scaled_dot_product_attention"
SPARSE = "intarsia.block_sparse_attention"


@dataclass(frozen=True)
class Site:
    """One self-attention over video tokens: what its heads attend to may be thinned out.

    Attributes:
        name: The call's result (B, H, S, D).
        query: The queries (B, H, S, D).
        key: The keys (B, H, S, D).
        value: The values (B, H, S, D).
        heads: H.
        head_dim: D.
        layout: How the S tokens lie in the video.
        lengths: The integers (B) at which each row's keys end; None if it sees all.
    """

    name: str
    query: str
    key: str
    value: str
    heads: int
    head_dim: int
    layout: TokenLayout
    lengths: str | None


def sites(graph: Graph, tokens: TokenLayout | None = None) -> tuple[Site, ...]:
    """Every self-attention over video tokens, in execution order.

    Args:
        graph: Any traced model.
        tokens: How the tokens lie, for a model whose graph does not show it.

    Raises:
        UsageError: ``tokens`` does not fit the attention of this graph, or the graph shows another layout.
    """
    return tuple(found for found in survey(graph, tokens).values() if isinstance(found, Site))


def refused(graph: Graph, tokens: TokenLayout | None = None) -> dict[str, str]:
    """Every other call of attention, by the name of its result, and why it is none; raises as ``sites`` does."""
    return {name: found for name, found in survey(graph, tokens).items() if isinstance(found, str)}


def why_none(graph: Graph, tokens: TokenLayout | None = None) -> str | None:
    """Why the graph has no self-attention over video tokens, in one line; None if it has."""
    found = survey(graph, tokens)
    if any(isinstance(one, Site) for one in found.values()):
        return None
    if not found:
        return f"{graph.name} calls no attention ({DENSE} or {FUSED})"
    name, reason = next(iter(found.items()))
    return f"no attention of {graph.name} is among a video's tokens; the first of {len(found)}, %{name}: {reason}"


def survey(graph: Graph, tokens: TokenLayout | None = None) -> dict[str, Site | str]:
    """What each call of attention is, by the name of its result: a site, or the reason why it is none."""
    calls = [node for node in graph.nodes if node.args.keys() >= {"query", "key", "value"}]
    axes = TokenAxes(graph) if calls else None
    found = {node.name: _site(node, graph, axes, tokens) for node in calls if axes is not None}
    if tokens is not None and not any(isinstance(one, Site) for one in found.values()):
        counts = sorted({str(graph.type(node.ref("query")).shape[-2]) for node in calls})
        raise UsageError(
            f"{tokens} has {tokens.before} + {tokens.frames} x {tokens.height} x {tokens.width} + {tokens.after} = "
            f"{tokens.tokens} tokens; the attention of {graph.name} has {' or '.join(counts) or 'no call'}; "
            "give frames, height and width after the patch embedding, and text with before= or after="
        )
    return found


def _site(node: Node, graph: Graph, axes: TokenAxes, tokens: TokenLayout | None) -> Site | str:
    """The call as a site, or why it is none."""
    if reason := _unlike(node, graph):
        return reason
    asked, seen = (axes.of(node.ref(arg))[2] for arg in ("query", "key"))
    if not _same_tokens(asked, seen, given=tokens is not None):
        return f"cross-attention: its queries' tokens are {described(asked)}, its keys' are {described(seen)}"
    layout = layout_of(asked) if tokens is None else _given(node, asked, tokens)
    if isinstance(layout, str):
        return layout
    fused = _fused(node, graph)
    if isinstance(fused, str):
        return fused
    query, key, value = (node.ref(arg) for arg in ("query", "key", "value"))
    _, heads, _, head_dim = axes.shape(query)
    lengths = fused.args["lengths"]
    ends = lengths.name if isinstance(lengths, Ref) else None
    return Site(node.name, query, key, value, heads, head_dim, layout, ends)


def _unlike(node: Node, graph: Graph) -> str:
    """Why the call is not attention of (B, H, S, D) as a pattern thins it out; empty if it is."""
    if node.op not in (DENSE, FUSED):
        return "is sparse already" if node.op == SPARSE else f"{node.op} is neither {DENSE} nor {FUSED}"
    query, key, value = (graph.type(node.ref(arg)) for arg in ("query", "key", "value"))
    if len(query.shape) != 4 or not isinstance(query.shape[1], int) or not isinstance(query.shape[3], int):
        return f"its queries are {query}, not (B, H, S, D) with H and D fixed"
    if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return f"its queries are {query}, its keys {key} and its values {value}, not of one batch and as many heads"
    if not isinstance(query.shape[2], int):
        return f"its tokens are {query.shape[2]}, a named size; trace without --dynamic frames, height, width or text"
    return ""


def _same_tokens(asked: Axis, seen: Axis, *, given: bool) -> bool:
    """Whether queries and keys are the same tokens; a layout given by hand vouches for those of unknown origin."""
    if given and not all(any(map(is_known, axis)) for axis in (asked, seen)):
        return length(asked) == length(seen)
    return asked == seen


def _given(node: Node, axis: Axis, tokens: TokenLayout) -> TokenLayout | str:
    """The layout given by hand if it has as many tokens as the axis; UsageError if the graph shows another."""
    shown = layout_of(axis)
    if isinstance(shown, TokenLayout) and shown != tokens:
        raise UsageError(f"%{node.name}: the graph shows {shown}, {tokens} was given; leave tokens out")
    return tokens if length(axis) == tokens.tokens else f"it has {length(axis)} tokens, not the {tokens.tokens} given"


def _fused(node: Node, graph: Graph) -> Node | str:
    """The call as attention whose keys may end early, or why it is more than that."""
    if node.op == FUSED:
        return node
    candidate = attention(node, graph)
    assert candidate is not None
    return candidate.reason or candidate.nodes[0]
