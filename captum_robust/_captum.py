"""The private names of Captum that this package uses, each under a plain one.

Nothing else here may import from a module of Captum's with an underscore: when Captum moves one of
them, this is the only file to mend.
"""

from __future__ import annotations

from captum._utils.common import _format_output as format_output
from captum._utils.common import _format_tensor_into_tuples as format_tensor_into_tuples
from captum._utils.common import _is_tuple as is_tuple
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _select_targets as select_targets
from captum._utils.typing import TargetType
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule

__all__ = [
    "EpsilonRule",
    "GammaRule",
    "TargetType",
    "format_output",
    "format_tensor_into_tuples",
    "is_tuple",
    "run_forward",
    "select_targets",
]
