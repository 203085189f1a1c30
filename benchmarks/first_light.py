"""The main job, measured: tracing at full size, a trained model, and its engine beside a plain ONNX export.

    python benchmarks/first_light.py [--quick] [--json FILE]

The plain export is what ``torch.onnx.export`` makes of the same module with the same inputs; both run on ONNX Runtime
with its default settings, in turns.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import Figures, alone, main, median_seconds, paired

if TYPE_CHECKING:
    from intarsia.backends.bundle import Bundle

MEANINGS = {
    "trace_14b_seconds": "trace and clean Wan2.1-T2V-14B at 480x832x81 on the meta device, imports included",
    "trace_14b_peak_bytes": "most memory that process held",
    "nodes_before_1_3b": "nodes of Wan2.1-T2V-1.3B as torch.export gives it",
    "nodes_after_1_3b": "nodes once it is traced and cleaned",
    "samples_recognised": "share of wan-mini's samples whose shape, colour and motion a detector reads as asked",
    "engine_size_ratio": "bytes of the f32 weights as shipped over bytes of our whole engine",
    "psnr_held_out": "dB, videos of our engine against those of the unchanged model, held-out noise",
    "psnr_floor": "dB, the same between unrelated videos",
    "ours_over_plain_onnx_seconds": "seconds of a call of our engine over those of the plain export",
    "text_round_trip_14b_seconds": "print the 14B graph and parse it again",
    "one_rewrite_14b_seconds": "replace one node of the 14B graph",
}
QUALITY = "psnr>=35"


def measure(quick: bool) -> Figures:
    """The figures; quick ones look at 8 samples in place of 64, and at fewer held-out videos."""
    traced = alone(_traced_text, "wan2.1-t2v-14b")
    before, after = alone(_node_counts, "wan2.1-t2v-1.3b").result
    return {
        "trace_14b_seconds": traced.seconds,
        "trace_14b_peak_bytes": traced.peak_bytes,
        "nodes_before_1_3b": before,
        "nodes_after_1_3b": after,
        **_text_and_rewrite(traced.result, rounds=3 if quick else 9),
        "samples_recognised": _samples_recognised(8 if quick else 64),
        **_engine(quick),
    }


def _traced_text(name: str) -> str:
    import intarsia

    return str(intarsia.trace(name, meta=True).graph)


def _node_counts(name: str) -> tuple[int, int]:
    """Nodes in torch.export's graph, and in ours after cleaning."""
    import torch

    import intarsia
    from intarsia.models import find, meta

    model = find(name)
    with torch.device("meta"):
        inputs = model.inputs()
    exported = torch.export.export(meta(model), (), {**inputs, **model.static}, strict=False)
    return len(exported.graph.nodes), len(intarsia.trace(name, meta=True).graph.nodes)


def _text_and_rewrite(text: str, *, rounds: int) -> dict[str, float]:
    from intarsia.ir.graph import Graph, Node
    from intarsia.ir.rewrite import rewrite

    graph = Graph.parse(text)
    middle = graph.nodes[len(graph.nodes) // 2].name

    def renamed(node: Node) -> list[Node] | None:
        return [replace(node, source="")] if node.name == middle else None

    return {
        "text_round_trip_14b_seconds": median_seconds(lambda: Graph.parse(str(graph)), rounds=rounds),
        "one_rewrite_14b_seconds": median_seconds(lambda: rewrite(graph, renamed), rounds=rounds),
    }


def _samples_recognised(count: int) -> float:
    import torch

    from intarsia.models import denoiser, find, load
    from intarsia.models.train_wan_mini import evaluate

    model = find("wan-mini")
    assert model.sampler is not None
    with torch.no_grad():
        return evaluate(denoiser(load(model)), model.sampler, count=count)["all"]


def _engine(quick: bool) -> dict[str, float]:
    import intarsia

    with tempfile.TemporaryDirectory() as folder:
        bundle = intarsia.optimize(
            "wan-mini",
            target="cpu-avx2",
            quality=QUALITY,
            output=Path(folder) / "bundle",
            effort="quick" if quick else "default",
        )
        plain = Path(folder) / "plain.onnx"
        _export_plainly(plain)
        quality: Any = bundle.manifest["quality"]
        psnr = quality["metrics"]["psnr"]
        return {
            "engine_size_ratio": _weight_bytes() / bundle.engine_bytes,
            "psnr_held_out": psnr["mean"],
            "psnr_floor": psnr["floor"],
            "ours_over_plain_onnx_seconds": _ratio(bundle, plain, rounds=20 if quick else 100),
        }


def _export_plainly(path: Path) -> None:
    import torch

    from intarsia.models import find, load

    model = find("wan-mini")
    module = load(model)
    kwargs = {**model.inputs(), **model.static}
    torch.onnx.export(module, (), path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)


def _weight_bytes() -> int:
    """Of the f32 safetensors, not of the plain ONNX export, which is twice as large and would flatter us."""
    from intarsia.models import find

    weights = find("wan-mini").weights
    assert weights is not None
    return weights.stat().st_size


def _ratio(bundle: Bundle, plain: Path, *, rounds: int) -> float:
    import onnxruntime

    engine, inputs = bundle.engine(), bundle.sample.inputs
    session = onnxruntime.InferenceSession(plain, providers=["CPUExecutionProvider"])
    feed = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return paired(lambda: engine(*inputs), lambda: session.run(None, feed), rounds=rounds).ratio


if __name__ == "__main__":
    main("first_light", MEANINGS, measure)
