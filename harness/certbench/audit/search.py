"""Searches for witnesses: projected gradient descent, plain and automatic, on whole batches of balls.

Every point that is looked at is a float32 image inside its ball, so nothing that is found has to be repaired
afterwards. Balls leave the batch as soon as a witness of theirs is confirmed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor, nn

from certbench.audit.ball import Ball, broadcast
from certbench.audit.losses import LOSSES, smallest_margin
from certbench.audit.registry import Attack, Phase
from certbench.errors import RunError

Confirm = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) -> bool (batch,): do these witnesses hold at the level of the guarantee?"""
Loss = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int, int], Tensor]
"""(phase, restart) -> uniform numbers in [0, 1), float32, one per pixel of the batch."""


class Found(IntEnum):
    """What is known of a ball, from least to most; ``BROKEN`` means that the centre itself has no finite logits."""

    NOTHING = 0
    FLIP = 1
    WITNESS = 2
    BROKEN = 3


class Hunt:
    """A batch of balls under attack.

    ``found`` (batch,) says what is known of each, ``witness`` (batch, *image) holds the image that shows it (the
    centre where there is none). A flip that the guarantee's own level does not confirm is kept, and the hunt for a
    better one goes on. Gradients are taken at the network's :func:`gradient_guide`; what counts as a flip is decided by
    the network itself.

    Raises:
        RunError: no ball, labels that do not fit, or a network whose output does not.
    """

    def __init__(self, network: nn.Module, balls: Ball, labels: Tensor, confirm: Confirm) -> None:
        self.network, self.balls, self.labels, self.confirm = network, balls, labels, confirm
        self.guide = gradient_guide(network)
        if labels.shape != balls.radius.shape or labels.dtype != torch.int64 or not len(labels):
            raise RunError(
                f"{len(balls.radius)} balls need as many labels (int64), not {tuple(labels.shape)}"
            )
        self.found = torch.zeros_like(labels)
        self.witness = balls.center.clone()
        with torch.no_grad():
            logits = self.logits(balls.center)
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise RunError(
                f"labels {int(labels.min())} to {int(labels.max())} do not fit a network of {logits.shape[1]} classes"
            )
        self.found[~logits.isfinite().all(1)] = Found.BROKEN
        self._judge(torch.arange(len(labels), device=labels.device), balls.center, logits)

    def logits(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """Those of the network under attack, or of its guide.

        Raises:
            RunError: the network's output is not (batch, classes).
        """
        logits: Tensor = (network or self.network)(images)
        good = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(images)
        if not good or logits.shape[1] < 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RunError(
                f"the network gives {shape} for {len(images)} images; it must give (images, classes)"
            )
        return logits

    def open(self) -> Tensor:
        """The balls still to be attacked, as indices."""
        return (self.found < Found.WITNESS).nonzero().squeeze(1)

    def look(self, which: Tensor, images: Tensor, loss: Loss, gradient: bool = True) -> tuple[Tensor, Tensor]:
        """Loss and its gradient at one image of each ball ``which``; flips are noted on the way."""
        with torch.set_grad_enabled(gradient):
            point = images.detach().requires_grad_(gradient)
            logits = self.logits(point, self.guide)
            values = loss(logits, self.labels[which])
            slope = _slope(values, point) if gradient else torch.zeros_like(images)
        if self.guide is not self.network:
            with torch.no_grad():
                logits = self.logits(images)
        self._judge(which, images, logits.detach())
        return values.detach(), slope

    def _judge(self, which: Tensor, images: Tensor, logits: Tensor) -> None:
        flipped = ~(smallest_margin(logits, self.labels[which]) > 0) & (self.found[which] < Found.WITNESS)
        if not flipped.any():
            return
        which, images = which[flipped], images[flipped]
        level = torch.where(self.confirm(images, self.labels[which]), Found.WITNESS, Found.FLIP)
        new = level > self.found[which]
        self.found[which[new]] = level[new].to(self.found.dtype)
        self.witness[which[new]] = images[new]


def _slope(values: Tensor, point: Tensor) -> Tensor:
    """
    Raises:
        RunError: no gradient reaches the pixels, so that any attack would report false robustness.
    """
    found = torch.autograd.grad(values.sum(), point, allow_unused=True)[0] if values.requires_grad else None
    if found is None:
        raise RunError(
            "no gradient reaches the pixels of this network, so attacks on it are blind; give the module that hides it "
            "a method gradient_surrogate()"
        )
    return found


def gradient_guide(network: nn.Module) -> nn.Module:
    """What shows an attack the way: the network, or a copy where some of its modules bring a stand-in.

    A module that hides its gradient, because it rounds for instance, may have a method ``gradient_surrogate()`` that
    returns a module with the same outputs and a useful gradient. The copy only steers the search; it judges nothing.
    """
    hidden = [name for name, module in network.named_modules() if hasattr(module, "gradient_surrogate")]
    if not hidden:
        return network
    if "" in hidden:
        return network.gradient_surrogate()  # type: ignore[no-any-return,operator]  # found by its name
    guide = copy.deepcopy(network)
    for name in hidden:
        parent, _, child = name.rpartition(".")
        owner = guide.get_submodule(parent)
        setattr(owner, child, owner.get_submodule(child).gradient_surrogate())  # type: ignore[operator]  # as above
    return guide


def hunt(
    network: nn.Module, balls: Ball, labels: Tensor, attack: Attack, confirm: Confirm, draw: Draw
) -> Hunt:
    """Attack every ball with every phase until a witness is confirmed."""
    state = Hunt(network, balls, labels, confirm)
    for number, phase in enumerate(attack.phases):
        search = {"apgd": apgd, "pgd": pgd}[phase.search]
        for restart in range(phase.restarts):
            which = state.open()
            if not len(which):
                return state
            share = draw(number, restart).to(balls.center.device)[which]
            low, high = balls.low[which], balls.high[which]
            search(state, which, balls.project(low + share * (high - low), which), phase)
    return state


def pgd(state: Hunt, which: Tensor, start: Tensor, phase: Phase) -> None:
    """Projected gradient ascent with steps of one size, along the sign of the gradient."""
    loss, x = LOSSES[phase.loss], start
    _, g = state.look(which, x, loss)
    for k in range(1, phase.steps + 1):
        stay = state.found[which] < Found.WITNESS
        if not stay.all():
            which, x, g = which[stay], x[stay], g[stay]
            if not len(which):
                return
        step = broadcast(state.balls.radius[which] * (phase.pgd_step / phase.steps), x).to(x.dtype)
        x = state.balls.project(x + step * g.nan_to_num().sign(), which)
        _, g = state.look(which, x, loss, gradient=k < phase.steps)


# Automatic step sizes ----------------------------------------------------------------------------------------------

MOMENTUM = 0.75
"""alpha: the share of the gradient step in a move."""
ENOUGH_RISES = 0.75
"""rho: the share of steps between checkpoints that must increase the loss."""


def checkpoints(steps: int) -> Iterator[int]:
    """``ceil(p_j steps)`` with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in percent."""
    before, at = 0, 22
    while at <= 100:
        yield math.ceil(at * steps / 100)
        before, at = at, at + max(at - before - 3, 6)


@dataclass(frozen=True)
class _State:
    """Per ball: iterate and the one before, loss and gradient there, the best of all, and the step's history."""

    which: Tensor
    x: Tensor
    x_before: Tensor
    f: Tensor
    g: Tensor
    x_max: Tensor
    f_max: Tensor
    g_max: Tensor
    eta: Tensor
    rises: Tensor
    f_max_before: Tensor
    halved: Tensor

    def keep(self, mask: Tensor) -> _State:
        return _State(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})


def apgd(state: Hunt, which: Tensor, start: Tensor, phase: Phase) -> None:
    """Auto-PGD of Croce and Hein 2020 (arXiv 2003.01690), with the symbols of its algorithm 1.

    The step eta starts at twice the radius and is halved at a checkpoint where the loss rose too seldom, or where
    neither step nor best loss changed since the checkpoint before; the search then goes on from the best point.
    """
    loss = LOSSES[phase.loss]
    f, g = state.look(which, start, loss)
    eta = (2 * state.balls.radius[which]).to(start.dtype)
    none = torch.zeros_like(which)
    s = _State(which, start, start, f, g, start, f, g, eta, none, f, none.bool())
    marks = {mark: mark - before for before, mark in _pairs(phase.steps)}
    for k in range(1, phase.steps + 1):
        stay = state.found[s.which] < Found.WITNESS
        if not stay.all():
            s = s.keep(stay)
            if not len(s.which):
                return
        s = _move(state, s, loss, first=k == 1, last=k == phase.steps)
        if k in marks:
            s = _adapt(s, marks[k])


def _pairs(steps: int) -> Iterator[tuple[int, int]]:
    before = 0
    for mark in checkpoints(steps):
        if mark > before:
            yield before, mark
            before = mark


def _move(state: Hunt, s: _State, loss: Loss, first: bool, last: bool) -> _State:
    project = state.balls.project
    z = project(s.x + broadcast(s.eta, s.x) * s.g.nan_to_num().sign(), s.which)
    if not first:
        z = project(s.x + MOMENTUM * (z - s.x) + (1 - MOMENTUM) * (s.x - s.x_before), s.which)
    f, g = state.look(s.which, z, loss, gradient=not last)
    better = f > s.f_max
    wide = broadcast(better, z)
    return replace(
        s,
        x=z,
        x_before=s.x,
        f=f,
        g=g,
        x_max=torch.where(wide, z, s.x_max),
        f_max=torch.where(better, f, s.f_max),
        g_max=torch.where(wide, g, s.g_max),
        rises=s.rises + (f > s.f),
    )


def _adapt(s: _State, window: int) -> _State:
    seldom = s.rises < ENOUGH_RISES * window
    stuck = ~s.halved & (s.f_max == s.f_max_before)
    halve = seldom | stuck
    wide = broadcast(halve, s.x)
    return replace(
        s,
        eta=torch.where(halve, s.eta / 2, s.eta),
        x=torch.where(wide, s.x_max, s.x),
        f=torch.where(halve, s.f_max, s.f),
        g=torch.where(wide, s.g_max, s.g),
        rises=torch.zeros_like(s.rises),
        f_max_before=s.f_max,
        halved=halve,
    )
