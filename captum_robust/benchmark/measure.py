"""From heat maps to the columns of their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust._resize import size_within
from captum_robust.benchmark.batches import Batch, outcome_columns, rows_of
from captum_robust.benchmark.reading import Loaded, as_jpeg
from captum_robust.catalog.certification import Certificates
from captum_robust.catalog.methods import Method, Perturbation
from captum_robust.data import Sample
from captum_robust.draw import amplified, encode_jpeg
from captum_robust.metrics import functional as metrics
from captum_robust.metrics.functional.box_accuracy import sweep_and_maxboxacc
from captum_robust.metrics.functional.stability import SSIM_WINDOW
from captum_robust.report.results import ATTACK_POOL, GALLERY_POOL, STRATEGY_ORDER
from captum_robust.runs.level_hits import OVERLAPS, pack_hits
from captum_robust.runs.store import pack

_HEAT_SIDE = 56
_CHANGE_SIDE = 224
_CHANGE_BYTES = 20_000


def map_columns(maps: Tensor, batch: Batch, boxes: Tensor | None) -> list[dict[str, Any]]:
    """The metrics of each map N×H×W, and pictures of the first ones.

    ``boxes`` are N×4, whatever the threshold; None: they come from the maps.
    """
    true = [sample.boxes for sample in batch.samples]
    if boxes is None:
        drawn, v1, v2 = sweep_and_maxboxacc(maps, STRATEGY_ORDER, true)
    else:
        thresholds = sum(len(metrics.alpha_grid(strategy)) for strategy in STRATEGY_ORDER)
        drawn = boxes.detach().float().cpu()[:, None].expand(-1, thresholds, -1)
        v1 = v2 = metrics.best_iou(drawn[:, :1], true, inclusive=True).expand(-1, 256)
    ious = metrics.best_iou(drawn, true)
    rows: list[dict[str, Any]] = [{} for _ in batch]
    pointing = _pointing(maps, batch.samples)
    shown = [i for i, item in enumerate(batch) if item.position < GALLERY_POOL]
    for i, heat in zip(shown, _thumbnails(maps[shown]), strict=True):
        rows[i]["heat"] = heat
    for i, (row, sample) in enumerate(zip(rows, batch.samples, strict=True)):
        row["predicted_boxes"] = pack(drawn[i].round().to(torch.int16))
        if len(sample.boxes):
            row["ious"] = pack(ious[i])
            row["maxboxacc"] = pack_hits(v1[i], OVERLAPS["maxboxacc"])
            row["maxboxacc_v2"] = pack_hits(v2[i], OVERLAPS["maxboxacc_v2"])
        if len(sample.boxes) or sample.mask is not None:
            row["pointing"] = pointing[i]
        if sample.mask is not None:
            row["pxap"] = pack(metrics.pxap_histograms(maps[i : i + 1], sample.mask[None])[0])
    return rows


def change_columns(perturbation: Perturbation, batch: Batch) -> list[dict[str, Any]]:
    """What became of each changed image, and pictures of the first changes."""
    names = ("new_class", "flipped", "margin")
    rows = rows_of({name: getattr(perturbation, name) for name in names})
    for row, item, change in zip(rows, batch, perturbation.change, strict=True):
        if item.position < GALLERY_POOL:
            row |= picture_of_change(change)
    return rows


def attack_columns(batch: Batch) -> list[dict[str, Any]]:
    """What became of each attacked image, and pictures of the first ones."""
    rows = rows_of(outcome_columns(batch))
    for i, item in enumerate(batch):
        if item.position < ATTACK_POOL:
            drawn = picture_of_change(batch.images[i] - batch.clean[i])
            rows[i]["change"], rows[i]["amplification"] = drawn.values()
            rows[i]["picture"] = as_jpeg(batch.images[i])
    return rows


def stability_columns(
    clean: Mapping[Loaded, Tensor], images: Sequence[Loaded], attacked: Tensor
) -> list[dict[str, Any]]:
    """How far each map N×H×W is that of the clean image.

    Nothing for an image without a clean map.
    """
    rows: list[dict[str, Any]] = [{} for _ in images]
    known = [i for i, image in enumerate(images) if image in clean]
    if known:
        before = torch.stack([clean[images[i]] for i in known])
        large = min(_size(before)) >= SSIM_WINDOW
        measures = [m for m in metrics.STABILITY_MEASURES if m != "ssim" or large]
        values = rows_of(metrics.stability(before, attacked[known], measures=measures))
        for i, row in zip(known, values, strict=True):
            rows[i] = row
    return rows


def crop_columns(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    method: Method,
) -> list[dict[str, Any]]:
    """The areas and log probabilities of the crops around each map, 2×A packed."""
    if method.box is None:
        boxes = metrics.saliency_boxes(maps)
    else:
        boxes = method.box(_size(maps)).expand(len(maps), 1, 4)
    return [
        {"crops": packed} for packed in _packed(metrics.crop_scores(scores, images, boxes, classes))
    ]


def removal_columns(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    settings: Mapping[str, Any],
    of_road: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The curves of deletion and insertion of each map, behind the share of the pixels, and ROAD's.

    ``settings`` are those of deletion and insertion.
    """
    deletion, insertion = metrics.removal_curves(scores, images, maps, classes, **settings)
    share = deletion.share.expand_as(deletion.probability)
    curves = torch.stack((share, deletion.probability, insertion.probability), dim=1)
    imputed = metrics.road(scores, images, maps, classes, **of_road)
    share = torch.tensor(of_road["shares"]).to(imputed.most).expand_as(imputed.most)
    road = torch.stack((share, imputed.most, imputed.least), dim=1)
    return [
        {"removal": pack(row), "road": pack(own)}
        for row, own in zip(curves.cpu(), road.cpu(), strict=True)
    ]


def randomization_columns(
    model: nn.Module,
    explain: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """How far each map stays the same without the model's weights, the mean over the stages."""
    same = metrics.model_randomization(model, explain, images, classes, maps=maps, **settings)
    means = {"spearman": same.spearman.mean(dim=0), "ssim": same.ssim.mean(dim=0)}
    return rows_of({f"randomized_{name}": mean for name, mean in means.items()})


def drops_of(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    classes: Tensor,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Random squares S×H×W, and how far the probability of each class falls without them, N×S."""
    squares = metrics.random_squares(settings["squares"], _size(images[:, 0]), settings["seed"])
    return squares, metrics.square_drops(scores, images, squares, classes, fill=settings["fill"])


def certificate_columns(certificates: Certificates, batch: Batch) -> list[dict[str, Any]]:
    """What is proven of each image: a line for the smoothed box, and one for each radius.

    A line is 10 numbers: the certified share (NaN of the first line), the overlap with the true box
    that fits best (NaN without any; the least that is proven, but in the first line), and the inner
    and outer box, in pixels. Beside it the cells of the first images.
    """
    true = [sample.boxes for sample in batch.samples]
    smoothed = certificates.box.float().cpu()
    unknown = torch.full((len(smoothed), 1), torch.nan)
    overlap = metrics.best_iou(smoothed[:, None], true).float()
    lines = [torch.cat([unknown, overlap, smoothed, smoothed], dim=1)]
    for proven in certificates.at:
        inner, outer = proven.inner.float().cpu(), proven.outer.float().cpu()
        least = metrics.best_certified_iou(inner, outer, true)
        facts = torch.stack([proven.share.cpu(), least], dim=1)
        lines.append(torch.cat([facts, inner, outer], dim=1))
    cells = torch.stack([proven.cells.cpu() for proven in certificates.at], dim=1)
    rows = [{"certificate": pack(lines_of)} for lines_of in torch.stack(lines, dim=1)]
    for i, item in enumerate(batch):
        if item.position < GALLERY_POOL:
            rows[i]["certified_cells"] = pack(cells[i])
    return rows


def true_crops(
    scores: Callable[[Tensor], Tensor], images: Tensor, samples: list[Sample], classes: Tensor
) -> list[bytes | None]:
    """The same of the largest true box of each image; None where there is no box."""
    known = [i for i, sample in enumerate(samples) if len(sample.boxes)]
    crops: list[bytes | None] = [None] * len(samples)
    if known:
        boxes = torch.stack([_largest(samples[i].boxes) for i in known])[:, None]
        packed = _packed(metrics.crop_scores(scores, images[known], boxes, classes[known]))
        for i, crop in zip(known, packed, strict=True):
            crops[i] = crop
    return crops


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[1], maps.shape[2]


def _largest(boxes: Tensor) -> Tensor:
    return boxes[(boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argmax()]


def _packed(crops: tuple[Tensor, Tensor]) -> list[bytes]:
    return [pack(row) for row in torch.stack(crops, dim=1).cpu()]


def _pointing(maps: Tensor, samples: Sequence[Sample]) -> list[float]:
    """Whether the largest pixel of each, at the image's original size, hits the object.

    NaN where there is none.
    """
    hits = [math.nan] * len(samples)
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, sample in enumerate(samples):
        if sample.mask is not None or len(sample.boxes):
            by_size.setdefault(sample.original_size, []).append(i)
    for size, rows in by_size.items():
        at_size = F.interpolate(maps[rows, None], size=size, mode="bilinear", align_corners=False)
        boxed = [(k, i) for k, i in enumerate(rows) if samples[i].mask is None]
        if boxed:
            scaled = [_at_size(samples[i]) for _, i in boxed]
            found = metrics.pointing_game_hits(at_size[[k for k, _ in boxed], 0], scaled).tolist()
            for (_, i), hit in zip(boxed, found, strict=True):
                hits[i] = hit
        for k, i in enumerate(rows):
            mask = samples[i].mask
            if mask is not None:
                large = F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0].bool()
                hits[i] = float(metrics.pointing_game_hits(at_size[k], large)[0])
    return hits


def _at_size(sample: Sample) -> Tensor:
    """The boxes of a sample in pixels of the image at its original size."""
    height, width = sample.size
    across, down = sample.original_size[1] / width, sample.original_size[0] / height
    return sample.boxes * torch.tensor([across, down] * 2)


def _thumbnails(maps: Tensor) -> list[bytes]:
    """Each map as _HEAT_SIDE² bytes, scaled to its own range; enough to draw it."""
    if len(maps) == 0:
        return []
    small = F.interpolate(maps[:, None], size=(_HEAT_SIDE, _HEAT_SIDE), mode="area")[:, 0]
    low, high = small.amin(dim=(1, 2), keepdim=True), small.amax(dim=(1, 2), keepdim=True)
    spread = torch.where(high > low, high - low, 1)  # of a constant map zeros are left
    return list(map(pack, ((small - low) / spread * 255).round().to(torch.uint8)))


def picture_of_change(change: Tensor) -> dict[str, Any]:
    """A change 3×H×W as columns: a JPEG of at most 20 kB, and how much it is amplified there."""
    size = size_within(change.shape[1:], min(_CHANGE_SIDE, max(change.shape[1:])))
    small = F.interpolate(change.detach().float().cpu()[None], size=size, mode="area")[0]
    picture, factor = amplified(small)
    for quality in (75, 60, 45, 30, 15):  # noise is what JPEG is worst at
        data = encode_jpeg(picture, quality)
        if len(data) <= _CHANGE_BYTES:
            break
    return {"perturbation": data, "amplification": factor}
