"""The names of the methods as people write them."""

from __future__ import annotations

TITLES = {
    "robust_cam": "RobustCAM",
    "perceptual_ball": "perceptual ball",
    "perceptual_ball_guided": "perceptual ball × gradient",
    "perceptual_ball_cam": "perceptual ball × CAM",
    "smallest_perturbation": "smallest perturbation",
    "defended_robust_cam": "RobustCAM, defended",
    "grad_cam": "Grad-CAM",
    "defended_grad_cam": "Grad-CAM, defended",
    "guided_grad_cam": "guided Grad-CAM",
    "integrated_gradients": "integrated gradients",
    "top_classes_ig": "integrated gradients of the top classes",
    "real_time_masking": "real-time mask",
    "box_vote": "vote of boxes",
    "box_vote_fast": "fast vote of boxes",
    "smooth_grad": "SmoothGrad",
    "guided_backprop": "guided backpropagation",
    "lrp": "layer-wise relevance propagation",
    "input_x_gradient": "input × gradient",
    "rise": "RISE",
    "grad_cam_plus_plus": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "layer_cam_fused": "LayerCAM of several layers",
    "hires_cam": "HiResCAM",
    "eigen_cam": "EigenCAM",
    "score_cam": "Score-CAM",
    "saliency_max": "saliency, largest channel",
}


def title_of(name: str) -> str:
    """The name of a method in words; of one that the catalogue does not know, as it is.

    >>> title_of("perceptual_ball_cam"), title_of("center_box")
    ('perceptual ball × CAM', 'center box')
    """
    return TITLES.get(name, name.replace("_", " "))
