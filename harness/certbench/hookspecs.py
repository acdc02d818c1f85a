"""The hooks a plugin may implement: what goes in, what comes out, when it is called, what it may raise.

A plugin is a module named by an entry point of the group ``certbench``; its functions carry ``@hookimpl``. The module
imports torch inside its hooks only, so that ``certbench --help`` and ``certbench list`` stay fast. This file holds
signatures and no logic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch

    from certbench.contract import Certificates, CertifyTask, MethodCard, TrainTask
    from certbench.data.info import DatasetInfo

hookspec = pluggy.HookspecMarker("certbench")
hookimpl = pluggy.HookimplMarker("certbench")


@hookspec
def register_methods() -> Iterable[MethodCard]:  # type: ignore[empty-body]  # a specification has no body
    """Name the methods this plugin brings.

    Called once, before anything runs, and must not import torch. Two plugins that name one method are an error that
    names both distributions.
    """


@hookspec(firstresult=True)
def train(task: TrainTask) -> torch.nn.Module:  # type: ignore[empty-body]  # a specification has no body
    """Train the network of ``task.recipe`` and return it in evaluation mode.

    Called only for methods this plugin registered. Usually builds an objective and hands it to
    :func:`certbench.training.fit`, which resumes from ``task.folder``; called again after training has finished, it
    returns the finished network without training. May raise :class:`certbench.errors.CertbenchError` with one line
    for the user; anything else is reported as this plugin's fault.
    """


@hookspec(firstresult=True)
def certify(task: CertifyTask) -> Iterable[Certificates]:  # type: ignore[empty-body]  # a specification has no body
    """Decide every image of ``task.split``, in order.

    Optional: a plugin without it gets the certifier that its card or the recipe names. A plugin with it certifies its
    methods itself wherever a recipe does not name another certifier than the card's; the rows then carry the method's
    name as their certifier. The network comes in
    evaluation mode and must come back unchanged. Every image gets exactly one certificate; what could not be decided
    is named by its verdict and never left out.
    """


@hookspec
def register_datasets() -> Iterable[DatasetInfo]:  # type: ignore[empty-body]  # a specification has no body
    """Describe the data sets this plugin brings.

    Called when a data set is looked up or listed, and must not import torch: an entry names its ``reader`` as
    ``package.module:function``, and only loading the data set imports that. The reader gets the entry and the data
    folder and returns (training images, labels), (test images, labels) as arrays in published order; it may raise
    :class:`certbench.errors.DataError`. A name that is taken is an error that names both distributions.
    """


@hookspec
def register_models() -> Mapping[str, Callable[[DatasetInfo], torch.nn.Module]]:  # type: ignore[empty-body]  # as above
    """Name the networks this plugin brings, each with a function that builds it for a data set.

    Called when a network is built or listed; may import torch. A builder gets the data set's entry and returns a fresh
    network for *normalised* images of its shape, with one logit per class; torch's global generator is seeded for it,
    so its first weights must come from there and from the entry alone. The first line of its docstring is the summary.
    It may raise :class:`certbench.errors.UsageError` for a data set that it does not fit. A name that is taken is an
    error that names both distributions.
    """
