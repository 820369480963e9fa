"""Features of images in the plane."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_number
from captum_robust._plurals import amount
from captum_robust._progress import stage
from captum_robust.draw import blank_figure
from captum_robust.inspection.features import Features
from captum_robust.inspection.neighbours import check_scikit_learn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("tsne", "pca")
_FEWEST = 4
"""Images that t-SNE is made of."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A point in the plane for each of N images."""

    features: Features
    points: Tensor
    """N×2."""
    method: str
    """``"tsne"`` or ``"pca"``, as it was made."""
    explained: float
    """Of PCA, the share of the variance along the two axes; else, or without any, NaN."""
    notes: list[str]
    """What to know of the result."""

    def plot(self, most: int = 400) -> Figure:
        """Draw the first so many images at their points, with frames in the colours of classes.

        Without pictures, and for further images, there are dots. Arrows lead from images to their
        attacked versions, which are crosses.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib import colormaps
        from matplotlib.colors import to_rgba
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        figure = blank_figure(figsize=(9, 9), layout="constrained")
        share = f", {self.explained:.0%} of the variance" if self.explained >= 0 else ""
        title = "t-SNE" if self.method == "tsne" else f"PCA{share}"
        axes = figure.add_subplot(title=title, xticks=[], yticks=[])
        labels, points, clean = self.features.labels, self.points, self.features.is_clean
        places = [(float(x), float(y)) for x, y in points.tolist()]
        colours = colormaps["tab20"](labels.numpy() % 20)
        colours[labels.numpy() < 0] = to_rgba("#888888")
        across, up = points[clean].T.numpy()
        axes.scatter(across, up, c=colours[clean.numpy()], s=12)
        if self.features.thumbnails is not None:
            pictures = self.features.thumbnails[clean][:most].permute(0, 2, 3, 1).numpy()
            zoom = 0.6 if len(points) > 100 else 0.9
            for number, picture in zip(clean.nonzero()[:, 0].tolist(), pictures, strict=False):
                frame = {"edgecolor": colours[number], "linewidth": 1.5}
                box = OffsetImage(picture, zoom=zoom)
                axes.add_artist(AnnotationBbox(box, places[number], pad=0.1, bboxprops=frame))
        for number in (~clean).nonzero()[:, 0].tolist():
            assert self.features.origins is not None
            start = places[int(self.features.origins[number])]
            arrow = {"arrowstyle": "-|>", "color": "#d55e00", "linewidth": 1.5}
            axes.annotate("", places[number], start, arrowprops=arrow, zorder=9)
            axes.plot(*places[number], "X", color="#d55e00", markersize=9, zorder=10)
        axes.margins(0.08)
        return figure


def embedding(
    features: Any,
    method: Literal["tsne", "pca"] = "tsne",
    *,
    perplexity: float = 30.0,
    seed: int = 0,
) -> Embedding:
    """Embed features in the plane by PCA or t-SNE, that of openTSNE where it is installed.

    The time of PCA grows as the number of images N; that of t-SNE, which weighs pairs of them, as
    N log N or faster (in these libraries, for the first thousands nearer to N²).

    Args:
        features: N×D, or :class:`captum_robust.inspection.Features`.
        method: ``"tsne"`` or ``"pca"``; fewer than four images are embedded by PCA.
        perplexity: of t-SNE; where it is more than a third of the other images, that third.
        seed: of t-SNE.

    Raises:
        ValueError: features that are not N×D, not finite or of no image; another method.
        ImportError: scikit-learn is missing.
    """
    own = Features.of(features)
    n = len(own.values)
    check_choice("method", method, METHODS)
    check_number("perplexity", perplexity, 0, open_low=True)
    check(n, "features: expected at least one image, got none")
    check(own.values.isfinite().all(), "features: NaN or infinity in them")
    check_scikit_learn()
    from sklearn.decomposition import PCA

    notes = []
    made: str = method
    if method == "tsne" and n < _FEWEST:
        notes.append(f"Too few for t-SNE: {amount(n, 'image')}; PCA instead.")
        made = "pca"
    points, explained = torch.zeros(n, 2), float("nan")
    values = own.values.double().numpy()
    if n > 1 and (own.values == own.values[0]).all():  # on which scikit-learn's t-SNE crashes
        notes.append(f"All {n} images have the same features, and one point.")
        made = "pca"
    elif made == "tsne":
        most = (n - 1) / 3
        if perplexity > most:
            notes.append(f"Perplexity {most:.3g} instead of {perplexity:g}, for {n} images.")
        with stage("embedding by t-SNE"):
            points = _tsne(values, min(perplexity, most), seed)
    elif n > 1:
        axes = min(2, *values.shape)
        pca = PCA(axes, svd_solver="full").fit(values)
        points[:, :axes] = torch.from_numpy(pca.transform(values)).float()
        explained = float(pca.explained_variance_ratio_.sum())
    return Embedding(own, points, made, explained, notes)


def _tsne(values: npt.NDArray[np.float64], perplexity: float, seed: int) -> Tensor:
    """N×2 for N×D; both libraries are deterministic under a seed, but not alike."""
    options = {"perplexity": perplexity, "random_state": seed}
    start = "pca" if min(values.shape) > 1 else "random"
    if find_spec("openTSNE") is not None:
        import openTSNE

        made = openTSNE.TSNE(2, **options, initialization=start).fit(values)
        return torch.from_numpy(np.array(made)).float()
    from sklearn.manifold import TSNE

    return torch.from_numpy(TSNE(2, **options, init=start).fit_transform(values)).float()
