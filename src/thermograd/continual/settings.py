"""The configuration of a comparison: a TOML file, checked key by key before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..settings import Root, Section, read_toml
from .streams import Scenario

__all__ = ["KINDS", "Settings", "load"]

KINDS = ("none", "joint", "l2", "ewc", "synaptic_intelligence", "random", "landscape", "layer_landscape")
_PLAIN = ("none", "joint")  # nothing to choose


class StreamSettings(Section):
    """``[stream]``: the sequence of tasks."""

    data: str = Field(description="digits, mnist, fashion_mnist or cifar10")
    folder: str | None = Field(default=None, description="where the files lie, relative to this file")
    scenario: Scenario = Field(description="task, domain, class or permuted")
    tasks: int = Field(default=5, ge=2, description="how many tasks")
    n: int | None = Field(default=None, ge=10, description="most training samples of a task")
    n_test: int | None = Field(default=None, ge=1, description="most test samples of a task")
    validation: float = Field(default=0.1, gt=0, lt=1, description="share of the training samples to choose on")
    standardise: bool = Field(default=False, description="whether channels get mean 0 and standard deviation 1")


class NetworkSettings(Section):
    """``[network]``: trained from the first task on; all its weights are trainable in every task."""

    name: Literal["mlp", "small_cnn"] = Field(default="mlp", description="mlp or small_cnn")
    widths: list[Annotated[int, Field(ge=1)]] = Field(
        default=[50, 50], description="widths of the hidden layers or channels"
    )
    activation: str = Field(default="relu", description="relu, tanh or gelu")


class LearningSettings(Section):
    """``[training]``: plain SGD on each task in turn."""

    epochs: int = Field(default=1, ge=1, description="passes over each task")
    batch_size: int = Field(default=64, ge=1, description="samples in a minibatch")
    lr: float = Field(default=0.1, gt=0, description="learning rate")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum")
    path_steps: int = Field(default=300, ge=4, description="last steps of a task that count as its trajectory")


class ProtocolSettings(Section):
    """``[protocol]``: seeds, and what is compared with what."""

    seeds: int = Field(default=5, ge=2, description="independent repetitions that are reported")
    selection_seeds: int = Field(default=5, ge=1, description="other repetitions, on which hyperparameters are chosen")
    seed: int = Field(default=0, ge=0, lt=2**31, description="first of all seeds")
    baseline: str = Field(default="ewc", description="the method that others are tested against")
    samples: int | None = Field(default=1000, ge=2, description="samples of a task that a constraint is measured on")
    measure_dtype: Literal["float32", "float64"] = Field(default="float64", description="precision of that")
    out: str | None = Field(default=None, description="folder of the results, relative to the current folder")


class MethodSettings(Section):
    """``[methods.NAME]``: a constraint with the grid that its hyperparameters are chosen from."""

    kind: Literal[KINDS] | None = Field(default=None, description=f"{', '.join(KINDS)}; default: the method's name")  # type: ignore[valid-type]
    strengths: list[float] = Field(default=[], description="strengths to choose from")
    options: dict[str, Any] = Field(default={}, description="arguments of the constraint")
    grid: dict[str, list[Any]] = Field(default={}, description="arguments to choose from, besides the strength")

    @field_validator("strengths")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if any(v < 0 for v in value) or len(set(value)) < len(value):
            raise ValueError("strengths must be >= 0 and each be there once")
        return sorted(value)


class Settings(Root):
    """A whole configuration.

    >>> settings = Settings.from_dict({
    ...     "stream": {"data": "digits", "scenario": "domain"},
    ...     "methods": {"none": {}, "ewc": {"strengths": [10.0, 1000.0]}},
    ... })
    >>> settings.training.lr, settings.methods["ewc"].kind
    (0.1, 'ewc')
    """

    stream: StreamSettings
    network: NetworkSettings = NetworkSettings()
    training: LearningSettings = LearningSettings()
    protocol: ProtocolSettings = ProtocolSettings()
    methods: dict[str, MethodSettings] = Field(description="at least one section [methods.NAME]")

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, values: Any) -> Any:
        """Fill in the kind of a method that is called by its kind."""
        methods = values.get("methods") if isinstance(values, Mapping) else None
        if not isinstance(methods, Mapping):
            return values
        filled = {
            name: {"kind": name, **method} if isinstance(method, Mapping) and name in KINDS else method
            for name, method in methods.items()
        }
        return {**values, "methods": filled}

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if not self.methods:
            raise ValueError("there is no method; give at least one section [methods.NAME]")
        for name, method in self.methods.items():
            if method.kind is None:
                raise ValueError(f"methods.{name} needs kind = one of {', '.join(KINDS)}, as its name is none of them")
            if method.kind in _PLAIN and (method.strengths or method.options or method.grid):
                raise ValueError(f"methods.{name} is of kind {method.kind}, which has nothing to choose")
            if method.kind not in _PLAIN and not method.strengths:
                raise ValueError(f"methods.{name} needs strengths to choose from")
            if both := sorted(set(method.options) & set(method.grid)):
                raise ValueError(f"methods.{name} has {both[0]} in its options and in its grid; keep one of them")
        baseline = self.protocol.baseline
        if "baseline" in self.protocol.model_fields_set and baseline not in self.methods:
            raise ValueError(f"protocol.baseline is {baseline!r}, no method; expected one of {', '.join(self.methods)}")
        return self


def load(path: str | os.PathLike[str]) -> Settings:
    """Read and check a configuration file; ``stream.folder`` is taken relative to it.

    Raises:
        ConfigError: the file is absent or not TOML, or a key or a value is wrong.
    """
    path = Path(path).expanduser()
    values = read_toml(path)
    stream = values.get("stream")
    if isinstance(stream, dict) and isinstance(stream.get("folder"), str):
        stream["folder"] = str((path.absolute().parent / Path(stream["folder"]).expanduser()).resolve())
    protocol = values.setdefault("protocol", {})
    if isinstance(protocol, dict):
        protocol.setdefault("out", str(Path("runs") / path.stem))
    return Settings.from_dict(values, str(path))
