"""The network as ONNX: input ``X``, raw pixels, to output ``Y``, logits, for any batch size."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certbench.errors import RunError, UsageError
from certbench.results.files import write_atomically

OPSET = 18
"""What torch's exporter writes without converting; named, so that an update of torch does not change it."""
TOLERANCE = 1e-4
"""Largest difference to torch's logits, as a share of the largest logit (or of 1): float32 sums in another order."""


def write_onnx(path: Path, content: bytes) -> None:
    """Put the bytes of :func:`onnx_bytes` at ``path``, whole or not at all.

    Raises:
        RunError: the folder cannot be written.
    """
    write_atomically(path, content)


def onnx_bytes(network: nn.Module, images: Tensor, notes: Mapping[str, str] | None = None) -> bytes:
    """The network in evaluation mode as one ONNX file: ``X`` float32 (batch, C, H, W) in [0, 1] to ``Y`` (batch, K).

    The weights are stored as they are, except that torch's exporter folds a batch norm into the convolution or linear
    layer before it; a network that is folded already keeps every bit. The network itself is left alone.

    Args:
        network: takes raw pixels, on any device, with float32 weights.
        images: a few raw images (batch, C, H, W); they give the shape, and the file must reproduce their logits.
        notes: what the file says of itself, by name.

    Raises:
        UsageError: the packages of the extra ``export`` are not installed.
        RunError: weights that are not finite float32, a network that cannot be exported, or a file that computes
            something else than the network.
    """
    tools = require_packages()
    deployed = copy.deepcopy(network).cpu().eval()
    _check_weights(deployed)
    images = images.detach().cpu()
    try:
        program = torch.onnx.export(
            deployed,
            # Two images, because the exporter takes a size of one for a constant.
            (torch.zeros(2, *images.shape[1:]),),
            input_names=["X"],
            output_names=["Y"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"torch cannot export this network to ONNX: {line}") from error
    assert program is not None  # it is None only from the exporter that dynamo=True leaves behind
    model = program.model_proto
    _forget_sources(model)
    tools["onnx"].helper.set_model_props(model, dict(notes or {}))
    tools["onnx"].checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    _check_outputs(tools["onnxruntime"], content, deployed, images)
    return content


def require_packages() -> dict[str, Any]:
    """The modules of the extra ``export`` by name.

    Raises:
        UsageError: one is not installed.
    """
    found = {}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = importlib.import_module(package)
        except ImportError as error:
            raise UsageError(
                f"ONNX export needs the package {package} ({error}): pip install certbench[export]"
            ) from None
    return found


def _check_weights(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or not tensor.isfinite().all()):
            what = tensor.dtype if tensor.dtype != torch.float32 else "NaN or infinity"
            raise RunError(f"cannot export: weight {name} holds {what}, and ONNX gets finite float32 weights")


def _forget_sources(model: Any) -> None:
    """Drop the stack traces that the exporter notes at each node: they name folders of this machine."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _check_outputs(onnxruntime: Any, content: bytes, network: nn.Module, images: Tensor) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; it warns of missing GPUs
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["Y"], {"X": images.numpy()})
    with torch.no_grad():
        expected = network(images).numpy()
    same_shape = found.shape == expected.shape
    if not same_shape or not np.allclose(
        found, expected, rtol=0, atol=TOLERANCE * max(1, abs(expected).max())
    ):
        gap = (
            f"logits differ by {abs(found - expected).max():.2g}" if same_shape else f"shape is {found.shape}"
        )
        raise RunError(f"the exported ONNX network does not compute what torch computes: its {gap}")
