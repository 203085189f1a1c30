"""A report on sparse attention: what each head of each layer computes in each phase, and how far the choice carries."""

from __future__ import annotations

from collections import Counter
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
from intarsia.report_attention import AttentionPhase, attention_phases, group_calls, short_names
from intarsia.report_facts import METRICS
from intarsia.search.explain import noted
from intarsia.search.explain_heads import Bargains, site_of, why_head
from intarsia.search.head_settings import HeadSearch
from intarsia.search.weighed import Weighed

MODES = (DENSE, SKIP, "diagonal", "multi-diagonal", "vertical-stripe")
"""Modes that have a colour of their own; all others share the last."""

WIDE = 24
"""Heads up to which the density is written into the cells."""

TOLD = 4000
"""Cells up to which each tells why its pattern was chosen."""


_WITH_NUMBERS = "a number is the share of pairs computed, in percent; the denser, the stronger a colour."
_WITHOUT_NUMBERS = "the denser, the stronger a colour."


@dataclass(frozen=True)
class Mode:
    """A mode, its colour, and how often it was chosen, over all phases."""

    name: str
    tone: int
    count: int


@dataclass(frozen=True)
class HeadCell:
    """One head: where it stands (pixels), its colour, how strong, and what is told of it."""

    x: int
    y: int
    tone: int
    strength: float
    label: str
    text: str


@dataclass(frozen=True)
class Label:
    """A layer or the number of a head, and where it is written (pixels)."""

    at: float
    text: str


@dataclass(frozen=True)
class ModeGrid:
    """The layer x head map of one phase; sizes in pixels."""

    title: str
    width: int
    height: int
    left: int
    cell: tuple[int, int]
    layers: tuple[Label, ...]
    heads: tuple[Label, ...]
    cells: tuple[HeadCell, ...]


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
    graphs = [variant.graph for variant in bundle.variants] if bundle else []
    phases = [_options(plan, number, _counts(plan, graphs)) for number in range(len(plan.phases))]
    drawn: Sequence[AttentionPhase] = ()
    note = ""
    if bundle is not None:
        drawn, note, reason = attention_phases(bundle, phases)
    many = sum(map(len, phases[0].values())) * len(phases) > TOLD
    return HeadsSection(
        strategy=_strategy(plan),
        sentences=tuple(_sentences(plan, phases)),
        modes=_modes(phases),
        key=_WITH_NUMBERS if max(map(len, phases[0].values())) <= WIDE else _WITHOUT_NUMBERS,
        grids=tuple(_grid(plan, number, options, told=not many) for number, options in enumerate(phases)),
        attention=tuple(drawn),
        attention_note=note,
        why_no_maps=reason,
    )


def mode_of(option: str) -> str:
    """The mode of a pattern: ``diagonal`` of ``diagonal(density=0.25)``; a user's is called by its class."""
    return option.rpartition(".py:")[2].partition("(")[0]


def density_of(option: str) -> float | None:
    """The share of pairs that the pattern's text asks for; None if it has none."""
    if option in (DENSE, SKIP):
        return float(option == DENSE)
    try:
        found = Spec.parse(option.rpartition(".py:")[2]).args.get("density")
    except SpecError:
        return None
    return float(found) if isinstance(found, int | float) else None


def _bundle(folder: Path) -> tuple[Bundle | None, str]:
    """The bundle with all its graphs, or why it cannot be read."""
    try:
        bundle = load_bundle(folder)
        for variant in bundle.variants:
            _ = variant.graph
    except (UsageError, QualityError) as error:
        return None, str(error).replace(str(folder), folder.name)
    return bundle, ""


def _counts(plan: Plan, graphs: Sequence[Graph]) -> dict[str, int]:
    """How many heads each attention has: as many as plan and notes name, or as the graphs still compute and skip."""
    entries = cast("list[dict[str, str]]", plan.notes.get("places", []))
    places = [place for phase in plan.phases for step in phase.steps if is_of_heads(step) for place in step.chosen]
    places += [entry["place"] for entry in entries if "#" in entry["place"]]
    found: dict[str, int] = {}
    for place in places:
        found[site_of(place)] = max(found.get(site_of(place), 0), int(place.rpartition("#")[2]) + 1)
    counts = {site: max(count, *(_computed(graph, site) for graph in graphs), 0) for site, count in found.items()}
    return dict(sorted(counts.items(), key=lambda item: _natural(item[0])))


def _computed(graph: Graph, site: str) -> int:
    """How many heads the graph computes at an attention."""
    heads = [graph.type(call.ref("query")).shape[1] for call in group_calls(graph, site)]
    return sum(count for count in heads if isinstance(count, int))


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


def _modes(phases: Sequence[Mapping[str, Sequence[str]]]) -> tuple[Mode, ...]:
    counts = Counter(mode_of(option) for phase in phases for options in phase.values() for option in options)
    known = [mode for mode in MODES if mode in counts]
    return tuple(Mode(mode, _tone(mode), counts[mode]) for mode in (*known, *sorted(counts.keys() - set(MODES))))


def _tone(mode: str) -> int:
    return MODES.index(mode) if mode in MODES else len(MODES)


def _grid(plan: Plan, phase: int, sites: Mapping[str, Sequence[str]], *, told: bool) -> ModeGrid:
    heads = max(map(len, sites.values()))
    width, height = (36, 20) if heads <= WIDE else (10, 12)
    names = short_names(sites)
    left, top = 12 + 7 * max(map(len, names)), 20
    weighed = {place: options for (_, place), options in noted(plan, phase).items()} if told else {}
    bargains = Bargains.of(plan, [(options, _chosen_at(sites, place)) for place, options in weighed.items()])
    cells = [
        HeadCell(
            x=left + head * width,
            y=top + row * height,
            tone=_tone(mode_of(option)),
            strength=_strength(option),
            label=_percent(option) if heads <= WIDE else "",
            text=_told(f"{site}#{head}", option, weighed.get(f"{site}#{head}", ()), bargains),
        )
        for row, (site, options) in enumerate(sites.items())
        for head, option in enumerate(options)
    ]
    every = 1 if heads <= WIDE else 4
    return ModeGrid(
        title=phase_title(plan.phases, phase),
        width=left + heads * width + 2,
        height=top + len(sites) * height + 2,
        left=left,
        cell=(width, height),
        layers=tuple(Label(top + (row + 0.5) * height + 4, name) for row, name in enumerate(names)),
        heads=tuple(Label(left + (head + 0.5) * width, str(head)) for head in range(0, heads, every)),
        cells=tuple(cells),
    )


def phase_title(phases: Sequence[Phase], number: int) -> str:
    """``phase 1, steps 10 to 19``; ``all steps`` where there is one phase."""
    if len(phases) == 1:
        return "all steps"
    at = phases[number]
    return f"phase {number}, steps {at.first} to {'the last' if at.last is None else at.last}"


def _chosen_at(sites: Mapping[str, Sequence[str]], place: str) -> str:
    site, _, head = place.rpartition("#")
    return sites[site][int(head)]


def _told(place: str, option: str, options: Sequence[Weighed], bargains: Bargains) -> str:
    known = any(weighed.option == option for weighed in options)
    return f"{place}: {option}" + (f". {why_head(options, option, bargains)}" if known else "")


def _strength(option: str) -> float:
    """How opaque a cell is: the denser, the stronger."""
    density = density_of(option)
    return 0.55 if density is None else round(0.22 + 0.78 * min(density, 1.0) ** 0.5, 2)


def _percent(option: str) -> str:
    density = density_of(option)
    return "" if density is None or option in (DENSE, SKIP) else f"{100 * density:.3g}"
