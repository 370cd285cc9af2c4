"""Time and check the spectral package: one table, ours against torch.linalg.svd in the same run.

    python scripts/bench_spectral.py --num 80 --size 1280 --device cuda --out bench.json
    python scripts/bench_spectral.py --num 8 --size 256 --device cpu

Needs torch only. A row that fails shows its error and the rest go on. Times are for all `--num` matrices unless the row
says otherwise. `check` is against float64 or exact results of the same run: `S` error of the values over s_1, `rms`
and `angle` of the tracked against the exact top-k subspace (the largest angle, over the matrices with a relative gap
above 1e-3 at k), `share` the largest error of a share.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host_syncs import counted_syncs
from spectral_table import OVERSAMPLE, Bench, Result, format_row, random_matrix, trained_matrix

from svdtrain.spectral import lanes, metrics, null, subspace
from svdtrain.spectral.analysis import RowResult, run_job
from svdtrain.spectral.decompose import Decomposition, decompose_batch, decompose_many
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.subspace import RITZ_WAYS, RitzWay, ritz_rotation, warm_steps
from svdtrain.spectral.tracking import SubspaceTracker

STEP_MS = 3240.0  # a depth-20 step of 524,288 tokens on one H200
GAP = 1e-3


def spectrum_error(S: Tensor, W: Tensor) -> float:
    truth = torch.linalg.svdvals(W.double())
    return float((S.double() - truth).abs().max() / truth[0])


def exact_one(bench: Bench, W: Tensor) -> tuple[float, str, str]:
    error = spectrum_error(decompose_batch(W).S, W)
    return bench.clock(lambda: decompose_batch(W), 1, warm_up=False), f"S {error:.1e}", "ONE matrix"


def bench_exact(bench: Bench) -> None:
    """torch.linalg.svd against ours; the slow ones on few matrices, scaled up."""
    few = min(2, bench.num)

    def library(driver: str | None) -> tuple[float, str, str]:
        def work() -> Tensor:
            return torch.stack(
                [torch.linalg.svd(W, full_matrices=False, driver=driver)[1] for W in bench.weights[:few]]
            )

        ms = bench.clock(work, 1) * bench.num / few
        return ms, f"S {spectrum_error(work()[0], bench.weights[0]):.1e}", f"{few} measured, scaled to {bench.num}"

    def ours() -> tuple[float, str, str]:
        bench.old = decompose_many(bench.weights)
        ms = bench.clock(lambda: decompose_many(bench.weights), 1, warm_up=False)
        d, W = bench.old[0], bench.weights[0]
        rebuilt = float((d.rebuild() - W).norm() / W.norm())
        return ms, f"S {spectrum_error(d.S, W):.1e} rebuild {rebuilt:.1e}", "float64 Gram eigh, batched"

    bench.row("exact", "torch.linalg.svd default", lambda: library(None))
    if bench.device.type == "cuda":
        bench.row("exact", "torch.linalg.svd gesvda", lambda: library("gesvda"))
    bench.row("exact", "ours decompose_many", ours)
    bench.row("exact", "ours, one matrix", lambda: exact_one(bench, bench.weights[0]))
    bench.new = decompose_many(bench.after)


def stacked(decompositions: list[Decomposition], width: int) -> lanes.Basis:
    rows = [(d.U[:, :width], d.S[:width], d.V[:, :width], d.S) for d in decompositions]
    return lanes.Basis(*(torch.stack(column) for column in zip(*rows, strict=True)))


def subspace_check(U: Tensor, S: Tensor, exact: list[Decomposition], k: int) -> str:
    """rms sine, largest angle where there is a gap, and the error of the singular values."""
    truth = torch.stack([d.U[:, :k] for d in exact])
    values = torch.stack([d.S for d in exact])
    rms = float((metrics.sin_theta_squared(truth.double(), U[..., :k].double()) / k).mean().sqrt())
    error = float(((S[..., :k] - values[:, :k]).abs().amax(-1) / values[:, 0]).max())
    gapped = metrics.relative_gap(values, k) > GAP
    angle = "no gap"
    if bool(gapped.any()):
        bound = metrics.subspace_angle_bound(truth[gapped].double(), U[gapped][..., :k].double())
        angle = f"{float(bound.max()):.4f}"
    return f"rms {rms:.4f} angle {angle} S {error:.0e}"


def bench_warm(bench: Bench) -> None:
    """One warm iteration with every way to do Rayleigh-Ritz; accuracy after a 1 % update."""
    W = torch.stack(bench.after)
    for k in bench.ks:
        width = min(k + OVERSAMPLE, bench.size)
        old = stacked(bench.old, width)
        bench.row(
            "warm step", "old basis", lambda old=old, k=k: (0.0, subspace_check(old.U, old.S, bench.new, k), ""), k
        )
        variants: list[tuple[RitzWay, int]] = [*((way, 1) for way in RITZ_WAYS), ("hybrid", 2), ("refine", 2)]
        for way, iterations in variants:

            def work(way: RitzWay = way, iterations=iterations, old=old):
                return warm_steps(W, old.U, old.S, old.V, way=way, max_iterations=iterations)

            def measure(work=work, k=k) -> tuple[float, str, str]:
                result = work()
                note = f"residual {float(result.residual.max()):.1e} ok {int(result.ok.sum())}/{bench.num}"
                return bench.clock(work, warm_up=False), subspace_check(result.U, result.S, bench.new, k), note

            bench.row("warm step", way if iterations == 1 else f"{way} x{iterations}", measure, k)


def bench_ritz(bench: Bench) -> None:
    """The small eigenvalue problem alone."""
    W = torch.stack(bench.after)
    for k in bench.ks:
        old = stacked(bench.old, min(k + OVERSAMPLE, bench.size))
        Z = W.mT @ old.U
        H = Z.mT @ Z
        for way in RITZ_WAYS[:-1]:

            def measure(way: RitzWay = way, H=H) -> tuple[float, str, str]:
                P = ritz_rotation(H, way)
                rotated = P.mT @ H @ P
                off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
                left = float((off.flatten(1).norm(dim=1) / rotated.flatten(1).norm(dim=1)).max())
                note = sync_note(bench, lambda: ritz_rotation(H, way))
                return bench.clock(lambda: ritz_rotation(H, way), warm_up=False), f"off-diagonal {left:.0e}", note

            bench.row("small eigh", way, measure, k)


def exact_rho(bench: Bench, k: int) -> float:
    """Mean rotation ratio from two exact decompositions."""
    U, new = (torch.stack([d.U[:, :k] for d in side]) for side in (bench.old, bench.new))
    dW = torch.stack(bench.after) - torch.stack(bench.weights)
    spectrum = torch.stack([d.S for d in bench.old])
    expected = null.rotation_null(spectrum, k, null.update_variance(dW), bench.size)
    return float(null.rotation_ratio(metrics.sin_theta_squared(U, new), expected).mean())


def named(bench: Bench) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Names, weights before and after the update, and gradients."""
    names = [f"w{i}" for i in range(bench.num)]
    tensors = (bench.weights, bench.after, bench.gradients)
    return names, *(dict(zip(names, some, strict=True)) for some in tensors)  # type: ignore[return-value]


def installed(bench: Bench, k: int, **settings: Any) -> SubspaceTracker:
    """A tracker that knows the exact bases of the weights before the update."""
    names, weights, _, _ = named(bench)
    tracker = SubspaceTracker(weights, dict.fromkeys(names, k), TrackerSettings(**settings))
    tracker.install(dict(zip(names, bench.old, strict=True)), weights, 0)
    return tracker


def bench_analysis(bench: Bench) -> None:
    """A full tracked analysis of all matrices with all its numbers, gradient and update statistics included."""
    names, _, after, gradients = named(bench)
    for k in bench.ks:
        truth = exact_rho(bench, k)
        for way in RITZ_WAYS[1:3]:

            def measure(way: RitzWay = way, k: int = k, truth=truth) -> tuple[float, str, str]:
                tracker = installed(bench, k, ritz=way, max_iterations=1, chunk=bench.num)

                def analyse() -> dict[str, RowResult]:
                    tracker.observe(1, after, gradients)  # finished by the tracker's thread, beside the slow lane
                    found = run_job(tracker._snapshot(1, set(names), after))
                    tracker.settle()
                    return found

                column = lanes.SLOW_COLUMNS.index("rho")
                rho = sum(result.table[column] for result in analyse().values()) / bench.num
                note = sync_note(bench, analyse)
                return bench.clock(analyse, warm_up=False), f"mean rho {rho:.3f} exact {truth:.3f}", note

            bench.row("full analysis", way, measure, k)


def bench_parts(bench: Bench) -> None:
    """What the lanes consist of, one kernel or group of kernels at a time."""
    W, before = torch.stack(bench.after), torch.stack(bench.weights)
    names, _, after, gradients = named(bench)
    for k in [k for k in (16, 64, 256) if k in bench.ks]:
        width = min(k + OVERSAMPLE, bench.size)
        old = stacked(bench.old, width)
        Y = W @ old.V
        Q = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True)
        gram, eye = Q.mT @ Q, torch.eye(width, device=W.device)
        L = torch.linalg.cholesky_ex(gram)[0]
        cut = torch.full((bench.num,), k, device=W.device)
        norm, dW = lanes.frobenius_norm(W, usual=True), W - before
        quality = dict.fromkeys(("ok", "exact", "skipped", "residual", "staleness"), 1.0)
        R = metrics.projection_residual(old.U[..., :k], Q[..., :k])
        tracker = installed(bench, k)
        bucket, fast, rows = tracker._store.buckets[0], tracker._fast, slice(0, min(40, bench.num))
        X = fast._stack(bucket, rows, after, minus_reference=True)
        _, unit, total = lanes.in_range(X)
        U_k, E_k, V_k = bucket.principal(rows, X.dtype)
        parts: dict[str, Callable[[], object]] = {
            "product W V": lambda Y=Y, old=old: W @ old.V,
            "small Gram": lambda Q=Q: Q.mT @ Q,
            "cholesky_ex": lambda gram=gram: torch.linalg.cholesky_ex(gram),
            "triangular inverse": lambda L=L, eye=eye: torch.linalg.solve_triangular(L, eye, upper=False),
            "one Cholesky pass": lambda Q=Q, eye=eye: subspace._cholesky_pass(Q, eye),
            "staleness": lambda old=old, cut=cut: subspace.staleness_of(W, old.U, old.S, old.V, cut),
            "slow statistics": lambda *_, o=old, dW=dW, norm=norm, cut=cut, k=k, q=quality: lanes.slow_statistics(
                o, o, dW, norm, cut, k, q
            ),
            "eigenvalue bound": lambda R=R: metrics.largest_eigenvalue_bound(R.mT @ R),
            "rotation null": lambda o=old, cut=cut, k=k, t=norm: null.rotation_null(
                o.spectrum, cut, t, bench.size, max_k=k
            ),
            "snapshot": lambda t=tracker: t._snapshot(1, set(names), after),
            f"fast: stack dW of {X.shape[0]}": lambda f=fast, b=bucket, r=rows: f._stack(
                b, r, after, minus_reference=True
            ),
            f"fast: stack G of {X.shape[0]}": lambda f=fast, b=bucket, r=rows: f._stack(
                b, r, gradients, minus_reference=False
            ),
            "fast: in range": lambda X=X: lanes.in_range(X),
            "fast: participation": lambda X=X, total=total: lanes.participation_of(X, total),
            "fast: shares": lambda X=X, u=unit, t=total, U=U_k, E=E_k, V=V_k: lanes.fast_statistics(
                X, u, t, U, E, V, t
            ),
        }
        for part, work in parts.items():
            bench.row("part", part, lambda work=work: (bench.clock(work), "", host_note(bench, work)), k)


def host_note(bench: Bench, work: Callable[[], object]) -> str:
    """How long the host takes to enqueue it: where that is the time, the device waits for the host."""
    bench.synchronize()
    start = time.perf_counter()
    work()
    host = (time.perf_counter() - start) * 1e3
    bench.synchronize()
    return f"host {host:.2f} ms"


def share_error(tracker: SubspaceTracker, bench: Bench, after: dict, gradients: dict, k: int) -> str:
    """Largest error of the fast lane's shares against float64, over the first four matrices."""
    tracker.flush()
    tracker.observe(1, after, gradients)
    values = next(report for report in tracker.flush() if report.kind == "fast").values
    worst, worst_participation = 0.0, 0.0
    for i, name in enumerate(list(after)[:4]):
        U = bench.old[i].U.double()
        for X, lane in ((gradients[name], "gradient"), (after[name] - bench.weights[i], "update")):
            share, participation = metrics.principal_share(X.double(), U, k), metrics.matrix_participation_ratio(X)
            worst = max(worst, abs(float(share) - values[name][f"{lane}/share"]))
            ratio = values[name][f"{lane}/participation"] / float(participation)
            worst_participation = max(worst_participation, abs(ratio - 1))
    return f"share {worst:.0e} PR {worst_participation:.0e}"


def sync_note(bench: Bench, work: Callable[[], object]) -> str:
    """Host synchronisations in this thread during one run, as torch's debug mode counts them."""
    if bench.device.type != "cuda":
        return ""
    bench.synchronize()
    with counted_syncs() as count:
        work()
    return f"host syncs {count[0]}"


def bench_fast(bench: Bench) -> None:
    """What every step pays: gradient and update of all matrices against the last basis."""
    _, _, after, gradients = named(bench)
    for k in bench.ks:
        for dtype in (torch.float32, torch.bfloat16) if bench.device.type == "cuda" else (torch.float32,):

            def measure(k: int = k, dtype=dtype) -> tuple[float, str, str]:
                tracker = installed(bench, k, fast_dtype=dtype)
                check = share_error(tracker, bench, after, gradients, k)
                note = sync_note(bench, lambda: tracker.observe(2, after, gradients))
                ms = bench.clock(lambda: (tracker.observe(3, after, gradients), tracker.settle()))
                host = host_note(bench, lambda: tracker.observe(4, after, gradients))
                held = sum(tracker.memory_bytes().values()) / 2**20
                return ms, check, f"{note} {host}, {100 * ms / STEP_MS:.2f} % of a d20 step, holds {held:.0f} MiB"

            bench.row("fast lane / step", str(dtype).removeprefix("torch."), measure, k)


def bench_engine(bench: Bench, section: str, weights: dict[str, Tensor], k: int) -> None:
    """The whole engine over one interval: both lanes, staggered, as a training loop would call it."""

    def measure() -> tuple[float, str, str]:
        names = list(weights)
        gradients = {name: random_matrix(W.shape, i, W.device) for i, (name, W) in enumerate(weights.items())}
        current = {name: W.clone() for name, W in weights.items()}
        tracker = SubspaceTracker(current, dict.fromkeys(names, k), TrackerSettings(interval=20))
        tracker.step(0, current, gradients)
        tracker.flush()
        total, hosts, steps = 0.0, [], 40
        for step in range(1, steps + 1):
            for name in names:
                current[name] += 1e-4 * gradients[name] / gradients[name].norm() * current[name].norm()
            bench.synchronize()
            start = time.perf_counter()
            tracker.step(step, current, gradients)
            hosts.append((time.perf_counter() - start) * 1e3)
            tracker.settle()
            bench.synchronize()
            total += (time.perf_counter() - start) * 1e3
        slow = [values for report in tracker.flush() if report.kind == "slow" for values in report.values.values()]
        exact = sum(values["exact"] for values in slow)
        ms = total / steps
        tracker.analyse(steps + 1, current, names[:1])
        truth = decompose_many([current[names[0]]])[0].U
        angle = metrics.compute_subspace_angle(tracker.basis(names[0]).U, truth, k)
        counts = f"{len(slow) - exact:.0f} warm {exact:.0f} exact"
        note = f"host {sum(hosts) / steps:.1f} ms, {100 * ms / STEP_MS:.2f} % of d20; {counts}"
        return ms, f"angle {angle:.4f}", note

    bench.row(section, f"{len(weights)} matrices, mean of 40", measure, k)


def bench_engines(bench: Bench) -> None:
    n, device, count = bench.size, bench.device, max(1, bench.num // 4)
    attention = {f"attn{i}": W for i, W in enumerate(bench.weights)}
    mlp = {f"fc{i}": trained_matrix(4 * n, n, i, device) for i in range(count)}
    mlp |= {f"proj{i}": trained_matrix(n, 4 * n, 50 + i, device) for i in range(count)}
    for k in [k for k in (16, 64, 128) if k in bench.ks]:
        bench_engine(bench, "engine / step, attention", attention, k)
    k = 64 if 64 in bench.ks else bench.ks[0]
    bench_engine(bench, "engine / step, MLP", mlp, k)
    bench_engine(bench, "engine / step, all", attention | mlp, k)
    for name in ("fc0", "proj0"):
        bench.row("exact", f"MLP {name}, one", lambda name=name: exact_one(bench, mlp[name]))


# --- output -----------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=80, help="matrices")
    parser.add_argument("--size", type=int, default=1280, help="rows and columns of the square ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args(argv)


@torch.no_grad()
def main() -> None:
    arguments = parse()
    started, threads = time.perf_counter(), f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else threads
    print(f"torch {torch.__version__}, {arguments.device} ({name}), {arguments.num} x {arguments.size}^2, float32")
    print(f"{'section':26s} {'variant':28s} {'k':>4s} {'ms':>10s}  {'check':42s} note")
    bench = Bench(arguments)
    sections = (bench_exact, bench_warm, bench_parts, bench_analysis, bench_fast, bench_engines, bench_ritz)
    for section in sections:
        try:
            section(bench)
        except Exception as error:
            bench.results.append(Result(section.__name__, "stopped", note=f"{type(error).__name__}: {error}"))
            print(format_row(bench.results[-1]), flush=True)
    print(f"{(seconds := time.perf_counter() - started):.0f} s in all")
    if arguments.out:
        about = {"num": arguments.num, "size": arguments.size, "device": name, "torch": torch.__version__}
        rows = {"seconds": seconds, "step_ms": STEP_MS, "rows": [asdict(result) for result in bench.results]}
        arguments.out.write_text(json.dumps(about | rows, indent=1))


if __name__ == "__main__":
    main()
