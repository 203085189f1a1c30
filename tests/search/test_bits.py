"""Bits by the integer program: the paper's nine answers, ties, limits together, and why there is none."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.ir.errors import UsageError
from intarsia.search.bit_files import read_limits, read_problem
from intarsia.search.bits import Infeasible, Layer, Problem, solve

PUBLISHED = Path(__file__).parent / "data" / "hawqv3_resnet18_ilp.json"
"""Zhen-Dong/HAWQ (MIT), ILP.ipynb: ResNet18 of HAWQ-V3 (arXiv 2011.10680), with the answers of its table."""

ANSWERS = {
    "size=0.75": "1111111111111011110",
    "size=0.5": "1111111111111110100",
    "size=0.25": "1111111111111100000",
    "bops=0.75": "1111111101111010110",
    "bops=0.5": "1110111101110000000",
    "bops=0.25": "1110101000000000000",
    "latency=0.75": "1111111101111010110",
    "latency=0.5": "1111101101110010100",
    "latency=0.25": "1110101000000000000",
}


@pytest.mark.parametrize("limit", ANSWERS)
def test_the_papers_nine_configurations_come_out_exactly(limit: str):
    problem = read_problem(PUBLISHED)
    assert solve(problem, read_limits([limit], problem)).bits == ANSWERS[limit]


def test_an_answer_takes_less_than_a_second():
    problem = read_problem(PUBLISHED)
    limits = read_limits(["size=0.5"], problem)
    solve(problem, limits)
    start = time.process_time()
    solve(problem, limits)
    assert time.process_time() - start < 1


def layer(name: str, weights: int, wrong: float, **options: float) -> Layer:
    """1,000 multiply-adds a weight; rounding to 4 bits is wrong by ``wrong``, to 8 by a hundredth."""
    return Layer(name, weights, 1000 * weights, {"w4a4": wrong, "w8a8": wrong / 100, **options})


def test_the_most_sensitive_layers_for_their_size_keep_eight_bits():
    problem = Problem((layer("a", 100, 1.0), layer("b", 100, 3.0), layer("c", 100, 2.0)))
    found = solve(problem, {"size": 250})
    assert found.bits == "011"
    assert found.chosen == ("w4a4", "w8a8", "w8a8")
    assert found.used == {"size": 250, "bops": (16 + 64 + 64) * 100_000}
    assert found.perturbation == pytest.approx(1.05)


def test_tied_layers_get_the_same_bits():
    problem = Problem((layer("a", 100, 3.0), layer("b", 100, 2.0), layer("c", 100, 1.0)), ties=((0, 2),))
    assert solve(problem, {"size": 250}).bits == "101"
    assert solve(problem, {"size": 249}).bits == "010"


def test_ties_chain():
    layers = tuple(layer(name, 100, 1.0) for name in "abcd")
    assert solve(Problem(layers, ties=((0, 1), (1, 3))), {"size": 350}).bits == "1101"


def test_a_layer_with_one_option_keeps_it_and_counts():
    first = Layer("first", 100, 1000, {"w8a8": 0.0})
    problem = Problem((first, layer("a", 100, 1.0), layer("b", 100, 2.0)))
    assert problem.extent("size") == (200, 300)
    assert solve(problem, {"size": 250}).bits == "101"


def test_three_options_count_weights_and_activations():
    problem = Problem((layer("a", 100, 1.0, w4a8=0.5), layer("b", 100, 2.0, w4a8=1.0)))
    found = solve(problem, {"size": 150, "bops": (32 + 64) * 100_000})
    assert found.chosen == ("w4a8", "w8a8")
    assert found.bits == "12"
    assert solve(problem, {"size": 100}).chosen == ("w4a8", "w4a8")


def test_among_layers_that_are_alike_earlier_ones_get_more_bits():
    layers = tuple(layer(name, 100, 1.0) for name in "abcdef")
    assert solve(Problem(layers), {"size": 450}).bits == "111000"


def test_of_equal_perturbations_the_one_that_takes_less_is_chosen():
    idle = Layer("idle", 100, 1000, {"w4a4": 0.0, "w8a8": 0.0})
    assert solve(Problem((idle, layer("a", 100, 1.0))), {"size": 200}).bits == "01"


def test_a_limit_of_nothing_is_kept_by_layers_that_take_nothing():
    empty = Layer("empty", 0, 0, {"w4a4": 1.0, "w8a8": 0.5})
    assert solve(Problem((empty,)), {"size": 0.0}).bits == "1"


def test_a_limit_at_the_very_edge_is_kept_and_one_byte_below_it_too():
    layers = tuple(layer(str(n), 10**9 + n, 1.0 + n / 1000) for n in range(24))
    problem = Problem(layers)
    edge = problem.extent("size")[0] + 12 * 0.5e9 + sum(range(12, 24)) / 2
    assert solve(problem, {"size": edge}).bits == "0" * 12 + "1" * 12
    under = solve(problem, {"size": problem.extent("size")[0] + 12 * 0.5e9 - 30})
    assert under.bits.count("1") == 11
    assert under.used["size"] <= problem.extent("size")[0] + 12 * 0.5e9 - 30


WORTH = st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))


@settings(max_examples=25)
@given(st.lists(WORTH, min_size=2, max_size=6), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_no_choice_within_two_limits_is_better(worths, first, second):
    layers = tuple(
        Layer(str(n), weights, 1.0, {"w4a4": float(wrong), "w8a8": 0.0}, {"w4a4": fast, "w8a8": slow})
        for n, (weights, wrong, fast, slow) in enumerate(worths)
    )
    problem = Problem(layers)
    limits = {}
    for measure, share in (("size", first), ("latency", second)):
        ends = sorted(problem.extent(measure))
        limits[measure] = ends[0] * (1 - share) + ends[1] * share
    within = [
        sum(layer.perturbation[option] for layer, option in zip(layers, options, strict=True))
        for options in product(("w4a4", "w8a8"), repeat=len(layers))
        if all(
            sum(layer.cost(option, measure) for layer, option in zip(layers, options, strict=True))
            <= limit * (1 + 1e-9)
            for measure, limit in limits.items()
        )
    ]
    if within:
        assert solve(problem, limits).perturbation == min(within)
    else:
        with pytest.raises(Infeasible):
            solve(problem, limits)


def test_a_limit_that_nothing_keeps_is_named_with_what_is_missing():
    problem = Problem((layer("a", 2**21, 1.0), layer("b", 2**20, 1.0)))
    with pytest.raises(Infeasible) as caught:
        solve(problem, {"size": 2**20, "bops": 1e12})
    assert str(caught.value) == ("limit size=1 MiB cannot be kept: the smallest choice takes 1.5 MiB, 0.5 MiB more")


def test_limits_that_only_together_are_too_tight_are_both_named():
    slow = Layer("a", 2**20, 1e6, {"w4a4": 1.0, "w8a8": 0.0}, {"w4a4": 3e-3, "w8a8": 1e-3})
    with pytest.raises(Infeasible) as caught:
        solve(Problem((slow,)), {"size": 0.75 * 2**20, "latency": 2e-3})
    assert str(caught.value).splitlines() == [
        "limit size=0.75 MiB cannot be kept beside latency=2 ms: the smallest choice takes 1 MiB, 0.25 MiB more",
        "limit latency=2 ms cannot be kept beside size=0.75 MiB: the smallest choice takes 3 ms, 1 ms more",
    ]


def test_a_limit_on_latency_needs_seconds_and_ties_an_option_in_common():
    with pytest.raises(UsageError, match="latency is limited, and is not known"):
        solve(Problem((layer("a", 1, 1.0),)), {"latency": 1.0})
    eight = Layer("b", 1, 1, {"w8a8": 0.0})
    four = Layer("c", 1, 1, {"w4a4": 0.0})
    with pytest.raises(UsageError, match="b, c are tied and share no option"):
        solve(Problem((eight, four), ties=((0, 1),)), {"size": 1.0})
    with pytest.raises(UsageError, match="expected an option such as w8a8"):
        solve(Problem((replace(eight, perturbation={"int8": 0.0}),)), {"size": 1.0})


def written(folder: Path, **changed: object) -> Path:
    """A file of two layers; a key that is None is left out."""
    data: dict[str, object] = {
        "hutchinson_trace": [1.0, 2.0],
        "delta_weights_8bit_square": [0.01, 0.01],
        "delta_weights_4bit_square": [1.0, 1.0],
        "parameters": [1.0, 2.0],
        "macs": [10, 10],
        **changed,
    }
    path = folder / "layers.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return path


def test_units_of_a_file_become_counts_and_seconds(tmp_path: Path):
    path = written(tmp_path, latency_int4=[1, 2], latency_int8=[2, 4], names=["x", "y"], tied=[[0, 1]], excluded=[1])
    problem = read_problem(path)
    assert problem.layers[0] == Layer("x", 2**20, 10e6, {"w4a4": 1.0, "w8a8": 0.01}, {"w4a4": 1e-3, "w8a8": 2e-3})
    assert problem.layers[1].perturbation == {"w8a8": 0.02}
    assert solve(problem, {"size": 3 * 2**20}).bits == "11"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parameters": None}, "parameters is missing"),
        ({"paramters": [1, 1]}, "unknown key 'paramters'; did you mean parameters?"),
        ({"macs": [1]}, "macs has 1 entries, hutchinson_trace has 2"),
        ({"macs": 7}, "macs is a list with one number a layer, found a number"),
        ({"macs": [1, "2"]}, 'macs[1] is a number, found "2"'),
        ({"macs": [1, True]}, "macs[1] is a number, found true"),
        ({"macs": [1, float("nan")]}, "macs[1] is nan; measure it again"),
        ({"parameters": [1, -2]}, "parameters[1] is -2; it cannot be below 0"),
        ({"hutchinson_trace": [-0.5, 1]}, "hutchinson_trace[0] is -0.5; it cannot be below 0: average over more"),
        ({"latency_int4": [1, 1]}, "latency_int4 stands alone; give latency_int4 and latency_int8, or none"),
        ({"tied": [[0, 2]]}, "tied: expected numbers of layers, 0 to 1, found 2"),
        ({"tied": [0, 1]}, "tied is a list of lists of numbers of layers"),
        ({"excluded": [1.5]}, "excluded: expected numbers of layers, 0 to 1, found 1.5"),
        ({"names": ["one"]}, "names has 1 entries, hutchinson_trace has 2"),
        ({"names": ["one", "one"]}, "names has 'one' more than once"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_in_one_line(tmp_path: Path, changed: dict[str, object], said: str):
    path = written(tmp_path, **changed)
    with pytest.raises(UsageError) as caught:
        read_problem(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {said}")


def test_every_rule_that_a_file_breaks_has_a_line_of_its_own(tmp_path: Path):
    path = written(tmp_path, macs=[1], parameters=[1, float("inf")])
    with pytest.raises(UsageError) as caught:
        read_problem(path)
    assert [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()] == [
        "parameters[1] is inf; measure it again",
        "macs has 1 entries, hutchinson_trace has 2",
    ]


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[1]", "found a list"), (None, "cannot be read")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, said: str):
    path = tmp_path / "layers.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_problem(path)


def test_limits_are_fractions_or_values_with_units():
    problem = read_problem(PUBLISHED)
    fewest, most = problem.extent("size")
    assert read_limits(["size=0", "bops=70G", "latency=4.2ms"], problem) == pytest.approx(
        {"size": fewest, "bops": 70e9, "latency": 4.2e-3}
    )
    assert read_limits(["size=1"], problem) == {"size": most}
    assert read_limits(["size=6.5MiB"], problem) == {"size": 6.5 * 2**20}


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (["bytes=0.5"], "--limit bytes=0.5: expected size, bops, latency"),
        (["size"], "--limit size: expected a fraction such as 0.5"),
        (["size=-1"], "expected a fraction such as 0.5, or a number with B, kB"),
        (["size=5ms"], "expected a fraction such as 0.5, or a number with B, kB"),
        (["size=nan"], "expected a fraction"),
        (["size=1.5"], "a number without a unit is a fraction from 0 to 1"),
        (["size=0.5", "size=0.6"], "--limit size=0.6: size is limited twice"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: list[str], said: str):
    with pytest.raises(UsageError, match=said):
        read_limits(limits, read_problem(PUBLISHED))


def test_a_limit_on_latency_without_latencies_in_the_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="the file has no latency_int4 and no latency_int8"):
        read_limits(["latency=0.5"], read_problem(written(tmp_path)))
