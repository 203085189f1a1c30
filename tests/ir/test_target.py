"""Machines as TOML files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intarsia.ir.errors import TargetError
from intarsia.ir.target import load_target, parse_target, shipped_targets

MACHINE = """\
summary = "a machine"
kind = "cpu"
architecture = "x86-64-v3"
bandwidth = 20e9
memory = 8_000_000_000
launch = 0
features = ["avx2"]

[flops]
f32 = 100e9

[sources]
flops = "measured"
bandwidth = "measured"
memory = "data sheet"
launch = "measured"
"""


def test_a_users_own_file_is_a_machine_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MACHINE)
    target = load_target(str(path))
    assert (target.name, target.kind, target.features) == ("mine", "cpu", ("avx2",))
    assert target.flops == {"f32": 100e9}


def test_the_machines_that_ship_are_read_and_each_of_their_numbers_has_a_source() -> None:
    names = shipped_targets()
    assert {"h200", "h100", "a100", "t4", "l40s", "rtx4090", "cpu-avx2", "null"} <= set(names)
    for name in names:
        target = load_target(name)
        assert target.name == name
        assert set(target.sources) >= {"flops", "bandwidth", "memory", "launch"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind =", "kind", "mine: not TOML: "),
        ('kind = "cpu"\n', "", "mine: no key 'kind'; a target has architecture, bandwidth, flops"),
        ("launch = 0", "launch = 0\nspeed = 3", "mine: unknown key 'speed'; a target has architecture"),
        ('"cpu"', '"tpu"', "mine: kind is 'tpu', not one of cuda, rocm, cpu, null"),
        ('"cpu"', '["cpu"]', "mine: kind is ['cpu'], not one of"),
        ('"x86-64-v3"', "3", "mine: architecture is 3, not a string"),
        ('["avx2"]', '"avx2"', "mine: features is 'avx2', not a list of strings"),
        ('["avx2"]', "3", "mine: features is 3, not a list of strings"),
        ("f32 = 100e9", "f16 = 100e9", "mine: [flops] gives FLOP/s by element type, f32 at least"),
        ("f32 = 100e9", "f32 = 100e9\nfp8 = 1e9", "mine: [flops] fp8 is no element type; those are f64, f32"),
        ("20e9", "-20e9", "mine: bandwidth is -20000000000.0, not a positive number"),
        ("20e9", "nan", "mine: bandwidth is nan, not a positive number"),
        ("20e9", "true", "mine: bandwidth is True, not a positive number"),
        ("8_000_000_000", '"8 GB"', "mine: memory is '8 GB', not a positive number"),
        ("launch = 0", "launch = -1", "mine: launch is -1, not a time in seconds"),
        ('bandwidth = "measured"\n', "", "mine: [sources] does not say where bandwidth comes from"),
    ],
)
def test_a_broken_file_is_told_by_key_and_rule(old: str, new: str, message: str) -> None:
    assert old in MACHINE
    with pytest.raises(TargetError, match="^" + re.escape(message)):
        parse_target(MACHINE.replace(old, new, 1), name="mine", where="mine")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"target 'h20' is unknown; did you mean h\d+0\? Known: .*or the path of a"):
        load_target("h20")


def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"nowhere\.toml: cannot be read as a target: No such file"):
        load_target(str(tmp_path / "nowhere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(TargetError, match=r"binary\.toml: cannot be read as a target: not text"):
        load_target(str(tmp_path / "binary.toml"))
