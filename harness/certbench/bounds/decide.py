"""From bounds to certificates: what may be certified, in which chunks, and what happens when memory runs out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from certbench.bounds.box import input_box
from certbench.bounds.cascade import Bound, Chunk, all_sound
from certbench.bounds.graph import Graph
from certbench.bounds.trace import trace
from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import to_pixels
from certbench.errors import RunError
from certbench.models.fold import deployed_network
from certbench.models.kernels import one_thread_each, plain_kernels

log = logging.getLogger(__name__)
_PROBE = 250
"""Images on which the folded network is compared with the trained one."""


def certify(bounds: Sequence[Bound], task: CertifyTask) -> Iterator[Certificates]:
    """Certificates of ``task.split`` in order, in batches.

    What is bounded, in float64 and around the float32 images that it sees, is the deployed network: batch norms folded.
    Under ``float_sound`` bounds the prediction is that of the deployed network in its own float32, otherwise that of
    real arithmetic (float64). An image outside [0, 1], with a label out of range, or with bounds that are not finite
    gets the verdict ``error``. Where memory runs out, the batch is halved and the log says so; a single image that does
    not fit gets the verdict ``error``.

    Raises:
        RunError: the task holds no image; the network is in training mode, has weights that are not finite or of a
            wrong type, or does not return logits of shape (batch, classes); an evaluation contradicts a proof.
        UsageError: the network cannot be traced, or an operation has no rule.
    """
    if not len(task.split):
        raise RunError("there is no image to certify")
    check_network(task.network)
    deployed = deployed_network(task.network)
    network = copy.deepcopy(deployed).double().requires_grad_(False)
    first = to_pixels(task.split.images[:_PROBE], task.levels)
    graph = trace(network, tuple(first.shape[1:]))
    _check_evaluations(task.network, network, graph, first.double())
    evaluate = _evaluation(bounds, deployed, graph)
    size = min(bound.chunk for bound in bounds)
    ranges = [(start, min(start + size, len(task.split))) for start in range(0, len(task.split), size)]

    def chunk(start: int, stop: int) -> Chunk:
        return Chunk(bounds, task, graph, evaluate, start, stop)

    with plain_kernels(), one_thread_each(task.device) as workers:
        for parts in workers.map(lambda ends: _in_halves(chunk, *ends), ranges):
            yield from parts


def check_network(network: nn.Module) -> None:
    """
    Raises:
        RunError: it is in training mode, or has weights that are not finite.
    """
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise RunError(f"cannot certify in training mode ({training[0]}); call eval() on the network first")
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"cannot certify: weight {name} holds NaN or infinity; train again")


def _check_evaluations(network: nn.Module, deployed: nn.Module, graph: Graph, images: Tensor) -> None:
    """
    Raises:
        RunError: the deployed network computes something else than the trained one, or the bounds at radius 0 enclose
            something else than the deployed network computes. Either would be a bug, caught before any certificate.
    """
    images = images.nan_to_num(0.0).clamp(0.0, 1.0)  # bad images are dealt with one by one, later
    zero = torch.zeros_like(images[:, 0, 0, 0])
    with torch.no_grad():
        trained, folded = copy.deepcopy(network).double()(images.clone()), deployed(images.clone())
        bounded = graph.bound(input_box(images, zero)).logits.center
    if not _agree(trained, folded):
        raise RunError(
            f"folding batch norms changed what {type(network).__name__} computes; it cannot be certified"
        )
    if not _agree(folded, bounded):
        raise RunError(
            f"the bounds of {type(network).__name__} at radius 0 are not what it computes; it cannot be certified"
        )


def _agree(one: Tensor, two: Tensor) -> bool:
    scale = float(one.abs().nan_to_num(0.0, 0.0).max()) if one.numel() else 0.0
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _evaluation(bounds: Sequence[Bound], deployed: nn.Module, graph: Graph) -> Callable[[Tensor], Tensor]:
    """The logits that predictions are made from, in float64, for images in float64.

    Under a float-sound guarantee they come from the deployed network itself, in float32, which is one of the
    evaluations admitted at every precision but float64.

    Raises:
        RunError: weights that are deployed in float32 are stored in another type.
    """
    if not all_sound(bounds) or any(bound.deploy == "float64" for bound in bounds):
        return lambda images: graph.run(images).logits
    for name, tensor in deployed.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise RunError(
                f"cannot certify for {bounds[0].deploy}: weight {name} is stored in {tensor.dtype}, not in float32"
            )

    def logits(images: Tensor) -> Tensor:
        found: Tensor = deployed(images.float())
        return found.double()

    return logits


def _in_halves(chunk: Callable[[int, int], Chunk], start: int, stop: int) -> list[Certificates]:
    """Certificates of images start to stop, halved as often as memory asks for."""
    try:
        return [chunk(start, stop).certificates()]
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # does nothing where no GPU is in use
    if stop - start == 1:
        log.warning("out of memory on image %d of this part alone: verdict error", start)
        return [chunk(start, stop).failure()]
    middle = (start + stop) // 2
    log.warning(
        "out of memory on images %d to %d: going on with batches of %d", start, stop - 1, stop - middle
    )
    return [*_in_halves(chunk, start, middle), *_in_halves(chunk, middle, stop)]


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
