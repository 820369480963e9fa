"""How long does the explorer take to answer: a photograph, an attack with its maps, the defence?

EfficientNet-Lite0, the seven photographs of the sample set, the usual five maps, in a thread beside
the main one, as on the page: there PyTorch takes longer on a CPU. The goal is three
seconds for an attack by ten steps of PGD and five maps on two idle cores. Where other programs run,
the time of the processor says more than the clock.

``python studies/explorer.py --threads 2``
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import harness

from captum_robust.benchmark.passes import count_passes
from captum_robust.data.samples import SampleSet
from captum_robust.models import load_classifier
from captum_robust.show.exploration import Exploration, Explorer, Photograph, Question
from captum_robust.show.explorer_page import rendered

QUESTIONS = {
    "photograph, five maps": Question(),
    "PGD, 10 steps, five maps": Question(attack="pgd"),
    "DeepFool, five maps": Question(attack="deepfool"),
    "map of Grad-CAM attacked, five maps": Question(attack="explanation"),
    "defence, photograph, five maps": Question(defended=True),
    "defence, PGD made before, five maps": Question(attack="pgd", defended=True),
}


def measure(*, images: int = 7) -> None:
    """Print passes and times of each question, of the median photograph."""
    explorer = Explorer(load_classifier("efficientnet_lite0"))
    samples = SampleSet()
    photographs = [explorer.photograph(samples[i].image, samples.ids[i]) for i in range(images)]
    other = explorer.photograph(samples[0].image.flip(2), "to warm up")
    for question in QUESTIONS.values():
        explorer.explore(other, question)
    for name, question in QUESTIONS.items():
        with ThreadPoolExecutor(1) as page:
            laps = list(page.map(partial(lap, explorer, question=question), photographs))
        clock, processor, page, there, back = map(statistics.median, zip(*laps, strict=True))
        print(
            f"{name:<36} {clock:6.2f} s, {processor:6.2f} s of the processor; {there:4.0f} images "
            f"forward, {back:4.0f} back; page {page:.2f} s"
        )


def lap(explorer: Explorer, photograph: Photograph, *, question: Question) -> tuple[float, ...]:
    """Seconds by the clock and of the processor, seconds of the page, and images there and back."""
    with count_passes(explorer.model) as passes:
        start, processor = time.perf_counter(), time.process_time()
        found: Exploration = explorer.explore(photograph, question)
        spent = time.perf_counter() - start, time.process_time() - processor
    start = time.perf_counter()
    rendered(found, explorer.python(photograph, question))
    return *spent, time.perf_counter() - start, passes.forward, passes.backward


if __name__ == "__main__":
    harness.study(__doc__, measure)
