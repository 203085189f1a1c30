"""What each pattern at each head alone does to the network's answer, to first order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.program import Program
from intarsia.passes.attention_sites import Site
from intarsia.search.head_errors import Heads, dense_answer, mean_of, walk
from intarsia.search.head_table import ABSENT, Floats
from intarsia.search.sensitivity import Batch


@dataclass(frozen=True)
class Moments:
    """Relative squared errors of the guided answer for any share of the mean of all values, all (N, O).

    With d what an option changes of a head's result, m what putting the mean in its place would change further, and J
    the derivative of the answer: ``|J d|^2``, ``(J d) (J m)`` and ``|J m|^2``, in the mean over calls.

    Attributes:
        moved: Infinite where a head lacks the option.
    """

    moved: Floats
    crossed: Floats
    means: Floats

    def errors(self, shares: Floats | float = 0.0) -> Floats:
        """The errors with these shares of the mean (N, O)."""
        return np.maximum(self.moved + 2 * shares * self.crossed + shares**2 * self.means, 0.0)

    @staticmethod
    def best(phases: Sequence[Moments]) -> Floats:
        """The shares from 0 to 1 (N, O) of least error in the sum over phases."""
        crossed, means = (np.sum([getattr(one, name) for one in phases], axis=0) for name in ("crossed", "means"))
        return np.asarray(np.clip(-crossed / np.maximum(means, 1e-300), 0.0, 1.0))


def output_moments(
    program: Program,
    batches: Sequence[Batch],
    heads: Heads,
    *,
    guide: Callable[[Tensor], Tensor],
    probes: int,
    seed: int,
) -> Moments:
    """For each head and option the relative squared error of the guided answer, to first order.

    With J the derivative of the answer by a site's result and d what an option changes of it, the squared error is
    ``|J d|^2``, which is the mean of ``(v . J d)^2`` over random signs v; one backward pass for each v serves all heads
    and options. Source: Hutchinson's estimator, as HAWQ-V2 (arXiv 1911.03852) uses it for traces.

    Args:
        guide: From the rows of one call's answer to what is kept of them, linear.
        probes: Random sign vectors for each call.
    """
    generator = torch.Generator().manual_seed(seed)
    found, norm = np.zeros((3, len(heads.places), heads.width)), 0.0
    for batch in batches:
        results: dict[str, Tensor] = {}
        operands: dict[str, Mapping[str, Tensor]] = {}

        def answer(
            site: Site,
            tables: Sequence[Mapping[str, Any]],
            results: dict[str, Tensor] = results,
            operands: dict[str, Mapping[str, Tensor]] = operands,
        ) -> Sequence[Tensor]:
            (table,) = tables
            operands[site.name] = {name: table[name].detach() for name in _operand_names(site)}
            found = dense_answer(site, table, heads.graph)
            results[site.name] = found if found.requires_grad else found.detach().requires_grad_()
            return [results[site.name]]

        with torch.enable_grad():
            guided = guide(walk(program, [batch], heads.sites, answer)[0].float())
        norm += float(guided.detach().double().square().sum())
        wanted = [results[site.name] for site in heads.sites]
        slopes: list[tuple[Tensor, ...]] = []
        for number in range(probes):
            signs = torch.randint(0, 2, guided.shape, generator=generator).to(guided) * 2 - 1
            again = number + 1 < probes
            along_signs = (guided * signs).sum()
            slopes.append(torch.autograd.grad(along_signs, wanted, retain_graph=again, materialize_grads=True))
        with torch.no_grad():
            for place, site in enumerate(heads.sites):
                dense, table = results[site.name].detach(), operands[site.name]
                for head, options in enumerate(heads.of_site(site)):
                    along = torch.stack([slope[place][:, head].flatten() for slope in slopes])
                    mean = mean_of(site, head, table)
                    for number, option in enumerate(options[1:], start=1):
                        changed = heads.result(site, head, option, table, rows=torch.arange(site.layout.tokens))
                        moved = (along @ (changed - dense[:, head]).flatten()).double()
                        towards = (along @ (mean - changed).flatten()).double()
                        squares = torch.stack([moved * moved, moved * towards, towards * towards]).mean(1)
                        found[:, heads.first(site) + head, number] += squares.numpy()
    moved, crossed, means = found / max(norm, 1e-300)
    absent = np.arange(heads.width) >= np.array([[len(options)] for options in heads.options])
    return Moments(np.where(absent, ABSENT, moved), crossed, means)


def _operand_names(site: Site) -> tuple[str, ...]:
    return (site.query, site.key, site.value, *((site.lengths,) if site.lengths else ()))
