"""What does a run of fifty thousand images take: to make it, on the disk, and to read it?

    python studies/fifty_thousand.py make IMAGES FOLDER [--count 50000]
    python studies/fifty_thousand.py run FOLDER OUT [--model efficientnet_lite0] [--attacks fgsm]
    python studies/fifty_thousand.py read FOLDER OUT [--model …] [--attacks …]

``make`` lists the images of a data set under as many names as asked for, without a copy of their
bytes. ``read`` gives each question to a process of its own, which has read nothing yet.
"""

from __future__ import annotations

import csv
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import BATCH, classifier, study
from torch import nn

from captum_robust.benchmark import Comparison, build_attacks, compare
from captum_robust.data import LocalizationDataset, fitted, load_dataset
from captum_robust.data.classes import imagenet_names
from captum_robust.models import Classifier

METHODS = ["robust_cam", "grad_cam", "center_box"]


def make(images: Path, folder: Path, *, kind: str = "imagenet", count: int = 50_000) -> None:
    """Write a folder with links to the images of a data set in turn, and their boxes."""
    samples = [*load_dataset(kind, images)]
    folder.mkdir(parents=True)
    with (folder / "boxes.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "x0", "y0", "x1", "y1", "label"])
        for position in range(count):
            sample = samples[position % len(samples)]
            source = Path(sample.source).resolve()
            name = f"{position:06d}{source.suffix}"
            (folder / name).symlink_to(source)
            rows.writerows(
                [name, *box, sample.label] for box in sample.boxes.tolist() or [[""] * 4]
            )
    print(f"{count} names of {len(samples)} images, listed in {seconds_of(folder):.1f} s")


def seconds_of(folder: Path) -> float:
    """Return how long the data set of a folder takes to open."""
    began = time.perf_counter()
    load_dataset("folder", folder)
    return time.perf_counter() - began


def model_of(name: str) -> Classifier:
    """Return a classifier; ``"tiny"``: four layers at 64 pixels, the cheapest that is one."""
    if name != "tiny":
        return classifier(name)
    torch.manual_seed(0)
    widths, layers = (3, 16, 32, 64), []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1000))
    return Classifier(net, (0.5,) * 3, (0.5,) * 3, 64, class_names=imagenet_names()).eval()


def peak() -> float:
    """Return the peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare(model: Classifier, dataset: LocalizationDataset, batches: int = 20) -> float:
    """Return the seconds an image that a pass of the classifier alone takes."""
    spent = []
    for start in range(0, batches * BATCH, BATCH):
        part = [dataset[i % len(dataset)] for i in range(start, start + BATCH)]
        batch = torch.stack([fitted(one, model.input_size, "squash").image for one in part])
        began = time.perf_counter()
        with torch.no_grad():
            model(batch)
        spent.append((time.perf_counter() - began) / BATCH)
    return statistics.median(spent)


def named(network: Classifier, attacks: str) -> dict[str, Any]:
    """Return attacks by their names, of 2/255."""
    return build_attacks(network, attacks.split(","), [2]) if attacks else {}


def run(
    folder: Path, out: Path, *, model: str = "tiny", count: int | None = None, attacks: str = ""
) -> None:
    """Compare the methods on the images, and say what it took."""
    network, dataset = model_of(model), load_dataset("folder", folder)
    alone, done, peaks = bare(network, dataset), threading.Event(), [peak()]

    def watch() -> None:
        while not done.wait(1):
            peaks.append(peak())

    watcher, began = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        result = compare(network, dataset, METHODS, named(network, attacks), out=out, limit=count)
    finally:
        done.set()
        watcher.join()
    took, n = time.perf_counter() - began, len(result)
    size = sum(file.stat().st_size for file in out.iterdir())
    table = result.table()
    passes = 1 + table.loc[table["attack"] == "clean", "forward"].sum()  # one finds the class
    print(f"{n} images in {took:.0f} s, {n / took:.1f} a second; bare passes {1 / alone:.1f}")
    print(f"{passes:.1f} forward passes an image, bare {passes * alone * n / took:.2f} of the time")
    at = [peaks[min(int(share * len(peaks)), len(peaks) - 1)] for share in (0.1, 0.5, 1)]
    print("peak MiB at 10, 50 and 100 % of the time: " + ", ".join(f"{p:.0f}" for p in at))
    print(f"folder {size / 1e6:.1f} MB, {size / n / 1e3:.2f} kB an image")


def read(folder: Path, out: Path, *, model: str = "tiny", attacks: str = "") -> None:
    """Print the seconds and the peak memory of each question to a run."""
    print(f"{'':28}seconds   of the processor   peak MiB")
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        split(out, ranks := Path(scratch) / "ranks")
        cases = [(name, name, out) for name in (*QUESTIONS, "resume")]
        for what, name, place in [*cases, ("table of four ranks' files", "table", ranks)]:
            command = [sys.executable, __file__, "ask", name, folder, place]
            command += ["--model", model, "--attacks", attacks]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"{what:28}{said.splitlines()[-1]}", flush=True)


def split(out: Path, parted: Path, ranks: int = 4) -> None:
    """Write the run of one process as so many ranks would have."""
    parted.mkdir()
    shutil.copy(out / "run.json", parted)
    for rank in range(ranks):
        file = parted / (f"rows.{rank}.sqlite" if rank else "rows.sqlite")
        shutil.copy(out / "rows.sqlite", file)
        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            for table in ("images", "results", "attacked"):
                database.execute(
                    f"DELETE FROM {table} WHERE position / {BATCH} % {ranks} <> {rank}"
                )
            database.execute("VACUUM")


QUESTIONS: dict[str, Callable[[Comparison, Path], object]] = {
    "open": lambda run, _: len(run),
    "table": lambda run, _: run.table(),
    "failures": lambda run, _: run.failures(),
    "to_dataframe": lambda run, _: run.to_dataframe(),
    "chunks": lambda run, _: sum(map(len, run.to_dataframe(chunksize=10_000))),
    "to_parquet": lambda run, scratch: run.to_parquet(scratch / "rows.parquet"),
    "to_html": lambda run, scratch: run.to_html(scratch / "report.html"),
}


def ask(name: str, folder: Path, out: Path, *, model: str = "tiny", attacks: str = "") -> None:
    """Ask one question, in this process."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if name == "resume":
            network, dataset = model_of(model), load_dataset("folder", folder)
            limit = len(Comparison(out))
            compare(network, dataset, METHODS, named(network, attacks), out=out, limit=limit)
        else:
            QUESTIONS[name](Comparison(out), Path(scratch))
    print(f"{time.perf_counter() - began:7.1f}   {time.process_time():16.1f}   {peak():8.0f}")


if __name__ == "__main__":
    study(__doc__, make, run, read, ask)
