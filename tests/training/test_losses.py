"""The losses against explicit sums and published numbers, their gradients, and extreme numbers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests.training.made_losses import COUNTS, made
from training import margins
from training.losses import (
    LOSSES,
    masked_cross_entropy,
    pairwise_cross_entropy,
    shifted_cross_entropy,
)

PRIOR = COUNTS / COUNTS.sum()
NONE = np.zeros((4, 4))
RARE = np.array([0, 0, 1, 1])


def rows(by_class):
    """D[y, j] = by_class[y]."""
    return np.tile(by_class[:, None], 4)


def mean_one(weights):
    return weights / (PRIOR @ weights)


# What the literature prints, beside the options that ask for it: weights alpha (L,) and margins D (L, L).
LOG_RATIO = np.log(PRIOR[None, :] / PRIOR[:, None])
CUI = (1 - 0.99) / (1 - 0.99**COUNTS)
PRINTED = [
    ("cross-entropy", {}, np.ones(4), NONE),
    ("balanced", {}, 1 / PRIOR / 4, NONE),
    ("class-balanced", {"beta": 0.99}, mean_one(CUI), NONE),
    ("adaptive", {}, np.ones(4), rows(PRIOR**-0.25)),
    ("ldam", {"margin": 0.4}, np.ones(4), rows(30 * 0.4 * COUNTS**-0.25 / 50**-0.25)),
    ("equalised", {}, np.ones(4), np.tile(np.log(PRIOR), (4, 1))),
    ("equalised", {"gamma": 0.8, "rare_below": 0.12}, np.ones(4), np.tile(np.log(1 - 0.8 * RARE), (4, 1))),
    ("logit-adjusted", {"tau": 1.5}, np.ones(4), 1.5 * LOG_RATIO),
    ("logit-adjusted-adaptive", {}, np.ones(4), LOG_RATIO + rows(PRIOR**-0.25)),
    (
        "pairwise",
        {"tau1": 0.5, "tau2": 1.5},
        np.ones(4),
        1.5 * np.tile(np.log(PRIOR), (4, 1)) - rows(0.5 * np.log(PRIOR)),
    ),
]
FIXED = pytest.mark.parametrize(
    ("name", "words", "alpha", "table"), PRINTED, ids=[f"{name} {words}" for name, words, *_ in PRINTED]
)


def batch(seed=0, n=16, classes=4):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(0, 3, (n, classes))), torch.tensor(rng.integers(0, classes, n))


def explicit(logits, labels, alpha, table):
    """Equation 11, sample by sample and term by term; D = -inf leaves a class out."""
    terms = []
    for f, y in zip(logits, labels.tolist(), strict=True):
        others = [j for j in range(len(f)) if j != y]
        total = 1 + sum(torch.exp(table[y, j] + f[j] - f[y]) for j in others)
        terms.append(alpha[y] * torch.log(total))
    return torch.stack(terms).mean()


@FIXED
def test_a_loss_with_fixed_weights_and_margins_is_the_sum_that_the_paper_prints(name, words, alpha, table):
    logits, labels = batch()
    value = made(name, words).function(logits, labels, None)
    expected = explicit(logits, labels, torch.tensor(alpha), torch.tensor(table))
    assert float(value) == pytest.approx(float(expected), rel=2e-6)


@FIXED
def test_and_it_is_a_case_of_the_general_pairwise_loss(name, words, alpha, table):
    logits, labels = batch(1)
    general = pairwise_cross_entropy(
        logits, labels, weights=torch.tensor(alpha), table=torch.tensor(table - np.diag(np.diag(table)))
    )
    assert float(made(name, words).function(logits, labels, None)) == pytest.approx(float(general), rel=2e-6)


def drawn_mask(seed, labels, drop_rate):
    """The classes that a generator of this seed drops, (B, L)."""
    drawn = torch.rand(len(labels), len(drop_rate), generator=torch.Generator().manual_seed(seed))
    dropped = (drawn < drop_rate.float()).numpy()
    dropped[np.arange(len(labels)), labels.numpy()] = False
    return dropped


@pytest.mark.parametrize("seed", range(5))
def test_the_random_mask_is_for_each_drawn_mask_a_case_of_the_general_pairwise_loss(seed):
    logits, labels = batch(seed)
    loss = made("equalised-mask", gamma=0.7, rare_below=0.3)
    value = loss.function(logits, labels, torch.Generator().manual_seed(seed))
    dropped = drawn_mask(seed, labels, torch.tensor([0.0, 0.7, 0.7, 0.7]))
    assert dropped.any()
    terms = []
    for i in range(len(labels)):
        table = torch.zeros(4, 4, dtype=torch.float64)
        table[:, dropped[i]] = -torch.inf
        table.fill_diagonal_(0)
        one = pairwise_cross_entropy(
            logits[i : i + 1], labels[i : i + 1], weights=torch.ones(4, dtype=torch.float64), table=table
        )
        terms.append(float(one))
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-6)


def test_the_mask_drops_rare_classes_at_its_rate_and_never_the_target_or_a_frequent_class():
    n = 4000
    labels = torch.arange(4).repeat(n // 4)
    logits = torch.zeros(n, 4, requires_grad=True)
    loss = made("equalised-mask", gamma=0.9, rare_below=0.15)
    loss.function(logits, labels, torch.Generator().manual_seed(1)).backward()
    kept = (logits.grad != 0).numpy()
    own = np.eye(4, dtype=bool)[labels.numpy()]
    # A target alone in its softmax has loss 0 and gradient 0: then it is not told from a dropped one.
    assert kept[own & (kept.sum(1, keepdims=True) > 0)].all()
    assert kept[:, :2][~own[:, :2]].all()
    for rare in (2, 3):
        others = kept[labels.numpy() != rare, rare]
        assert binomtest(int(others.sum()), len(others), 0.1).pvalue > 0.001


def test_a_sample_whose_other_classes_are_all_dropped_loses_nothing():
    logits, labels = batch()
    rate = torch.full((4,), 1.0)
    value = masked_cross_entropy(logits, labels, weights=torch.ones(4), drop_rate=rate)
    assert float(value) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_agree_with_finite_differences_in_double_precision(smoothing):
    rng = np.random.default_rng(3)
    logits, labels = batch(n=5)
    logits.requires_grad_()
    weights, others, own = (torch.tensor(rng.uniform(0.2, 2, 4)) for _ in range(3))
    table = torch.tensor(rng.normal(size=(4, 4)))
    assert torch.autograd.gradcheck(
        lambda f: shifted_cross_entropy(
            f, labels, weights=weights, others=others, own=own, label_smoothing=smoothing
        ),
        logits,
    )
    assert torch.autograd.gradcheck(
        lambda f: pairwise_cross_entropy(f, labels, weights=weights, table=table, label_smoothing=smoothing),
        logits,
    )
    assert torch.autograd.gradcheck(
        lambda f: masked_cross_entropy(
            f,
            labels,
            weights=weights,
            drop_rate=torch.full((4,), 0.5),
            generator=torch.Generator().manual_seed(4),
        ),
        logits,
    )


@FIXED
def test_the_gradient_is_the_weighted_softmax_less_the_label(name, words, alpha, table):
    logits, labels = batch(2)
    leaf = logits.clone().requires_grad_()
    made(name, words).function(leaf, labels, None).backward()
    z = logits.numpy() + (table - np.diag(np.diag(table)))[labels]
    mass = np.exp(z - z.max(1, keepdims=True))
    expected = mass / mass.sum(1, keepdims=True) - np.eye(4)[labels]
    np.testing.assert_allclose(
        leaf.grad.numpy(), alpha[labels][:, None] * expected / len(labels), rtol=1e-5, atol=1e-9
    )


@FIXED
def test_label_smoothing_spreads_a_share_of_each_label_over_all_classes(name, words, alpha, table):
    logits, labels = batch(4)
    value = made(name, words, label_smoothing=0.1).function(logits, labels, None)
    z = logits.numpy() + (table - np.diag(np.diag(table)))[labels]
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    assert float(value) == pytest.approx(np.mean(alpha[labels] * -(target * log_p).sum(1)), rel=2e-6)


def test_cross_entropy_is_torchs_own():
    logits, labels = batch()
    torch.testing.assert_close(
        made("cross-entropy").function(logits, labels, None),
        torch.nn.functional.cross_entropy(logits, labels),
    )


def test_at_tau_zero_the_logit_adjusted_loss_is_cross_entropy():
    logits, labels = batch()
    zero = made("logit-adjusted", tau=0.0).function(logits, labels, None)
    assert torch.equal(zero, made("cross-entropy").function(logits, labels, None))


@pytest.mark.parametrize("name", ["balanced", "class-balanced", "logit-adjusted", "equalised-mask"])
def test_with_as_many_images_of_each_class_a_consistent_loss_is_cross_entropy(name):
    logits, labels = batch()
    even = np.full(4, 80)
    torch.testing.assert_close(
        made(name, counts=even).function(logits, labels, None),
        made("cross-entropy").function(logits, labels, None),
    )


@settings(max_examples=25, deadline=None)
@given(tau=st.floats(0, 5), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_only_the_shares_of_the_counts_matter_to_the_logit_adjusted_loss(tau, factor, seed):
    logits, labels = batch(seed)
    torch.testing.assert_close(
        made("logit-adjusted", tau=tau).function(logits, labels, None),
        made("logit-adjusted", tau=tau, counts=COUNTS * factor).function(logits, labels, None),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["balanced", "class-balanced"])
def test_weights_are_one_in_the_mean_over_training_and_a_batch_is_not_divided_by_its_own(name):
    logits, _ = batch(n=6)
    rare = torch.full((6,), 3)
    loss = made(name)
    weights = (
        margins.balanced(COUNTS) if name == "balanced" else margins.class_balanced(COUNTS, 0.9999)
    ).weights
    assert PRIOR @ weights == pytest.approx(1)
    plain = made("cross-entropy").function(logits, rare, None)
    assert float(loss.function(logits, rare, None)) == pytest.approx(weights[3] * float(plain), rel=1e-6)


def exp_profile(largest, classes):
    return np.array([int(largest * 0.01 ** (c / (classes - 1))) for c in range(classes)], dtype=float)


@pytest.mark.parametrize(
    ("largest", "classes", "adaptive_ends", "cui_ratio"),
    [(5000, 10, (1.26, 3.97), 78.9), (500, 100, (2.16, 6.82), 97.6)],
)
def test_margins_and_weights_are_those_of_the_published_long_tailed_sets(
    largest, classes, adaptive_ends, cui_ratio
):
    counts = exp_profile(largest, classes)
    own = -margins.adaptive(counts).own
    assert (own[0], own[-1]) == pytest.approx(adaptive_ends, abs=0.006)
    weights = margins.effective_number_weights(counts, 0.9999)
    assert weights[-1] / weights[0] == pytest.approx(cui_ratio, abs=0.06)
    in_logits = -margins.ldam(counts, 0.5).own
    assert (in_logits[0], in_logits[-1]) == pytest.approx((4.74, 15.0), abs=0.02)
    assert made("equalised-mask", counts=counts).options["rare_below"] == 0.5 / classes


def test_the_effective_number_ends_at_no_weights_and_at_inverse_counts():
    assert margins.effective_number_weights(COUNTS, 0.0).tolist() == [1, 1, 1, 1]
    near_one = margins.effective_number_weights(COUNTS, 1 - 1e-12)
    np.testing.assert_allclose(near_one * COUNTS, 1, rtol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_deferred_reweighting_starts_at_four_fifths_and_multiplies_by_class_weights(name):
    loss = made(name, deferred_reweighting=True)
    assert loss.at(0.0) is loss.function
    assert loss.at(159 / 200) is loss.function
    assert loss.at(160 / 200) is loss.deferred
    logits, _ = batch(5, n=3)
    factor = margins.effective_number_weights(COUNTS, 0.9999)
    ratios = []
    for y in range(4):
        labels = torch.full((3,), y)
        before, after = (
            float(function(logits, labels, torch.Generator().manual_seed(0)))
            for function in (loss.function, loss.deferred)
        )
        ratios.append(after / before)
    np.testing.assert_allclose(np.array(ratios) / ratios[0], factor / factor[0], rtol=1e-5)
    assert made(name).at(1.0)(logits, torch.tensor([0, 1, 2]), None).isfinite()
    assert made(name).deferred is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_at_their_limit_and_a_tiny_prior_stay_finite(name, dtype):
    counts = np.array([1.0, 1e-9])
    for y, deferred in itertools.product((0, 1), (False, True)):
        logits = torch.tensor([[60_000.0, -60_000.0], [-60_000.0, 60_000.0]], dtype=dtype, requires_grad=True)
        loss = made(name, counts=counts, deferred_reweighting=deferred)
        value = loss.at(0.9)(logits, torch.full((2,), y), None)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        value.backward()
        # A weight of 1 / prior alone is past float16, whatever the loss computes in.
        if dtype == torch.bfloat16 or not (deferred or "balanced" in name):
            assert torch.isfinite(logits.grad).all()
    assert np.isfinite(loss.logit_offset).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_looks_at_its_data_so_that_a_step_can_be_captured(name):
    """A meta tensor has no values: reading one, or branching on one, raises."""
    meta = torch.device("meta")
    loss = made(name, device=meta, deferred_reweighting=True)
    logits = torch.empty(8, 4, device=meta, requires_grad=True)
    for progress in (0.0, 0.9):
        value = loss.at(progress)(logits, torch.empty(8, dtype=torch.int64, device=meta), None)
        assert value.shape == ()
        value.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_loss_is_captured_in_a_cuda_graph_and_replays_to_its_own_value():
    device = torch.device("cuda")
    for name in LOSSES:
        loss = made(name, device=device, deferred_reweighting=True)
        logits, labels = torch.zeros(8, 4, device=device), torch.zeros(8, dtype=torch.int64, device=device)
        graph = torch.cuda.CUDAGraph()
        generator = torch.Generator(device)
        graph.register_generator_state(generator)
        for function in (loss.function, loss.deferred):
            function(logits, labels, generator)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            value = loss.function(logits, labels, generator)
        new_logits, new_labels = batch(6, n=8)
        logits.copy_(new_logits)
        labels.copy_(new_labels)
        generator.manual_seed(3)
        graph.replay()
        again = loss.function(logits, labels, torch.Generator(device).manual_seed(3))
        torch.testing.assert_close(value, again, msg=name)
