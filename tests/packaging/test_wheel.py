"""What pip installs: the wheel holds all, and its command works without the checkout and the optional parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = ("diffusers", "transformers", "timm", "triton", "tvm", "apache_tvm", "tensorrt", "accelerate")
SHIPPED = {".py", ".toml", ".jinja", ".safetensors", ".md", ".typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the checkout, and the wheel that is built from this sdist."""
    source, folder = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, the core dependencies, and none of the optional packages."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=built)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=built)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not entry.name.lower().startswith(("intarsia", "__editable__", *OPTIONAL)) and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder


def _run(*command: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def _in_checkout() -> set[str]:
    """Every file that a user needs, by its path inside the package."""
    files = [p for p in (ROOT / "intarsia").iterdir() if p.is_file()]
    folders = [p for p in (ROOT / "intarsia").iterdir() if p.is_symlink()]
    names = {f"intarsia/{file.name}" for file in files if file.suffix in SHIPPED}
    for folder in folders:
        found = (
            file for file in folder.resolve().rglob("*") if file.suffix in SHIPPED and "__pycache__" not in file.parts
        )
        names |= {f"intarsia/{folder.name}/{file.relative_to(folder.resolve())}" for file in found}
    return names


def test_the_wheel_holds_every_module_and_every_data_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("intarsia/")}
    assert held == _in_checkout()
    assert any(name.endswith("wan-mini.safetensors") for name in held)


def test_the_sdist_holds_every_module_and_every_data_file_and_the_licence(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert _in_checkout() | {"LICENSE", "README.md", "pyproject.toml"} <= held


def test_the_command_works_without_the_checkout_and_without_optional_packages(
    environment: Path, tmp_path: Path
) -> None:
    command = str(environment / "bin" / "intarsia")
    doctor = _run(command, "doctor", cwd=tmp_path).stdout
    assert "diffusers" in doctor
    assert "intarsia[models]" in doctor
    targets = json.loads(_run(command, "list", "targets", "--json", cwd=tmp_path).stdout)
    assert "h200" in json.dumps(targets)


def test_what_an_optional_package_is_needed_for_says_so_in_one_line(environment: Path, tmp_path: Path) -> None:
    command = str(environment / "bin" / "intarsia")
    refused = _run(command, "trace", "wan-mini", "-o", "wan.graph", cwd=tmp_path, expect=6)
    assert "diffusers" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_is_the_wheels_and_brings_its_weights(environment: Path, tmp_path: Path) -> None:
    code = "import intarsia.models as m; print(m.__file__); print(m.find('wan-mini').weights.stat().st_size)"
    file, size = _run(str(environment / "bin" / "python"), "-c", code, cwd=tmp_path).stdout.split()
    assert Path(file).is_relative_to(environment)
    assert 1e6 < int(size) < 8e6


def test_the_folders_of_the_checkout_are_no_packages_of_their_own(tmp_path: Path) -> None:
    names = ["ir", "passes", "search", "kernels", "backends", "models"]
    code = f"import importlib.util as u; print([s.origin for n in {names} if (s := u.find_spec(n))])"
    found = _run(sys.executable, "-c", code, cwd=tmp_path).stdout
    assert str(ROOT) not in found
