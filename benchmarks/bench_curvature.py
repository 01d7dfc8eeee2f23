r"""Curvature products and spectra against PyHessian, curvlinops and hessian-eigenthings.

Two networks in float32 on one thread (``--threads``): an MLP 784-100-100-10 with 4096 samples and a CNN of 357k
weights on 3x32x32 with 1024 samples, both trained for a few steps on clustered data, so that the spectrum has its
usual outliers. Each library is called by its public API in a process of its own and reports its own CPU seconds
(``time.process_time``: the machine may be shared), the memory it grew by, and beside the time an error: of a product
against float64 double backward, of an eigenvalue its true residual by that float64 product.

The peers live in an environment of their own, since they are no dependency::

    python -m venv peers
    peers/bin/pip install torch==2.13.0 numpy
    peers/bin/pip install --no-deps pyhessian curvlinops-for-pytorch hessian-eigenthings
    peers/bin/pip install einops einconv unfoldNd backpack-for-pytorch linear_operator scipy tqdm opt-einsum
    python benchmarks/bench_curvature.py --peers peers/bin/python --work mlp cnn

Without ``--peers`` only thermograd is timed (``make bench`` does this). One JSON line a measurement goes to
``--json``; a table to the terminal.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve()
TASKS = ("products", "top", "density", "gradients")
LIBRARIES = ("pyhessian", "curvlinops", "eigenthings")


# ---------------------------------------------------------------------- the networks


def mlp() -> nn.Module:
    """784-100-100-10, 89,610 weights."""
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def cnn() -> nn.Module:
    """Four convolutions and two linear layers, 356,676 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2048, 110), nn.ReLU(), nn.Linear(110, 10)),
    )


def prepared(work: str, samples: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """The network after a few epochs on ten clusters of overlapping classes, and its data."""
    torch.manual_seed(0)
    shape, N = ((784,), 4096) if work == "mlp" else ((3, 32, 32), 1024)
    N = samples or N
    y = torch.arange(N) % 10
    centres = torch.randn(10, *shape)
    X = 0.15 * centres[y] + torch.randn(N, *shape)
    model = mlp() if work == "mlp" else cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3 if work == "mlp" else 4):
        for batch in torch.randperm(N).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return model, X, y


# ---------------------------------------------------------------------- what a product costs at least


def product_flops(model: nn.Module, X: Tensor) -> dict[str, float]:
    """Floating-point operations in matrix products and convolutions: of a loss, a gradient, a Hessian product.

    A layer y = W x costs c in the forward pass. The gradient adds c for W, and c for x where x depends on weights.
    With everything of the primal kept, a Hessian product costs V x and R(g) x^T always, and where x depends on
    weights also W R(x), V^T g, W^T R(g) and g R(x)^T: 6 c for a hidden layer, 2 c for the first.
    """
    costs: list[float] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        positions = output[:, 0].numel() if isinstance(module, nn.Conv2d) else len(output)
        costs.append(2.0 * module.weight.numel() * positions)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        model(X[:8])
    for hook in hooks:
        hook.remove()
    first, rest = costs[0] * len(X) / 8, sum(costs[1:]) * len(X) / 8
    return {"loss": first + rest, "gradient": 2 * first + 3 * rest, "product": 2 * first + 6 * rest}


def matmul_peak() -> float:
    """Best rate of a 2048 x 2048 float32 matrix product, operations a CPU second."""
    A = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: A @ A)[0] for _ in range(4))


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the action returned."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


# ---------------------------------------------------------------------- the libraries


def vectors(P: int, k: int) -> Tensor:
    """The same start vectors for everybody, [P, k]."""
    return torch.randn(P, k, generator=torch.Generator().manual_seed(1))


def split(v: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters)]


def thermograd_tasks(model: nn.Module, X: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Our own routines."""
    import thermograd as tg

    problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, y), dtype=torch.float32)

    def products() -> Tensor:
        return tg.landscape.hessian(problem) @ vectors(problem.P, args.products)

    def one_by_one() -> Tensor:
        H = tg.landscape.hessian(problem)
        return torch.stack([H @ v for v in vectors(problem.P, args.products).T], 1)

    def top() -> tuple[Tensor, Tensor]:
        pairs = tg.landscape.eigenpairs(tg.landscape.hessian(problem), 10, tol=1e-3)
        return pairs.eigenvalues, pairs.eigenvectors

    def density() -> Any:
        return tg.landscape.spectral_density(tg.landscape.hessian(problem), probes=10, steps=8)

    def gradients() -> None:
        """As many gradients as there are products, to say what a product costs in gradients."""
        for _ in range(args.products):
            problem.gradient()

    return {
        "products": products,
        "one by one": one_by_one,
        "top": top,
        "density": density,
        "gradients": gradients,
    }


def pyhessian_tasks(model: nn.Module, X: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """PyHessian keeps the graph of the gradient; its density uses torch.eig, which torch has removed: given back."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    def eig(T: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
        values, columns = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], 1), columns

    torch.eig = eig  # type: ignore[attr-defined]

    def make() -> Any:
        return hessian(model, nn.CrossEntropyLoss(), data=(X, y), cuda=False)

    def products() -> Tensor:
        h = make()
        V = vectors(sum(p.numel() for p in h.params), args.products)
        out = []
        for v in V.T:
            product = hessian_vector_product(h.gradsH, h.params, split(v.contiguous(), h.params))
            out.append(torch.cat([p.reshape(-1) for p in product]))
        return torch.stack(out, 1)

    def top() -> tuple[Tensor, Tensor]:
        values, columns = make().eigenvalues(maxIter=args.power_steps, tol=1e-3, top_n=10)
        return torch.tensor(values), torch.stack([torch.cat([p.reshape(-1) for p in c]) for c in columns], 1)

    return {"products": products, "top": top, "density": lambda: make().density(iter=8, n_v=10)}


def curvlinops_tasks(model: nn.Module, X: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Take curvlinops in blocks of vectors, and SciPy's eigsh on it as its documentation shows."""
    from curvlinops import HessianLinearOperator, LanczosApproximateSpectrumCached
    from scipy.sparse.linalg import eigsh

    def make() -> Any:
        # newer versions take a dictionary of names, older ones a list
        parameters: Any = dict(model.named_parameters())
        try:
            return HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(X, y)], check_deterministic=False)
        except (TypeError, AttributeError, ValueError):
            parameters = list(model.parameters())
            return HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(X, y)], check_deterministic=False)

    def products() -> Tensor:
        H = make()
        V = vectors(H.shape[0], args.products)
        return torch.cat([H @ part for part in V.split(args.block, dim=1)], 1)

    def one_by_one() -> Tensor:
        H = make()
        return torch.stack([H @ v for v in vectors(H.shape[0], args.products).T], 1)

    def top() -> tuple[Tensor, Tensor]:
        values, columns = eigsh(make().to_scipy(), k=10, which="LA", tol=1e-3)
        order = values.argsort()[::-1].copy()
        return torch.as_tensor(values[order]), torch.as_tensor(columns[:, order].copy())

    def density() -> Any:
        H = make()
        for _ in range(10):
            LanczosApproximateSpectrumCached(H, 8, boundaries=(-1.0, 10.0)).approximate_spectrum(num_repeats=1)

    return {"products": products, "one by one": one_by_one, "top": top, "density": density}


def eigenthings_tasks(model: nn.Module, X: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """hessian-eigenthings: its Lanczos must be told the number of steps; ``--steps`` is one that suffices."""
    from hessian_eigenthings import HessianOperator, lanczos, spectral_density
    from hessian_eigenthings.loss_fns import supervised_loss

    def make() -> Any:
        return HessianOperator(model, [(X, y)], supervised_loss(nn.functional.cross_entropy))

    def products() -> Tensor:
        H = make()
        return torch.stack([H.matvec(v.contiguous()) for v in vectors(H.size, args.products).T], 1)

    def top() -> tuple[Tensor, Tensor]:
        found = lanczos(make(), k=10, max_iter=args.steps, tol=1e-3, which="LA", seed=0, reorthogonalize=True)
        return found.eigenvalues, found.eigenvectors.T.contiguous()

    return {
        "products": products,
        "top": top,
        "density": lambda: spectral_density(make(), num_runs=10, lanczos_steps=8, seed=0),
    }


# ---------------------------------------------------------------------- one process a library


def reference_product(model: nn.Module, X: Tensor, y: Tensor, V: Tensor) -> Tensor:
    """Hessian products in float64 by plain double backward, chunked: shares nothing with anybody."""
    import copy

    double = copy.deepcopy(model).double()
    parameters = list(double.parameters())
    total = torch.zeros(len(V), V.shape[1], dtype=torch.float64)
    for chunk in torch.arange(len(X)).split(256):
        loss = nn.functional.cross_entropy(double(X[chunk].double()), y[chunk], reduction="sum")
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        for j, v in enumerate(V.T):
            pieces = split(v.double().contiguous(), parameters)
            product = torch.autograd.grad(gradient, parameters, pieces, retain_graph=True)
            total[:, j] += torch.cat([p.reshape(-1) for p in product])
    return total / len(X)


def error_of(task: str, result: Any, model: nn.Module, X: Tensor, y: Tensor) -> float | None:
    """Relative error of the first two products, or the worst true relative residual of the eigenpairs."""
    if task in ("products", "one by one"):
        two = result[:, :2]
        truth = reference_product(model, X, y, vectors(len(two), result.shape[1])[:, :2])
        return float((two - truth).norm() / truth.norm())
    if task == "top":
        values, columns = result
        columns = columns.double() / columns.double().norm(dim=0)
        image = reference_product(model, X, y, columns)
        return float(((image - columns * values.double()).norm(dim=0) / values.double().abs()).max())
    return None


def child(args: argparse.Namespace) -> None:
    """Run the tasks of one library on one network, and print a JSON line for each."""
    torch.set_num_threads(args.threads)
    model, X, y = torch.load(args.data, weights_only=False)
    makers = {
        "thermograd": thermograd_tasks,
        "pyhessian": pyhessian_tasks,
        "curvlinops": curvlinops_tasks,
        "eigenthings": eigenthings_tasks,
    }
    actions = makers[args.library](model, X, y, args)
    for task, action in actions.items():
        if task.replace("one by one", "products") not in args.tasks:
            continue
        line: dict[str, Any] = {"library": args.library, "work": args.work[0], "task": task, "threads": args.threads}
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        try:
            line["cpu_seconds"], result = seconds(action)
        except Exception as error:  # a peer that cannot do it is reported as such, and does not stop the others
            line["failed"] = f"{type(error).__name__}: {error}"[:300]
        else:
            line["wall_seconds"] = time.perf_counter() - began
            line["grew_mib"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
            if args.errors:
                line["error"] = error_of(task, result, model, X, y)
            del result
        print(json.dumps(line), flush=True)


def measure(args: argparse.Namespace, library: str, work: str, data: str) -> list[dict[str, Any]]:
    """Start the child process of a library and collect what it prints."""
    python = sys.executable if library == "thermograd" else args.peers
    command = [python, str(HERE), "--library", library, "--work", work, "--data", data, "--tasks", *args.tasks]
    command += ["--threads", str(args.threads), "--products", str(args.products or (100 if work == "mlp" else 20))]
    command += ["--steps", str(args.steps), "--power-steps", str(args.power_steps), "--block", str(args.block)]
    command += ["--errors"] if args.errors else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        lines.append({"library": library, "work": work, "task": "all", "failed": done.stderr.strip()[-300:]})
    return lines


def scaling() -> None:
    """Print seconds a product of thermograd against samples N, weights P and block size k, for MLPs 784-h-h-10."""
    import thermograd as tg

    points = [(h, 4096, 4) for h in (10, 100, 1000)] + [(100, N, 4) for N in (256, 1024, 16384)]
    points += [(100, 4096, k) for k in (1, 16, 64)] + [(2800, 512, k) for k in (1, 4)]
    print("| P | N | k | ms a product | GFLOP/s | MiB grown |\n|---|---|---|---|---|---|")
    for hidden, N, k in points:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        )
        X, y = torch.randn(N, 784), torch.arange(N) % 10
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, y), dtype=torch.float32)
        H, V = tg.landscape.hessian(problem), torch.randn(problem.P, k)
        H @ V[:, :1]
        each = min(seconds(lambda H=H, V=V: H @ V)[0] for _ in range(2)) / k
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        rate = product_flops(model, X)["product"] / each / 1e9
        print(f"| {problem.P} | {N} | {k} | {each * 1e3:.1f} | {rate:.0f} | {grew:.0f} |", flush=True)


def report(lines: list[dict[str, Any]], floors: dict[str, float]) -> None:
    """Print the table, with the ratios of the peers to us in CPU and in wall seconds."""
    ours = {(x["work"], x["task"]): x for x in lines if x["library"] == "thermograd" and "failed" not in x}
    for line in lines:
        text = f"{line['work']:4} {line['task']:11} {line['library']:12}"
        if "failed" in line:
            print(text, line["failed"])
            continue
        text += f" {line['cpu_seconds']:8.2f} CPU s {line['wall_seconds']:8.2f} wall s"
        text += f"  error {line.get('error') or float('nan'):.1e}  +{line['grew_mib']} MiB"
        mine = ours.get((line["work"], line["task"].replace("one by one", "products")))
        if mine and line["library"] != "thermograd":
            text += f"  {line['cpu_seconds'] / mine['cpu_seconds']:.2f} x ours"
            text += f" ({line['wall_seconds'] / mine['wall_seconds']:.2f} in wall time)"
        print(text)
    for name, value in floors.items():
        print(f"{name}: {value:.3g}")


def main() -> None:
    """Parse the command line; be parent or child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of the environment in which the peers are installed")
    parser.add_argument("--work", nargs="+", default=["mlp"], choices=["mlp", "cnn"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--libraries", nargs="+", default=["thermograd", *LIBRARIES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", type=int, default=0, help="default 100 for the MLP, 20 for the CNN")
    parser.add_argument("--samples", type=int, default=0, help="default 4096 for the MLP, 1024 for the CNN")
    parser.add_argument("--scaling", action="store_true", help="our product against N, P and k instead of the tasks")
    parser.add_argument("--steps", type=int, default=40, help="Lanczos steps of hessian-eigenthings")
    parser.add_argument("--power-steps", type=int, default=100, help="most power steps of PyHessian for a pair")
    parser.add_argument("--block", type=int, default=10, help="vectors at once for curvlinops")
    parser.add_argument("--errors", action="store_true", help="errors against float64, which cost more than the work")
    parser.add_argument("--json", help="append one JSON line a measurement to this file")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        child(args)
        return
    torch.set_num_threads(args.threads)
    if args.scaling:
        scaling()
        return
    lines: list[dict[str, Any]] = []
    floors = {"matmul peak (GFLOP/s)": matmul_peak() / 1e9}
    with tempfile.TemporaryDirectory() as folder:
        for work in args.work:
            data = str(Path(folder) / f"{work}.pt")
            model, X, y = prepared(work, args.samples)
            torch.save((model, X, y), data)
            flops = product_flops(model, X)
            floors[f"{work}: product at the peak (s)"] = flops["product"] / floors["matmul peak (GFLOP/s)"] / 1e9
            floors[f"{work}: product in gradients, by operations"] = flops["product"] / flops["gradient"]
            for library in args.libraries:
                if library == "thermograd" or args.peers:
                    found = measure(args, library, work, data)
                    lines += found
                    if args.json:
                        with open(args.json, "a", encoding="utf-8") as file:
                            file.writelines(json.dumps(line) + "\n" for line in found)
    report(lines, floors)


if __name__ == "__main__":
    main()
