"""The kernels of a deployed evaluation: those whose round-off is that of sums of products, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

SWITCHES = {
    "cudnn": "off",
    "nnpack": "off",
    "float32_matmul_precision": "highest",
    "reduced_precision_reduction": "off",
    "flush_denormal": "off",
}
"""What :func:`plain_kernels` enforces; part of the record of every float-sound certificate."""

REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Switch off every kernel that may use Winograd, FFT or reduced precision behind float32's back.

    cuDNN and NNPACK choose their algorithms themselves, and the error of a Winograd or Fourier transform is not that
    of a sum of products. Process-wide while it lasts; the former switches come back afterwards.
    """
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in REDUCTIONS}
    precision = torch.get_float32_matmul_precision()
    torch.set_flush_denormal(False)  # the bounds count on gradual underflow in their own arithmetic
    torch.set_float32_matmul_precision("highest")
    for name in REDUCTIONS:
        setattr(matmul, name, False)
    try:
        with (
            torch.backends.cudnn.flags(enabled=False, allow_tf32=False),
            torch.backends.nnpack.flags(enabled=False),
        ):
            yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def one_thread_each(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Workers that run one chunk each on a single thread: the number of threads per operation would change bits.

    As many as there are threads on a CPU, one in front of a GPU.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            cores if device.type == "cpu" else 1, initializer=torch.set_num_threads, initargs=(1,)
        ) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)
