"""What a pass is, and the registry of passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir import registry
from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.spec import Spec, construct, spec_of
from intarsia.ir.target import Target

PASSES: dict[str, str] = {
    "active-tokens": "intarsia.passes.active_tokens:ActiveTokens",
    "blend-means": "intarsia.passes.blend_means:BlendMeans",
    "calibrate": "intarsia.passes.calibrate:Calibrate",
    "cast-floats": "intarsia.passes.cast_floats:CastFloats",
    "clean": "intarsia.passes.clean:Clean",
    "complex-to-real": "intarsia.passes.complex_to_real:ComplexToReal",
    "drop-noops": "intarsia.passes.drop_noops:DropNoops",
    "drop-ranges": "intarsia.passes.drop_ranges:DropRanges",
    "drop-unused": "intarsia.passes.drop_unused:DropUnused",
    "first-block-cache": "intarsia.passes.step_caching:FirstBlockCache",
    "fold-batch-norm": "intarsia.passes.fold_batch_norm:FoldBatchNorm",
    "fold-sizes": "intarsia.passes.fold_sizes:FoldSizes",
    "fuse-heads": "intarsia.passes.fuse_heads:FuseHeads",
    "fuse-kernels": "intarsia.passes.fuse_kernels:FuseKernels",
    "hoist-invariants": "intarsia.passes.hoist_invariants:HoistInvariants",
    "integer-islands": "intarsia.passes.integer_islands:IntegerIslands",
    "lower-integer": "intarsia.passes.lower_integer:LowerInteger",
    "merge-duplicates": "intarsia.passes.merge_duplicates:MergeDuplicates",
    "merge-rope": "intarsia.passes.merge_rope:MergeRope",
    "merge-views": "intarsia.passes.merge_views:MergeViews",
    "quantize-integer": "intarsia.passes.quantize_integer:QuantizeInteger",
    "quantize-linear": "intarsia.passes.quantize_linear:QuantizeLinear",
    "smooth-linear": "intarsia.passes.smooth_linear:SmoothLinear",
    "sparse-attention": "intarsia.passes.sparse_attention:SparseAttention",
    "tables-of-blocks": "intarsia.passes.tables_of_blocks:TablesOfBlocks",
    "teacache": "intarsia.passes.step_caching:TeaCache",
}
"""Passes that come with Intarsia, by name; others join by entry points of the group ``intarsia.passes``."""

GROUP = "intarsia.passes"

LISTED = 6
"""Options of a place that a message lists."""


@dataclass(frozen=True)
class Pass(ABC):
    """A named change to a graph, which may leave decisions to the search.

    Subclasses are frozen dataclasses; their fields are the pass's arguments, and ``str`` of a pass is
    ``name(key=value)``, from which ``find_pass`` makes it again.
    """

    name: ClassVar[str]
    steers: ClassVar[bool] = False
    """Whether what later passes ask hangs on its answers, which cost nothing themselves, as ranges do."""

    def choices(self, graph: Graph, target: Target) -> Choices:
        """The decisions this pass leaves open on ``graph``; the first option of each leaves things as they are."""
        return {}

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Places where the pass looked and offers nothing, each with the reason; ``explain`` prints them."""
        return {}

    def unlisted(self, graph: Graph, target: Target, chosen: Chosen) -> dict[str, str]:
        """Of options that ``choices`` does not list, those that a plan cannot ask for, by place, with the reason."""
        return dict.fromkeys(chosen, "it is not offered")

    @abstractmethod
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The changed graph, or ``graph`` itself when nothing changes; weights are never looked at."""

    def split(self, graph: Graph) -> tuple[Graph, ...]:
        """The segments that a step runs one after the other, each as an engine of its own; one graph is no cut.

        Asked of the graph that all passes of a plan left, its weight-only nodes run. Together the segments have all
        its calls, as ``ir.segments.split`` cuts it, and possibly more outputs. One pass of a plan may cut.
        """
        return (graph,)

    def __str__(self) -> str:
        return str(spec_of(self.name, self))


def find_pass(text: str) -> Pass:
    """The pass that ``name(key=value)`` or ``path/to/file.py:ClassName(key=value)`` stands for.

    Raises:
        UsageError: No such pass, file or class.
        SpecError: The notation or a key is wrong.
    """
    if ".py:" in text:
        return registry.from_file(text, Pass, kind="pass")  # type: ignore[type-abstract]
    spec = Spec.parse(text)
    found = registry.find(spec.name, PASSES, group=GROUP, kind="pass")
    made = construct(found, spec)
    assert isinstance(made, Pass)
    return made


def check_chosen(pass_: Pass, graph: Graph, target: Target, chosen: Chosen) -> None:
    """Raise PlanError if ``chosen`` names a place or an option that the pass does not take on ``graph``."""
    choices = pass_.choices(graph, target)
    for place in chosen:
        if place not in choices:
            reason = pass_.refusals(graph, target).get(place)
            why = f": {reason}" if reason else "; inspect the plan's graph"
            raise PlanError(f"{pass_.name}: nothing to choose at %{place}{why}")
    others = {place: option for place, option in chosen.items() if option not in choices[place]}
    for place, reason in (pass_.unlisted(graph, target, others) if others else {}).items():
        offers = choices[place]
        offered = ", ".join(offers[:LISTED]) + (f" and {len(offers) - LISTED} more" if len(offers) > LISTED else "")
        raise PlanError(f"{pass_.name}: %{place} offers {offered}; the plan asks for {others[place]}: {reason}")
