"""What each pattern loses at each head: held against the answer itself, computed with that head changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import load_target
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.sparse_attention import DENSE, SKIP, SparseAttention
from intarsia.search.head_errors import Heads, sampled_rows, walk
from intarsia.search.head_mass import attention_mass
from intarsia.search.head_moments import Moments, output_moments

TARGET = load_target("cpu-avx2")
SPARSE = SparseAttention(
    block=16, patterns=(SKIP, "diagonal(density=0.5)", "multi-diagonal(density=0.25)", "vertical-stripe(density=0.5)")
)

READOUT = """graph readout {
  input %video: f32[1, 1, 4, 4, 4]
  param %patch: f32[8, 1, 1, 1, 1]
  param %to_q: f32[8, 8]
  param %to_k: f32[8, 8]
  param %to_v: f32[8, 8]
  param %readout: f32[OUT, 512]
  %grid: f32[1, 8, 4, 4, 4] = aten.conv3d(input=%video, weight=%patch, bias=None)
  %flat: f32[1, 8, 64] = aten.flatten.using_ints(self=%grid, start_dim=2, end_dim=4)
  %tokens: f32[1, 64, 8] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %q.all: f32[1, 64, 8] = aten.linear(input=%tokens, weight=%to_q, bias=None)
  %k.all: f32[1, 64, 8] = aten.linear(input=%tokens, weight=%to_k, bias=None)
  %v.all: f32[1, 64, 8] = aten.linear(input=%tokens, weight=%to_v, bias=None)
  %q.heads: f32[1, 64, 2, 4] = aten.view(self=%q.all, size=[1, 64, 2, 4])
  %k.heads: f32[1, 64, 2, 4] = aten.view(self=%k.all, size=[1, 64, 2, 4])
  %v.heads: f32[1, 64, 2, 4] = aten.view(self=%v.all, size=[1, 64, 2, 4])
  %q: f32[1, 2, 64, 4] = aten.transpose.int(self=%q.heads, dim0=1, dim1=2)
  %k: f32[1, 2, 64, 4] = aten.transpose.int(self=%k.heads, dim0=1, dim1=2)
  %v: f32[1, 2, 64, 4] = aten.transpose.int(self=%v.heads, dim0=1, dim1=2)
  %y: f32[1, 2, 64, 4] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v)
  %rows: f32[1, 512] = aten.reshape(self=%y, shape=[1, 512])
  %answer: f32[1, OUT] = aten.linear(input=%rows, weight=%readout, bias=None)
  return %answer
}
"""
"""Attention whose answer is linear in what it gives, so that first order is all there is."""


def readout(outputs: int) -> Program:
    graph = Graph.parse(READOUT.replace("OUT", str(outputs)))
    generator = torch.Generator().manual_seed(3)
    weights = {param.name: torch.randn(param.type.shape, generator=generator) for param in graph.params}  # type: ignore[union-attr]
    return materialize(Program(graph, weights))


def video(seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)),)


def heads_of(program: Program, sparse: SparseAttention = SPARSE) -> Heads:
    return Heads.of(sparse, program.graph, TARGET, {})


def whole_errors(
    program: Program, batches: Sequence[tuple[Tensor, ...]], heads: Heads, guide: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """The relative squared error of the answer with each option at each head alone, by running the changed graph."""
    dense = [guide(program.module()(*batch)[0]).double() for batch in batches]
    norm = sum(float(answer.square().sum()) for answer in dense)
    found = np.zeros((len(heads.places), heads.width))
    for head, place in enumerate(heads.places):
        for number, option in enumerate(heads.options[head]):
            changed = Program(heads.pass_.run(program.graph, TARGET, {place: option}), program.weights).module()
            answers = [guide(changed(*batch)[0]).double() for batch in batches]
            found[head, number] = sum(float((a - b).square().sum()) for a, b in zip(answers, dense, strict=True)) / norm
    return found


def every_sign(monkeypatch: pytest.MonkeyPatch, width: int) -> int:
    """Let probes run through all sign vectors of an answer (1, width), one after the other; how many there are."""
    vectors = [torch.tensor([signs]) for signs in product((0, 1), repeat=width)]
    endless = iter(vectors * 100)
    monkeypatch.setattr("intarsia.search.head_moments.torch.randint", lambda *_, **__: next(endless))
    return len(vectors)


def test_with_all_sign_vectors_the_errors_are_exactly_those_of_the_changed_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, batches = readout(3), [video(0), video(1)]
    heads = heads_of(program)
    probes = every_sign(monkeypatch, 3)
    found = output_moments(program, batches, heads, guide=lambda rows: rows, probes=probes, seed=0).errors()
    expected = whole_errors(program, batches, heads, lambda rows: rows)
    assert expected[:, 1:].min() > 1e-3
    assert found == pytest.approx(expected, rel=1e-4)


def test_errors_for_any_share_of_the_mean_are_those_of_the_answer_with_that_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, batches = readout(3), [video(0), video(1)]
    heads = heads_of(program)
    shares = np.random.default_rng(0).random((len(heads.places), heads.width)).round(2)
    blended = tuple(
        tuple(
            option if option == DENSE else with_mean(option, share) for option, share in zip(options, row, strict=True)
        )
        for options, row in zip(heads.options, shares.tolist(), strict=True)
    )
    expected = whole_errors(program, batches, replace(heads, options=blended), lambda rows: rows)
    moments = output_moments(
        program, batches, heads, guide=lambda rows: rows, probes=every_sign(monkeypatch, 3), seed=0
    )
    assert moments.errors(shares) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_best_share_is_that_of_the_least_error_over_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    program = readout(3)
    heads = heads_of(program)
    probes = every_sign(monkeypatch, 3)
    phases = [
        output_moments(program, [video(seed)], heads, guide=lambda rows: rows, probes=probes, seed=0) for seed in (0, 1)
    ]
    best = Moments.best(phases)
    tried = np.stack([sum(one.errors(share) for one in phases) for share in np.linspace(0, 1, 101)])
    assert best[:, 1:] == pytest.approx(tried.argmin(axis=0)[:, 1:] / 100, abs=0.006)
    assert best[:, 1:].max() > 0.1


def with_mean(option: str, share: float) -> str:
    return option if option == DENSE else str(replace(find_pattern(option), mean=share))


def test_random_probes_come_near_those_errors(denoiser: Program) -> None:
    program, batches = readout(6), [video(0)]
    heads = heads_of(program)
    expected = whole_errors(program, batches, heads, lambda rows: rows)
    for seed in (0, 1):
        found = output_moments(program, batches, heads, guide=lambda rows: rows, probes=400, seed=seed).errors()
        assert found == pytest.approx(expected, rel=0.35)


def test_a_guide_is_part_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batches = readout(4), [video(5)]
    heads = heads_of(program)

    def guide(rows: Tensor) -> Tensor:
        return rows[:, :2] - 3 * rows[:, 2:]

    found = output_moments(program, batches, heads, guide=guide, probes=every_sign(monkeypatch, 2), seed=0).errors()
    assert found == pytest.approx(whole_errors(program, batches, heads, guide), rel=1e-4)


def test_behind_more_layers_the_errors_are_the_first_order_of_the_answers(
    denoiser: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of a thousandth of the way to the option moves the answer by its first-order error."""
    program = materialize(denoiser)
    heads = heads_of(program)
    batch = (torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([0.6]))
    weigh = torch.zeros(2, 128)
    weigh[0, 5], weigh[1, 77] = 1.0, -2.0

    def guide(rows: Tensor) -> Tensor:
        return rows.flatten(1) @ weigh.T

    found = output_moments(program, [batch], heads, guide=guide, probes=every_sign(monkeypatch, 2), seed=0).errors()
    wide = {name: tensor.double() for name, tensor in program.weights.items()}
    doubled = Program(program.graph, wide)
    weigh, batch = weigh.double(), tuple(tensor.double() for tensor in batch)
    step = 1e-3

    def answered(place: tuple[str, int] | None, option: str) -> Tensor:
        def answer(site, tables):
            (table,) = tables
            rows = torch.arange(64)
            parts = [heads.result(site, head, DENSE, table, rows=rows) for head in range(site.heads)]
            if place is not None and place[0] == site.name:
                other = heads.result(site, place[1], option, table, rows=rows)
                parts[place[1]] = parts[place[1]] + step * (other - parts[place[1]])
            return [torch.stack(parts, dim=2).transpose(1, 2)]

        return guide(walk(doubled, [batch], heads.sites, answer)[0])

    dense = answered(None, DENSE)
    for site in heads.sites:
        for head, options in enumerate(heads.of_site(site)):
            for number, option in enumerate(options):
                moved = (answered((site.name, head), option) - dense) / step
                expected = float(moved.square().sum() / dense.square().sum())
                assert found[heads.first(site) + head, number] == pytest.approx(expected, rel=0.02, abs=1e-12)


def test_heads_that_the_answer_does_not_come_from_lose_nothing(denoiser: Program) -> None:
    first = denoiser.graph.producers["blocks.0.add"]
    graph = Graph.parse(str(denoiser.graph).replace("return %", f"return %{first.name}, %"))
    program = materialize(Program(graph, denoiser.weights))
    heads = heads_of(program)
    batch = (torch.ones(1, 2, 4, 4, 4), torch.tensor([0.5]))
    found = output_moments(program, [batch], heads, guide=lambda rows: rows, probes=2, seed=0).errors()
    assert found[:2, 1:].min() > 0
    assert found[2:].max() == 0


def test_an_option_that_some_heads_lack_is_infinite_there(denoiser: Program) -> None:
    heads = heads_of(denoiser)
    fewer = Heads(heads.pass_, heads.graph, heads.sites, (heads.options[0][:2], *heads.options[1:]), TARGET, {})
    batch = (torch.ones(1, 2, 4, 4, 4), torch.tensor([0.5]))
    found = output_moments(materialize(denoiser), [batch], fewer, guide=lambda rows: rows, probes=1, seed=0).errors()
    assert np.isinf(found[0, 2:]).all()
    assert np.isfinite(found[1:]).all()
    assert np.isinf(fewer.costs("density")[0, 2:]).all()


HEADS = """graph heads {{
  input %video: f32[2, 8, 3, 4, 4]
  input %lengths: i64[2]
  %flat: f32[2, 8, 48] = aten.flatten.using_ints(self=%video, start_dim=2, end_dim=4)
  %tokens: f32[2, 48, 8] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %split: f32[2, 48, 2, 4] = aten.view(self=%tokens, size=[2, 48, 2, 4])
  %q: f32[2, 2, 48, 4] = aten.transpose.int(self=%split, dim0=1, dim1=2)
  %ends: i64[2] = aten.add.Scalar(self=%lengths, other=1)
  %y: f32[2, 2, 48, 4] = intarsia.attention(query=%q, key=%q, value=%q, lengths={lengths}, scale={scale})
  return %y
}}
"""


@pytest.mark.parametrize(
    "option", [DENSE, SKIP, "diagonal(density=0.5)", "multi-diagonal(density=0.6)", "radial(density=0.8)"]
)
@pytest.mark.parametrize("lengths", ["None", "%lengths", "%ends"])
@pytest.mark.parametrize("count", [0, 7])
def test_rows_are_those_that_the_operator_gives(option: str, lengths: str, count: int) -> None:
    graph = Graph.parse(HEADS.format(lengths=lengths, scale="0.7"))
    sparse = SparseAttention(block=16, tokens="tokens(frames=3, height=4, width=4)")
    heads = heads_of(Program(graph, {}), sparse)
    (site,) = heads.sites
    inputs = (torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([48, 20]))
    table = dict(zip(("video", "lengths"), inputs, strict=True))
    query = inputs[0].flatten(2).transpose(1, 2).reshape(2, 48, 2, 4).transpose(1, 2)
    table |= {"q": query, "ends": inputs[1] + 1}
    chosen = {f"y#{head}": option for head in range(2)}
    (expected,) = Program(sparse.run(graph, TARGET, chosen), {}).module()(*inputs)
    rows = sampled_rows(48, count)
    for head in range(2):
        found = heads.result(site, head, option, table, rows=rows)
        assert torch.allclose(found, expected[:, head, rows], atol=1e-5)


MASKED = """
  %keys: i64[48] = aten.arange(end=48)
  %row: i64[1, 48] = aten.unsqueeze(self=%keys, dim=0)
  %column: i64[2, 1] = aten.unsqueeze(self=%ends, dim=1)
  %below: b1[2, 48] = aten.lt.Tensor(self=%row, other=%column)
  %mask: b1[2, 1, 1, 48] = aten.view(self=%below, size=[2, 1, 1, 48])
  %y: f32[2, 2, 48, 4] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q, attn_mask=%mask)
"""


def test_lengths_that_only_a_mask_was_made_of_are_kept_for_the_patterns() -> None:
    call = "  %y: f32[2, 2, 48, 4] = intarsia.attention(query=%q, key=%q, value=%q, lengths=%ends, scale=0.7)\n"
    text = HEADS.format(lengths="%ends", scale="0.7").replace(call, MASKED.lstrip("\n"))
    program = Program(Graph.parse(text), {})
    heads = heads_of(program, SparseAttention(block=16, tokens="tokens(frames=3, height=4, width=4)"))
    (site,) = heads.sites
    assert site.lengths == "ends"
    inputs = (torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 20]))

    def answer(site, tables):
        rows = torch.arange(48)
        parts = [heads.result(site, head, DENSE, tables[0], rows=rows) for head in range(2)]
        return [torch.stack(parts, dim=2).transpose(1, 2)]

    (found,) = walk(program, [inputs], heads.sites, answer)
    assert torch.allclose(found, program.module()(*inputs)[0], atol=1e-5)
    mass = attention_mass(program, [inputs], heads)["y"].columns
    assert np.allclose(mass.sum(1), 1)
    assert mass[:, 41:].sum() == 0
    assert mass[:, 21:41].min() > 0
    assert mass[:, 21:].sum() < mass[:, :21].sum()
    shorter = attention_mass(program, [(inputs[0], torch.tensor([19, 19]))], heads)["y"].columns
    assert shorter[:, 20:].sum() == 0


def test_walking_calls_side_by_side_gives_what_each_gives_alone(denoiser: Program) -> None:
    program = materialize(denoiser)
    heads = heads_of(program)
    batches = [(torch.full((1, 2, 4, 4, 4), float(level)), torch.tensor([0.5])) for level in (0, 1)]

    def answer(site, tables):
        return [
            scaled_dot_product_attention(*(table[name] for name in (site.query, site.key, site.value)))
            for table in tables
        ]

    with torch.no_grad():
        together = walk(program, batches, heads.sites, answer)
        for found, batch in zip(together, batches, strict=True):
            assert torch.equal(found, program.module()(*batch)[0])


def test_costs_are_shares_of_all_pairs_or_predicted_seconds_of_one_head(denoiser: Program) -> None:
    heads = heads_of(denoiser)
    density, seconds = heads.costs("density"), heads.costs("seconds")
    assert density[:, 0].sum() == pytest.approx(1)
    assert (density[:, 1] == 0).all()
    assert (seconds[:, 1] == 0).all()
    for number in range(2, heads.width):
        mask = SPARSE.mask(heads.options[0][number], heads.sites[0].layout)
        assert density[0, number] == pytest.approx(mask.density / 4)
        assert 0 < seconds[0, number] <= seconds[0, 0]


def test_the_fingerprint_changes_with_options_and_with_what_a_pattern_computes(
    denoiser: Program, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = heads_of(denoiser)
    assert heads.fingerprint == heads_of(denoiser).fingerprint
    assert heads.fingerprint != heads_of(denoiser, SparseAttention(block=16, patterns=(SKIP,))).fingerprint
    assert heads.fingerprint != heads_of(denoiser, SparseAttention(block=32, patterns=SPARSE.patterns)).fingerprint
    monkeypatch.chdir(tmp_path)
    text = (
        "import numpy as np\nfrom dataclasses import dataclass\nfrom intarsia.passes.patterns.base import Pattern\n\n"
        "@dataclass(frozen=True)\nclass Mine(Pattern):\n    name = 'mine'\n\n"
        "    def blocks(self, layout, block_q, block_k):\n"
        "        return np.roll(np.eye(layout.tokens // block_q, dtype=bool), SHIFT, axis=1)\n"
    )
    found = []
    for shift in (0, 1):
        (tmp_path / f"mine{shift}.py").write_text(text.replace("SHIFT", str(shift)))
        mine = SparseAttention(block=16, patterns=(f"./mine{shift}.py:Mine",))
        heads = heads_of(denoiser, mine)
        found.append((heads.fingerprint, [options[1] for options in heads.options]))
    assert found[0][0] != found[1][0]
