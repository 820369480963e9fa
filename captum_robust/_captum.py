"""The private names of Captum that this package uses, each under a plain one.

Nothing else here may import from a module of Captum's with an underscore: when Captum moves one of
them, this is the only file to mend.
"""

from captum._utils import common
from captum._utils.typing import TargetType as TargetType
from captum.attr._utils import lrp_rules

format_baseline = common._format_baseline
format_output = common._format_output
format_tensor_into_tuples = common._format_tensor_into_tuples
is_tuple = common._is_tuple
run_forward = common._run_forward
select_targets = common._select_targets
EpsilonRule = lrp_rules.EpsilonRule
GammaRule = lrp_rules.GammaRule
