"""A run for other people's verifiers: its network as ONNX, its images as VNN-LIB, in a folder as VNN-COMP uses them."""

from certbench.export.benchmark import Benchmark, choose_images, write_benchmark
from certbench.export.files import check_target
from certbench.export.onnx import onnx_bytes, require_packages, write_onnx
from certbench.export.vnnlib import property_text

__all__ = [
    "Benchmark",
    "check_target",
    "choose_images",
    "onnx_bytes",
    "property_text",
    "require_packages",
    "write_benchmark",
    "write_onnx",
]
