"""Sparse-vDiT's search: step by step and layer by layer each head takes its pattern, and the loop goes on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.program import Program
from intarsia.passes.attention_sites import Site
from intarsia.passes.sparse_attention import DENSE
from intarsia.search.head_errors import Heads, sampled_rows, walk
from intarsia.search.head_table import ABSENT, Choice, Floats, by_loss
from intarsia.search.journal import Journal
from intarsia.search.sensitivity import Batch

SCORES = ("mse", "relative")
"""Mean squared error as the paper has it, and the same as a share of the dense result's mean square."""


@dataclass
class Policy:
    """Decides, in closed loop, what every head does in one step after the other.

    Attributes:
        program: Materialized.
        heads: Where it decides, and between what.
        costs: What each option costs relative to dense (N, O).
        score: One of ``SCORES``.
        epsilon: A head stays dense where the loss of every other option exceeds this.
        weight: Of the cost in the loss, lambda in the paper.
        rows: Queries of each head that the score is taken from; 0 for all.
        journal: What an earlier, killed run has decided; steps that it knows are not weighed again.
        key: What tells this policy's entries in the journal from others'.
        firsts: Steps that decide; those between keep what was decided last.
        chosen: What was decided (steps so far, N).
        errors: What was measured (steps so far, N, O).

    Source: Sparse-vDiT (arXiv 2506.03065), algorithm 1 and equations 2 and 3.
    """

    program: Program
    heads: Heads
    costs: Floats
    score: str
    epsilon: float
    weight: float
    rows: int
    journal: Journal
    key: str
    firsts: frozenset[int]
    chosen: list[Choice] = field(default_factory=list[Choice])
    errors: list[Floats] = field(default_factory=list[Floats])

    def step(self, batches: Sequence[Batch]) -> list[Tensor]:
        """One step of the loop: the answer of every call, all heads in the pattern that this step chose for them."""
        number = len(self.chosen)
        chosen, errors = self._known(number)
        weighs = chosen is None
        if chosen is None or errors is None:
            chosen = np.zeros(len(self.heads.places), dtype=np.int64)
            errors = np.full((len(chosen), self.heads.width), ABSENT)

        def answer(site: Site, tables: Sequence[Mapping[str, Any]]) -> Sequence[Tensor]:
            mine = slice(self.heads.first(site), self.heads.first(site) + site.heads)
            if weighs:
                errors[mine] = self._errors(site, tables)
                loss = errors[mine] + self.weight * self.costs[mine]
                chosen[mine] = by_loss(np.where(np.isfinite(self.costs[mine]), loss, ABSENT), self.epsilon)
            return [self._result(site, table, chosen[mine]) for table in tables]

        with torch.no_grad():
            outputs = walk(self.program, batches, self.heads.sites, answer)
        if weighs:
            rows = [[None if np.isinf(e) else float(e) for e in row] for row in errors]
            self.journal.put(self._key(number), {"chosen": chosen.tolist(), "errors": rows})
        self.chosen.append(chosen)
        self.errors.append(errors)
        return outputs

    def _known(self, number: int) -> tuple[Choice | None, Floats | None]:
        """What is decided for a step already, by the step before or in the journal; nothing if it must be weighed."""
        if number not in self.firsts:
            return self.chosen[-1], self.errors[-1]
        known = self.journal.get(self._key(number))
        if not isinstance(known, dict):
            return None, None
        errors = np.array([[ABSENT if error is None else error for error in row] for row in known["errors"]])
        return np.array(known["chosen"], dtype=np.int64), errors

    def _key(self, number: int) -> str:
        return f"heads/{self.key}/{number}"

    def _errors(self, site: Site, tables: Sequence[Mapping[str, Any]]) -> Floats:
        """The score of the site's heads (H, O): a mean over calls, the largest over a call's rows (guided or not)."""
        found = np.full((site.heads, self.heads.width), ABSENT)
        rows = sampled_rows(site.layout.tokens, self.rows)
        for head, options in enumerate(self.heads.of_site(site)):
            found[head, : len(options)] = 0.0
            for table in tables:
                dense = self.heads.result(site, head, DENSE, table, rows=rows).double()
                norm = dense.square().mean((1, 2)).clamp_min(1e-300) if self.score == "relative" else torch.ones(1)
                for number, option in enumerate(options[1:], start=1):
                    other = self.heads.result(site, head, option, table, rows=rows).double()
                    error = ((other - dense).square().mean((1, 2)) / norm).max()
                    found[head, number] += float(error) / len(tables)
        return found

    def _result(self, site: Site, table: Mapping[str, Any], chosen: Choice) -> Tensor:
        every = torch.arange(site.layout.tokens)
        options = self.heads.of_site(site)
        parts = [
            self.heads.result(site, head, options[head][int(number)], table, rows=every)
            for head, number in enumerate(chosen)
        ]
        return torch.stack(parts, dim=2).transpose(1, 2)  # tokens before heads in memory, as attention gives it
