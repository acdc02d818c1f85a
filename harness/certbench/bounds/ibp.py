"""The ``ibp`` certifier: interval bounds with the classification layer merged, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from certbench.bounds.box import input_box
from certbench.bounds.graph import Graph
from certbench.bounds.radius import Bracket, MarginFunction, largest_proved_radius
from certbench.bounds.trace import trace
from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import to_pixels
from certbench.errors import RunError
from certbench.threat import round_down, round_up

NAME = "ibp"
CHUNK = 250
"""Images per bound pass. Part of the protocol: the shape of a batch decides the last bits of its results."""
RELATIVE_TOLERANCE = 2.0**-20
"""Width of the final bracket of a radius, as a share of the cap."""
SETTINGS = {
    "certifier": NAME,
    "precision": "float64",
    "chunk": CHUNK,
    "relative_tolerance": RELATIVE_TOLERANCE,
}


def certify(task: CertifyTask) -> Iterator[Certificates]:
    """Certificates of ``task.split`` in order, one batch of at most ``CHUNK`` images after the other.

    The network is bounded in float64 around the float32 images that the deployed network sees, so the guarantee is
    ``real_arith``. An image whose bounds are not finite gets the verdict ``error``.

    Raises:
        RunError: the task holds no image, or the network has weights that are not finite.
    """
    if not len(task.split):
        raise RunError("there is no image to certify")
    network = copy.deepcopy(task.network).double().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"cannot certify: weight {name} holds NaN or infinity; train again")
    first = to_pixels(task.split.images[:1], task.levels)
    graph = trace(network, tuple(first.shape[1:]))
    starts = range(0, len(task.split), CHUNK)
    with _one_thread_each(task.device) as workers, torch.inference_mode():
        yield from workers.map(lambda start: _certify_chunk(task, graph, start), starts)


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Workers that run one chunk each on a single thread: the number of threads per operation would change bits."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=cores if device.type == "cpu" else 1) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)


def _certify_chunk(task: CertifyTask, graph: Graph, start: int) -> Certificates:
    with torch.inference_mode():
        part = task.split.slice(start, start + CHUNK)
        images = to_pixels(part.images, task.levels, torch.float64)
        return _decide(task, graph, images, part.labels, task.start + start)


def _decide(
    task: CertifyTask, graph: Graph, images: Tensor, labels: Tensor, first_index: int
) -> Certificates:
    """Verdict, margin and radius of one chunk; images (batch, channels, height, width) in float64."""

    def margin(which: Tensor, eps: Tensor) -> Tensor:
        """Smallest margin bound of the images ``which`` at one radius each; NaN is kept, so it proves nothing."""
        return graph.bound(input_box(images[which], eps)).margins(labels[which]).amin(1)

    logits = graph.run(images).logits
    prediction = logits.argmax(1)
    everything = torch.arange(len(labels), device=images.device)
    radius, cap = round_up(task.radius), round_up(task.cap)
    at_radius = margin(everything, torch.full_like(images[:, 0, 0, 0], radius))
    correct, proved = prediction == labels, at_radius > 0
    broken = ~(at_radius.isfinite() & logits.isfinite().all(1))

    searched = (correct & ~broken).nonzero().squeeze(1)
    radii = torch.zeros_like(at_radius)
    passes = torch.ones(len(labels), dtype=torch.int32, device=images.device)
    found, spent = _search(margin, searched, logits, labels, at_radius, radius, cap)
    radii[searched] = found.clamp_max(round_down(task.cap))
    passes[searched] += spent

    verdict = np.full(len(labels), "unknown", dtype=object)
    verdict[(proved & correct).numpy(force=True)] = "certified"
    verdict[(~correct).numpy(force=True)] = "misclassified"
    verdict[broken.numpy(force=True)] = "error"
    radii[broken] = torch.nan
    return Certificates(
        index=np.arange(first_index, first_index + len(labels), dtype=np.int32),
        prediction=prediction.numpy(force=True),
        verdict=verdict,
        radius=radii.numpy(force=True),
        margin=torch.where(broken, torch.nan, at_radius).numpy(force=True),
        proved_by=np.where((radii > 0).numpy(force=True), NAME, "").astype(object),
        passes=passes.numpy(force=True),
        guarantee="real_arith",
    )


def _search(
    margin: MarginFunction,
    which: Tensor,
    logits: Tensor,
    labels: Tensor,
    at_radius: Tensor,
    radius: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Largest proved radii in [0, cap] of correctly classified images, and the bound passes spent on each."""
    own = logits[which].gather(1, labels[which, None]).squeeze(1)
    others = logits[which].scatter(1, labels[which, None], -torch.inf).amax(1)
    at_zero, at_radius = own - others, at_radius[which]
    proved = at_radius > 0
    zeros = torch.zeros_like(at_radius)
    low, f_low = torch.where(proved, radius, zeros), torch.where(proved, at_radius, at_zero)
    high, f_high = torch.where(proved, cap, zeros + radius), torch.where(proved, zeros, at_radius)
    spent = torch.zeros_like(which, dtype=torch.int32)
    upward = (proved & (low < high)).nonzero().squeeze(1)
    if len(upward):
        f_high[upward] = margin(which[upward], high[upward])
        spent[upward] += 1
        whole = upward[f_high[upward] > 0]
        low[whole] = cap
    low = torch.where(f_low > 0, low, high)  # an exact tie has no bracket: nothing to search, radius 0 below
    found, passes = largest_proved_radius(
        lambda active, eps: margin(which[active], eps),
        Bracket(low, f_low, high, f_high),
        tolerance=RELATIVE_TOLERANCE * cap,
    )
    return torch.where(f_low > 0, found, zeros), spent + passes
