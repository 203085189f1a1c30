"""Launching through a driver, shown on a library that writes down what it is called with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from intarsia.backends.driver import Function, Interface
from intarsia.ir.errors import MissingEnvironment, QualityError

SOURCE = r"""
#include <stdio.h>
#include <string.h>
#include <stdint.h>
static FILE *out(void) { return fopen(LOG, "a"); }
extern "C" int load(void **module, const char *code) {
    if (!strcmp(code, "of another machine")) return 209;
    *module = (void *)0x10;
    return 0;
}
extern "C" int find(void **function, void *module, const char *name) {
    if (strcmp(name, "kernel")) return 500;
    *function = (void *)0x20;
    return 0;
}
extern "C" int allow(void *function, int attribute, int value) {
    FILE *f = out(); fprintf(f, "allow %d %d\n", attribute, value); fclose(f);
    return 0;
}
extern "C" int launch(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **a, void **extra) {
    FILE *f = out();
    fprintf(f, "launch %u %u %u x %u %u %u shared %u stream %ld args %lx %d %lx %lx\n", gx, gy, gz, bx, by, bz, shared,
            (long)stream, *(uint64_t *)a[0], *(int32_t *)a[1], *(uint64_t *)a[2], *(uint64_t *)a[3]);
    fclose(f);
    return 0;
}
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def interface(tmp_path: Path, log: Path) -> Interface:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "driver.cpp").write_text(SOURCE.replace("LOG", f'"{log}"'))
    library = tmp_path / "libdriver.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.cpp")], check=True)
    return Interface((str(library),), "load", "find", "launch", "allow")


def test_a_kernel_gets_its_arguments_by_value_and_two_null_pointers(interface: Interface, log: Path) -> None:
    function = Function(interface, b"code", symbol="kernel", types=("*fp16", "i32"), threads=128, shared_bytes=1024)
    function.launch((3, 2, 1), (0x7F00_0000_0010, -5), stream=7)
    assert log.read_text() == "launch 3 2 1 x 128 1 1 shared 1024 stream 7 args 7f0000000010 -5 0 0\n"


def test_more_shared_memory_than_is_given_is_asked_for(interface: Interface, log: Path) -> None:
    Function(interface, b"code", symbol="kernel", types=(), threads=128, shared_bytes=100_000)
    assert log.read_text() == "allow 8 100000\n"


def test_code_of_another_machine_is_refused_with_the_drivers_answer(interface: Interface) -> None:
    with pytest.raises(MissingEnvironment, match="the driver answers load with error 209"):
        Function(interface, b"of another machine", symbol="kernel", types=(), threads=32, shared_bytes=0)


def test_a_kernel_that_is_not_in_the_code_is_a_corrupt_engine(interface: Interface) -> None:
    with pytest.raises(QualityError, match="holds no kernel other: the driver answers find with error 500"):
        Function(interface, b"code", symbol="other", types=(), threads=32, shared_bytes=0)


def test_without_a_driver_the_error_names_the_library() -> None:
    absent = Interface(("libnowhere.so.1",), "a", "b", "c")
    with pytest.raises(MissingEnvironment, match=r"there is no GPU driver: libnowhere\.so\.1 is not found"):
        Function(absent, b"", symbol="kernel", types=(), threads=32, shared_bytes=0)


def test_a_number_of_another_kind_than_triton_passes_is_our_mistake(interface: Interface) -> None:
    function = Function(interface, b"code", symbol="kernel", types=("fp32", "i32"), threads=32, shared_bytes=0)
    with pytest.raises(KeyError):
        function.launch((1, 1, 1), (1, 1), stream=0)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
