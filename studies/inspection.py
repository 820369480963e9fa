"""What ``captum-robust inspect`` costs beside a plain forward pass, and whether its memory grows.

    python studies/inspection.py --images DIR    # ImageNet's layout, at 224 pixels
    python studies/inspection.py --tiny tiny-imagenet-100.tar --size 64 --n 10000 --memory 2000,5000

All passes read the same images and take turns batch by batch, so that other load meets them alike:
the whole network alone; with the patches of its layers and the features; and with colours and
textures dissected too, which is the pass of ``inspect``. What each does before, such as finding
receptive fields, counts. Peak memory is that of a process of its own for each number of images.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Part, peak_mib, study

from captum_robust._contexts import evaluation
from captum_robust.data import LocalizationDataset, load_dataset
from captum_robust.inspection.concepts import Colours, Concepts, Textures
from captum_robust.inspection.streaming import ImageStream
from captum_robust.inspection.tour import Survey
from captum_robust.inspection.watched import layers_of
from captum_robust.models import Classifier, load_classifier

BATCH = 16


def some(whole: LocalizationDataset, n: int) -> LocalizationDataset:
    """Return n images, evenly spread."""
    n = min(n, len(whole))
    return Part(whole, [i * len(whole) // n for i in range(n)])


def opened(images: str, tiny: str, n: int) -> LocalizationDataset:
    """Return n images of one of the two layouts."""
    if tiny:
        return some(load_dataset("tiny-imagenet", tiny, split="train", labels="wnids"), n)
    return some(load_dataset("imagenet", images), n)


def forward(model: Classifier, data: LocalizationDataset) -> Iterator[None]:
    """Run the whole network on batch after batch."""
    for batch in ImageStream(model, data, batch_size=BATCH).batches():
        with torch.no_grad(), evaluation(model):
            model.module(batch.inputs)
        yield


def survey(model: Classifier, data: LocalizationDataset, *, dissected: bool) -> Iterator[None]:
    """Take in batch after batch, as ``inspect`` does."""
    sources: list[Concepts] = [Colours(), Textures()] if dissected else []
    reads = tuple(source.read for source in sources)
    stream = ImageStream(model, data, batch_size=BATCH, reads=reads)
    pass_over = Survey(model, layers_of(model, None), stream, sources)
    for batch in stream.batches():
        with evaluation(model):
            pass_over.add(batch)
        yield


def once(model: str, size: int, images: str, tiny: str, n: int) -> None:
    """Run the pass of ``inspect``, in a process of its own."""
    torch.set_num_threads(1)
    network = load_classifier(model, input_size=size)
    for _ in survey(network, opened(images, tiny, n), dissected=True):
        pass


def inspection(
    *,
    model: str = "efficientnet_lite0",
    images: str = "",
    tiny: str = "",
    size: int = 224,
    n: int = 400,
    memory: str = "",
) -> None:
    """Print images a second, and peak memory of the numbers in ``memory``."""
    network, data = load_classifier(model, input_size=size), opened(images, tiny, n)
    passes = {
        "forward": forward(network, data),
        "patches": survey(network, data, dissected=False),
        "and dissection": survey(network, data, dissected=True),
    }
    spent = {name: [0.0, 0.0] for name in passes}
    left = dict(passes)
    while left:
        for name, each in list(left.items()):
            wall, cpu = time.perf_counter(), time.process_time()
            if next(each, left) is left:
                del left[name]
            spent[name][0] += time.perf_counter() - wall
            spent[name][1] += time.process_time() - cpu
    print(f"{model}, {len(data)} images at {size} pixels")
    print(f"{'':16}{'images/s':>9}{'forward =':>11}{'processor time':>16}")
    for name, (wall, cpu) in spent.items():
        relative = f"{spent['forward'][0] / wall:10.2f}{spent['forward'][1] / cpu:16.2f}"
        print(f"{name:16}{len(data) / wall:9.1f} {relative}", flush=True)
    for count in filter(None, memory.split(",")):
        call = f"once({model!r}, {size}, {images!r}, {tiny!r}, {int(count)})"
        peak = peak_mib(["-c", f"from inspection import once; {call}"], Path(__file__).parent)
        print(f"peak memory, {count} images: {peak:.0f} MiB", flush=True)


if __name__ == "__main__":
    study(__doc__, inspection, threads=1)
