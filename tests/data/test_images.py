"""MNIST, Fashion-MNIST and CIFAR-10, on small files made here and on the real ones where they are present."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

import thermograd as tg
from thermograd.data import cifar, idx
from thermograd.errors import DataError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not beside this repository")


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def digits_like() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 28, 28), dtype=np.uint8), rng.integers(0, 10, 12).astype(np.uint8)


def write_idx(folder: Path, arrays: tuple[np.ndarray, np.ndarray], *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), arrays):
        content = idx_bytes(array)
        name = f"train-{kind}" + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw", "MNIST"])
def test_idx_is_found_and_read(tmp_path: Path, digits_like: tuple, place: str, zipped: bool) -> None:
    write_idx(tmp_path / place, digits_like, zipped=zipped)
    X, y = tg.data.mnist(tmp_path, verify=False)
    assert np.array_equal((X[:, 0].numpy() * 255).round().astype(np.uint8), digits_like[0])
    assert X.shape == (12, 1, 28, 28)
    assert np.array_equal(y.numpy(), digits_like[1])


def test_idx_of_other_content_is_refused(tmp_path: Path, digits_like: tuple) -> None:
    write_idx(tmp_path, digits_like, zipped=True)
    with pytest.raises(DataError, match=r"is not the train-images-idx3-ubyte of MNIST.*SHA-256 ba89"):
        tg.data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "cut off"),
        (lambda b: b"\1" + b[1:], "does not start like an idx file"),
        (lambda b: b[:10], "bytes of data"),
        (lambda b: gzip.compress(b)[:-9], "cannot be read"),
        (lambda b: b"", "does not start like"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, digits_like: tuple, damage, message: str) -> None:
    write_idx(tmp_path, digits_like, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        tg.data.mnist(tmp_path, verify=False)


def test_absent_files_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        tg.data.mnist(tmp_path)
    for word in ("train-images-idx3-ubyte", str(tmp_path / "MNIST/raw"), "THERMOGRAD_DATA", "download=True"):
        assert word in str(caught.value)
    monkeypatch.setenv("THERMOGRAD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        tg.data.load("cifar10")


def test_nothing_is_downloaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("mnist", "fashion_mnist", "cifar10"):
        with pytest.raises(DataError):
            tg.data.load(name, tmp_path)


def serve(monkeypatch: pytest.MonkeyPatch, server: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    """Point the MNIST source to files in a local folder, as if that were the published set."""
    write_idx(server, arrays, zipped=True)
    packed = {f.name.removesuffix(".gz"): f.read_bytes() for f in server.iterdir()}
    source = dataclasses.replace(
        idx._MNIST,
        url=server.as_uri() + "/",
        content_sha256={k: hashlib.sha256(gzip.decompress(v)).hexdigest() for k, v in packed.items()},
        archive_md5={k: hashlib.md5(v).hexdigest() for k, v in packed.items()},
    )
    monkeypatch.setattr(idx, "_MNIST", source)


def test_download_fetches_checks_and_is_reused(
    tmp_path: Path, digits_like: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tmp_path / "server", digits_like)
    X, _ = tg.data.mnist(tmp_path / "mine", download=True)
    assert len(X) == 12
    names = sorted(f.name for f in (tmp_path / "mine/MNIST/raw").iterdir())
    assert names == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]  # no temporary file left
    for file in (tmp_path / "server").iterdir():
        file.unlink()
    assert len(tg.data.mnist(tmp_path / "mine", download=True)) == 12  # not fetched again


def test_a_wrong_download_is_thrown_away(tmp_path: Path, digits_like: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "server", digits_like)
    (tmp_path / "server/train-images-idx3-ubyte.gz").write_bytes(b"not it")
    with pytest.raises(DataError, match="MD5"):
        tg.data.mnist(tmp_path / "mine", download=True)
    assert list((tmp_path / "mine/MNIST/raw").iterdir()) == []
    (tmp_path / "server/train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="cannot be fetched"):
        tg.data.mnist(tmp_path / "mine", download=True)


@pytest.fixture
def colour_images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8), np.arange(10, dtype=np.uint8)


def write_batches(folder: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    records = np.concatenate([arrays[1][:, None], arrays[0].reshape(10, 3072)], axis=1)
    for i, part in enumerate(np.split(records, 5), 1):
        part.tofile(folder / f"data_batch_{i}.bin")
    records.tofile(folder / "test_batch.bin")


def write_archive(path: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    """The reversible form, made here by its definition read backwards."""
    planes = arrays[0].transpose(1, 0, 2, 3).copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    across = np.concatenate([planes[..., :1], planes[..., 1:] - planes[..., :-1]], axis=3)
    residual = np.concatenate([across[:, :, :1], across[:, :, 1:] - across[:, :, :-1]], axis=2)
    np.savez_compressed(path, residual=residual, labels=arrays[1])


@pytest.mark.parametrize("place", ["", "CIFAR10"])
@pytest.mark.parametrize("layout", ["batches", "archive"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_layouts_agree(tmp_path: Path, colour_images: tuple, layout: str, place: str, split: str) -> None:
    if layout == "batches":
        write_batches(tmp_path / place / "cifar-10-batches-bin", colour_images)
    else:
        (tmp_path / place).mkdir(exist_ok=True)
        write_archive(tmp_path / place / f"cifar10_{split}.npz", colour_images)
    X, y = tg.data.cifar10(tmp_path, split, verify=False)
    assert np.array_equal((X.numpy() * 255).round().astype(np.uint8), colour_images[0])
    assert np.array_equal(y.numpy(), colour_images[1])
    with pytest.raises(DataError, match=r"the labels of .* are not those of CIFAR-10"):
        tg.data.cifar10(tmp_path, split)


def test_cifar_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_train.npz", residual=np.array([{}], object), labels=np.zeros(1, np.uint8))
    with pytest.raises(DataError, match="cannot be read"):
        tg.data.cifar10(tmp_path, verify=False)


def test_cifar_cut_batches_are_refused(tmp_path: Path, colour_images: tuple) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_batches(folder, colour_images)
    (folder / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="multiple of 3073"):
        tg.data.cifar10(tmp_path, verify=False)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_2.bin is not there"):
        tg.data.cifar10(tmp_path, verify=False)


def test_cifar_download_unpacks_only_the_batches(
    tmp_path: Path, colour_images: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server" / "cifar-10-batches-bin"
    write_batches(folder, colour_images)
    (folder / "readme.html").write_text("hello")
    packed = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    monkeypatch.setattr(cifar, "_URL", packed.as_uri())
    monkeypatch.setattr(cifar, "_ARCHIVE_MD5", hashlib.md5(packed.read_bytes()).hexdigest())
    X, _ = tg.data.cifar10(tmp_path / "mine", download=True, verify=False)
    assert len(X) == 10
    left = {f.name for f in (tmp_path / "mine").rglob("*") if f.is_file()}
    assert left == {f.name for f in folder.glob("*.bin")}


@needs_real
@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [("mnist", (1, 28, 28), 0.1325), ("fashion_mnist", (1, 28, 28), 0.2868), ("cifar10", (3, 32, 32), 0.4766)],
)
def test_the_published_sets(name: str, shape: tuple, mean: float) -> None:
    data = tg.data.load(name, REAL, "test")
    assert data.X.shape == (10000, *shape)
    assert float(data.X.mean()) == pytest.approx(mean, abs=1e-4)
    assert float(data.X.max()) == 1.0
    assert len(data.classes) == 10
    assert len(tg.data.load(name, REAL, "test", n=100)) == 100


@needs_real
def test_the_wrong_set_is_recognised() -> None:
    with pytest.raises(DataError, match="belongs to Fashion-MNIST"):
        tg.data.mnist(REAL / "FashionMNIST", "test")
