"""One picture that shows where a classifier looks."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from captum_robust import draw
from captum_robust._checks import check, check_number
from captum_robust._files import check_folder, write_whole
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust._resize import resize_image, size_within
from captum_robust._scores import probabilities_of, warn_of_probabilities
from captum_robust.catalog.certification import IN, OUT, Certificates, Certification
from captum_robust.catalog.methods import Explanation, Method
from captum_robust.catalog.thresholds import Threshold
from captum_robust.data import DataError, load_image
from captum_robust.data.files import read_bytes
from captum_robust.data.image_lists import images_at, png_names
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of

_DISPLAY_SIDE = 360
_RECORD = "captum_robust.explain"
"""The key of a text in the PNG: what it was made from and with, and what was said of it."""


@dataclass(frozen=True)
class ExplainedImage:
    """What :func:`explain_image` says of an image."""

    classes: list[tuple[str, float]]
    """The first classes with their probabilities."""
    numbers: list[int]
    """Of the same classes."""
    scores: list[float]
    """Of the same classes, before the softmax."""
    explained: int
    """The number of the class that the maps are of."""
    maps: dict[str, Tensor]
    """The map h×w of each method, on the CPU; of a certified one also under its name with
    ".certified" R×h×w, of so many radii: 1 in, 0 out, .5 where it abstains. Empty where
    :func:`explained_before` read it."""
    boxes: dict[str, list[float]]
    """The box of each map, (x0, y0, x1, y1) in pixels of the image."""
    verdicts: dict[str, str]
    """What the image became, for each method that perturbs it."""
    picture: Path
    certificates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is proven of each method's map and box, see :func:`explain_image`; empty if nothing was
    to be certified. Boxes are in pixels of the image."""

    def save_maps(self) -> dict[str, Path]:
        """Write the map of each method beside the picture, as float32 in a NumPy file.

        Raises:
            OSError: one cannot be written.
        """
        files = self._map_files()
        for method, heat in self.maps.items():
            write_whole(files[method], _npy(heat))
        return files

    def _map_files(self) -> dict[str, Path]:
        stem = self.picture.stem
        names = [*self.boxes, *(f"{method}.certified" for method in self.certificates)]
        return {name: self.picture.with_name(f"{stem}.{name}.npy") for name in names}

    def facts(self) -> dict[str, Any]:
        """What JSON holds of it: all but the maps themselves."""
        shares = zip(self.classes, self.numbers, self.scores, strict=True)
        return {
            "picture": str(self.picture),
            "explained": self.explained,
            "classes": [
                {"class": number, "name": name, "probability": share, "score": score}
                for (name, share), number, score in shares
            ],
            "boxes": self.boxes,
            "verdicts": self.verdicts,
            **({"certificates": self.certificates} if self.certificates else {}),
        }


def pictures_of(paths: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Name the picture to write in ``out`` for each image: pairs of picture and image.

    Args:
        paths: image files and folders; pictures of an earlier call in ``out`` are no images.
        out: folder of the pictures.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: there are no images in a folder, a picture would overwrite an image, or ``out``
            is a file.
    """
    check_folder(out)
    files = images_at(paths, without=out)
    names = png_names(list(files))
    pictures = [(out / name, file) for name, file in zip(names, files.values(), strict=True)]
    originals = {file.resolve() for _, file in pictures}
    for picture, _ in pictures:
        is_image = picture.resolve() in originals
        check(not is_image, f"{picture}: would overwrite the image itself; give another --out")
    return pictures


def explained_before(
    file: Path, picture: Path, settings: str, *, with_maps: bool = False
) -> ExplainedImage | None:
    """What :func:`explain_image` said of the same image with the same settings, from its picture.

    None: there is no such picture or, ``with_maps``, not the files of its maps.
    """
    try:
        with Image.open(picture) as written:
            record = str(written.info.get(_RECORD, ""))
        key, _, facts = record.partition("\n")
        if key != _key(settings, read_bytes(file)):
            return None
        said = json.loads(facts)
        checksums = said.pop("checksums")
        before = ExplainedImage(**said, maps={}, picture=picture)
        files = before._map_files() if with_maps else {}
        is_same = all(zlib.crc32(f.read_bytes()) == checksums[m] for m, f in files.items())
    except OSError:  # one of the files is missing, or no image
        return None
    return before if is_same else None


def _key(settings: str, image: bytes) -> str:
    return hashlib.sha256(settings.encode() + b"\n" + image).hexdigest()


def _npy(heat: Tensor) -> bytes:
    data = io.BytesIO()
    np.save(data, heat.numpy())
    return data.getvalue()


def _write_picture(rgb: draw.RGB, said: ExplainedImage, key: str) -> None:
    """Write the PNG with all that is needed to say the same again."""
    facts = {k: v for k, v in vars(said).items() if k not in ("maps", "picture")}
    facts["checksums"] = {m: zlib.crc32(_npy(heat)) for m, heat in said.maps.items()}
    record, data = PngInfo(), io.BytesIO()
    record.add_text(_RECORD, f"{key}\n{json.dumps(facts)}")
    Image.fromarray(rgb).save(data, "PNG", pnginfo=record)
    write_whole(said.picture, data.getvalue())


def explain_image(
    model: Classifier,
    file: Path,
    methods: Mapping[str, Method],
    picture: Path,
    *,
    target: int | None = None,
    counterfactual: int | None = None,
    threshold: float | None = None,
    top: int = 5,
    settings: str = "",
    certification: Certification | None = None,
    show_progress: bool = False,
) -> ExplainedImage:
    """Draw the map and box of each method over an image file, and write the picture as PNG.

    The box is drawn around the largest component of the pixels that the threshold keeps. Beside
    the map of a method that perturbs the image stands the perturbation, amplified; and, with
    ``certification``, what is proven of the map within each radius, with the inner and outer box.

    Args:
        model: where it runs is where the image goes.
        file: of the image.
        methods: what to draw, by name.
        picture: the PNG to write.
        target: the class to explain; None: the prediction.
        counterfactual: the class that methods which perturb the image move it towards; None: away
            from the explained one.
        threshold: of the box, a share of the map's range; None: that of each method, which ships
            with the package or is a fifth of the range.
        top: how many classes to return.
        settings: all that the picture depends on beside the image, for :func:`explained_before`.
        certification: how maps and boxes are to be certified; None: not at all. Of each method then
            ``certificates`` has ``sigma``, ``samples``, ``confidence``, ``box`` (that of the
            smoothed map) and ``radii``, for each of which ``radius``, ``certified_share``, of the
            pixels, the parts of it ``inside`` and ``outside``, ``inner_box`` and ``outer_box``,
            None where nothing is proven, and ``least_samples``, with fewer of which no pixel is.
        show_progress: a bar on standard error, of the noisy copies.

    Raises:
        DataError: the image can't be read, the model gives no finite score for it, or the
            counterfactual class is the explained one or the prediction.
        ValueError: ``threshold`` outside [0, 1], or ``counterfactual`` without a method for it.
    """
    given = threshold if threshold is None else Threshold("value", float(threshold))
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)
    check(
        counterfactual is None or any(m.towards for m in methods.values()),
        "counterfactual: only methods that perturb the image know it, such as perceptual_ball; "
        f"got {', '.join(methods)}",
    )
    data = read_bytes(file)
    image = load_image(data, name=str(file))
    x = resize_image(image, model.input_size)[None].to(device_of(model))
    x = in_channels_of(model, x)
    with torch.no_grad():
        scores = model(x)
    warn_of_probabilities(scores, "model")
    (probabilities,) = probabilities_of(scores)
    scores = scores[0].float()
    check(
        torch.isfinite(probabilities).all(), f"{file}: the model gives no finite scores", DataError
    )
    best = probabilities.topk(min(top, len(probabilities)))
    predicted = int(best.indices[0])
    explained = predicted if target is None else target
    wanted = None if counterfactual is None else class_name(model, counterfactual)
    what = "prediction" if counterfactual == predicted else "explained class"
    check(
        counterfactual not in (predicted, explained),
        f"{file}: the counterfactual class, {wanted}, is the {what} already",
        DataError,
    )
    color = draw.PREDICTED_COLOR
    large = resize_image(image, size_within(image.shape[1:], _DISPLAY_SIDE))
    groups = [[(draw.as_rgb(large), class_name(model, explained))]]
    verdicts, maps, boxes, proofs = {}, {}, {}, {}
    for name, method in counted(methods.items(), "method", None, "explain"):
        title = name
        if counterfactual is not None and method.towards is not None:
            method = method.towards(counterfactual)
        elif counterfactual is not None:
            title = f"{name}\nof {class_name(model, explained)}"  # it can't be asked for the other
        explanation, heat, box = map_and_box(method, x, explained, given)
        drawn = draw.draw_boxes(draw.overlay(large, heat[0]), scaled_box(box, heat, large), color)
        groups.append([(drawn, title)])
        maps[name], boxes[name] = heat[0], scaled_box(box, heat, image)[0].tolist()
        if (p := explanation.perturbation) is not None:
            mark, words = draw.verdict(bool(p.flipped[0]), explained == predicted, wanted)
            verdicts[name] = f"{words} {class_name(model, int(p.new_class[0]))}"
            change, factor = picture_of_change(large, p.change[0])
            caption = f"its perturbation {draw.factor_text(factor)}\n{mark} {verdicts[name]}"
            groups[-1].append((change, caption))
        if certification is not None:
            aimed = torch.tensor([explained], device=x.device)
            same = method if given is None else replace(method, threshold=given)
            proven = certification.of(model, same, x, aimed, show_progress=show_progress)
            maps[f"{name}.certified"], proofs[name] = _proof(certification, proven, image, heat)
            groups[-1] += _proof_pictures(proofs[name], proven, large, image)
    columns = _columns(groups) if certification is None else max(map(len, groups))
    pictures, captions = zip(*in_rows(groups, columns), strict=True)
    numbers = best.indices.tolist()
    classes = list(zip((class_name(model, i) for i in numbers), best.values.tolist(), strict=True))
    best_scores = scores[best.indices].tolist()
    said = ExplainedImage(
        classes, numbers, best_scores, explained, maps, boxes, verdicts, picture, proofs
    )
    _write_picture(draw.panel(pictures, captions, columns), said, _key(settings, data))
    return said


def _proof(
    how: Certification, proven: Certificates, image: Tensor, heat: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """The certified maps R×h×w of one image, and what is said of them, in pixels of the image."""
    states = torch.cat([one.cells for one in proven.at]).cpu()
    size = heat.shape[1], heat.shape[2]
    large = torch.nn.functional.interpolate(states[None].float() / IN, size, mode="nearest")[0]

    def listed(box: Tensor) -> list[float] | None:
        scaled = scaled_box(box.float().cpu(), heat, image)[0]
        return None if scaled.isnan().any() else scaled.tolist()

    radii = [
        {
            "radius": one.radius,
            "certified_share": one.share[0].item(),
            "inside": (one.cells == IN).float().mean().item(),
            "outside": (one.cells == OUT).float().mean().item(),
            "inner_box": listed(one.inner),
            "outer_box": listed(one.outer),
            "least_samples": how.least(one.radius),
        }
        for one in proven.at
    ]
    names = ("sigma", "samples", "confidence", *(["denoiser"] if how.denoiser else []))
    facts = {name: getattr(how, name) for name in names}
    return large, {**facts, "box": listed(proven.box), "radii": radii}


def _proof_pictures(
    proof: Mapping[str, Any], proven: Certificates, large: Tensor, image: Tensor
) -> list[tuple[draw.RGB, str]]:
    """What is certified within each radius, with its caption."""
    scale = np.array([large.shape[2] / image.shape[2], large.shape[1] / image.shape[1]] * 2)
    pictures = []
    for facts, one in zip(proof["radii"], proven.at, strict=True):
        inner, outer = (
            None if facts[name] is None else (np.array(facts[name]) * scale).tolist()
            for name in ("inner_box", "outer_box")
        )
        drawn = draw.draw_certificate(draw.as_rgb(large), one.cells[0].cpu(), inner, outer)
        share = f"within {one.radius:g}: {facts['certified_share']:.0%} certified"
        boxes = "white and pink: inner and outer box" if inner else "no box is proven"
        pictures.append((drawn, f"{share}\nblue: in, dark: out, yellow: abstains\n{boxes}"))
    return pictures


def map_and_box(
    method: Method, x: Tensor, target: int, threshold: Threshold | None = None
) -> tuple[Explanation, Tensor, Tensor]:
    """What a method says of the class in an image 1×C×H×W, with its map 1×h×w and box 1×4.

    The box is in pixels of the map; both are on the CPU, and the same in every call, also of
    methods that draw.

    Args:
        method: of the catalogue.
        x: pixels in [0, 1], of the size that the model takes.
        target: the class.
        threshold: of the box; None: that of the method.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        explanation = method.explain(x, torch.tensor([target], device=x.device))
    heat = explanation.maps.detach().float().cpu()
    box = method.boxes(explanation)
    if box is None:
        return explanation, heat, (threshold or method.threshold).boxes(heat)
    return explanation, heat, box.detach().float().cpu()


def _columns(groups: list[list[tuple[draw.RGB, str]]]) -> int:
    """Up to four stand in one row; else three, which fit a page and a phone, or two."""
    count = sum(map(len, groups))
    if count < 5:
        return count

    def places(columns: int) -> int:
        return -(-len(in_rows(groups, columns)) // columns) * columns

    paired = count > len(groups)
    return 2 if paired and places(2) < places(3) else 3  # the one that leaves fewer gaps


def in_rows(groups: list[list[tuple[draw.RGB, str]]], columns: int) -> list[tuple[draw.RGB, str]]:
    """The pictures in order, with white ones where a group would be broken across two rows."""
    white = (np.full((1, 1, 3), 255, np.uint8), "")
    cells: list[tuple[draw.RGB, str]] = []
    for group in groups:
        left = -len(cells) % columns
        if left < len(group):
            cells += [white] * left
        cells += group
    return cells


def picture_of_change(image: Tensor, change: Tensor) -> tuple[draw.RGB, float]:
    """The change C×h×w, amplified, in the size of an image 3×H×W; and the factor."""
    import cv2

    picture, factor = draw.amplified(change)
    height, width = image.shape[1:]
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8), factor


def scaled_box(box: Tensor, heat: Tensor, image: Tensor) -> Tensor:
    """A box in pixels of the map in those of the image."""
    return box * torch.tensor([image.shape[2] / heat.shape[2], image.shape[1] / heat.shape[1]] * 2)


def class_name(model: Classifier, number: int) -> str:
    """The name of a class, or its number as text where the model knows no names."""
    return str(number) if model.class_names is None else model.class_names[number]
