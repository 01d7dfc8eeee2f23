"""How often the streaming test of equilibrium is wrong: false alarms and the power to see a run at rest.

    python benchmarks/bench_equilibrium.py

Weights are 50 independent AR(1) coordinates; the minibatch loss is 1 plus a drift and noise correlated from step to
step. "Boundary": the loss falls by exactly the tolerance across the window, so that any claim is a false alarm.
"Relaxing": it falls as exp(-k/1000) from 2 to 1, and a claim while more than the tolerance of the excess of a window is
still to fall is premature; what is counted are runs of 6000 steps with any such claim, over all their windows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from thermograd.trajectory import Equilibration

RUNS, SIZE, PULL = 400, 50, 0.1


def stream(
    meter: Equilibration,
    steps: int,
    mean: Callable[[int], float],
    rng: np.random.Generator,
    noise: float,
    memory: float,
) -> list[tuple[int, int, bool]]:
    """Feed a run to the meter; start and end of each window, and the verdict."""
    theta, wave, verdicts = np.zeros(SIZE), 0.0, []
    sd = noise * np.sqrt(1 - memory**2)
    for k in range(steps):
        before = theta
        theta = (1 - PULL) * theta + rng.standard_normal(SIZE)
        wave = memory * wave + sd * rng.standard_normal()
        wanted, windows = meter.wants_weights, meter.windows
        meter.add(
            torch.from_numpy(before) if wanted else None, torch.from_numpy(theta) if wanted else None,
            mean(k) + wave, 0.0,
        )  # fmt: skip
        if meter.windows != windows:
            assert meter.window is not None
            verdicts.append((*meter.window, meter.equilibrated))
    return verdicts


def main() -> None:
    """Print the rates."""
    print("| loss noise | correlation | false alarms at the boundary | at rest, recognised | premature, relaxing |")
    print("| --- | --- | --- | --- | --- |")
    for noise, memory in ((0.02, 0.0), (0.02, 0.9), (0.1, 0.0), (0.1, 0.9)):
        rng = np.random.default_rng(0)
        alarms = rest = premature = 0
        for run in range(RUNS):
            meter = Equilibration()
            drift = meter.tolerance
            ends = stream(meter, 400, lambda k, d=drift: 1 + d * (0.5 - k / 400), rng, noise, memory)
            alarms += ends[-1][2]
            rest += stream(Equilibration(), 400, lambda k: 1.0, rng, noise, memory)[-1][2]
            if run < RUNS // 8:
                meter = Equilibration()
                ends = stream(meter, 6000, lambda k: 1 + np.exp(-k / 1000), rng, noise, memory)
                premature += any(
                    said and np.exp(-start / 1000) - np.exp(-end / 1000) > meter.tolerance for start, end, said in ends
                )
        few = RUNS // 8
        print(
            f"| {noise:g} | {memory:g} | {alarms / RUNS:.3f} ± {np.sqrt(alarms * (1 - alarms / RUNS)) / RUNS:.3f} | "
            f"{rest / RUNS:.2f} | {premature / few:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
