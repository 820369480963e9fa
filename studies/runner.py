"""How busy ``compare`` keeps the classifier, and what a method takes inside of it.

``speed``: the seconds of ``compare`` with RobustCAM, Grad-CAM and the centre box over N images,
beside those of the bare forward passes that these methods need (one an image and method), of the
same images, which lie in memory for the passes: the files are read by ``compare`` alone. Batch size
and precision are the same, and they take turns. The ratios are those of the medians: to the passes
as any program has them, and to passes that keep the memory of their activations as a run does.

``ratios``: what the run says that each method takes ("ms" in its table), beside a bare call of the
method on the same batches.

``resume``: the seconds in which a run of so many positions that is complete is gone through again.

    python studies/runner.py speed imagenet DATA --images 128 --rounds 3
    python studies/runner.py ratios imagenet DATA --methods robust_cam,grad_cam,saliency
    python studies/runner.py resume --positions 50000

Times are noisy where other jobs run: the load is printed before and after.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from harness import classifier, listed, photographs, race, study
from torch import Tensor

from captum_robust._contexts import autocast, evaluation
from captum_robust._memory import kept_memory
from captum_robust.benchmark import RunWarning, compare
from captum_robust.catalog.description import describe_run
from captum_robust.catalog.methods import METHODS, build_methods
from captum_robust.data import LocalizationDataset, Sample, load_dataset
from captum_robust.models import Classifier
from captum_robust.report.results import CLEAN
from captum_robust.runs.rows import ImageRow, ResultRow
from captum_robust.runs.store import RunStore, pack

METHODS_TIMED = ("robust_cam", "grad_cam", "center_box")


def main() -> None:
    """Run one stage."""
    study(__doc__, speed, ratios, resume)


def speed(
    kind: str = "imagenet",
    path: Path | None = None,
    *,
    images: int = 128,
    rounds: int = 3,
    batch_size: int = 16,
    workers: int = 0,
    precision: str = "float32",
    device: str = "cpu",
    model: str = "efficientnet_lite0",
) -> None:
    """Print the ratio of the bare passes' time to that of the run."""
    net, data = classifier(model).to(device), load_dataset(kind, path)
    x = photographs(path, images, net.input_size, kind).images
    passes = sum(name not in ("center_box",) for name in METHODS_TIMED)

    def bare() -> None:
        for _ in range(passes):
            passed(net, x, batch_size, precision)

    def run() -> None:
        with TemporaryDirectory() as folder:
            options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
            options |= {"out": folder, "workers": workers, "progress": False}
            compare(net, data, METHODS_TIMED, limit=images, **options)

    def kept() -> None:
        with kept_memory():
            bare()

    laps = race(
        {"bare passes": bare, "with kept memory": kept, "compare": run}, rounds, device=device
    )
    for name, lap in laps.items():
        print(f"{name:16} {lap.median:7.2f} s, {statistics.median(lap.cpu):7.2f} s on the cores")
    run_laps = laps.pop("compare")
    for name, lap in laps.items():
        by_round = sorted(a / b for a, b in zip(lap.wall, run_laps.wall, strict=True))
        ratio = lap.median / run_laps.median
        print(f"{name}: ratio {ratio:.2f}, {by_round[0]:.2f} to {by_round[-1]:.2f} by round")
    print(f"{len(x)} images, {passes} passes each; load {os.getloadavg()[0]:.1f}")


@torch.no_grad()
def passed(net: Classifier, x: Tensor, batch_size: int, precision: str) -> None:
    """Give all images to the classifier, batch by batch."""
    device = next(net.parameters()).device
    with evaluation(net), autocast(device, precision):
        for part in x.split(batch_size):
            net(part.to(device, non_blocking=True))


def ratios(
    kind: str = "imagenet",
    path: Path | None = None,
    *,
    methods: Annotated[tuple[str, ...], listed(METHODS)] = METHODS_TIMED,
    images: int = 64,
    rounds: int = 3,
    batch_size: int = 16,
    device: str = "cpu",
    model: str = "efficientnet_lite0",
) -> None:
    """Print each method's time inside of the run, and of a bare call."""
    net, data = classifier(model).to(device), load_dataset(kind, path)
    found = photographs(path, images, net.input_size, kind)
    built = build_methods(net, methods)
    x = found.images.to(device)

    def bare(name: str) -> None:
        for part, labels in zip(x.split(batch_size), found.labels.split(batch_size), strict=True):
            with evaluation(net):
                built[name].explain(part, labels.clamp(min=0).to(device))

    def run() -> Mapping[str, float]:
        options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
        rows = compare(net, data, methods, limit=images, **options).to_dataframe()
        return rows.groupby("method")["seconds"].sum().to_dict()

    inside: dict[str, list[float]] = {name: [] for name in methods}

    def noted() -> None:
        for name, seconds in run().items():
            inside[name].append(seconds)

    calls = {name: lambda name=name: bare(name) for name in methods}
    laps = race({**calls, "compare": noted}, rounds, device=device)
    for name in methods:
        within, alone = statistics.median(inside[name][1:]), laps[name].median
        ms = 1000 / len(x)
        print(
            f"{name:24} {within * ms:8.2f} ms inside, {alone * ms:8.2f} bare: {within / alone:.2f}"
        )
    print(f"{len(x)} images; load {os.getloadavg()[0]:.1f}")


class Repeated(LocalizationDataset):
    """One grey image under so many names."""

    kind = "repeated"

    def __init__(self, count: int) -> None:
        self.ids = [f"{i:06}.png" for i in range(count)]

    def _load(self, index: int) -> Sample:
        return Sample(torch.full((3, 32, 32), 0.5), 0, torch.zeros(0, 4), self.ids[index])


def resume(*, positions: int = 50_000, rounds: int = 3) -> None:
    """Print how long a complete run takes to say so."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    net, data = Classifier(network, input_size=32).eval(), Repeated(positions)
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # no image has a box
        folder = Path(name) / "run"

        def run() -> None:
            compare(net, data, METHODS_TIMED, out=folder, progress=False)

        fill(folder, net, data)
        size = sum(file.stat().st_size for file in folder.iterdir())
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    print(
        f"{positions} positions, {size / positions:.0f} bytes each: resumed in "
        f"{statistics.median(times):.2f} s; load {os.getloadavg()[0]:.1f}"
    )


def fill(folder: Path, net: Classifier, data: LocalizationDataset) -> None:
    """Insert rows as large as those of photographs for all positions."""
    positions = len(data)
    settings: dict[str, Any] = {"batch_size": 16, "target": "label", "fit": "squash"}
    settings |= {"precision": "float32", "seed": 0}
    methods = {name: name for name in METHODS_TIMED}
    store = RunStore(folder, describe_run(net, data, positions, methods, {}, settings))
    store.begin()
    store.write_classes(())
    noise = torch.Generator().manual_seed(0)
    packed = pack(torch.rand(256, generator=noise))
    for start in range(0, positions, 1000):
        names = [(p, f"{p:06}.png") for p in range(start, min(start + 1000, positions))]
        store.write(
            [
                ResultRow(p, method, CLEAN, name, 0, 0, 0.5, 0.01, heat=packed, ious=packed)
                for p, name in names
                for method in METHODS_TIMED
            ],
            [ImageRow(p, name, 0, 32, 32, []) for p, name in names],
        )
    store.close()


if __name__ == "__main__":
    main()
