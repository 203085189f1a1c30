"""Run our Triton kernels in Triton's interpreter and print their errors as JSON; started by test_triton.py.

A process of its own: TRITON_INTERPRET must be set before kernels are imported, and stays set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.kernels import launch
from intarsia.kernels.conformance import Case
from intarsia.kernels.integers import golden

GENERATOR = torch.Generator().manual_seed(0)
DTYPES = (torch.float32, torch.float16)


def cases() -> Iterator[tuple[str, str, Case]]:
    """Operator, a name for the case, arguments."""
    for dtype in DTYPES:
        yield from weight_only(dtype)
        yield from attentions(dtype)
        yield from norms(dtype)
        yield from residuals(dtype)
        yield from ropes(dtype)
    yield from integers()


def weight_only(dtype: torch.dtype) -> Iterator[tuple[str, str, Case]]:
    """None of the tokens and rows divides a block."""
    for tokens, rows, columns in ((1, 40, 64), (5, 130, 96), (17, 24, 128), (70, 70, 64), (0, 8, 64)):
        for bias in (None, normal(rows).to(dtype)):
            x, weight = normal(tokens, columns).to(dtype), normal(rows, columns)
            name = f"{dtype} {tokens} {rows} {columns} {bias is not None}"
            codes, scale = torch.ops.intarsia.quantize_rows(weight)
            yield "intarsia.linear_i8", name, {"input": x, "weight": codes, "scale": scale, "bias": bias}
            for group in (32, 64, 128):
                if columns % group == 0:
                    packed, scale = torch.ops.intarsia.quantize_groups(weight, group)
                    case = {"input": x, "packed": packed, "scale": scale, "bias": bias, "group": group}
                    yield "intarsia.linear_i4", f"{name} {group}", case


def attentions(dtype: torch.dtype) -> Iterator[tuple[str, str, Case]]:
    """Ragged and whole blocks, lengths that cut inside a block, before it and beyond the keys, heads in any order."""
    lengths = torch.tensor([70, 0])
    for queries, keys, channels, given in (
        (5, 7, 32, None),
        (130, 64, 64, None),
        (33, 150, 64, lengths),
        (40, 129, 128, lengths.int() + 100),
    ):
        by_token = normal(2, queries, 2, channels).to(dtype).transpose(1, 2)
        by_head, fused = normal(2, 2, keys, channels).to(dtype), normal(2, keys, 2, 3 * channels).to(dtype)
        value = fused[..., channels : 2 * channels].transpose(1, 2)
        scale = None if given is None else 0.3
        case = {"query": by_token, "key": by_head, "value": value, "lengths": given, "scale": scale}
        yield "intarsia.attention", f"{dtype} {queries} {keys} {channels} {given is not None}", case


def norms(dtype: torch.dtype) -> Iterator[tuple[str, str, Case]]:
    for channels, weight, rows in ((96, None, (2, 1)), (40, normal(40), (2, 5)), (64, normal(64).to(dtype), (1, 1))):
        chunks = normal(*rows, 2 * channels).to(dtype)
        modulation = {"scale": chunks[..., :channels], "shift": chunks[..., channels:]}
        x = normal(2, 5, channels).to(dtype) + 3
        case = {"input": x, "weight": weight, "bias": weight, **modulation, "eps": 1e-6}
        yield "intarsia.modulated_norm", f"{dtype} {channels} {rows}", case


def residuals(dtype: torch.dtype) -> Iterator[tuple[str, str, Case]]:
    for channels, rows in ((96, (2, 1)), (2100, (2, 3)), (40, (1, 1))):
        residual, x = normal(2, 3, channels), normal(2, 3, channels).to(dtype)
        gate = normal(*rows, 2 * channels)[..., :channels]
        case = {"residual": residual.to(dtype), "input": x, "gate": gate}
        yield "intarsia.gated_residual", f"{dtype} {channels} {rows}", case


def ropes(dtype: torch.dtype) -> Iterator[tuple[str, str, Case]]:
    for heads, channels, weight in ((3, 96, normal(96)), (2, 64, None), (5, 40, normal(40).to(dtype))):
        x = normal(2, 5, 2 * channels)[..., :channels].to(dtype)
        angles = normal(5, channels // heads // 2)
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        case = {"input": x, "weight": weight, **tables, "heads": heads, "eps": 1e-6}
        yield "intarsia.norm_rope", f"{dtype} {heads} {channels} {weight is not None}", case


def integers() -> Iterator[tuple[str, str, Case]]:
    """Full-range operands; multipliers of both signs whose products need all of 64 bits, ties among them."""
    for tokens, rows, columns in ((1, 40, 64), (70, 130, 96), (17, 24, 40), (0, 8, 64)):
        x, weight = whole(-128, 128, tokens, columns).to(torch.int8), whole(-128, 128, rows, columns).to(torch.int8)
        shift = whole(8, 20, rows).int()
        large = {"multiplier": whole(-(2**31), 2**31, rows).int(), "shift": shift + 35}
        ties = {"multiplier": torch.ones(rows, dtype=torch.int32), "shift": shift - 7}
        for bias, dyadic in ((None, ties), (whole(-(2**20), 2**20, rows).int(), large)):
            case = {"input": x, "weight": weight, "bias": bias, **dyadic}
            yield "intarsia.linear_i8i8", f"torch.int8 {tokens} {rows} {columns} {bias is not None}", case
            wide = {**case, "low": -32768, "high": 32767}
            yield "intarsia.linear_i8i8", f"torch.int8 {tokens} {rows} {columns} {bias is not None} to i16", wide
    yield from convolutions()
    yield from sums()


def convolutions() -> Iterator[tuple[str, str, Case]]:
    """Whole and ragged steps and tiles, windows beyond the edge, strides, dilations, groups, wider results."""
    for rows, depth, window, stride, padding, dilation, groups in (
        (24, 3, (3, 3), (2, 1), (1, 2), (1, 1), 1),
        (40, 32, (1, 3), (1, 1), (0, 2), (1, 2), 1),
        (16, 64, (1, 1), (2, 2), (0, 0), (1, 1), 1),
        (6, 1, (3, 3), (1, 1), (1, 1), (1, 1), 6),
        (8, 5, (2, 2), (1, 1), (1, 0), (2, 1), 2),
    ):
        x = whole(-128, 128, 2, depth * groups, 7, 6).to(torch.int8)
        sides = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        bias = whole(-(2**20), 2**20, rows).int() if groups == 1 else None
        case = {
            "input": x.contiguous(memory_format=torch.channels_last) if depth == 32 else x,
            "weight": whole(-128, 128, rows, depth, *window).to(torch.int8),
            "bias": bias,
            "multiplier": whole(-(2**31), 2**31, rows).int(),
            "shift": whole(36, 46, rows).int(),
        }
        for ends in ({}, {"low": 0, "high": 15}, {"low": -32768, "high": 32767}):
            name = f"torch.int8 {rows} {depth} {window} {groups} {len(ends) and ends['high']}"
            yield "intarsia.conv2d_i8i8", name, {**case, **sides, **ends}


def sums() -> Iterator[tuple[str, str, Case]]:
    """Operands of different widths, ties on either side, sums that are clipped."""
    types = (torch.int16, torch.int16, 32767), (torch.int8, torch.int32, 127), (torch.int32, torch.int16, 2**31 - 1)
    for first, second, high in types:
        for shape in ((3, 5), (2, 3, 9, 50)):
            operands = [
                whole(torch.iinfo(one).min, torch.iinfo(one).max + 1, *shape).to(one) >> (index * 3)
                for index, one in enumerate((first, second))
            ]
            case = {"input": operands[0], "other": operands[1], "low": -high - 1, "high": high}
            for prefix, multiplier, shift in (("", 3, 2), ("other_", -(2**31), 33)):
                case |= {f"{prefix}multiplier": torch.tensor([multiplier]).int()}
                case |= {f"{prefix}shift": torch.tensor([shift]).int()}
            yield "intarsia.add_requantized", f"torch.int8 {first} {second} {shape}", case


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def right(op: str, case: Case) -> Tensor:
    """What the operator gives: by definition for integers, by its reference for floats."""
    definition = getattr(golden, op.partition(".")[2], None)
    if definition is None:
        answer: Tensor = kernels.operators()[op].REFERENCES[op](**case)
        return answer
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in case.items()}
    return torch.from_numpy(definition(**arrays))


def error(op: str, case: Case) -> float:
    """Largest difference, relative to the largest magnitude; infinite if types differ."""
    found, expected = launch.run(op, case), right(op, case)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


if __name__ == "__main__":
    kernels.register()
    print(json.dumps({f"{op} {name}": error(op, case) for op, name, case in cases()}))
