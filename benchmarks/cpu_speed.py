"""How fast MLX is on this CPU, before and after: `python benchmarks/cpu_speed.py`.

Three ways are timed in alternating processes, so that a machine busy with other work slows all of
them alike:
  mlx    MLX as installed: its own BLAS, mx.conv1d and mx.conv_transpose1d
  forms  its own BLAS, convolutions as matrix products
  both   the fast BLAS and convolutions as matrix products: what the program does
Printed are the median times and the ratios to `mlx`, each as median [lowest - highest] of the
rounds. Mimi has its public widths and random weights; the demo voice is the bundled one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from csm_studio import fast_blas  # noqa: E402

WAYS = ("mlx", "forms", "both")
MATMUL_SHAPES = ((1, 2048, 8192), (64, 256, 256), (256, 2048, 2048), (512, 512, 512))
# (steps, channels in, channels out, kernel, stride): Mimi's layers on one second of speech
CONV_SHAPES = (
    (24_000, 1, 64, 7, 1),
    (24_000, 64, 32, 3, 1),
    (24_000, 64, 128, 8, 4),
    (1_200, 256, 512, 12, 6),
    (200, 512, 1024, 16, 8),
    (24_000, 64, 1, 7, 1),
)
TRANSPOSED_SHAPES = ((25, 1024, 512, 16, 8), (200, 512, 256, 12, 6), (6_000, 128, 64, 8, 4))
MAX_TIMED = 5
MAX_SECONDS = 1.0
Case = tuple[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes per way (default: 3)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_way(arguments.way, arguments.only)
        return
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, MLX {version('mlx')}")
    print(f"fast BLAS: {fast_blas.enable()} Load average at the start {os.getloadavg()[0]:.1f}")
    rounds = [
        {way: measure_in_process(way, arguments.only) for way in WAYS}
        for _ in range(arguments.rounds)
    ]
    print(f"{'case':58s}{'mlx ms':>10s}{'forms ms':>10s}{'both ms':>10s}  mlx/forms, mlx/both")
    for name in rounds[0]["mlx"]:
        times = "".join(
            f"{statistics.median(one[way][name] for one in rounds):10.1f}" for way in WAYS
        )
        ratios = [spread([one["mlx"][name] / one[way][name] for one in rounds]) for way in WAYS[1:]]
        print(f"{name:58s}{times}  {'  '.join(ratios)}")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):6.1f}x [{min(ratios):.1f} - {max(ratios):.1f}]"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_in_process(way: str, only: str) -> dict[str, float]:
    environment = os.environ | {fast_blas.VARIABLE: "1" if way == "both" else "0"}
    command = [sys.executable, __file__, "--way", way, "--only", only]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output)


def run_way(way: str, only: str) -> None:
    mx.set_default_device(mx.Device(mx.cpu))
    status = fast_blas.enable()
    if status.enabled != (way == "both"):
        raise SystemExit(f"Nothing to compare here. {status}")
    mx.random.seed(0)
    cases = [*matmul_cases(), *conv_cases(way), *mimi_cases(way), *voice_cases()]
    print(json.dumps({name: best_ms(run) for name, run in cases if only in name}))


def best_ms(run: Callable[[], object]) -> float:
    """Time the best of a few runs after a first one, which touches the memory."""
    mx.eval(run())
    times: list[float] = []
    while not times or (len(times) < MAX_TIMED and sum(times) < MAX_SECONDS):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def matmul_cases() -> Iterator[Case]:
    for rows, inner, columns in MATMUL_SHAPES:
        a, b = mx.random.normal((rows, inner)), mx.random.normal((columns, inner))
        yield f"matmul {rows} x {inner} x {columns}", functools.partial(mx.matmul, a, b.T)
    q, k = mx.random.normal((1, 32, 256, 64)), mx.random.normal((1, 8, 256, 64))
    yield (
        "attention 32/8 heads x 256 x 64",
        lambda: mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask="causal"),
    )


def conv_cases(way: str) -> Iterator[Case]:
    from csm_studio.models.mimi import convolution

    mlx = way == "mlx"
    conv = mx.conv1d if mlx else convolution.conv1d_matmul
    transposed = mx.conv_transpose1d if mlx else convolution.conv_transpose1d_matmul
    for label, convolve, shapes in (
        ("conv", conv, CONV_SHAPES),
        ("transposed conv", transposed, TRANSPOSED_SHAPES),
    ):
        for num_steps, num_in, num_out, kernel, stride in shapes:
            name = f"{label} {num_steps} x {num_in} -> {num_out}, k {kernel}, stride {stride}"
            x = mx.random.normal((1, num_steps, num_in))
            weight = mx.random.normal((num_out, kernel, num_in))

            forward = functools.partial(convolve, stride=stride)
            yield name, functools.partial(forward, x, weight)
            yield f"{name}: gradients", functools.partial(gradients, forward, x, weight)


def gradients(forward: Callable[..., mx.array], x: mx.array, weight: mx.array) -> object:
    return mx.grad(lambda x, w: forward(x, w).square().sum(), (0, 1))(x, weight)


def mimi_cases(way: str) -> Iterator[Case]:
    from csm_studio.configs import MimiConfig
    from csm_studio.models.mimi import conv
    from csm_studio.models.mimi.codec import Mimi

    if way == "mlx":
        layers: Any = conv
        layers.conv1d, layers.conv_transpose1d = mx.conv1d, mx.conv_transpose1d
    codec = Mimi(MimiConfig())
    mx.eval(codec.parameters())
    audio = mx.random.normal((1, 24_000), scale=0.1)
    codes = mx.random.randint(0, 2048, (1, 32, 13))
    yield "Mimi encode, 1 s", lambda: codec.encode(audio)
    yield "Mimi decode, 1 s", lambda: codec.decode(codes)


def voice_cases() -> Iterator[Case]:
    """The bundled demo voice at work: a training step, speech, and its codec."""
    import numpy as np

    from csm_studio.dataset.batches import Example, Turn, build_batch
    from csm_studio.generation.frames import FrameLoop
    from csm_studio.generation.prompt import build_prompt
    from csm_studio.generation.settings import SamplingOptions
    from csm_studio.model_folder import load_model
    from csm_studio.training.loss import CodebookWeights, DepthSample, batch_loss

    model = load_model("demo")
    assert model.companions is not None
    codec, tokenizer = model.companions.codec, model.companions.tokenizer
    audio = mx.random.normal((1, 240_000), scale=0.1)
    codes = codec.encode(audio)
    yield "demo voice: encode 10 s", lambda: codec.encode(audio)
    yield "demo voice: decode 10 s", lambda: codec.decode(codes)

    turn = Turn(tokenizer.encode_segment("A sentence of the usual length.", 0), np.array(codes[0]))
    batch = build_batch([Example((turn,))] * 4)
    num_targets = len(batch.targets)
    depth = DepthSample.draw(num_targets, 1 / 16, np.random.default_rng(0))
    weights = CodebookWeights.csm_mlx(model.config.audio_num_codebooks)
    step = nn.value_and_grad(model, lambda *arguments: batch_loss(model, *arguments)[0])
    yield (
        f"demo voice: gradients of a batch of 4 x {turn.num_frames} frames",
        lambda: step(batch, depth, weights, num_targets),
    )
    prompt = build_prompt("Hello.", 0, [], model.companions, model.config.audio_num_codebooks)

    def speak() -> None:
        loop = FrameLoop(model, prompt, SamplingOptions(), seed=0)
        for _ in range(25):  # whether or not the speech has ended: the same work in every way
            loop.enqueue()
            loop.wait()

    yield "demo voice: generate 2 s, without the codec", speak


if __name__ == "__main__":
    main()
