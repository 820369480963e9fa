"""The names of methods in words, for pages and captions; commands take the names themselves."""

from __future__ import annotations

_WORDS = {
    "robust_cam": "RobustCAM",
    "perceptual_ball": "perceptual ball",
    "perceptual_ball_guided": "perceptual ball × gradient",
    "perceptual_ball_cam": "perceptual ball × CAM",
    "smallest_perturbation": "smallest perturbation",
    "defended_robust_cam": "defended RobustCAM",
    "grad_cam": "Grad-CAM",
    "defended_grad_cam": "defended Grad-CAM",
    "guided_grad_cam": "guided Grad-CAM",
    "integrated_gradients": "integrated gradients",
    "top_classes_ig": "top-class integrated gradients",
    "occlusion": "occlusion",
    "real_time_masking": "real-time mask",
    "box_vote": "box vote",
    "box_vote_fast": "fast box vote",
    "adversarial_localization": "adversarial localization",
    "iterative_mask": "iterative mask",
    "saliency": "gradient",
    "smooth_grad": "SmoothGrad",
    "guided_backprop": "guided backpropagation",
    "deconvolution": "deconvolution",
    "lrp": "layer-wise relevance",
    "input_x_gradient": "input × gradient",
    "rise": "RISE",
    "grad_cam_plus_plus": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "hires_cam": "HiResCAM",
    "eigen_cam": "EigenCAM",
    "layer_cam_fused": "fused LayerCAM",
    "score_cam": "Score-CAM",
    "saliency_max": "largest-channel gradient",
    "center_box": "centre box",
    "whole_image": "whole image",
    "random": "random map",
}


def words_of(name: str) -> str:
    """The words for a method of the catalogue; any other name as it is.

    >>> words_of("perceptual_ball_cam"), words_of("mine")
    ('perceptual ball × CAM', 'mine')
    """
    return _WORDS.get(name, name)
