"""Logits in real arithmetic: evaluated in float64, with a rigorous bound on the round-off beside every number.

``bounded`` says what such a number is and has the rules of layers and arithmetic, ``activations`` those of activations.
An operation without a rule is an error, never a guess.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from certbench.audit import activations, bounded
from certbench.audit.bounded import LARGEST, UNIT, Bounded, UnsupportedError, exact, more, moving


class Enclosure:
    """Evaluates a copy of a network, in evaluation mode, with error bounds.

    Raises:
        UnsupportedError: the network cannot be traced, or has an operation without a rule.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        double = copy.deepcopy(network).to(device="cpu", dtype=torch.float64).eval()
        for name, module in double.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                raise UnsupportedError(
                    f"module {name or 'network'} has a hook, or a forward of its own instance"
                )
        for name, tensor in double.state_dict().items():
            if tensor.is_floating_point() and not (tensor.abs() < LARGEST).all():
                raise UnsupportedError(f"weight {name} is not finite, or too large to bound what underflows")
        try:
            self._graph = fx.symbolic_trace(nn.Sequential(double))
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UnsupportedError(f"the network cannot be traced ({line})") from error
        self.logits(torch.zeros(1, *shape))  # a missing rule is found here, before any attack

    def logits(self, images: Tensor) -> Bounded:
        """Logits of images taken as exact; float32 or float64, shape (batch, *shape), on any device.

        Raises:
            UnsupportedError: an operation without a rule.
        """
        value = images.detach().to(device="cpu", dtype=torch.float64).clone()
        with torch.no_grad():
            # a new interpreter each time: it keeps the values it is working on, and chunks run in parallel
            result = _Interpreter(self._graph).run(exact(value))
        if not isinstance(result, Bounded):
            raise UnsupportedError(f"the network returns {type(result).__name__}, not one tensor")
        return result

    def is_flipped(self, images: Tensor, labels: Tensor) -> Tensor:
        """Where the label's logit is provably not strictly the largest; bool (batch,), on the CPU.

        Raises:
            UnsupportedError: an operation without a rule.
        """
        logits = self.logits(images)
        own = labels.cpu()[:, None]
        ahead = logits.value - logits.value.gather(1, own)
        slack = more(logits.error + logits.error.gather(1, own) + 2 * UNIT * ahead.abs(), 8)
        proved = (ahead >= slack) & slack.isfinite() & ahead.isfinite()
        return proved.scatter(1, own, False).any(1)


class _Interpreter(fx.Interpreter):
    """Runs the traced graph on :class:`Bounded` values; everything that holds a tensor but an index is one."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Bounded:
        found = self.fetch_attr(target)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise UnsupportedError(f"no rule for the constant {target}")
        return exact(found)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        rule = MODULES.get(type(module))
        if rule is None or len(args) != 1 or kwargs or not isinstance(args[0], Bounded):
            raise UnsupportedError(f"no rule for module {target} ({type(module).__name__})")
        return rule(module, args[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (operator.add, operator.sub, operator.mul, operator.floordiv) and _all_int(args):
            return target(*args)
        if target is operator.getitem and _all_int([*args[0], args[1]]):
            return args[0][args[1]]
        return self._apply(FUNCTIONS.get(target), getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._apply(METHODS.get(target), f"Tensor.{target}", args, kwargs)

    def _apply(self, rule: Callable[..., Any] | None, name: str, args: Any, kwargs: Any) -> Any:
        try:
            if rule is not None:
                return rule(*args, **kwargs)
        except (TypeError, AttributeError, ValueError) as error:  # arguments that the rule does not know
            raise UnsupportedError(f"no rule for {name} with these arguments ({error})") from error
        raise UnsupportedError(f"no rule for {name}")


def _all_int(values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


MODULES: dict[type[nn.Module], Callable[[nn.Module, Bounded], Bounded]] = {
    nn.Linear: bounded.linear_module,
    nn.Conv2d: bounded.conv2d_module,
    nn.BatchNorm1d: bounded.batch_norm,
    nn.BatchNorm2d: bounded.batch_norm,
    nn.AvgPool2d: bounded.avg_pool2d_module,
    nn.AdaptiveAvgPool2d: bounded.avg_pool2d_module,
    nn.MaxPool2d: lambda m, x: Bounded(m(x.value), m(x.error)),
    nn.ReLU: lambda m, x: bounded.relu(x, bool(m.inplace)),
    nn.Identity: lambda m, x: x,
    nn.Dropout: lambda m, x: x,
    nn.Dropout2d: lambda m, x: x,
    nn.Flatten: lambda m, x: moving(m)(x),
    **activations.ACTIVATION_MODULES,
}
"""Rules by exact type: a subclass may compute something else."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: bounded.linear,
    F.conv2d: bounded.conv2d,
    torch.conv2d: bounded.conv2d,
    F.avg_pool2d: bounded.avg_pool2d,
    F.adaptive_avg_pool2d: bounded.adaptive_avg_pool2d,
    F.max_pool2d: bounded.max_pool2d,
    F.relu: bounded.relu,
    torch.relu: bounded.relu,
    torch.flatten: moving(torch.flatten),
    torch.cat: bounded.cat,
    torch.bucketize: bounded.bucketize,
    torch.take: bounded.take,
    torch.mean: bounded.mean,
    torch.neg: bounded.neg,
    operator.neg: bounded.neg,
    operator.iadd: lambda a, b: bounded.written(a, bounded.add(a, b), inplace=True),
    getattr: lambda x, name: tuple(x.value.shape) if name == "shape" else _missing(name),
    **dict.fromkeys((operator.add, torch.add), bounded.add),
    **dict.fromkeys((operator.sub, torch.sub), bounded.sub),
    **dict.fromkeys((operator.mul, torch.mul), bounded.mul),
    **dict.fromkeys((operator.truediv, torch.div), bounded.div),
    **activations.ACTIVATIONS,
}

METHODS: dict[str, Callable[..., Any]] = {
    "add": bounded.add,
    "sub": bounded.sub,
    "mul": bounded.mul,
    "div": bounded.div,
    "relu": bounded.relu,
    "relu_": lambda x: bounded.relu(x, inplace=True),
    "mean": bounded.mean,
    "size": lambda x, *args: x.value.size(*args),
    **{
        name: moving(getattr(Tensor, name)) for name in ("flatten", "view", "reshape", "squeeze", "unsqueeze")
    },
    **activations.METHODS,
}


def _missing(name: str) -> Any:
    raise UnsupportedError(f"no rule for the attribute {name}")
