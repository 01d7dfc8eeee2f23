"""Kunin et al. at the reduced scale, against the exact dynamics; ImageNet's protocol on a folder of a few images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thermograd import models, papers
from thermograd.errors import NotAvailableError
from thermograd.papers import kunin_imagenet as imagenet
from thermograd.papers.item import Bench
from thermograd.papers.kunin_sweeps import Cell


def run(name, tmp_path, seeds=2, seed=7):
    return papers.reproduce(f"kunin/{name}", scale="reduced", seeds=seeds, seed=seed, out=tmp_path)


def check(outcome, slack, relative=0.0, skip=()):
    """Every exact value is met within ``slack`` and six standard errors, which come from two or three seeds."""
    compared = 0
    for row in outcome.rows:
        if row.theory is not None and not any(word in row.quantity for word in skip):
            allowed = slack + relative * abs(row.theory) + 6 * row.stderr
            assert abs(row.ours - row.theory) < allowed, row
            compared += 1
    assert compared


def test_phase_spirals(tmp_path):
    outcome = run("fig2", tmp_path)
    check(outcome, 0.01, 0.05, skip=("rms",))
    for row in outcome.rows:
        if "rms" in row.quantity:  # the exact column is the spread of the start's noise, which only falls
            assert row.ours < row.theory + 4 * row.stderr
    assert outcome.verdict == "reproduced with a caveat"


def test_current_of_two_dimensions(tmp_path):
    outcome = run("fig3", tmp_path, seeds=4)
    check(outcome, 1e-4)
    assert [row.quantity for row in outcome.differing] == []


def test_spread_in_the_top_subspace(tmp_path):
    check(run("fig4", tmp_path), 0.05)


def test_loops(tmp_path):
    check(run("fig6", tmp_path), 0.06)


def test_sweeps(tmp_path):
    check(run("fig7", tmp_path), 0.25, skip=("local",))
    check(run("fig7", tmp_path), 0.1, skip=(" c ", "c at"))


def test_grid(tmp_path):
    outcome = run("fig8", tmp_path)
    check(outcome, 0.2)
    numbers = {row.quantity: row for row in outcome.rows}
    assert numbers["R² of the line in log η/(1-β) alone"].published is None
    assert numbers["R² of the plane in log η, log 1/(1-β), log S"].theory > 0.6


def test_drift_and_noise(tmp_path):
    outcome = run("fig1", tmp_path)
    check(outcome, 0.08)
    shares = [row.ours for row in outcome.rows if "share of drift" in row.quantity]
    assert shares == sorted(shares)  # drift grows with the batch
    assert "drift" in outcome.caveats[0]


@pytest.fixture
def imagenet_folder(tmp_path):
    """Two classes of six images each, and random weights."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("n01", "n02")):
        folder = tmp_path / "imagenet" / "train" / name
        folder.mkdir(parents=True)
        for k in range(6):
            pixels = rng.integers(0, 128, (40 + k, 60, 3)) + 127 * i
            image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    torch.manual_seed(0)
    torch.save(models.resnet18(2).state_dict(), tmp_path / "imagenet" / "resnet18.pth")
    return tmp_path


def test_imagenet_protocol_runs_from_a_folder(imagenet_folder, tmp_path):
    bench = Bench("full", (1, 2), tmp_path / "out", imagenet_folder)
    cells = [Cell(1e-4, 4, 0.9, 1e-4), Cell(2e-4, 4, 0.9, 1e-4)]
    found = imagenet.measure(bench, cells, seed=1, size=32)
    assert np.isfinite(found["c"]).all()
    # the velocity of so short a run hardly depends on the learning rate, so the squared step goes as its square
    assert 2.5 < found["local"][1] / found["local"][0] < 6
    assert np.array_equal(imagenet.measure(bench, cells, seed=1, size=32)["c"], found["c"])  # kept


def test_images_are_cropped_and_repeatable(imagenet_folder):
    images = imagenet.ImageFolder(imagenet_folder / "imagenet" / "train", 16, seed=3)
    assert len(images) == 12
    assert images.classes == ["n01", "n02"]
    pixels, label = images[11]
    assert pixels.shape == (3, 16, 16)
    assert label == 1
    assert torch.equal(images[11][0], pixels)
    images.epoch = 1
    assert not torch.equal(images[11][0], pixels)
    assert images[0][0].mean() < images[11][0].mean()  # the second class is the brighter one


def test_full_scale_reads_the_laws_from_its_cells(monkeypatch, tmp_path):
    """The rows at the paper's scale, from cells that follow the laws, with a little noise between seeds."""

    def lawful(bench, cells, seed):
        noise = 1e-3 * np.random.default_rng(seed).standard_normal(len(cells))
        c = 0.5 - 0.2 * np.log10([cell.lr / (1 - cell.momentum) for cell in cells]) + noise
        local = [cell.lr**2 / cell.batch / (1 - cell.momentum**2) for cell in cells]
        return {"c": c, "local": np.array(local)}

    monkeypatch.setattr(imagenet, "measure", lawful)
    grid = papers.reproduce("kunin/fig8", full=True, seeds=3, seed=1, out=tmp_path)
    rows = {row.quantity: row for row in grid.rows}
    assert rows["R² of the line in log η/(1-β) alone"].ours > 0.999
    assert abs(rows["difference of the first two: none if c depends on η/(1-β)"].ours) < 1e-2
    assert abs(rows["mean difference of c in pairs of equal η/(1-β)"].ours) < 1e-2
    sweeps = papers.reproduce("kunin/fig7", full=True, seeds=3, seed=1, out=tmp_path)
    powers = [row.ours for row in sweeps.rows if row.published and "power" in row.quantity]
    assert np.allclose(powers, [2, -1, 1], atol=1e-6)
    assert not sweeps.differing


def test_imagenet_that_is_not_here(tmp_path):
    with pytest.raises(NotAvailableError, match="images"):
        imagenet.measure(Bench("full", (1, 2), tmp_path, tmp_path), [], 1)
    outcome = papers.reproduce("kunin/fig7", full=True, seeds=2, out=tmp_path, data_folder=tmp_path)
    assert outcome.verdict == "cannot be run here"
