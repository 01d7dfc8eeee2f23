"""From a configuration to a problem, an optimizer and minibatches."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from . import data, models
from .config import Config, DataConfig, LossConfig
from .errors import ConfigError, DataError, ThermogradError
from .losses import half_squared_error, half_squared_error_one_hot
from .minibatches import Minibatches
from .problem import Problem
from .samples import Samples

__all__ = ["LOSSES", "Experiment", "build"]


def _binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Logistic loss of a single score for labels 0 and 1."""
    score = output.squeeze(-1) if output.ndim > target.ndim else output
    return F.binary_cross_entropy_with_logits(score, target.to(score.dtype))


LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse_one_hot": lambda: half_squared_error_one_hot,
    "half_squared_error": lambda: half_squared_error,
    "mse": nn.MSELoss,
    "bce": lambda: _binary_cross_entropy,
}


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes. It unpacks: ``problem, optimizer, batches = build(config)``.

    Args:
        problem: model, loss and data; its parameters are those selected by ``training.record``.
        optimizer: over all parameters of the model.
        batches: the stream of minibatch indices.
        scheduler: of the learning rate, or None.
        inputs: all inputs in the precision and on the device of the training.
        targets: all targets, likewise.
    """

    problem: Problem
    optimizer: torch.optim.Optimizer
    batches: Minibatches
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    inputs: Any
    targets: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.problem, self.optimizer, self.batches))


def build(config: Config) -> Experiment:
    """Build everything that a configuration names; the weights are drawn from ``run.seed``.

    Raises:
        ConfigError: a name or an argument is wrong.
        ModelError, LossError, DataError: the parts do not fit together.
    """
    dtype = getattr(torch, config.training.dtype)
    device = _device(config.run.device)
    with _importable(config.run.path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        samples = _data(config.data)
        torch.manual_seed(config.run.seed)  # the weights do not depend on what the data loader drew
        model = _model(config).to(device=device, dtype=dtype)
        loss = _loss(config.loss)
        problem = Problem(
            model,
            loss,
            (samples.inputs, samples.targets),
            params=config.training.record,
            dtype=getattr(torch, config.measure.dtype),
        )
    optimizer = _optimizer(config, model)
    inputs, targets = samples.take(slice(None), device, dtype)
    training = config.training
    batches = Minibatches(problem.N, training.batch_size, training.sampling, config.run.seed, training.drop_last)
    return Experiment(problem, optimizer, batches, _scheduler(config, optimizer), inputs, targets)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device {name!r} cannot be used: {error}", expected="a device of this machine"
        ) from error
    return device


def _model(config: Config) -> nn.Module:
    name = config.model.name
    known = {n: getattr(models, n) for n in models.NAMES}
    model = _call("model", name, known, config.model.arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name = {name!r} returns a {type(model).__name__}", expected="a torch.nn.Module")
    return model


def _loss(config: LossConfig) -> Any:
    if ":" not in config.name:
        return _call("loss", config.name, LOSSES, config.arguments)
    return _import("loss", config.name) if not config.arguments else _call("loss", config.name, {}, config.arguments)


def _data(config: DataConfig) -> Samples:
    """The data set, cut to ``n`` samples and with its wrong labels."""
    if ":" in config.name:
        samples = Samples.from_any(_call("data", config.name, {}, config.arguments))
        samples = _take(samples, config.n, config.n_seed)
        if not config.label_noise:
            return samples
        return Samples(samples.inputs, _noisy(samples.targets, config))
    if config.name.lower().endswith((".csv", ".csv.gz")):
        _check_arguments("data", data.csv_table, {"path": config.name, **config.arguments})
        dataset = data.csv_table(Path(config.folder or ".") / config.name, **config.arguments)
        dataset = dataset.take(config.n, config.n_seed)
    else:
        unknown = sorted(set(config.arguments) - {"download"})
        if unknown:
            raise ConfigError(f"unknown key data.arguments.{unknown[0]}", expected=f"download, for {config.name}")
        dataset = data.load(
            config.name, config.folder, config.split, n=config.n, seed=config.n_seed, **config.arguments
        )
    if config.label_noise:
        dataset = dataset.with_label_noise(config.label_noise, config.label_noise_seed)
    return Samples(dataset.X, dataset.y)


def _take(samples: Samples, n: int | None, seed: int | None) -> Samples:
    if n is None:
        return samples
    if n > len(samples):
        raise DataError(f"data.n is {n}", expected=f"at most {len(samples)}, the size of the data set")
    index = torch.arange(n)
    if seed is not None:
        index = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    inputs, targets = tree_map(lambda leaf: leaf[index], (samples.inputs, samples.targets))
    return Samples(inputs, targets)


def _noisy(targets: Any, config: DataConfig) -> Tensor:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
        raise DataError("data.label_noise is set but the targets are not class labels", expected="whole numbers [N]")
    return data.noisy_labels(targets, int(targets.max()) + 1, config.label_noise, config.label_noise_seed)


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    wanted = config.optimizer
    kind = _torch_class("optimizer", wanted.name, torch.optim, torch.optim.Optimizer, exclude={"Optimizer", "LBFGS"})
    given: dict[str, Any] = {"lr": wanted.lr, "weight_decay": wanted.weight_decay}
    if wanted.is_sgd:
        given |= {"momentum": wanted.momentum, "nesterov": wanted.nesterov, "dampening": wanted.dampening}
    elif not wanted.weight_decay:
        del given["weight_decay"]  # not every optimizer has it
    if wanted.is_sgd and config.run.device == "cpu":
        given["fused"] = True  # the same update in one call: half the time of a small network's step
    given |= {k: tuple(v) if isinstance(v, list) else v for k, v in wanted.arguments.items()}
    _check_arguments("optimizer", kind, {"params": [], **given})
    try:
        return kind(model.parameters(), **given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{kind.__name__} refuses its arguments {given}: {error}") from error


def _scheduler(config: Config, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    wanted = config.training.schedule
    if wanted is None:
        return None
    module = torch.optim.lr_scheduler
    exclude = {"LRScheduler", "ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
    kind = _torch_class("training.schedule", wanted.name, module, module.LRScheduler, exclude=exclude)
    _check_arguments("training.schedule", kind, {"optimizer": optimizer, **wanted.arguments})
    try:
        return kind(optimizer, **wanted.arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{kind.__name__} refuses its arguments {wanted.arguments}: {error}") from error


# ---------------------------------------------------------------------- names to objects


@contextlib.contextmanager
def _importable(folders: Sequence[str]) -> Iterator[None]:
    """Let modules beside the configuration and in the current folder be imported, if anything is to be imported."""
    before = list(sys.path)
    sys.path[:0] = [*folders, str(Path.cwd())] if folders else []
    try:
        yield
    finally:
        sys.path[:] = before


def _torch_class(section: str, name: str, module: Any, base: type, exclude: set[str]) -> Any:
    classes = {
        n.lower(): c
        for n, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, base) and n not in exclude and not n.startswith("_")
    }
    if name.lower() not in classes:
        raise _unknown_name(section, name, [c.__name__ for c in classes.values()])
    return classes[name.lower()]


def _call(section: str, name: str, known: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Any]) -> Any:
    """Call a built-in function or one given by import path with the configured arguments."""
    if ":" in name:
        function = _import(section, name)
    elif name in known:
        function = known[name]
    else:
        raise _unknown_name(section, name, [*known], or_import=True)
    _check_arguments(section, function, arguments)
    try:
        return function(**arguments)
    except ThermogradError:
        raise
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"{section}.name = {name!r} raised {type(error).__name__}: {error}",
            remedy="mend it; --debug shows the traceback",
        ) from error


def _import(section: str, name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs user code
        absent = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        raise ConfigError(
            f"{section}.name = {name!r}: importing {module_name!r} failed with {type(error).__name__}: {error}",
            expected="an import path package.module:function",
            remedy="put the module beside the configuration or name its folder in run.path" if absent else None,
        ) from error
    if not hasattr(module, attribute):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        close = difflib.get_close_matches(attribute, names, n=1)
        raise ConfigError(
            f"{section}.name = {name!r}: {module_name} has no {attribute!r}"
            + (f" (did you mean {close[0]!r}?)" if close else ""),
            expected=f"a function in {getattr(module, '__file__', module_name)}",
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise ConfigError(f"{section}.name = {name!r} is a {type(function).__name__}", expected="a function")
    return function


def _unknown_name(section: str, name: str, known: list[str], *, or_import: bool = False) -> ConfigError:
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    guess = f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
    otherwise = ", or an import path package.module:function" if or_import else ""
    return ConfigError(f"{section}.name is {name!r}{guess}", expected=f"one of {', '.join(known)}{otherwise}")


def _check_arguments(section: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the function does not take, or that it needs and did not get."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have no signature
        return
    called = getattr(function, "__name__", str(function)).replace("<lambda>", "none: ")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in arguments:
        if name not in signature.parameters and not takes_any:
            close = difflib.get_close_matches(name, signature.parameters, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"unknown key {section}.arguments.{name}{guess}", expected=f"the arguments {called}{signature}"
            )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{section}.arguments lack something: {error}", expected=f"the arguments {called}{signature}"
        ) from error
