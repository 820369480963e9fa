"""Imported where processes are forked from, and nowhere else: what a run loads is loaded there."""

import tempfile
from pathlib import Path

import cv2
import torch

from captum_robust.benchmark import Comparison
from tests.reliability.commands import compared, write_images

torch.set_num_threads(1)
cv2.setNumThreads(0)  # the threads of a pool are not forked with it
with tempfile.TemporaryDirectory() as folder:
    compared(write_images(Path(folder, "images"), 2), Path(folder, "run"))
    Comparison(Path(folder, "run")).to_html(Path(folder, "report.html"))
