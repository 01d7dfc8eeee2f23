"""Sequences of tasks cut from one data set, in the three forms of van de Ven & Tolias (2019), and permuted pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import data
from ..errors import DataError, InputError

__all__ = ["Scenario", "Stream", "Task", "stream"]

Scenario = Literal["task", "domain", "class", "permuted"]
Pair = tuple[Tensor, Tensor]
_PARTS_SEED = 0  # of the split into parts: the same for every method and seed


@dataclass(frozen=True)
class Task:
    """One task: three parts of the data, and the outputs of the network that belong to it (None: all)."""

    train: Pair
    validation: Pair
    test: Pair
    outputs: tuple[int, ...] | None


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned; inputs of shape ``inputs``, a network with ``outputs`` outputs."""

    tasks: tuple[Task, ...]
    inputs: tuple[int, ...]
    outputs: int


def stream(
    name: str,
    scenario: Scenario,
    tasks: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    n: int | None = None,
    n_test: int | None = None,
    validation: float = 0.1,
    standardise: bool = False,
) -> Stream:
    """Cut a data set into a sequence of tasks.

    Args:
        name: as in :func:`thermograd.data.load`.
        scenario: "task": every task has outputs of its own, and is known at test; "domain": all tasks share the
            outputs, label i being the i-th class of a task; "class": one output for each class of all tasks, and the
            task is not known; "permuted": every task has all classes, its pixels in an order of its own.
        tasks: how many; classes are dealt out in their order, as many to each task.
        folder: where the data lie.
        n: most training samples of a task, validation included.
        n_test: most test samples of a task.
        validation: share of the training samples on which hyperparameters are chosen.
        standardise: give each channel of images (or all features together) mean 0 and standard deviation 1, those of
            the first task's training samples: of later ones nothing is known when it is learned.

    Raises:
        InputError: the classes cannot be dealt out evenly; a share or a number out of range.
        DataError: the data are absent, or too few.

    >>> digits = stream("digits", "domain", 5)
    >>> len(digits.tasks), digits.outputs, digits.tasks[4].train[1].unique().tolist()
    (5, 2, [0, 1])
    """
    if not 0 < validation < 1:
        raise InputError(f"validation is {validation}", expected="a share between 0 and 1")
    if tasks < 2:
        raise InputError(f"tasks is {tasks}", expected="two or more tasks, one after the other")
    train, test = _parts(name, folder)
    classes = int(train[1].max()) + 1
    if scenario != "permuted" and (classes % tasks or classes // tasks < 2):
        even = [k for k in range(2, classes // 2 + 1) if classes % k == 0]
        raise InputError(
            f"{tasks} tasks of the {classes} classes of {name}",
            expected=f"one of {even}: as many classes, two at least",
        )
    size = classes if scenario == "permuted" else classes // tasks
    random = torch.Generator().manual_seed(_PARTS_SEED)
    found = []
    for t in range(tasks):
        if scenario == "permuted":
            pixels = train[0][0].numel()
            order = torch.arange(pixels) if t == 0 else torch.randperm(pixels, generator=random)
            whole, held = _permuted(train, order), _permuted(test, order)
        else:
            whole, held = (_of_classes(part, t * size, size, scenario) for part in (train, test))
        whole, held = _few(whole, n, random), _few(held, n_test, random)
        kept = round(len(whole[0]) * (1 - validation))
        if kept < 1 or kept == len(whole[0]):
            raise DataError(f"task {t} has {len(whole[0])} training samples", expected="enough for a validation part")
        outputs = tuple(range(t * size, (t + 1) * size)) if scenario == "task" else None
        apart = (whole[0][:kept], whole[1][:kept]), (whole[0][kept:], whole[1][kept:])
        found.append(Task(*apart, held, outputs))
    if standardise:
        found = _standardised(found)
    width = {"task": classes, "domain": size, "class": classes, "permuted": classes}[scenario]
    return Stream(tuple(found), tuple(found[0].train[0].shape[1:]), width)


def _parts(name: str, folder: str | os.PathLike[str] | None) -> tuple[Pair, Pair]:
    """Training and test part, shuffled; a data set without a test part gives a quarter for it."""
    whole = data.load(name, folder)
    random = torch.Generator().manual_seed(_PARTS_SEED)
    order = torch.randperm(len(whole), generator=random)
    X, y = whole.X[order], whole.y[order]
    if name.lower().replace("-", "_") in ("mnist", "fashion_mnist", "fashionmnist", "cifar10", "cifar_10"):
        test = data.load(name, folder, split="test")
        return (X, y), (test.X, test.y)
    cut = len(X) * 3 // 4
    return (X[:cut], y[:cut]), (X[cut:], y[cut:])


def _of_classes(part: Pair, first: int, size: int, scenario: Scenario) -> Pair:
    chosen = (part[1] >= first) & (part[1] < first + size)
    return part[0][chosen], part[1][chosen] - (0 if scenario == "class" else first)


def _permuted(part: Pair, order: Tensor) -> Pair:
    return part[0].flatten(1)[:, order].view_as(part[0]), part[1]


def _standardised(tasks: list[Task]) -> list[Task]:
    X = tasks[0].train[0]
    over = (0, 2, 3) if X.ndim == 4 else tuple(range(X.ndim))
    mean, scale = X.mean(over, keepdim=True), X.std(over, keepdim=True)

    def moved(part: Pair) -> Pair:
        return (part[0] - mean) / scale, part[1]

    return [Task(moved(task.train), moved(task.validation), moved(task.test), task.outputs) for task in tasks]


def _few(part: Pair, n: int | None, random: torch.Generator) -> Pair:
    if n is None or n >= len(part[0]):
        return part
    chosen = torch.randperm(len(part[0]), generator=random)[:n]
    return part[0][chosen], part[1][chosen]
