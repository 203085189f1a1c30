"""A loop from a file: ours, or diffusers' configuration of a scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.ir.errors import UsageError
from intarsia.models.sampler import FlowMatchEuler
from intarsia.models.sampler_files import read_sampler

DEFAULT = FlowMatchEuler(steps=40, shift=3.0, guidance=5.0)
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 8.0}


def written(folder: Path, content: object) -> Path:
    path = folder / "scheduler_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_a_bundle_holds_is_read_back(tmp_path: Path) -> None:
    ours = FlowMatchEuler(steps=12, shift=5.0, guidance=1.0)
    assert read_sampler(written(tmp_path, ours.to_json()), DEFAULT) == ours


def test_a_scheduler_of_diffusers_tells_the_shift(tmp_path: Path) -> None:
    assert read_sampler(written(tmp_path, EULER), DEFAULT) == FlowMatchEuler(40, 8.0, 5.0)


def test_the_noise_levels_are_those_of_the_scheduler(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    (folder := tmp_path / "scheduler").mkdir()
    scheduler.save_pretrained(folder)
    ours = read_sampler(folder / "scheduler_config.json", DEFAULT)
    scheduler.set_timesteps(sigmas=[1 - step / ours.steps for step in range(ours.steps)])
    assert scheduler.sigmas.tolist() == pytest.approx(ours.sigmas().tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0},
            "UniPCMultistepScheduler goes on",
        ),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is not FlowMatchEulerDiscreteScheduler"),
        ({**EULER, "use_dynamic_shifting": True}, "give it as shift"),
        ({**EULER, "use_karras_sigmas": True}, "use_karras_sigmas is another schedule"),
        ({**EULER, "shift": "8"}, "shift is '8', not a number"),
        ({**EULER, "shift": -1.0}, "it must be above 0"),
        ({"solver": "euler"}, "the fields are steps, shift, guidance"),
        ([1], "the fields are steps, shift, guidance"),
        ("{", "not JSON"),
    ],
)
def test_other_solvers_are_refused_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        read_sampler(written(tmp_path, content), DEFAULT)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_sampler(tmp_path / "none.json", DEFAULT)
