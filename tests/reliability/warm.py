"""Imported where processes are forked from, and nowhere else: what a run loads is loaded there."""

import tempfile
from importlib import import_module
from pathlib import Path

import cv2
import torch

from captum_robust.benchmark import Comparison
from tests.reliability.commands import compared, write_images

for module in (
    "captum_robust.training.localization_recipe",
    "captum_robust.training.masking_recipe",
    "captum_robust.training.robust_recipe",
    "skimage.segmentation",
    "tests.reliability.trainings",
):
    import_module(module)
torch.set_num_threads(1)
cv2.setNumThreads(0)  # the threads of a pool are not forked with it
with tempfile.TemporaryDirectory() as folder:
    compared(write_images(Path(folder, "images"), 2), Path(folder, "run"))
    Comparison(Path(folder, "run")).to_html(Path(folder, "report.html"))
