"""The losses: neutral cases, gradients, and the offset that each leaves behind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.adjustment import scores
from training.exceptions import RunError
from training.losses import cross_entropy, default_tau, logit_adjusted, make_loss

CPU = torch.device("cpu")
PRIOR = np.array([0.6, 0.25, 0.1, 0.05])


def batch(seed=0, n=16, classes=4):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(0, 3, (n, classes))), torch.tensor(rng.integers(0, classes, n))


def test_at_tau_zero_the_logit_adjusted_loss_is_cross_entropy():
    logits, labels = batch()
    prior = torch.tensor(PRIOR)
    assert torch.equal(
        logit_adjusted(logits, labels, source_prior=prior, tau=0.0), cross_entropy(logits, labels)
    )


def test_a_uniform_prior_changes_no_loss():
    logits, labels = batch()
    even = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(
        logit_adjusted(logits, labels, source_prior=even, tau=1.7), cross_entropy(logits, labels)
    )


@settings(max_examples=25, deadline=None)
@given(tau=st.floats(0, 5), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_a_constant_factor_of_the_prior_changes_no_loss(tau, factor, seed):
    logits, labels = batch(seed)
    prior = torch.tensor(PRIOR)
    torch.testing.assert_close(
        logit_adjusted(logits, labels, source_prior=prior, tau=tau),
        logit_adjusted(logits, labels, source_prior=prior * factor, tau=tau),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_loss_is_the_pairwise_sum_of_equation_10():
    logits, labels = batch()
    tau, total = 1.3, 0.0
    for f, y in zip(logits.numpy(), labels.numpy(), strict=True):
        others = [j for j in range(4) if j != y]
        total += np.log1p(sum((PRIOR[j] / PRIOR[y]) ** tau * np.exp(f[j] - f[y]) for j in others))
    loss = logit_adjusted(logits, labels, source_prior=torch.tensor(PRIOR), tau=tau)
    assert float(loss) == pytest.approx(total / len(labels), rel=1e-6)


@pytest.mark.parametrize(("name", "tau"), [("cross-entropy", None), ("logit-adjusted", 1.5)])
def test_gradients_agree_with_finite_differences(name, tau):
    logits, labels = batch(n=5)
    function = make_loss(name, PRIOR, tau, CPU).function
    leaf = logits.clone().requires_grad_()
    function(leaf, labels).backward()
    step = 1e-5
    for place in np.ndindex(*logits.shape):
        up, down = logits.clone(), logits.clone()
        up[place] += step
        down[place] -= step
        slope = (function(up, labels) - function(down, labels)) / (2 * step)
        assert float(leaf.grad[place]) == pytest.approx(float(slope), abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_the_offset_makes_the_minimiser_calibrated_to_the_training_prior(tau):
    """Five inputs, known posteriors: minimise, then look at softmax(f + b) (Menon et al., theorem 1)."""
    rng = np.random.default_rng(1)
    joint = rng.dirichlet(np.ones(20)).reshape(5, 4)
    prior = joint.sum(0)
    loss = make_loss("logit-adjusted", prior, tau, CPU)
    f = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [f], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def risk():
        optimizer.zero_grad()
        value = sum(
            joint[x, y] * loss.function(f[x : x + 1], torch.tensor([y])) for x in range(5) for y in range(4)
        )
        value.backward()
        return value

    optimizer.step(risk)
    posterior = torch.softmax(f.detach() + torch.tensor(loss.logit_offset), dim=1).numpy()
    np.testing.assert_allclose(posterior, joint / joint.sum(1, keepdims=True), atol=1e-5)


def test_at_tau_one_the_served_decision_under_a_uniform_target_is_the_networks_own():
    logits = np.random.default_rng(0).normal(0, 2, (200, 4))
    offset = make_loss("logit-adjusted", PRIOR, 1.0, CPU).logit_offset
    served = scores(logits, offset, PRIOR, np.full(4, 0.25), tau=1.0)
    np.testing.assert_array_equal(served.argmax(1), logits.argmax(1))


def test_cross_entropy_leaves_no_offset():
    assert not make_loss("cross-entropy", PRIOR, None, CPU).logit_offset.any()


def test_half_precision_logits_at_their_limit_and_a_tiny_prior_stay_finite():
    logits = torch.tensor([[60_000.0, -60_000.0], [-60_000.0, 60_000.0]], dtype=torch.float16)
    logits.requires_grad_()
    prior = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)
    for loss in (
        cross_entropy(logits, torch.tensor([1, 1])),
        logit_adjusted(logits, torch.tensor([1, 1]), source_prior=prior, tau=1.0),
    ):
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf"), None])
def test_a_tau_that_is_none_is_refused(tau):
    with pytest.raises(RunError, match="tau"):
        make_loss("logit-adjusted", PRIOR, tau, CPU)


def test_cross_entropy_takes_no_tau_and_unknown_losses_are_named():
    with pytest.raises(RunError, match="--tau belongs to the logit-adjusted loss"):
        make_loss("cross-entropy", PRIOR, 1.0, CPU)
    with pytest.raises(RunError, match="unknown loss 'hinge'; known are cross-entropy, logit-adjusted"):
        make_loss("hinge", PRIOR, None, CPU)
    assert (default_tau("logit-adjusted"), default_tau("cross-entropy")) == (1.0, None)
