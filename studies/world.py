"""Inputs of `operations.py`, of any number and size: images, maps, boxes, networks, files."""

# ruff: noqa: D102 (an input is what its name says)

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import harness
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_robust import attacks, attr, benchmark, data, training, transforms
from captum_robust import nn as networks
from captum_robust.catalog.methods import build_methods
from captum_robust.metrics import functional as F
from captum_robust.models import Classifier
from captum_robust.show.explain import explain_image, pictures_of

_NUMBERS = itertools.count()
"""Of paths that nothing was written to."""


@dataclass(frozen=True)
class Sizes:
    """What an operation is given; each field is an axis."""

    images: int = 4
    side: int = 32
    classes: int = 8
    batch: int = 16
    k: int = 4
    methods: int = 2


@dataclass
class World:
    """Inputs of some sizes, made when they are first asked for."""

    sizes: Sizes
    device: str = "cpu"
    full: bool = False
    """EfficientNet-Lite0 instead of four small convolutions."""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="scaling-")))

    @cached_property
    def model(self) -> Classifier:
        torch.manual_seed(0)
        if self.full:
            return harness.classifier().to(self.device)
        net = networks.SimpleConvNet(self.sizes.classes, 8)
        names = [f"class {number}" for number in range(self.sizes.classes)]
        side = self.sizes.side
        model = Classifier(net, input_size=side, class_names=names, name="small")
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def x(self) -> Tensor:
        side = self.sizes.side
        return harness.rounded(harness.pink_noise(self.sizes.images, (side, side))).to(self.device)

    @cached_property
    def other(self) -> Tensor:
        return harness.rounded((self.x + 0.02 * torch.randn_like(self.x)).clamp(0, 1))

    @cached_property
    def y(self) -> Tensor:
        return harness.predicted(self.model, self.x)

    @cached_property
    def labels(self) -> Tensor:
        return torch.arange(len(self.x), device=self.device) % self.sizes.classes

    @cached_property
    def maps(self) -> Tensor:
        return self.x.mean(dim=1)

    @cached_property
    def masks(self) -> Tensor:
        return self.maps > self.maps.mean(dim=(1, 2), keepdim=True)

    @cached_property
    def boxes(self) -> list[Tensor]:
        side = float(self.sizes.side)
        one = torch.tensor([[side / 4, side / 4, 3 * side / 4, 3 * side / 4]])
        return [one.to(self.device)] * self.sizes.images

    @cached_property
    def box(self) -> Tensor:
        return torch.cat(self.boxes)

    @cached_property
    def values(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.sizes.images, generator=generator).to(self.device)

    @cached_property
    def features(self) -> Tensor:
        return torch.randn(self.sizes.images, 32, generator=torch.Generator().manual_seed(0))

    @cached_property
    def scores(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(self.sizes.images, self.sizes.classes, generator=generator)
        return scores.to(self.device)

    @cached_property
    def segments(self) -> Tensor:
        side = torch.arange(self.sizes.side, device=self.device) // 4
        numbers = side[:, None] * (self.sizes.side // 4) + side
        return numbers.expand(self.sizes.images, -1, -1).contiguous()

    @cached_property
    def photographs(self) -> Path:
        """A folder of PNG files with a table of boxes."""
        root = self.folder / f"photographs {self.sizes.images} {self.sizes.side}"
        root.mkdir(exist_ok=True)
        lines = ["file,x0,y0,x1,y1,label"]
        quarter = self.sizes.side // 4
        for number, pixels in enumerate(harness.to_bytes(self.x).permute(0, 2, 3, 1).cpu().numpy()):
            Image.fromarray(pixels).save(root / f"{number:06d}.png")
            label = number % self.sizes.classes
            lines.append(
                f"{number:06d}.png,{quarter},{quarter},{3 * quarter},{3 * quarter},{label}"
            )
        (root / "boxes.csv").write_text("\n".join(lines) + "\n")
        return root

    @cached_property
    def dataset(self) -> data.LocalizationDataset:
        return data.load_dataset("folder", self.photographs, class_names=self.model.class_names)

    @cached_property
    def video(self) -> Path:
        path, side = self.folder / f"video {self.sizes.images}.avi", self.sizes.side
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (side, side))
        for frame in harness.to_bytes(self.x).permute(0, 2, 3, 1).cpu().numpy():
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        return path

    def out(self, name: str = "out") -> Path:
        """Return a path that nothing has been written to."""
        return self.folder / f"{name} {next(_NUMBERS)}"

    @cached_property
    def run(self) -> benchmark.Comparison:
        """A run over the folder of photographs."""
        return compared(self, self.out("run"))

    @cached_property
    def attacked_run(self) -> benchmark.AttackRun:
        return self.attack_images(self.out("attacked"))

    def attack_images(self, out: Path) -> benchmark.AttackRun:
        return benchmark.attack_images(
            self.model,
            self.dataset,
            {"fgsm 2/255": attacks.FGSM(self.model)},
            out,
            batch_size=self.sizes.batch,
            progress=False,
        )

    @cached_property
    def trunk(self) -> nn.Module:
        torch.manual_seed(1)
        return networks.SimpleConvNet(self.sizes.classes, 4).eval().requires_grad_(False)

    @cached_property
    def masking(self) -> networks.MaskingNetwork:
        torch.manual_seed(1)
        size = (self.sizes.side, self.sizes.side)
        network = networks.MaskingNetwork(self.model, learned_classes=True, input_size=size)
        return network.eval().to(self.device)

    @cached_property
    def localization(self) -> networks.LocalizationNetwork:
        torch.manual_seed(1)
        size = (self.sizes.side, self.sizes.side)
        corruption = networks.CorruptionNetwork(width=2, input_size=size)
        net = networks.SimpleConvNet(self.sizes.classes, 2)
        return networks.LocalizationNetwork(corruption, net, fill=0.5).eval().to(self.device)

    @cached_property
    def denoiser(self) -> networks.Denoiser:
        torch.manual_seed(1)
        return networks.Denoiser(4).eval().to(self.device)

    @cached_property
    def pairs(self) -> TensorDataset:
        return TensorDataset(self.x.cpu(), self.labels.cpu())

    @cached_property
    def segmented(self) -> TensorDataset:
        return TensorDataset(self.x.cpu(), self.segments.cpu(), self.labels.cpu())

    @cached_property
    def trained(self) -> nn.Module:
        torch.manual_seed(2)
        return networks.SimpleConvNet(self.sizes.classes, 4).to(self.device)

    @cached_property
    def residual(self) -> nn.Module:
        torch.manual_seed(2)
        return networks.SmallResNet(self.sizes.classes, 4).eval().to(self.device)

    @cached_property
    def quilting(self) -> transforms.Quilting:
        return transforms.Quilting.fit(self.x[:2].cpu(), patches=200)

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        shown = (50 * self.maps).long()
        return shown, 50 - shown

    @cached_property
    def squares(self) -> Tensor:
        return F.random_squares(8, (self.sizes.side, self.sizes.side))

    @cached_property
    def drops(self) -> Tensor:
        return self.values[:, None].expand(-1, 8).contiguous()

    @cached_property
    def overlaps(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.sizes.images, 256, generator=generator).to(self.device)

    @cached_property
    def histograms(self) -> Tensor:
        return F.pxap_histograms(self.maps, self.masks)

    @cached_property
    def ids(self) -> list[str]:
        return [str(number) for number in range(self.sizes.images)]

    def training(self, **changes: Any) -> training.TrainingSettings:
        """Return the settings of one epoch."""
        device = "cpu" if self.device == "cpu" else "auto"
        given = {"epochs": 1, "batch_size": self.sizes.batch, "learning_rate": 1e-4}
        return training.TrainingSettings(**{**given, "device": device, **changes})

    def explain(self, x: Tensor, y: Tensor) -> Tensor:
        """Return maps N×H×W."""
        return attr.RobustCAM(self.model, self.model.cam_layer).attribute(x, y, upsample=True)[:, 0]

    def batches(self) -> Any:
        """Yield the images batch by batch."""
        return self.x.split(self.sizes.batch)

    @property
    def names_of_methods(self) -> dict[str, Any]:
        """As many methods as are asked for, all the same."""
        return {f"method {number}": "robust_cam" for number in range(self.sizes.methods)}


def compared(w: World, out: Path, **options: Any) -> benchmark.Comparison:
    """Return a run of `compare` over the folder of photographs."""
    batch = w.sizes.batch
    return benchmark.compare(
        w.model,
        w.dataset,
        w.names_of_methods,
        out=out,
        batch_size=batch,
        progress=False,
        **options,
    )


def explained(w: World, out: Path) -> int:
    """Return how many pictures `explain` wrote of the folder of photographs."""
    methods = build_methods(w.model, w.names_of_methods)
    out.mkdir()
    pictures = pictures_of([w.photographs], out)
    for picture, file in pictures:
        explain_image(w.model, file, methods, picture)
    return len(pictures)
