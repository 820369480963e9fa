"""The picture of the README: a photograph, clean and attacked, and where four methods look.

``python docs/picture.py`` writes ``docs/images/attacked.jpg``. The photograph is CC0 (Lav Varshney;
scikit-image: camera). Each method explains the class that it predicts itself.
"""

import argparse
from pathlib import Path

import torch

from captum_robust import draw
from captum_robust.attacks import PGD
from captum_robust.catalog.methods import Method, build_methods
from captum_robust.data import load_dataset
from captum_robust.defenses import DefendedModel
from captum_robust.models import Classifier, load_classifier

METHODS = {
    "grad_cam": "Grad-CAM",
    "defended_robust_cam": "RobustCAM, defended",
    "real_time_masking": "real-time mask",
    "perceptual_ball_cam": "perceptual ball × CAM",
}
SIDE = 220
"""Pixels of each photograph's width."""


def class_of(model: torch.nn.Module, x: torch.Tensor, names: list[str]) -> tuple[int, str]:
    """The predicted class, its name and its probability in words."""
    with torch.no_grad():
        (share,) = model(x).softmax(dim=1)
    best = int(share.argmax())
    return best, f"{names[best]}, {float(share[best]):.0%}"


def row(
    model: Classifier, x: torch.Tensor, methods: dict[str, Method], height: int, title: str
) -> list[tuple[draw.RGB, str]]:
    """The image at 1×3×H×W and the map and box of each method, of the class it takes it for."""
    size = (height, SIDE)
    predicted, words = class_of(model, x, model.class_names)
    shown = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    cells = [(draw.as_rgb(shown), f"{title}\n{words}")]
    for name, method in methods.items():
        if method.transforms:
            of = class_of(DefendedModel(model, method.transforms), x, model.class_names)[1]
            explanation = method.explain(x, None)
        else:
            of = words
            explanation = method.explain(x, torch.tensor([predicted]))
        maps = explanation.maps.detach()
        boxes = method.boxes(explanation)
        boxes = method.threshold.boxes(maps) if boxes is None else boxes
        scale = torch.tensor([SIDE, height] * 2) / torch.tensor([*maps.shape[:0:-1]] * 2)
        drawn = draw.draw_boxes(draw.overlay(shown, maps[0]), boxes * scale, draw.PREDICTED_COLOR)
        cells.append((drawn, f"{METHODS[name]}\nof {of}"))
    return cells


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images/attacked.jpg")
    parser.add_argument("--photograph", default="camera")
    parser.add_argument("--epsilon", type=float, default=2.0, help="in 255ths")
    options = parser.parse_args()
    model = load_classifier("efficientnet_lite0")
    sample = next(s for s in load_dataset("samples") if s.id == options.photograph)
    height = round(SIDE * sample.image.shape[1] / sample.image.shape[2])
    x = torch.nn.functional.interpolate(
        sample.image[None], model.input_size, mode="bilinear", antialias=True
    ).clamp(0, 1)
    attack = PGD(model, epsilon=options.epsilon / 255, early_stop=False)
    attacked = attack.perturb(x, torch.tensor([sample.label]))
    methods = build_methods(model, list(METHODS))
    cells = row(model, x, methods, height, "photograph")
    cells += row(model, attacked, methods, height, f"attacked, PGD {options.epsilon:g}/255")
    picture = draw.panel([c[0] for c in cells], [c[1] for c in cells], len(METHODS) + 1)
    options.out.write_bytes(draw.encode_jpeg(picture, 90))


if __name__ == "__main__":
    main()
