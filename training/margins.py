"""What each loss weighs its classes by and adds to its logits: constants from the class counts, in NumPy.

Every loss with fixed weights and margins is a case of the general pairwise one (Menon et al., 2021, eq. 11)

    alpha_y log(1 + sum_{j != y} exp(D[y, j] + f_j - f_y)),      D[y, j] = others_j - own_y,

and one identity says what it leaves behind. Where own = others = log d (so D[y, j] = log d_j / d_y), the
minimiser's softmax(f) is the posterior under the raw prior r proportional to prior alpha / d (theorem 1,
generalised), so f + log prior - log r is calibrated to the training prior. Tan et al.'s random mask divides
r by the chance of being kept. docs/maths.md has the table that this file writes out.

Counts are floats (L,), all above zero; shares of one will do, except for the effective number.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from longtail.priors import prior_from_counts

Floats = npt.NDArray[np.float64]

COSINE_SCALE = 30.0  # s of LDAM (Cao et al., 2019, and their code): logits are s times a cosine


@dataclass(frozen=True)
class Margins:
    """The constants of a loss, each (L,).

    A sample of class y weighs weights_y, sees the logits of other classes j raised by others_j and its own by
    own_y, and each other class is left out of its softmax with the chance drop_rate_j.
    """

    weights: Floats
    others: Floats
    own: Floats
    drop_rate: Floats

    @property
    def table(self) -> Floats:
        """The margins D (L, L): row y, column j, zeros on the diagonal."""
        table: Floats = self.others[None, :] - self.own[:, None]
        np.fill_diagonal(table, 0.0)
        return table

    @property
    def logit_offset(self) -> Floats:
        """The b (L,) that makes f + b calibrated to the training prior; a first guess where not consistent.

        b = log prior - log r with r proportional to prior weights / (exp(others) (1 - drop_rate)).
        """
        offset: Floats = self.others + np.log1p(-self.drop_rate) - np.log(self.weights)
        return offset

    @property
    def offset_is_exact(self) -> bool:
        """Whether the minimiser over all functions is calibrated by the offset, not only brought near."""
        return bool(np.array_equal(self.others, self.own))


def cross_entropy(counts: Floats) -> Margins:
    """Softmax cross-entropy (eq. 1): nothing is added."""
    none = np.zeros(len(counts))
    return Margins(weights=np.ones(len(counts)), others=none, own=none, drop_rate=none)


def balanced(counts: Floats) -> Margins:
    """The balanced loss (eq. 4): weights 1 / prior."""
    return reweighted(cross_entropy(counts), 1 / prior_from_counts(counts), counts)


def class_balanced(counts: Floats, beta: float) -> Margins:
    """Weights by the inverse effective number (Cui et al., 2019)."""
    return reweighted(cross_entropy(counts), effective_number_weights(counts, beta), counts)


def adaptive(counts: Floats) -> Margins:
    """The adaptive margin as the paper writes it (eq. 5): D[y, j] = prior_y^(-1/4), on the raw logits."""
    return replace(cross_entropy(counts), own=-(prior_from_counts(counts) ** -0.25))


def ldam(counts: Floats, margin: float) -> Margins:
    """The adaptive margin as its authors train it (Cao et al., 2019): LDAM, on logits s cos.

    The rarest class has this margin on the cosine, the others less, as n^(-1/4); D is s times it.
    """
    sizes = counts**-0.25
    return replace(cross_entropy(counts), own=-COSINE_SCALE * margin * sizes / sizes.max())


def equalised(counts: Floats, gamma: float | None, rare_below: float) -> Margins:
    """The equalised margin as the paper writes it (eq. 6): D[y, j] = log F(prior_j).

    F(p) = p as in its section 6.1; with a gamma it is Tan et al.'s threshold in the mean, 1 - gamma for
    classes rarer than `rare_below` and else 1, which is not their loss: that draws a mask.
    """
    prior = prior_from_counts(counts)
    factor = prior if gamma is None else np.where(prior < rare_below, 1 - gamma, 1.0)
    return replace(cross_entropy(counts), others=np.log(factor))


def equalised_mask(counts: Floats, gamma: float, rare_below: float) -> Margins:
    """Tan et al. (2020): another class rarer than `rare_below` is left out with the chance gamma.

    Consistent, unlike its mean: given the kept classes the loss is cross-entropy among them, and
    P(y | x, kept) is proportional to P(y | x) / (1 - gamma) for a rare y, to P(y | x) else.
    """
    return replace(
        cross_entropy(counts), drop_rate=np.where(prior_from_counts(counts) < rare_below, gamma, 0.0)
    )


def logit_adjusted(counts: Floats, tau: float) -> Margins:
    """The logit-adjusted loss (eq. 10): D[y, j] = tau log(prior_j / prior_y)."""
    raised = tau * np.log(prior_from_counts(counts))
    return replace(cross_entropy(counts), others=raised, own=raised)


def logit_adjusted_adaptive(counts: Floats, tau: float) -> Margins:
    """The logit-adjusted and the adaptive margin added up: tau log(prior_j / prior_y) + prior_y^(-1/4)."""
    base = logit_adjusted(counts, tau)
    return replace(base, own=base.own + adaptive(counts).own)


def pairwise(counts: Floats, tau1: float, tau2: float) -> Margins:
    """Section 5.3 with its sign set right: D[y, j] = tau2 log prior_j - tau1 log prior_y.

    tau1 = tau2 is the logit-adjusted loss, tau1 = 0 the equalised one with F(p) = p^tau2.
    """
    log_prior = np.log(prior_from_counts(counts))
    return replace(cross_entropy(counts), others=tau2 * log_prior, own=tau1 * log_prior)


def reweighted(margins: Margins, factor: Floats, counts: Floats) -> Margins:
    """Multiply the weights by `factor` (L,), scaled to a mean of one over the training distribution."""
    weights = margins.weights * factor
    return replace(margins, weights=weights / (prior_from_counts(counts) @ weights))


def effective_number_weights(counts: Floats, beta: float) -> Floats:
    """Return (1 - beta) / (1 - beta^n) (L,): 1 at beta 0, near 1 / n as beta goes to 1 (Cui et al., 2019)."""
    if beta == 0:
        return np.ones(len(counts))
    weights: Floats = (1 - beta) / -np.expm1(counts * np.log(beta))
    return weights
