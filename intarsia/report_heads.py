"""A report on sparse attention: what each head of each layer computes in each phase, and how far the choice carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from intarsia.backends.bundle import Bundle, load_bundle
from intarsia.ir.errors import QualityError, SpecError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.spec import Spec, construct, spec_of
from intarsia.passes.sparse_attention import DENSE, SKIP, SparseAttention
from intarsia.report_attention import AttentionPhase, attention_phases, group_calls
from intarsia.report_facts import METRICS
from intarsia.report_modes import Mode, ModeGrid, grid, key, modes, weighed_heads
from intarsia.search.explain_heads import site_of
from intarsia.search.head_settings import HeadSearch

TOLD = 4000
"""Cells up to which each tells why its pattern was chosen."""


@dataclass(frozen=True)
class HeadsSection:
    """All that a page says of sparse attention.

    Attributes:
        key: How the maps of modes are read.
        why_no_maps: Why there are no attention maps; empty where there are.
    """

    strategy: str
    sentences: tuple[str, ...]
    modes: tuple[Mode, ...]
    key: str
    grids: tuple[ModeGrid, ...]
    attention: tuple[AttentionPhase, ...]
    attention_note: str
    why_no_maps: str


def is_of_heads(step: Step) -> bool:
    """Whether the step of a plan decides head by head."""
    return step.run.partition("(")[0] == SparseAttention.name


def heads_section(folder: Path, plan: Plan | None) -> HeadsSection | None:
    """What the page about the bundle in ``folder`` says of heads; None if its plan leaves them alone.

    Reads graphs, weights and sample for the attention maps; where it cannot, the section says why and has none.
    """
    if plan is None or not any(step.chosen for phase in plan.phases for step in phase.steps if is_of_heads(step)):
        return None
    bundle, reason = _bundle(folder)
    graphs = {variant.phase: variant.graph for variant in bundle.variants} if bundle else {}
    counts = _counts(plan, graphs)
    phases = [_options(plan, number, counts) for number in range(len(plan.phases))]
    drawn: Sequence[AttentionPhase] = ()
    note = ""
    if bundle is not None:
        drawn, note, reason = attention_phases(bundle, phases)
    many = sum(map(len, phases[0].values())) * len(phases) > TOLD
    return HeadsSection(
        strategy=_strategy(plan),
        sentences=tuple(_sentences(plan, phases)),
        modes=modes(phases),
        key=key(phases[0]),
        grids=tuple(
            grid(plan, number, options, {} if many else weighed_heads(plan, number, options))
            for number, options in enumerate(phases)
        ),
        attention=tuple(drawn),
        attention_note=note,
        why_no_maps=reason,
    )


def _bundle(folder: Path) -> tuple[Bundle | None, str]:
    """The bundle with all its graphs, or why it cannot be read."""
    try:
        bundle = load_bundle(folder)
        for variant in bundle.variants:
            _ = variant.graph
    except (UsageError, QualityError) as error:
        return None, str(error).replace(str(folder), folder.name)
    return bundle, ""


def _counts(plan: Plan, graphs: Mapping[int, Graph]) -> dict[str, int]:
    """How many heads each attention has: as many as plan and notes name, or as a phase's graph computes and skips."""
    entries = cast("list[dict[str, str]]", plan.notes.get("places", []))
    places = [place for phase in plan.phases for step in phase.steps if is_of_heads(step) for place in step.chosen]
    places += [entry["place"] for entry in entries if "#" in entry["place"]]
    found: dict[str, int] = {}
    for place in places:
        found[site_of(place)] = max(found.get(site_of(place), 0), int(place.rpartition("#")[2]) + 1)
    counts = {
        site: max([count, *(_computed(graph, site) + _skipped(plan, phase, site) for phase, graph in graphs.items())])
        for site, count in found.items()
    }
    return dict(sorted(counts.items(), key=lambda item: _natural(item[0])))


def _computed(graph: Graph, site: str) -> int:
    """How many heads the graph computes at an attention."""
    heads = [graph.type(call.ref("query")).shape[1] for call in group_calls(graph, site)]
    return sum(count for count in heads if isinstance(count, int))


def _skipped(plan: Plan, phase: int, site: str) -> int:
    return sum(site_of(place) == site and option == SKIP for place, option in _chosen(plan.phases[phase]).items())


def _natural(name: str) -> list[tuple[int, str]]:
    """What sorts ``blocks.10`` behind ``blocks.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _options(plan: Plan, phase: int, counts: Mapping[str, int]) -> dict[str, list[str]]:
    """The option of every head by attention."""
    chosen = _chosen(plan.phases[phase])
    return {site: [chosen.get(f"{site}#{head}", DENSE) for head in range(count)] for site, count in counts.items()}


def _chosen(phase: Phase) -> dict[str, str]:
    return {place: option for step in phase.steps if is_of_heads(step) for place, option in step.chosen.items()}


def _strategy(plan: Plan) -> str:
    """The strategy as it is asked for on the command line; empty for a plan that no search made."""
    text = plan.notes.get("strategy")
    if not isinstance(text, str):
        return ""
    try:
        return str(spec_of("heads", construct(HeadSearch, Spec.parse(text))))
    except SpecError:
        return text


def _sentences(plan: Plan, phases: Sequence[Mapping[str, Sequence[str]]]) -> Iterator[str]:
    sites, heads = len(phases[0]), sum(map(len, phases[0].values()))
    ranges = "one phase" if len(phases) == 1 else f"{len(phases)} phases"
    text = f"{heads:,} heads of {sites} layers in {ranges}"
    density = plan.notes.get("density")
    if isinstance(density, float):
        text += f" compute {density:.1%} of all pairs of queries and keys, in the mean over heads and steps"
    yield f"{text}."
    if "epsilon" in plan.notes:
        yield f"Heads stay dense where the loss of every pattern exceeds {plan.notes['epsilon']}."
    gap = plan.notes.get("gap")
    if isinstance(gap, float):
        yield (
            "No other choice within the budget has a smaller sum of errors."
            if gap == 0
            else f"No other choice within the budget has a sum of errors that is smaller by more than {100 * gap:.2g}%."
        )
    transfer = plan.notes.get("transfer")
    if isinstance(transfer, dict):
        yield _transferred(transfer)


def _transferred(transfer: Mapping[str, object]) -> str:
    """How far the choice carries to other prompts and noise, in words."""
    agreement, loss = transfer["agreement"], transfer["loss_db"]
    assert isinstance(agreement, float | int)
    assert isinstance(loss, float | int)
    metric = METRICS.get(str(transfer["metric"]), str(transfer["metric"]))
    gain = f"gain {loss:.2f} dB of {metric}" if loss >= 0.005 else f"gain nothing ({loss:+.2f} dB of {metric})"
    alike = f"{agreement:.0%} of heads would have been chosen alike on other prompts and noise"
    return f"{alike}; choosing there would {gain}."
