# SPDX-License-Identifier: Apache-2.0
"""One step of DessiLBI in several speeds; all compute the same numbers.

``reference`` is the slow, obvious version and the oracle of the others; ``foreach`` groups tensors.
"""

from dessilbi.kernels.foreach import foreach_step_ as foreach_step_
from dessilbi.kernels.reference import couple_ as couple_
from dessilbi.kernels.reference import gamma_of as gamma_of
from dessilbi.kernels.reference import reference_step_ as reference_step_
