"""What the tokens that are not active are seen through: caches, held or moved along, in full or in eight bits."""

from __future__ import annotations

from dataclasses import replace

from intarsia.ir.graph import Arg, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.types import TensorType
from intarsia.passes.active_inputs import ELAPSED, RATE
from intarsia.passes.active_tape import Tape
from intarsia.passes.token_places import Place

LARGEST = {"i8": 127.0, "f8e4m3": 448.0}
"""Element types that caches of keys and values may be stored in, each with its largest number.

Source of 448: Micikevicius et al., FP8 Formats for Deep Learning, 2022, table 1."""

SMALLEST = 1e-12
"""Absolute values are divided by no less: the scale of a row of zeros."""


class Caches:
    """Caches of a graph on a tape: its last inputs, and as many last outputs, which are what they hold after the step.

    Args:
        tape: Where calls go.
        linear: Whether keys and values of tokens that are not active move on as they moved before.
        dtype: The element type that keys and values are stored in; "" for their own.

    Attributes:
        inputs: The caches.
    """

    def __init__(self, tape: Tape, *, linear: bool, dtype: str = "") -> None:
        self.linear = linear
        self.inputs: list[Value] = []
        self._after: dict[str, str] = {}
        self._tape, self._dtype = tape, dtype
        self._clocks: dict[tuple[str, TensorType, Place], str] = {}

    @property
    def after(self) -> tuple[str, ...]:
        """What each cache holds after the step, in the order of ``inputs``."""
        return tuple(self._after[value.name] for value in self.inputs)

    @property
    def clock(self) -> tuple[Value, ...]:
        """The inputs that say how far caches move."""
        told = TensorType("f32", (self._tape.tokens,))
        return (Value(ELAPSED, told), Value(RATE, told)) if self.linear else ()

    def held(self, name: str, rows: str, type_: TensorType, place: Place) -> str:
        """A value of all tokens: its active ones as ``rows`` has them, the others as they were."""
        cache = self._input(f"{name}.cache", type_)
        self._after[cache] = self._tape.write(rows, cache, type_, place, name=f"{name}.next")
        return self._after[cache]

    def seen(self, name: str, rows: str, type_: TensorType, place: Place) -> str:
        """Keys or values of all tokens (..., S, D), as attention reads them: the active ones as ``rows`` has them.

        The others are as they were or moved along, and have been rounded where caches are of eight bits.
        """
        if self.linear:
            return self._moved(name, rows, type_, place)
        if not self._dtype:
            return self.held(name, rows, type_, place)
        stored = self._stored(f"{name}.cache", type_)
        return self._refreshed(name, rows, self._read(stored, type_), stored, type_=type_, place=place)

    def _moved(self, name: str, rows: str, type_: TensorType, place: Place) -> str:
        """Keys or values as they were last computed, moved by their slope over the noise level since."""
        tape, few = self._tape, self._tape.few(type_, place)
        cache, slope = self._stored(f"{name}.cache", type_), self._stored(f"{name}.slope", type_)
        before = self._read(cache, type_)
        taken = tape.select(before, type_, place)
        missed = tape.call("aten.sub.Tensor", f"{name}.missed", few, self=Ref(rows), other=Ref(taken))
        rate = self._active(RATE, type_, place)
        learnt = tape.call("aten.mul.Tensor", f"{name}.learnt", few, self=Ref(missed), other=Ref(rate))
        along = self._read(self._written(f"{name}.slope", learnt, slope, type_, place), type_)
        elapsed = self._told(ELAPSED, type_, place)
        step = tape.call("aten.mul.Tensor", f"{name}.step", type_, self=Ref(along), other=Ref(elapsed))
        moved = tape.call("aten.add.Tensor", f"{name}.moved", type_, self=Ref(before), other=Ref(step))
        return self._refreshed(name, rows, moved, cache, type_=type_, place=place)

    def _refreshed(
        self, name: str, rows: str, others: str, stored: tuple[str, ...], *, type_: TensorType, place: Place
    ) -> str:
        """What attention reads: active tokens as ``rows`` has them, others as given; the rows are stored.

        They are taken from what attention reads. So all that reads a cache stands before what writes it, and both may
        be one buffer.
        """
        whole = self._tape.write(rows, others, type_, place, name=f"{name}.whole")
        self._written(name, self._tape.select(whole, type_, place), stored, type_, place)
        return whole

    def _active(self, clock: str, type_: TensorType, place: Place) -> str:
        """``_told`` of the active tokens."""
        key = (f"{clock}.active", type_, place)
        if key not in self._clocks:
            rows = replace(type_, shape=type_.shape[place.dim :])
            self._clocks[key] = self._tape.select(self._told(clock, type_, place), rows, replace(place, dim=0))
        return self._clocks[key]

    def _told(self, clock: str, type_: TensorType, place: Place) -> str:
        """A number of the clock for each token, 0 for all beside the video, repeated over what lies behind tokens.

        Repeated once a step, and not in every product: runtimes are quick where rows are wide.
        """
        key = (clock, type_, place)
        if key not in self._clocks:
            call, rows = self._tape.call, type_.shape[place.dim :]
            made = self._padded(clock, place) if place.others else clock
            made = self._tape.cast(made, TensorType("f32", rows[:1]), type_.dtype)
            column = (rows[0], *(1 for _ in rows[1:]))
            made = call("aten.view", f"{clock}.column", replace(type_, shape=column), self=Ref(made), size=column)
            self._clocks[key] = call(
                "aten.expand", f"{clock}.rows", replace(type_, shape=rows), self=Ref(made), size=rows
            )
        return self._clocks[key]

    def _padded(self, clock: str, place: Place) -> str:
        """A number of the clock for each token, with zeros for those beside the video."""
        sides = [self._zeros(count, clock) for count in (place.before, place.after)]
        parts = tuple(Ref(part) for part in (sides[0], clock, sides[1]) if part)
        type_ = TensorType("f32", (self._tape.tokens + place.others,))
        return self._tape.call("aten.cat", f"{clock}.tokens", type_, tensors=parts, dim=0)

    def _zeros(self, count: int, clock: str) -> str:
        if not count:
            return ""
        type_, dtype = TensorType("f32", (count,)), Symbol("torch.float32")
        return self._tape.call("aten.zeros", f"{clock}.text", type_, size=(count,), dtype=dtype)

    def _input(self, name: str, type_: TensorType) -> str:
        self.inputs.append(Value(self._tape.free(name), type_))
        return self.inputs[-1].name

    def _stored(self, name: str, type_: TensorType) -> tuple[str, ...]:
        """Inputs that hold a value: itself, or numbers of eight bits and a scale for each token and head."""
        names = (name, f"{name}.scale")
        return tuple(self._input(*each) for each in zip(names, self._parts(type_), strict=False))

    def _parts(self, type_: TensorType) -> tuple[TensorType, ...]:
        """The types of what holds a value."""
        if not self._dtype:
            return (type_,)
        return replace(type_, dtype=self._dtype), TensorType("f32", (*type_.shape[:-1], 1))

    def _written(
        self, name: str, rows: str, stored: tuple[str, ...], type_: TensorType, place: Place
    ) -> tuple[str, ...]:
        """What is stored, with rows of active tokens in their places: what there is after the step."""
        parts = self._rounded(rows, self._tape.few(type_, place))
        written = tuple(
            self._copied(part, cache, kind, place, name=f"{name}.next")
            for part, cache, kind in zip(parts, stored, self._parts(type_), strict=True)
        )
        self._after.update(zip(stored, written, strict=True))
        return written

    def _copied(self, rows: str, cache: str, type_: TensorType, place: Place, *, name: str) -> str:
        """The cache with rows written into it; floats of eight bits as bits, for PyTorch copies none by index."""
        if type_.dtype != "f8e4m3":
            return self._tape.write(rows, cache, type_, place, name=name)
        bits, few = replace(type_, dtype="i8"), self._tape.few(type_, place)
        part, whole = self._bits(rows, few, "i8"), self._bits(cache, type_, "i8")
        return self._bits(self._tape.write(part, whole, bits, place, name=f"{name}.bits"), bits, "f8e4m3", name=name)

    def _bits(self, source: str, type_: TensorType, dtype: str, *, name: str = "") -> str:
        """The same bits as another element type."""
        args: dict[str, Arg] = {"self": Ref(source), "dtype": Symbol(str(DTYPES[dtype]))}
        return self._tape.call("aten.view.dtype", name or f"{source}.bits", replace(type_, dtype=dtype), **args)

    def _read(self, stored: tuple[str, ...], type_: TensorType) -> str:
        """The value that is stored."""
        if not self._dtype:
            return stored[0]
        (codes, scale), wide = stored, replace(type_, dtype="f32")
        cast = self._tape.cast(codes, replace(type_, dtype=self._dtype), "f32")
        made = self._tape.call("aten.mul.Tensor", f"{codes}.wide", wide, self=Ref(cast), other=Ref(scale))
        return self._tape.cast(made, wide, type_.dtype)

    def _rounded(self, name: str, type_: TensorType) -> tuple[str, ...]:
        """The value as it is stored: each token of a head divided by its greatest absolute value."""
        if not self._dtype:
            return (name,)
        call, most = self._tape.call, LARGEST[self._dtype]
        wide, ones = replace(type_, dtype="f32"), TensorType("f32", (*type_.shape[:-1], 1))
        cast = self._tape.cast(name, type_, "f32")
        size = call("aten.abs", f"{name}.size", wide, self=Ref(cast))
        top = call("aten.amax", f"{name}.top", ones, self=Ref(size), dim=(-1,), keepdim=True)
        above = call("aten.clamp_min", f"{name}.above", ones, self=Ref(top), min=SMALLEST)
        scale = call("aten.div.Tensor", f"{name}.scale", ones, self=Ref(above), other=most)
        ratio = call("aten.div.Tensor", f"{name}.ratio", wide, self=Ref(cast), other=Ref(scale))
        if self._dtype == "i8":
            ratio = call("aten.round", f"{name}.round", wide, self=Ref(ratio))
        return self._tape.cast(ratio, wide, self._dtype), scale
