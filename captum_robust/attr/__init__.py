"""Attribution methods, each a drop-in for Captum's.

Arguments that all of them share, explained once:

``inputs``
    A tensor, or a tuple of tensors, whose first dimension is the batch. Inputs, gradients, hooks,
    modes and random state are left as they were, also when an error passes through.
``target``
    In each form that Captum takes: an int for all samples; a tensor or list of N ints; for scores
    with more than one dimension a tuple of indices, or a list of N tuples. A bad one raises what
    Captum raises. Of a model with one score a sample, None (or 0) explains that score, as by
    Captum; methods that weigh a class against others (the perceptual ball, the masks) read it as
    the logit of class 1 of two, of which None explains the predicted one.
    All but the two that are trained for the classes of a network (``RealTimeMasking``,
    ``AdversarialLocalization``) explain more than classes: a function that makes N numbers of the
    scores of any N samples; see below. Wrappers around them do too, not around Captum's own. Where
    a class is weighed against others, its number is the margin, or the logit of the class.
``additional_forward_args``
    Passed to ``forward_func`` behind the inputs; a tensor, anything else, or a tuple of both.

All raise ``ValueError`` for an empty batch, and for NaN or infinity in the inputs or in the scores
(the message says in which sample). Results are detached and contiguous, and no sample sees another:
of a model in eval mode, that is. In train mode, batch normalization mixes the samples and updates
its running statistics, and dropout draws anew in each pass.

Three targets that are functions. What differs from sample to sample goes through
``additional_forward_args``, as methods give many copies of a sample to the model.

How similar an image is to another one, by their embeddings N×D:

>>> import torch
>>> import torch.nn.functional as F
>>> x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
>>> def embed(x):
...     return x.mean(dim=(2, 3))
>>> query = embed(x[:1])
>>> RISE(embed, n_masks=50).attribute(x, lambda e: F.cosine_similarity(e, query)).shape
torch.Size([2, 3, 8, 8])

The best box of class 1 of a detector that gives the logits of B boxes and K classes, N×B×K (of one
that returns a list or a dictionary, a function around it picks them out):

>>> def detect(x):
...     return x.flatten(2).mT
>>> best = RISE(detect, n_masks=50).attribute(x, lambda s: s.softmax(dim=2)[..., 1].amax(dim=1))

The pixels that a segmenter with scores N×K×H×W takes for class 2, within a region of the image:

>>> segment, region = torch.nn.Conv2d(3, 4, 3, padding=1), torch.zeros(8, 8)
>>> region[2:6, 2:6] = 1
>>> cam = ClassActivationMap(segment, segment, "hires_cam")
>>> cam.attribute(x, lambda s: (s[:, 2] * region).sum(dim=(1, 2))).shape
torch.Size([2, 1, 8, 8])
"""

from captum_robust.attr._ball import BallDetails, BallSettings
from captum_robust.attr._certificate import CertifiedDetails
from captum_robust.attr.adversarial_localization import AdversarialLocalization
from captum_robust.attr.certified import Certified
from captum_robust.attr.class_activation_map import ClassActivationMap
from captum_robust.attr.defended import Defended
from captum_robust.attr.guided import Guided
from captum_robust.attr.iterative_mask import IterativeMask, MaskDetails
from captum_robust.attr.multi_scale import MultiScale
from captum_robust.attr.perceptual_ball import PerceptualBallPerturbation
from captum_robust.attr.real_time_masking import RealTimeMasking
from captum_robust.attr.rise import RISE
from captum_robust.attr.robust_cam import RobustCAM
from captum_robust.attr.score_cam import ScoreCAM
from captum_robust.attr.top_classes import TopClasses

__all__ = [
    "RISE",
    "AdversarialLocalization",
    "BallDetails",
    "BallSettings",
    "Certified",
    "CertifiedDetails",
    "ClassActivationMap",
    "Defended",
    "Guided",
    "IterativeMask",
    "MaskDetails",
    "MultiScale",
    "PerceptualBallPerturbation",
    "RealTimeMasking",
    "RobustCAM",
    "ScoreCAM",
    "TopClasses",
]
