"""The configuration of a run: a TOML file, checked key by key before anything is trained.

.. code-block:: toml

    [run]
    seed = 0

    [model]
    name = "mlp"                          # a built-in name, or "package.module:function"
    arguments = { sizes = [64, 16, 10] }

    [data]
    name = "digits"                       # likewise
    n = 1500

    [optimizer]
    name = "sgd"
    lr = 0.1
    momentum = 0.9

    [training]
    batch_size = 50
    burn_in_steps = 5000                  # trained, not recorded
    steps = 20000                         # trained and recorded

    [record]                              # optional: by default all weights, at each training.every-th step
    full = 0
    scalars = 1
    sketch = 10
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .hyperparameters import SGD, Sampling
from .settings import Root, Section, flat, read_toml, to_toml

__all__ = [
    "Config",
    "DataConfig",
    "LossConfig",
    "MeasureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RecordConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "load",
]

_Dtype = Literal["float32", "float64"]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Interval = Annotated[int, Field(ge=0)] | str | None


class RunConfig(Section):
    """``[run]``: the seed, where the run goes, and where it is computed."""

    seed: _Seed = Field(default=0, description="of the initial weights and of the minibatches")
    out: str | None = Field(default=None, description="folder of the run, relative to the current folder")
    path: list[str] = Field(default=[], description="folders to import user modules from, relative to this file")
    device: str = Field(default="cpu", description="torch device")


class ModelConfig(Section):
    """``[model]``: a built-in network or a function that returns a ``torch.nn.Module``."""

    name: str = Field(description="linear, mlp, small_cnn, small_transformer, or package.module:function")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of that function")


class DataConfig(Section):
    """``[data]``: a built-in data set or a function that returns ``(X, y)`` or a torch data set."""

    name: str = Field(description="digits, mnist, fashion_mnist, cifar10, a .csv file, or package.module:function")
    folder: str | None = Field(default=None, description="where the files lie, relative to this file")
    split: Literal["train", "test"] = Field(default="train", description="part of the data set")
    n: int | None = Field(default=None, ge=1, description="keep this many samples")
    n_seed: _Seed | None = Field(default=None, description="draw the n samples at random; without it, take the first n")
    label_noise: float = Field(default=0.0, ge=0, le=1, description="fraction of samples that get a wrong label")
    label_noise_seed: _Seed = Field(default=0, description="of the wrong labels")
    arguments: dict[str, Any] = Field(
        default={}, description="keyword arguments of package.module:function, or of csv_table"
    )


class LossConfig(Section):
    """``[loss]``: a built-in per-sample loss or a function on ``(output, target)``."""

    name: str = Field(default="cross_entropy", description="a built-in loss, or package.module:function")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the loss")


class OptimizerConfig(Section):
    """``[optimizer]``: SGD, or any optimizer of ``torch.optim`` by name."""

    name: str = Field(default="sgd", description="sgd, or the name of a torch.optim optimizer")
    lr: float = Field(gt=0, description="learning rate")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 coefficient")
    nesterov: bool = Field(default=False, description="Nesterov momentum of SGD")
    dampening: float = Field(default=0.0, ge=0, lt=1, description="dampening of SGD")
    arguments: dict[str, Any] = Field(default={}, description="further keyword arguments of another optimizer")

    @property
    def is_sgd(self) -> bool:
        """Whether the theory's optimizer is asked for."""
        return self.name.lower() == "sgd"

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.is_sgd:
            SGD(lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, dampening=self.dampening)
        elif self.nesterov or self.dampening or self.momentum:
            raise ValueError(f"momentum, nesterov and dampening belong to sgd; give those of {self.name} in arguments")
        return self


class ScheduleConfig(Section):
    """``[training.schedule]``: a scheduler of ``torch.optim.lr_scheduler``, stepped once a training step."""

    name: str = Field(description="name of a torch.optim.lr_scheduler scheduler")
    arguments: dict[str, Any] = Field(default={}, description="its keyword arguments, in steps")


class TrainingConfig(Section):
    """``[training]``: how minibatches are drawn, for how long, and what is recorded."""

    batch_size: int = Field(ge=1, description="samples in a minibatch")
    sampling: Sampling = Field(default="reshuffle", description="how minibatches are drawn")
    drop_last: bool = Field(default=False, description="leave out the smaller batch at the end of an epoch")
    burn_in_steps: int = Field(default=0, ge=0, description="steps trained before the recording")
    steps: int = Field(ge=1, description="steps recorded")
    every: int = Field(default=1, ge=1, description="record every so many steps; see [record] for more")
    record: str | list[str] | None = Field(
        default=None, description="name pattern of the parameters to record and measure"
    )
    dtype: _Dtype = Field(default="float32", description="precision of the training")
    checkpoint_seconds: float = Field(default=10.0, gt=0, description="time between checkpoints")
    schedule: ScheduleConfig | None = Field(default=None, description="learning rate schedule")


class RecordConfig(Section):
    """``[record]``: what is kept of the path; each key says at each how many steps (0: never, "log20": log-spaced)."""

    full: _Interval = Field(default=None, description="weights and velocities; default: each training.every steps")
    scalars: _Interval = Field(default=0, description="squared norms of weights, displacement, step and gradient")
    sketch: _Interval = Field(default=0, description="random projections that keep distances")
    sketch_dim: int = Field(default=512, ge=2, le=2**14, description="numbers in a sketch")
    sketch_seed: _Seed = Field(default=0, description="of the random projection")
    layers: dict[str, _Interval] = Field(default={}, description="weights and velocities of layers, by name pattern")

    @field_validator("full", "scalars", "sketch", "layers")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, str) and not (one.startswith("log") and one[3:].isdigit() and int(one[3:]) > 0):
                raise ValueError(f'{one!r} is no schedule; expected a number of steps, or text such as "log20"')
        return value

    @model_validator(mode="after")
    def _something(self) -> RecordConfig:
        if self.full == 0 and not (self.scalars or self.sketch or any(self.layers.values())):
            raise ValueError("nothing is recorded; give one of full, scalars, sketch, layers")
        return self


class MeasureConfig(Section):
    """``[measure]``: which laws are checked, and how thoroughly."""

    laws: Literal["all"] | list[str] = Field(default="all", description='"all" or names from `thermograd laws`')
    modes: int | None = Field(default=None, ge=1, description="leading Hessian modes measured")
    dtype: _Dtype = Field(default="float64", description="precision of the measurements")
    window_epochs: int | None = Field(default=None, ge=1, description="epochs in a window of the path")
    seed: _Seed = Field(default=0, description="of every random draw of the measurements")


class Config(Root):
    """A whole configuration.

    >>> config = Config.from_dict({
    ...     "model": {"name": "linear", "arguments": {"d_in": 64, "d_out": 10}},
    ...     "data": {"name": "digits"},
    ...     "optimizer": {"lr": 0.1},
    ...     "training": {"batch_size": 50, "steps": 100},
    ... })
    >>> config.loss.name, config.training.sampling
    ('cross_entropy', 'reshuffle')
    >>> Config.from_dict({**config.to_dict(), "optimizer": {"lr": 0.1, "mometum": 0.9}})
    Traceback (most recent call last):
        ...
    thermograd.errors.ConfigError: unknown key optimizer.mometum = 0.9 (did you mean 'momentum'?)...
    """

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    record: RecordConfig = RecordConfig()
    measure: MeasureConfig = MeasureConfig()

    @field_validator("run", "loss", "record", "measure", mode="before")
    @classmethod
    def _allow_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """The configuration with every default filled in; keys that are None are left out."""
        return self.model_dump(exclude_none=True)

    def to_toml(self) -> str:
        """The configuration as TOML, every default filled in."""
        return to_toml(self.to_dict())

    def trains_like(self, other: Config) -> bool:
        """Whether both configurations train the same weights and record the same (wherever the files lie)."""
        aside: dict[str, Any] = {"measure": True, "run": {"out", "path"}, "data": {"folder"}}
        aside["training"] = {"checkpoint_seconds"}
        return self.model_dump(exclude=aside) == other.model_dump(exclude=aside)

    def differences(self, other: Config) -> list[str]:
        """Keys in which two configurations differ, as ``optimizer.lr: 0.1 -> 0.2``."""
        mine, theirs = flat(self.to_dict()), flat(other.to_dict())
        keys = dict.fromkeys((*mine, *theirs))
        return [f"{k}: {mine.get(k)!r} -> {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]

    def replace(self, section: str, **changes: Any) -> Config:
        """A copy with some keys of one section changed, checked again."""
        values = self.to_dict()
        return Config.from_dict({**values, section: {**values.get(section, {}), **changes}})


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file.

    ``data.folder`` and ``run.path`` are taken relative to the file; user modules are looked for in the file's own
    folder too.

    Raises:
        ConfigError: the file is absent or not TOML (with line and column), or a key or a value is wrong.
    """
    path = Path(path).expanduser()
    values = read_toml(path)
    config = Config.from_dict(values, str(path))
    here = path.absolute().parent
    folders = [str((here / Path(p).expanduser()).resolve()) for p in config.run.path]
    if any(":" in part.name for part in (config.model, config.data, config.loss)) and str(here) not in folders:
        folders.append(str(here))
    config = config.replace("run", path=folders)
    is_table = ":" not in config.data.name and config.data.name.lower().endswith((".csv", ".csv.gz"))
    if config.data.folder is not None or is_table:
        config = config.replace("data", folder=str((here / Path(config.data.folder or ".").expanduser()).resolve()))
    if config.run.out is None:
        config = config.replace("run", out=str(Path("runs") / path.stem))
    return config
