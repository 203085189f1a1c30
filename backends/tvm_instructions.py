"""Machine instructions that TVM is taught: AVX2's product of pairs of int16, summed in int32, which never overflows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, valid-type"

from functools import lru_cache

MADD = "intarsia.vpmaddwd"
"""For 8 rows: sum += pair of inputs x pair of weights, int16 and int8. A Zen 3 starts two of them in every cycle."""


@lru_cache(maxsize=1)
def register() -> None:
    """Make the instruction known to TVM's schedules; once, however often it is called."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T  # noqa: N812

    @T.prim_func(s_tir=True)
    def described(
        inputs: T.Buffer((2,), "int16", offset_factor=1),
        weights: T.Buffer((8, 2), "int8", offset_factor=1),
        sums: T.Buffer((8,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:8], inputs[0:2], weights[0:8, 0:2])
            T.writes(sums[0:8])
            for i in T.serial(0, 8):
                for k in T.serial(0, 2):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        sums[vi] = sums[vi] + T.cast(inputs[vk], "int32") * T.cast(weights[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def instruction(
        inputs: T.Buffer((2,), "int16", offset_factor=1),
        weights: T.Buffer((8, 2), "int8", offset_factor=1),
        sums: T.Buffer((8,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:8], inputs[0:2], weights[0:8, 0:2])
            T.writes(sums[0:8])
            sums[T.ramp(T.int32(0), 1, 8)] += T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.wd"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(inputs.vload([0], "int16x2"), dtype="int32"), 8), dtype="int16x16"
                ),
                T.cast(weights.vload([0, 0], dtype="int8x16"), "int16x16"),
                dtype="int32x8",
            )

    TensorIntrin.register(MADD, described, instruction)
