"""Post-hoc weight normalisation: each logit divided by a power of what its class's weights grew to.

    s_y = f_y / nu_y ** tau          nu_y = ||w_y||, or the class's prior

Not consistent for the balanced error, and it knows no target prior; kept beside the one formula of
`longtail.adjustment`, with which it is compared. The ONNX graph, the API and the monitor are tested against
this file.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from longtail.adjustment import checked_logits
from longtail.priors import Floats

BiasRule = Literal["divide", "keep", "drop"]

_LARGEST = 1e250  # times any float32 it is still a float64


@dataclass(frozen=True)
class Scaling:
    """Scores as a scaling of each logit and a shift: s = f * factor + offset, both (L,)."""

    factor: Floats
    offset: Floats

    def scores(self, logits: npt.ArrayLike) -> Floats:
        """Return s, shape (..., L), for finite logits f of that shape. Raises ValueError for others."""
        values = checked_logits(logits)
        if values.shape[-1:] != self.factor.shape:
            raise ValueError(f"There are {self.factor.size} classes but the logits have {values.shape[-1]}.")
        return values * self.factor + self.offset


def weight_normalisation(
    norms: npt.ArrayLike, tau: float, *, biases: npt.ArrayLike | None = None, bias: BiasRule = "divide"
) -> Scaling:
    """Return how logits f = w x + c become f_y / nu_y ** tau, for nu = `norms` (L,).

    Menon et al. (2021), eq. 3, divides the whole logit, so its bias too. With `bias` "keep" only w is
    divided and c stays as it is, with "drop" c is left out (Kang et al., 2020); both need the `biases` c
    (L,). tau = 0 is the argmax of f, less c where it is dropped. Raises ValueError for a norm that is not a
    finite number above zero, a tau that is negative or not finite, and a tau so large that nu ** tau leaves
    1e-250 to 1e250.

    >>> weight_normalisation([2.0, 0.5], tau=1).scores([3.0, 1.0])
    array([1.5, 2. ])
    """
    nu = np.asarray(norms, dtype=np.float64)
    if nu.ndim != 1 or not nu.size or not np.isfinite(nu).all() or not (nu > 0).all():
        raise ValueError("One norm for each class is needed, finite and above zero.")
    if not np.isfinite(tau) or tau < 0:
        raise ValueError(f"tau must be a finite number, zero or more, not {tau}.")
    with np.errstate(over="ignore", under="ignore"):
        factor = np.exp(-tau * np.log(nu))
    if not ((factor >= 1 / _LARGEST) & (factor <= _LARGEST)).all():
        raise ValueError(f"tau = {tau:g} is too large: a norm to this power is beyond all range.")
    if bias == "divide":
        return Scaling(factor, np.zeros(len(nu)))
    if bias not in get_args(BiasRule):
        raise ValueError(f"The bias can be divided, kept or dropped, not '{bias}'.")
    if biases is None:
        raise ValueError(f"The biases are needed to {bias} them.")
    c = checked_logits(biases)
    if c.shape != nu.shape:
        raise ValueError(f"There are {nu.size} norms but biases of shape {c.shape}.")
    return Scaling(factor, c - c * factor if bias == "keep" else -c * factor)
