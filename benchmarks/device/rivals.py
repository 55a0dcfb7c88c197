# SPDX-License-Identifier: Apache-2.0
"""torch on the same GPU at the same shapes, where torch is installed."""

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

from .pieces import Setting
from .worker import Skipped

ATTENTION = {  # B, T, N, K, H
    "flash_attention, 7B, 4 rows of 4k": (4, 4096, 28, 4, 128),
    "flash_attention, 0.5B, 4 rows of 4k": (4, 4096, 14, 2, 64),
    "flash_attention, 7B, 32k": (1, 32768, 28, 4, 128),
}


def torch_speed(setting: Setting):
    if setting.platform == "cpu" or not torch.cuda.is_available():
        return {"-": _no_gpu}
    found = {name: functools.partial(_attention, *sizes) for name, sizes in ATTENTION.items()}
    return found | {"product of two matrices": _product}


def _no_gpu():
    raise Skipped("this torch sees no GPU")


def _seconds(run) -> float:
    """The fastest of ten calls, by the device's own clock."""
    run()
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _attention(B, T, N, K, H):
    q, k, v = _draw(B, N, T, H), _draw(B, K, T, H), _draw(B, K, T, H)
    attend = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    work = 2 * B * T * (T + 1) * N * H
    with torch.no_grad():
        seconds = _seconds(lambda: attend(q, k, v))
    row = {"implementation": "torch", "best_ms": 1e3 * seconds, "tflops": work / seconds / 1e12}
    rows = [row | {"pass": "forward"}]
    for x in (q, k, v):
        x.requires_grad_()
    out, cotangent = attend(q, k, v), _draw(B, N, T, H)
    seconds = _seconds(lambda: torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True))
    rows.append(row | {"pass": "backward", "best_ms": 1e3 * seconds, "tflops": 2.5 * work / seconds / 1e12})
    return {"rows": rows}


def _product():
    x, y = _draw(8192, 8192), _draw(8192, 8192)
    return {"TFLOP/s": 2 * 8192**3 / _seconds(lambda: x @ y) / 1e12}
