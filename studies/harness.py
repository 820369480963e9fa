"""What the studies share, so that each of them holds its question only.

- The command line: ``study`` makes it from the signatures of a script's stages, and prints the
  machine, the versions and the date before the numbers; see ``command_line.py``.
- The images: :func:`photographs`, :func:`tiny_imagenet`, :func:`pink_noise`; work in batches.
- What is not computed twice: :func:`kept`.
- Boxes from maps, and thresholds that are tuned on the other half: :func:`failures`.
- Means and differences with their intervals, as text.
- Times of contenders that take turns, and their ratios: :func:`race`; peak memory.
- A GPU: precisions, waiting for it, and the share of the time in which it was busy.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from captum.attr import LayerGradCam
from command_line import installed as installed
from command_line import listed as listed
from command_line import numbered as numbered
from command_line import study as study
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F

from captum_robust._contexts import outputs_of
from captum_robust._files import write_tensors
from captum_robust.attr import RealTimeMasking
from captum_robust.data import LocalizationDataset, Sample, load_dataset, resize
from captum_robust.metrics.functional import (
    STRATEGIES,
    LocalizationResult,
    alpha_grid,
    best_iou,
    bootstrap_difference,
    bootstrap_interval,
    center_box,
    localization_error,
    split_folds,
    sweep_boxes,
    whole_image_box,
)
from captum_robust.models import Classifier, load_classifier
from captum_robust.nn import MaskingNetwork, load_masking_network

BATCH = 16

# -- Classifier and images ------------------------------------------------------------------------


def classifier(name: str = "efficientnet_lite0") -> Classifier:
    """Return a classifier, EfficientNet-Lite0 or another, with its published weights, frozen.

    Its weights are laid out as convolutions of half precision are fastest with.
    """
    model = load_classifier(name).requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def masking_network(file: Path | None, model: Classifier) -> MaskingNetwork:
    """Return the masking network of a file, or that of the package."""
    if file is not None:
        return load_masking_network(file, model).eval()
    return RealTimeMasking.from_pretrained("efficientnet_lite0", model=model).network.eval()


@dataclass(frozen=True)
class Photographs:
    """Annotated images of one size."""

    images: Tensor
    """N×3×H×W in [0, 1]."""
    labels: Tensor
    """N, -1 where none is known."""
    boxes: list[Tensor]
    """M×4 in pixels for each image."""
    ids: list[str]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Photographs:
        """Put samples of one size together."""
        labels = [-1 if s.label is None else s.label for s in samples]
        images = torch.stack([s.image for s in samples])
        return cls(
            images, torch.tensor(labels), [s.boxes for s in samples], [s.id for s in samples]
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def half(self) -> Tensor:
        """N, the half that each image is in: 0 or 1, as for ``captum-robust compare``."""
        return split_folds(self.ids)


def photographs(
    path: str | Path | None,
    n: int | None = None,
    size: tuple[int, int] = (224, 224),
    kind: str = "imagenet",
) -> Photographs:
    """Return the first n images of a data set, squashed to a size; all without n."""
    dataset = load_dataset(kind, path)
    count = len(dataset) if n is None else min(n, len(dataset))
    return Photographs.of([resize(dataset[i], size) for i in range(count)])


class Part(LocalizationDataset):
    """Some samples of another data set."""

    kind = "part"

    def __init__(self, whole: LocalizationDataset, positions: Sequence[int]) -> None:
        self.whole, self.positions = whole, list(positions)
        self.root, self.class_names = whole.root, whole.class_names
        self.ids = [whole.ids[p] for p in self.positions]

    def _load(self, index: int) -> Sample:
        return self.whole[self.positions[index]]


def tiny_imagenet(path: Path, split: str, classes: int) -> LocalizationDataset:
    """Return the images of the first classes of Tiny ImageNet, folder or archive."""
    whole = load_dataset("tiny-imagenet", path, split=split, labels="wnids")
    if classes >= len(whole.class_names or ()):
        return whole
    if split != "train":
        return Part(whole, [p for p in range(len(whole)) if whole[p].label in range(classes)])
    # Ids begin with the WordNet id: only one image of each class is read to find its number.
    first: dict[str, int] = {}
    for position, name in enumerate(whole.ids):
        first.setdefault(name.split("_")[0], position)
    wanted = {wnid for wnid, position in first.items() if whole[position].label in range(classes)}
    return Part(whole, [p for p, name in enumerate(whole.ids) if name.split("_")[0] in wanted])


def pink_noise(n: int, size: tuple[int, int]) -> Tensor:
    """Return n seeded images N×3×H×W in [0, 1], with the 1/f spectrum of photographs."""
    noise = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))
    fy, fx = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    frequency = (fy**2 + fx**2).sqrt()
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1 / max(size)), size)
    low, high = smooth.amin((1, 2, 3), True), smooth.amax((1, 2, 3), True)
    return (smooth - low) / (high - low)


def to_bytes(x: Tensor) -> Tensor:
    """Return pixels in [0, 1] as uint8."""
    return x.mul(255).round().to(torch.uint8)


def rounded(x: Tensor) -> Tensor:
    """Return the pixels in [0, 1] that an 8-bit image would hold."""
    return x.mul(255).round() / 255


def parts(*tensors: Tensor, size: int = BATCH) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors batch by batch; uint8 images become pixels in [0, 1]."""
    for batch in zip(*(t.split(size) for t in tensors), strict=True):
        yield tuple(t / 255 if t.dtype == torch.uint8 else t for t in batch)


def in_batches(call: Callable[..., Tensor], *tensors: Tensor, size: int = BATCH) -> Tensor:
    """Return what the call gives for all batches of :func:`parts`, as one tensor."""
    return torch.cat([call(*batch) for batch in parts(*tensors, size=size)])


def gathered(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all batches by name."""
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, values in batch.items():
            columns.setdefault(name, []).append(values)
    return {name: torch.cat(column) for name, column in columns.items()}


@torch.no_grad()
def predicted(model: Callable[[Tensor], Tensor], x: Tensor, size: int = BATCH) -> Tensor:
    """Return the classes N with the highest scores, for pixels in [0, 1] or uint8."""
    return in_batches(lambda part: model(part).argmax(dim=1), x, size=size)


@torch.no_grad()
def scores_and_features(
    model: Classifier, batches: Iterable[Tensor], keep: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the scores of all batches, and what is kept of the features behind the last layer."""
    scores, features = [], []
    with outputs_of([model.cam_layer]) as outputs:
        for x in batches:
            scores.append(model(x))
            features.append(keep(outputs[0]))
    return torch.cat(scores), torch.cat(features)


def attacked(attack: Any, x: Tensor, labels: Tensor, size: int = BATCH) -> Tensor:
    """Return the 8-bit images that an attack makes, uint8."""
    return in_batches(lambda a, b: to_bytes(attack.perturb(a, b)), x, labels, size=size)


# -- Results that are kept ------------------------------------------------------------------------


def file_of(folder: Path, *names: str) -> Path:
    """Return where the tensors of a name lie: sub-folders first, the name last."""
    *folders, name = names
    return folder.joinpath(*folders, f"{name.replace('/', '_').replace(' ', '_')}.safetensors")


def folder_of(out: Path, *names: str) -> Path:
    """Return where a run is, by names that a shell need not quote."""
    return out.joinpath(*(name.replace(" ", "_").replace(",", "") for name in names))


def kept(
    file: Path,
    make: Callable[[], Mapping[str, Tensor]],
    count: int | None = None,
    of: str = "x",
) -> dict[str, Tensor]:
    """Return the tensors that the file holds; where there is none they are made and written.

    With ``count`` only of the first so many images: a file whose tensor ``of`` has fewer is made
    anew, and of one that has more the rest is left out.
    """
    if count is not None and file.exists() and len(load_file(file)[of]) < count:
        file.unlink()
    if not file.exists():
        began = time.perf_counter()
        write_tensors(file, make(), {})
        print(f"{file.stem}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    found = load_file(file)
    return {n: v if count is None or len(v) < count else v[:count] for n, v in found.items()}


# -- Maps and boxes -------------------------------------------------------------------------------


def enlarged(maps: Tensor, size: tuple[int, int] = (224, 224)) -> Tensor:
    """Return maps N×1×h×w or N×h×w at the size of the images, N×H×W."""
    maps = maps if maps.ndim == 4 else maps[:, None]
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]


def grad_cams(
    model: Classifier, x: Tensor, classes: Tensor, size: int = BATCH, *, signed: bool = False
) -> Tensor:
    """Return Captum's Grad-CAM N×H×W at the size of the images, its positive part unless signed."""
    cam = LayerGradCam(model, model.cam_layer)

    def explain(part: Tensor, target: Tensor) -> Tensor:
        return cam.attribute(part, target, relu_attributions=not signed).detach().float()

    return enlarged(in_batches(explain, x, classes, size=size), x.shape[2:])


def overlaps(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """Return N×A, the best overlap of the box of each threshold of each family."""
    swept = [sweep_boxes(part, STRATEGIES) for part in maps.split(100)]
    drawn = torch.cat([torch.cat([s[name] for name in STRATEGIES], dim=1) for s in swept])
    return best_iou(drawn, boxes)


def tuned(
    maps: Mapping[str, Tensor] | Tensor,
    boxes: list[Tensor],
    families: Sequence[str] = ("value", "mean", "energy"),
    **split: Any,
) -> LocalizationResult:
    """Return the errors at the threshold that is best for the other half.

    ``maps`` may be several versions of the maps, of which one is chosen along with the threshold;
    ``split`` are the ids or folds of the images.
    """
    ious, alphas = {}, {}
    for version, own in maps.items() if isinstance(maps, Mapping) else (("", maps),):
        for family, drawn in sweep_boxes(own, families).items():
            name = f"{family}, {version}" if version else family
            ious[name], alphas[name] = best_iou(drawn, boxes), alpha_grid(family)
    return localization_error(ious, alphas=alphas, **split)


def best_column(ious: Tensor) -> Tensor:
    """Return the number of the threshold that fails least often, of overlaps N×A."""
    return (ious <= 0.5).float().mean(dim=0).argmin()


def failures(ious: Tensor, half: Tensor, tuned_on: Tensor | None = None) -> Tensor:
    """Return N: 1 where the box fails at the threshold that is best for the other half.

    ``ious`` and ``tuned_on`` (other overlaps of the same columns, if the threshold is chosen on
    them) are of the first images of ``half``; of ``tuned_on`` there may be more.
    """
    tuned_on = ious if tuned_on is None else tuned_on
    failed = torch.zeros(len(ious))
    for side in (0, 1):
        best = best_column(tuned_on[half[: len(tuned_on)] != side])
        rows = half[: len(ious)] == side
        failed[rows] = (ious[rows][:, best] <= 0.5).float()
    return failed


def fixed_boxes(size: tuple[int, int], boxes: list[Tensor]) -> dict[str, Tensor]:
    """Return N: 1 where the box in the centre, and that of the whole image, fails."""
    return {
        name: (best_iou(box.expand(len(boxes), 1, 4), boxes)[:, 0] <= 0.5).float()
        for name, box in (("centre box", center_box(size)), ("whole image", whole_image_box(size)))
    }


# -- Numbers as text ------------------------------------------------------------------------------


def interval(found: Any, form: str = ".3f") -> str:
    """Return "mean [low, high]" of an interval, a share or a closed gap."""
    center = found.mean if hasattr(found, "mean") else found.value
    return f"{center:{form}} [{found.low:{form}}, {found.high:{form}}]"


def mean(values: Tensor, form: str = ".3f") -> str:
    """Return the mean of one value a sample, with its 95 % bootstrap interval."""
    return interval(bootstrap_interval(values), form)


def difference(a: Tensor, b: Tensor, form: str = "+.3f") -> str:
    """Return the mean of a - b over the same samples, with its 95 % bootstrap interval."""
    return interval(bootstrap_difference(a, b), form)


# -- Time and memory ------------------------------------------------------------------------------


@dataclass
class Laps:
    """Seconds that a contender took in each round, by the clock and on the cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Any = None
    """What it returned last."""

    @property
    def median(self) -> float:
        """Wall-clock seconds of the median round."""
        return statistics.median(self.wall)


def race(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: bool = True,
    repeats: Mapping[str, int] | None = None,
    device: str = "cpu",
) -> dict[str, Laps]:
    """Time contenders that take turns, each round beginning with another one.

    Args:
        contenders: name -> what is timed.
        rounds: how often each one is.
        warm_up: whether there is one more round before, which does not count.
        repeats: how often a round those run that are not to run once; their mean counts.
        device: a GPU is waited for.
    """
    wait = partial(wait_for, device)
    laps, names, repeats = {name: Laps() for name in contenders}, [*contenders], repeats or {}
    for number in range(-1 if warm_up else 0, rounds):
        by = number % len(names)
        spent = dict.fromkeys(names, (0.0, 0.0))
        for turn in range(max(repeats.values(), default=1)):
            # None always follows the same load.
            for name in names[by:] + names[:by]:
                if turn < repeats.get(name, 1):
                    wait()
                    wall, cpu = time.perf_counter(), time.process_time()
                    laps[name].result = contenders[name]()
                    wait()
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    spent[name] = spent[name][0] + wall, spent[name][1] + cpu
        if number >= 0:
            for name, (wall, cpu) in spent.items():
                laps[name].wall.append(wall / repeats.get(name, 1))
                laps[name].cpu.append(cpu / repeats.get(name, 1))
    return laps


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Return "median (smallest to largest)" of how many times longer the first took, by round."""
    each = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return f"{statistics.median(each):6.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def peak_mib(command: Sequence[str], folder: Path | None = None) -> float:
    """Return the peak resident memory of one process in MiB; what it prints is thrown away."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            sys.exit(errors.read())
    return usage.ru_maxrss / 1024


# -- A GPU ----------------------------------------------------------------------------------------

Precision = Literal["float32", "tf32", "bfloat16"]
Precisions = Annotated[
    tuple[Precision, ...],
    "tf32: of float32, 10 bits count in products, on a GPU; bfloat16: autocast",
]


@contextmanager
def precision_of(name: Precision, device: str) -> Iterator[None]:
    """Inside, products of matrices and convolutions have this precision."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    kind = torch.device(device).type
    try:
        for backend in backends:
            backend.allow_tf32 = name == "tf32"
        with torch.autocast(kind, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def wait_for(device: str) -> None:
    """Wait until a device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans (from, to)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy(call: Callable[[], Any], device: str) -> str:
    """Return the share of the time of a call in which a GPU computes or copies, as text."""
    if not device.startswith("cuda"):
        return "not measured"
    wait_for(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        began = time.perf_counter()
        call()
        wait_for(device)
        seconds = time.perf_counter() - began
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    ]
    return f"{covered(spans) / 1e6 / seconds:.0%}"


def margin(scores: Tensor, label: Tensor) -> Tensor:
    """Return N, how far the best other class leads the label."""
    own = scores.gather(1, label[:, None])[:, 0]
    return scores.scatter(1, label[:, None], -torch.inf).amax(dim=1) - own
