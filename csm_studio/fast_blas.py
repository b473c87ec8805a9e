"""A fast BLAS for MLX on Linux CPUs.

The `mlx[cpu]` wheel links the reference BLAS, whose matrix products run at a small fraction of the
machine's speed. `enable` points the calls that libmlx.so makes at the OpenBLAS of the PyPI wheel
`scipy-openblas32`: it rewrites the few slots of libmlx.so's global offset table that lead to
`cblas_*gemm`. Nothing else in the process is rebound (numpy and torch keep their own BLAS), and a
self-check through MLX undoes the change if a product comes out wrong. Where there is nothing to
do - macOS, a build of MLX with another BLAS, the wheel not installed - nothing is touched.

Source: System V ABI, chapter 5 (dynamic section, relocation tables); dlinfo(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

VARIABLE = "CSM_STUDIO_FAST_BLAS"
"""Environment variable that turns the replacement off when it is `0`."""

_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
_PREFIX = "scipy_"
_FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_OTHER_FAST_BLAS = ("openblas_get_config", "MKL_Get_Version", "bli_info_get_version_str")
_LINK_MAP = 2  # RTLD_DI_LINKMAP
_DT_NULL, _DT_STRTAB, _DT_SYMTAB = 0, 5, 6
_RELOCATIONS = ((23, 2), (7, 8))  # (DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)
_SYMBOL_BYTES = 24
_CHECKED_SHAPES = ((1, 1, 1), (3, 5, 7), (65, 33, 130), (1, 257, 40), (129, 8, 1))
_SLOT_TYPES = {"x86_64": (6, 7), "aarch64": (1025, 1026)}  # GLOB_DAT, JUMP_SLOT

_lock = threading.Lock()
_status: Status | None = None


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether MLX's matrix products run on the fast BLAS.

    Attributes:
        enabled: They do.
        detail: One line for the log: with what, or why not.
        num_threads: Threads that one matrix product may use; 0 when not enabled.
    """

    enabled: bool
    detail: str
    num_threads: int = 0

    def __str__(self) -> str:
        return self.detail


class _NotEnabled(Exception):
    """The reason why MLX is left as it is."""


class _LinkMap(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("dynamic", ctypes.c_size_t),
    )


def enable() -> Status:
    """Make MLX's CPU matrix products use OpenBLAS, once per process. Never raises.

    Safe to call again, from any thread, and whether or not MLX has already run.

    Returns:
        What was done, or why nothing was.
    """
    global _status
    with _lock:
        if _status is None:
            try:
                _status = _enable()
            except _NotEnabled as reason:
                _status = Status(False, f"MLX keeps its own BLAS: {reason}")
            except Exception as error:
                _status = Status(False, f"MLX keeps its own BLAS: {type(error).__name__}: {error}")
        return _status


def _enable() -> Status:
    if sys.platform != "linux" or platform.machine() not in _SLOT_TYPES:
        raise _NotEnabled(f"not needed on {sys.platform} {platform.machine()}.")
    if os.environ.get(VARIABLE) == "0":
        raise _NotEnabled(f"turned off by {VARIABLE}=0.")
    replacement = _openblas_path()
    import mlx.core  # noqa: F401  (maps libmlx.so)

    library = ctypes.CDLL(str(_mlx_path()), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    if any(hasattr(library, name) for name in _OTHER_FAST_BLAS):
        raise _NotEnabled("this build of MLX is linked to a fast one already.")
    slots = dict(_slots(library))
    if not slots:
        raise _NotEnabled("libmlx.so calls no BLAS.")
    openblas = _load_openblas(replacement)
    num_threads = int(getattr(openblas, _PREFIX + "openblas_get_num_threads")())
    addresses = {slot: _address(getattr(openblas, _PREFIX + name)) for slot, name in slots.items()}
    originals = {slot: ctypes.c_size_t.from_address(slot).value for slot in slots}
    try:
        _write(addresses)
        _self_check()
    except BaseException:
        _write(originals)
        raise
    functions = ", ".join(sorted(slots.values()))
    return Status(True, f"OpenBLAS with {num_threads} thread(s) for {functions}.", num_threads)


def _openblas_path() -> Path:
    spec = find_spec("scipy_openblas32")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")):
            return path
    raise _NotEnabled("scipy-openblas32 is not installed (pip install scipy-openblas32).")


def _mappings() -> Iterator[tuple[int, int, str, str]]:
    """Yield (start, end, permissions, path) of each mapped region of the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(word, 16) for word in fields[0].split("-"))
        yield start, end, fields[1], fields[5] if len(fields) > 5 else ""


def _mlx_path() -> Path:
    for _, _, _, path in _mappings():
        if Path(path).name == "libmlx.so":
            return Path(path)
    raise _NotEnabled("libmlx.so is not among the process's libraries.")


def _slots(library: ctypes.CDLL) -> Iterator[tuple[int, str]]:
    """Yield (address of a table slot, function it leads to) for the functions to replace."""
    link_map = ctypes.POINTER(_LinkMap)()
    dlinfo = ctypes.CDLL(None).dlinfo
    if dlinfo(ctypes.c_void_p(library._handle), _LINK_MAP, ctypes.byref(link_map)) != 0:
        raise _NotEnabled("dlinfo does not know libmlx.so.")
    base = link_map.contents.base
    section = dict(_dynamic_section(link_map.contents.dynamic))

    def table(tag: int) -> int:
        # glibc has relocated these pointers in place, musl has not.
        return section[tag] if section[tag] >= base else section[tag] + base

    for start, size in _RELOCATIONS:
        if start not in section:
            continue
        for offset, info, _ in struct.iter_unpack(
            "=QQq", ctypes.string_at(table(start), section[size])
        ):
            if info & 0xFFFFFFFF not in _SLOT_TYPES[platform.machine()]:
                continue
            symbol = table(_DT_SYMTAB) + (info >> 32) * _SYMBOL_BYTES
            name_offset = ctypes.c_uint32.from_address(symbol).value
            name = ctypes.string_at(table(_DT_STRTAB) + name_offset).decode()
            if name in _FUNCTIONS:
                yield base + offset, name


def _dynamic_section(address: int) -> Iterator[tuple[int, int]]:
    while True:
        tag, value = struct.unpack("=qQ", ctypes.string_at(address, 16))
        if tag == _DT_NULL:
            return
        yield tag, value
        address += 16


def _write(values: dict[int, int]) -> None:
    """Store each value at its address, making read-only pages writable for the moment."""
    for address, value in values.items():
        with _writable(address):
            ctypes.c_size_t.from_address(address).value = value


@contextlib.contextmanager
def _writable(address: int) -> Iterator[None]:
    permissions = next(p for start, end, p, _ in _mappings() if start <= address < end)
    if "w" in permissions:
        yield
        return
    page = address - address % mmap.PAGESIZE
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    arguments = ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE)
    if mprotect(*arguments, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise _NotEnabled(f"the table cannot be written: {os.strerror(ctypes.get_errno())}.")
    try:
        yield
    finally:
        mprotect(*arguments, mmap.PROT_READ)


def _address(function: Callable[..., object]) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def _load_openblas(path: Path) -> ctypes.CDLL:
    """Load OpenBLAS to use all usable cores but one, unless the user has set a number.

    Its threads wait for each other in a spin. With a thread on every core, anything else that runs
    (Python building the next graph, the studio, another program) holds up all of them: products
    of 512 x 512 on two cores beside one busy process were 2 to 7 times slower with two threads
    than with one. The number is fixed while loading; a pool made smaller later keeps its threads.
    """
    chosen = _THREADS_VARIABLE not in os.environ
    if chosen:
        os.environ[_THREADS_VARIABLE] = str(max(1, _num_usable_cores() - 1))
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    finally:
        if chosen:
            del os.environ[_THREADS_VARIABLE]  # numpy and child processes choose for themselves


def _num_usable_cores() -> int:
    num_cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # a container's share, where it has one
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        num_cores = min(num_cores, max(1, int(quota) // int(period)))
    return num_cores


def _self_check() -> None:
    """Compare products made by MLX with numpy's, over the layouts and types that BLAS sees."""
    import mlx.core as mx
    import numpy as np

    random = np.random.default_rng(0)
    kinds = (("float32", 1e-5), ("float64", 1e-12), ("complex64", 1e-5))
    # einsum, because numpy's own BLAS would start its threads.
    for (kind, tolerance), shape in itertools.product(kinds, _CHECKED_SHAPES):
        rows, inner, columns = shape
        left = random.standard_normal((2, rows, inner)).astype(kind)
        right = random.standard_normal((2, inner, columns)).astype(kind)
        expected = np.einsum("bij,bjk->bik", left, right)
        dtype = getattr(mx, kind)
        a, b = mx.array(left, dtype), mx.array(right, dtype)
        a_columns = _column_major(left, dtype)
        b_columns = _column_major(right, dtype)
        for x, y in ((a, b), (a_columns, b), (a, b_columns), (a_columns, b_columns)):
            error = np.abs(np.array(mx.matmul(x, y, stream=mx.cpu)) - expected).max()
            if not error <= tolerance * inner:
                raise _NotEnabled(f"OpenBLAS gives wrong {kind} products.")


def _column_major(matrices: np.ndarray, dtype: mx.Dtype) -> mx.array:
    import mlx.core as mx

    transposed = mx.array(matrices.swapaxes(-1, -2).copy(), dtype)
    return mx.swapaxes(transposed, -1, -2, stream=mx.cpu)
