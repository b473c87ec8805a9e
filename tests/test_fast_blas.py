from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from csm_studio import fast_blas

ROOT = Path(__file__).resolve().parents[1]

# Prints the largest error of MLX's products against numpy's, relative to the inner dimension.
CHECK_PRODUCTS = """
import mlx.core as mx
import numpy as np

def largest_error():
    random = np.random.default_rng(1)
    errors = []
    for batch, rows, inner, columns in ((1, 7, 5, 3), (3, 64, 65, 66), (2, 1, 300, 17)):
        a = random.standard_normal((batch, rows, inner)).astype(np.float32)
        b = random.standard_normal((batch, inner, columns)).astype(np.float32)
        c = random.standard_normal((batch, rows, columns)).astype(np.float32)
        b_t = mx.array(b.swapaxes(1, 2).copy()).swapaxes(1, 2)
        for product, expected in (
            (mx.array(a) @ mx.array(b), a @ b),
            (mx.array(a) @ b_t, a @ b),
            (mx.addmm(mx.array(c), mx.array(a), b_t, alpha=0.5, beta=2.0), 0.5 * (a @ b) + 2 * c),
        ):
            errors.append(np.abs(np.array(product) - expected).max() / inner)
    return max(errors)

def check():
    assert largest_error() < 1e-5, largest_error()
"""

needs_replacement = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() not in ("x86_64", "aarch64")
    or find_spec("scipy_openblas32") is None,
    reason="only where MLX has the reference BLAS and scipy-openblas32 is installed",
)


def _run(script: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != fast_blas.VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", CHECK_PRODUCTS + script],
        cwd=ROOT,
        env=environment | variables,
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()


@needs_replacement
def test_products_stay_right_before_and_after_enabling() -> None:
    script = """
check()
from csm_studio import fast_blas
status = fast_blas.enable()
check()
assert fast_blas.enable() is status
check()
print(status.enabled, status.num_threads, status)
"""
    enabled, num_threads, detail = _run(script, OPENBLAS_NUM_THREADS="1").split(maxsplit=2)
    assert (enabled, num_threads) == ("True", "1")
    assert "cblas_sgemm" in detail


@needs_replacement
def test_the_number_of_threads_leaves_a_core_and_no_trace() -> None:
    script = """
import os
from csm_studio import fast_blas
os.environ.pop("OPENBLAS_NUM_THREADS", None)
fast_blas._num_usable_cores = lambda: 3
print(fast_blas.enable().num_threads, "OPENBLAS_NUM_THREADS" in os.environ)
"""
    num_threads, left_over = _run(script).split()
    # OpenBLAS itself never takes more threads than the process has cores.
    assert int(num_threads) == min(2, len(os.sched_getaffinity(0)))
    assert left_over == "False"


@needs_replacement
def test_the_variable_turns_it_off() -> None:
    script = """
from csm_studio import fast_blas
status = fast_blas.enable()
check()
print(status.enabled, status)
"""
    output = _run(script, **{fast_blas.VARIABLE: "0"})
    assert output.startswith("False")
    assert "turned off by CSM_STUDIO_FAST_BLAS=0" in output


@needs_replacement
def test_wrong_results_restore_the_old_functions() -> None:
    script = """
import ctypes
from csm_studio import fast_blas
library = ctypes.CDLL(str(fast_blas._mlx_path()))
check()  # binds the functions that are called lazily
slots = dict(fast_blas._slots(library))
before = {slot: ctypes.c_size_t.from_address(slot).value for slot in slots}
does_nothing = ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value
fast_blas._address = lambda function: does_nothing
status = fast_blas.enable()
assert before == {slot: ctypes.c_size_t.from_address(slot).value for slot in slots}
check()
print(len(slots), status.enabled, status)
"""
    num_slots, enabled, detail = _run(script).split(maxsplit=2)
    assert int(num_slots) > 0
    assert enabled == "False"
    assert "wrong float32 products" in detail


@needs_replacement
@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        ("sys.modules['scipy_openblas32'] = None", "pip install scipy-openblas32"),
        ("fast_blas._openblas_path = lambda: '/nowhere/lib.so'", "OSError: /nowhere/lib.so"),
        ("fast_blas._PREFIX = 'other_'", "undefined symbol: other_"),
        ("fast_blas._OTHER_FAST_BLAS = ('cblas_sgemm',)", "linked to a fast one already"),
        ("fast_blas._mappings = lambda: iter(())", "libmlx.so is not among"),
    ],
)
def test_what_cannot_be_used_leaves_mlx_alone(sabotage: str, reason: str) -> None:
    script = f"""
import sys
from csm_studio import fast_blas
{sabotage}
status = fast_blas.enable()
check()
print(status.enabled, status)
"""
    output = _run(script)
    assert output.startswith("False")
    assert reason in output


@needs_replacement
def test_threads_that_enable_together_get_one_status() -> None:
    script = """
from concurrent.futures import ThreadPoolExecutor
import mlx.core
from csm_studio import fast_blas
calls = []
def fake():
    calls.append(1)
    return fast_blas.Status(False, "once")
fast_blas._enable = fake
with ThreadPoolExecutor(8) as pool:
    statuses = {id(status) for status in pool.map(lambda _: fast_blas.enable(), range(64))}
print(len(calls), len(statuses))
"""
    assert _run(script) == "1 1"


def test_nothing_is_done_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_blas, "_status", None)
    monkeypatch.setattr(fast_blas.sys, "platform", "darwin")
    status = fast_blas.enable()
    assert not status.enabled
    assert "not needed on darwin" in str(status)


def test_importing_does_not_import_mlx() -> None:
    script = "import sys; from csm_studio import fast_blas; print('mlx' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False"
