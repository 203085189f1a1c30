from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from intarsia.backends.bundle import Bundle
from intarsia.backends.manifest import canonical, entry_of, files_below, sealed
from intarsia.backends.verify import verify_bundle
from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.program import save_weights

PARTS = [
    "config.json",
    "engine/null/model.graph",
    "engine/null/model.safetensors",
    "frames.png",
    "manifest.json",
    "measurements.json",
    "model.graph",
    "plan.json",
    "report.html",
    "sample.safetensors",
    "sampler.json",
    "weights.safetensors",
]


def test_a_bundle_as_it_was_written_passes_every_check(bundle: Bundle) -> None:
    seen: list[str] = []
    report = verify_bundle(bundle.folder, progress=seen.append)
    assert report.passed
    assert [check.name for check in report.checks] == ["manifest", *seen]
    assert seen[:3] == ["files", "graph", "fingerprints"]
    assert seen[3:] == ["null: structure", "null: loads", "null: stored sample", "null: fresh inputs"]
    assert json.loads(json.dumps(report.to_json()))["passed"] is True


@pytest.mark.parametrize("name", PARTS)
def test_one_changed_byte_anywhere_is_found_and_its_file_is_named(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    content = path.read_bytes()
    step = max(1, len(content) // 60)
    for place in range(0, len(content), step):
        for bit in (1, 32, 128):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(QualityError, match=name):
                verify_bundle(bundle.folder)


def test_every_byte_of_the_measurements_line_of_the_manifest_is_watched(bundle: Bundle) -> None:
    path = bundle.folder / "manifest.json"
    content = path.read_bytes()
    start = content.index(b'    "measurements.json"')
    for place in range(start, content.index(b"\n", start) + 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(QualityError, match=r"manifest.json"):
            verify_bundle(bundle.folder)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "manifest.json"])
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).unlink()
    with pytest.raises(QualityError, match=f"{name} is missing"):
        verify_bundle(bundle.folder)


def test_a_bundle_without_its_manifest_is_no_bundle(bundle: Bundle) -> None:
    (bundle.folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="no bundle"):
        verify_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["extra.txt", "engine/null/extra.so", "plan.json.bak"])
def test_a_file_that_nobody_listed_is_named(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).write_text("hello")
    with pytest.raises(QualityError, match=f"{name} is not listed"):
        verify_bundle(bundle.folder)


def test_a_link_that_nobody_listed_is_named(bundle: Bundle) -> None:
    os.symlink("nowhere", bundle.folder / "dangling")
    with pytest.raises(QualityError, match="dangling is not listed"):
        verify_bundle(bundle.folder)


def test_all_wrong_files_are_named_at_once_in_one_line(bundle: Bundle) -> None:
    (bundle.folder / "plan.json").unlink()
    (bundle.folder / "frames.png").write_bytes(b"another")
    (bundle.folder / "extra").write_text("")
    with pytest.raises(QualityError) as caught:
        verify_bundle(bundle.folder)
    assert all(name in str(caught.value) for name in ("plan.json is missing", "frames.png has been", "extra is not"))
    assert "\n" not in str(caught.value)


def reseal(folder: Path) -> None:
    """Make hashes and seal fit whatever the files now hold, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [name for name in files_below(folder) if name not in ("manifest.json", "report.html")]
    manifest["files"] = {name: entry_of(folder / name) for name in names}
    (folder / "manifest.json").write_text(canonical(sealed(manifest)))


def test_other_weights_with_fitting_hashes_break_the_claimed_fingerprint(bundle: Bundle) -> None:
    weights = {name: 2 * tensor for name, tensor in bundle.program.weights.items()}
    save_weights(weights, bundle.folder / "weights.safetensors")
    reseal(bundle.folder)
    with pytest.raises(QualityError, match="the weights has fingerprint"):
        verify_bundle(bundle.folder)


def test_another_engine_with_fitting_hashes_breaks_the_stored_answer(bundle: Bundle) -> None:
    weights = {name: 2 * tensor for name, tensor in bundle.program.weights.items()}
    save_weights(weights, bundle.folder / "engine/null/model.safetensors")
    reseal(bundle.folder)
    with pytest.raises(QualityError, match="the engine on the stored sample against its stored answer differs"):
        verify_bundle(bundle.folder)


def test_an_engine_that_knows_only_the_sample_fails_on_fresh_inputs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from intarsia.backends.null import NullEngine

    answer = bundle.sample.engines["null"]
    monkeypatch.setattr(NullEngine, "__call__", lambda self, *inputs: answer)
    with pytest.raises(QualityError, match=r"the engine on fresh inputs \(seed 1\) against the reference differs"):
        verify_bundle(bundle.folder)


def test_a_broken_graph_with_fitting_hashes_is_one_line(bundle: Bundle) -> None:
    (bundle.folder / "model.graph").write_text("graph g {\n  return %x\n}\n")
    reseal(bundle.folder)
    with pytest.raises(QualityError, match="graph: graph g: output %x is not defined"):
        verify_bundle(bundle.folder)


def test_fresh_inputs_are_of_the_samples_kind() -> None:
    from intarsia.backends.verify import _like

    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert sorted(_like(tokens, generator).flatten().tolist()) == [1, 1, 3, 4, 5, 9]
    steps = torch.tensor([500.0, 500.0])
    assert torch.equal(_like(steps, generator), steps)
    noise = torch.randn(1000) * 3 + 7
    fresh = _like(noise, generator)
    assert not torch.equal(fresh, noise)
    assert abs(fresh.mean() - 7) < 0.5
    assert abs(fresh.std() - 3) < 0.5
