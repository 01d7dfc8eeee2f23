"""EquilibrationLR against cosine, ReduceLROnPlateau and a constant rate: equal steps, three tasks, five seeds.

    python benchmarks/bench_schedules.py [--data FOLDER] [--seeds 5] [--steps 6000] [--task NAME] [--schedule NAME]

Every schedule begins at the same learning rate, which was not tuned to any of them, and sees the same minibatches.
ReduceLROnPlateau has torch's defaults (factor 0.1, patience 10) and is given the mean minibatch loss of each epoch;
EquilibrationLR has its defaults. Cosine alone is told the number of steps.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import thermograd as tg
from thermograd.minibatches import Minibatches

SCHEDULES = ("constant", "cosine", "plateau", "equilibration")
LR, MOMENTUM, BATCH, DECAY = 0.1, 0.9, 50, 5e-4


def tasks(data: Path | None) -> dict[str, tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Layer sizes and train and test data of each task."""
    digits = tg.data.load("digits")
    X, y = digits.X.flatten(1), digits.y
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    noisy = y.clone()
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) < 0.2
    noisy[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=torch.Generator().manual_seed(2))
    found = {
        "digits": ([64, 32, 10], X[:1400], y[:1400], X[1400:], y[1400:]),
        "digits, 20% wrong labels": ([64, 32, 32, 10], X[:1400], noisy[:1400], X[1400:], y[1400:]),
    }
    if data is not None:
        train, test = (tg.data.load("fashion_mnist", folder=data, split=s) for s in ("train", "test"))
        found["Fashion-MNIST"] = (
            [784, 30, 10], train.X[:4000].flatten(1), train.y[:4000],
            test.X[:2000].flatten(1), test.y[:2000],
        )  # fmt: skip
    return found


def network(sizes: list[int]) -> nn.Sequential:
    """A ReLU network."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(task: tuple, schedule: str, seed: int, steps: int) -> tuple[float, float, float, list[int]]:
    """Train once; final training loss, test loss, test accuracy, and the steps at which the rate was lowered."""
    sizes, X, y, X_test, y_test = task
    torch.manual_seed(seed)
    model, loss = network(sizes), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    batches, epoch = Minibatches(len(X), BATCH, "reshuffle", seed), -(-len(X) // BATCH)
    problem = tg.Problem(model, loss, (X, y), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        recorder = tg.Recorder(folder, problem, optimizer, record=tg.Every(1000, tg.Scalars()), batch_size=BATCH)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule == "cosine" else None
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) if schedule == "plateau" else None
        settled = tg.EquilibrationLR(optimizer, recorder) if schedule == "equilibration" else None
        changes, seen = [], []
        with recorder:
            for step in range(1, steps + 1):
                index = next(batches)
                optimizer.zero_grad()
                value = loss(model(X[index]), y[index])
                value.backward()
                optimizer.step()
                seen.append(float(value.detach()))
                before = optimizer.param_groups[0]["lr"]
                if cosine is not None:
                    cosine.step()
                if settled is not None:
                    settled.step()
                if plateau is not None and step % epoch == 0:
                    plateau.step(np.mean(seen[-epoch:]))
                if schedule != "cosine" and optimizer.param_groups[0]["lr"] != before:
                    changes.append(step)
    with torch.no_grad():
        out = model(X_test)
        accuracy = float((out.argmax(1) == y_test).float().mean())
        return float(loss(model(X), y)), float(loss(out, y_test)), accuracy, changes


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--task", help="one task only")
    parser.add_argument("--schedule", choices=SCHEDULES, action="append", help="these schedules only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | schedule | training loss | test loss | test accuracy | decays at (first seed) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, task in tasks(options.data).items():
        if options.task not in (None, name):
            continue
        for schedule in options.schedule or SCHEDULES:
            runs = [train(task, schedule, seed, options.steps) for seed in range(options.seeds)]
            table = np.array([run[:3] for run in runs])
            error = table.std(0, ddof=1) / np.sqrt(len(runs))
            cells = " | ".join(f"{m:.4f} ± {e:.4f}" for m, e in zip(table.mean(0), error, strict=True))
            print(f"| {name} | {schedule} | {cells} | {', '.join(map(str, runs[0][3])) or '–'} |", flush=True)


if __name__ == "__main__":
    main()
