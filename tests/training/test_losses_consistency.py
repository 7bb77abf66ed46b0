"""What a loss leaves behind is what its offset says: minimised on tables, and fitted on Gaussians.

The figures of docs/results.md are what the slow test prints: pytest -s -k gaussians this_file.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from longtail.adjustment import scores
from longtail.calibration import fit_temperature
from longtail.priors import uniform_prior
from training.calibrate import offset_of
from training.losses import LOSSES, LossOptions, default_tau, make_loss
from training.margins import Margins, logit_adjusted, reweighted

CPU = torch.device("cpu")
DEFERRED = {"deferred_reweighting": True}
CONSISTENT = {
    "ERM": ("cross-entropy", {}),
    "balanced": ("balanced", {}),
    "class-balanced, beta .999": ("class-balanced", {"beta": 0.999}),
    "logit-adjusted, tau .5": ("logit-adjusted", {"tau": 0.5}),
    "logit-adjusted, tau 1": ("logit-adjusted", {"tau": 1.0}),
    "logit-adjusted, tau 2": ("logit-adjusted", {"tau": 2.0}),
    "equalised, random mask .9": ("equalised-mask", {"gamma": 0.9, "rare_below": 0.1}),
    "pairwise, tau1 = tau2 = 1.5": ("pairwise", {"tau1": 1.5, "tau2": 1.5}),
    "ERM + DRW": ("cross-entropy", DEFERRED),
    "balanced + DRW": ("balanced", DEFERRED),
    "equalised, random mask + DRW": ("equalised-mask", {"gamma": 0.5, "rare_below": 0.1, **DEFERRED}),
    "logit-adjusted, tau 1 + DRW": ("logit-adjusted", {"tau": 1.0, **DEFERRED}),
}
PER_METHOD = pytest.mark.parametrize(("name", "words"), CONSISTENT.values(), ids=CONSISTENT)


def made(name, words, counts):
    tau = words.get("tau", default_tau(name))
    rest = {key: value for key, value in words.items() if key != "tau"}
    return make_loss(name, counts, tau, CPU, options=LossOptions(**rest))


def minimise(risk, *shape, tolerance=1e-9):
    """Return the minimiser of a smooth function of one tensor, from zero."""
    f = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [f],
        max_iter=1000,
        max_eval=2000,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = risk(f)
        value.backward()
        return value.detach()

    optimizer.step(closure)
    return f.detach()


def random_table(seed, n_inputs=4, n_classes=4):
    """A joint distribution of a few inputs and labels, all of it known."""
    return np.random.default_rng(seed).dirichlet(np.ones(n_inputs * n_classes)).reshape(n_inputs, n_classes)


def expected_loss(margins: Margins, joint, f):
    """The expected loss of f (inputs, L), with every mask that may be drawn counted with its chance."""
    n_classes = joint.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for x, y in itertools.product(*map(range, joint.shape)):
        for dropped in itertools.product((False, True), repeat=n_classes):
            chance = 1.0
            for j in range(n_classes):
                rate = margins.drop_rate[j] if j != y else 0.0
                chance *= rate if dropped[j] else 1 - rate
            if chance == 0:
                continue
            z = f[x] + torch.tensor(np.where(dropped, -np.inf, margins.table[y]))
            total = total + joint[x, y] * chance * margins.weights[y] * (torch.logsumexp(z, 0) - z[y])
    return total


def check_calibrated(margins: Margins, joint):
    f = minimise(lambda f: expected_loss(margins, joint, f), *joint.shape)
    posterior = torch.softmax(f + torch.tensor(margins.logit_offset), dim=1).numpy()
    np.testing.assert_allclose(posterior, joint / joint.sum(1, keepdims=True), atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_for_any_weights_and_any_d_the_minimiser_plus_its_offset_is_the_true_posterior(seed):
    """Theorem 1, generalised: softmax(f) is calibrated to the raw prior proportional to prior alpha / d."""
    rng = np.random.default_rng(seed)
    log_d = rng.normal(0, 1.5, 4)
    margins = Margins(weights=rng.uniform(0.1, 5, 4), others=log_d, own=log_d, drop_rate=np.zeros(4))
    joint = random_table(seed)
    assert margins.offset_is_exact
    check_calibrated(margins, joint)
    f = minimise(lambda f: expected_loss(margins, joint, f), *joint.shape)
    raw_prior = joint.sum(0) * margins.weights / np.exp(log_d)
    likelihood = joint / joint.sum(0)
    expected = raw_prior * likelihood / (raw_prior * likelihood).sum(1, keepdims=True)
    np.testing.assert_allclose(torch.softmax(f, 1).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_random_mask_leaves_the_posterior_once_its_rate_is_taken_off(seed):
    """With weights and margins on top, to show that the three parts of the offset add up."""
    rng = np.random.default_rng(seed)
    joint = random_table(seed + 10)
    weighted = reweighted(logit_adjusted(joint.sum(0), 0.7), rng.uniform(0.5, 2, 4), joint.sum(0))
    masked = Margins(weighted.weights, weighted.others, weighted.own, np.array([0.0, 0.9, 0.5, 0.2]))
    check_calibrated(masked, joint)


@pytest.mark.parametrize("name", ["adaptive", "equalised", "logit-adjusted-adaptive", "ldam"])
def test_an_offset_that_is_not_exact_is_said_to_need_a_fit(name):
    counts = np.array([600, 300, 90, 10])
    loss = made(name, {}, counts)
    assert loss.offset_status == "fitted"
    starts = {"equalised": np.log(counts / 1000), "logit-adjusted-adaptive": np.log(counts / 1000)}
    np.testing.assert_allclose(loss.logit_offset, starts.get(name, np.zeros(4)))


@PER_METHOD
def test_consistent_losses_know_their_offset_but_for_a_re_weighted_last_fifth(name, words):
    status = made(name, words, np.array([600, 300, 90, 10])).offset_status
    assert status == ("fitted" if "deferred_reweighting" in words else "known")


def test_tau1_and_tau2_know_their_offset_only_where_they_agree():
    counts = np.array([600, 300, 90, 10])
    assert made("pairwise", {"tau1": 0.5, "tau2": 0.5}, counts).offset_status == "known"
    apart = made("pairwise", {"tau1": 0.0, "tau2": 0.5}, counts)
    assert apart.offset_status == "fitted"
    np.testing.assert_allclose(apart.logit_offset, 0.5 * np.log(counts / 1000))


def test_the_offsets_are_those_of_the_table_up_to_a_constant():
    counts = np.array([600.0, 300, 90, 10])
    log_prior = np.log(counts / 1000)
    w = (1 - 0.9999) / (1 - 0.9999**counts)
    table = [
        (("cross-entropy", {}), np.zeros(4)),
        (("balanced", {}), log_prior),
        (("class-balanced", {}), -np.log(w)),
        (("logit-adjusted", {"tau": 1.7}), 1.7 * log_prior),
        (("logit-adjusted", {"tau": 1.0, **DEFERRED}), log_prior - np.log(w)),
        (("cross-entropy", DEFERRED), -np.log(w)),
        (("equalised-mask", {"gamma": 0.9, "rare_below": 0.1}), np.log([1, 1, 0.1, 0.1])),
    ]
    for method, expected in table:
        gap = made(*method, counts).logit_offset - expected
        assert np.ptp(gap) < 1e-9, method


# Five Gaussians of unit spread on a bent line: the posterior is a softmax of an affine function of x, so that
# a fitted one can be told from the true one by sampling error alone.
CENTRES = np.array([[-2.4, 0.3], [-1.2, -0.8], [0.0, 0.6], [1.2, -0.5], [2.3, 0.7]])
N = 100_000
SHAPE = 0.01 ** (np.arange(5) / 4)  # imbalance ratio 100
PRIOR = SHAPE / SHAPE.sum()
GRID = np.stack(np.meshgrid(*[np.linspace(-7, 7, 141)] * 2), axis=-1).reshape(-1, 2)
DENSITIES = np.stack([multivariate_normal(centre).pdf(GRID) for centre in CENTRES], axis=1)


def target_priors():
    """Uniform, and forward and backward (by training frequency) with ratios 50 to 2: eleven in all."""
    yield "uniform", uniform_prior(5)
    for ratio in (50, 25, 10, 5, 2):
        forward = ratio ** (-np.arange(5) / 4)
        yield f"forward {ratio}", forward / forward.sum()
        yield f"backward {ratio}", forward[::-1] / forward.sum()


def gaussian_sample(n=N, seed=0):
    """Inputs (n, 3), the last a constant, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, n, p=PRIOR)
    inputs = CENTRES[labels] + rng.normal(size=(n, 2))
    return torch.tensor(np.c_[inputs, np.ones(n)]), torch.tensor(labels)


def fitted_weights(loss, inputs, labels):
    """The affine softmax (3, 5) of least mean loss on the sample.

    A mask is drawn once for each sample: the generator starts anew at each evaluation.
    """
    function = loss.at(1.0)

    def risk(weights):
        return function(inputs @ weights, labels, torch.Generator().manual_seed(1))

    return minimise(risk, 3, 5, tolerance=1e-6).numpy()  # far below the noise of the sample


def on_grid(weights):
    return np.c_[GRID, np.ones(len(GRID))] @ weights


def excess_risk(logits, offset, prior, target, tau=1.0):
    """Points of error above Bayes' rule for the target prior, integrated over the plane; (excess, Bayes)."""
    mass = DENSITIES * target
    mass = mass / mass.sum()
    decided = scores(logits, offset, prior, target, tau).argmax(1)
    best, ours = mass.max(1).sum(), mass[np.arange(len(GRID)), decided].sum()
    return 100 * (best - ours), 100 * (1 - best)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_gaussians_every_consistent_method_serves_eleven_targets_within_a_fifth_of_a_point_of_bayes():
    inputs, labels = gaussian_sample()
    counts = np.bincount(labels.numpy(), minlength=5)
    prior = counts / N
    print(f"\n{N:,} draws, counts {counts.tolist()}; excess over Bayes in points: uniform, worst of eleven")
    worst = {}
    for title, method in CONSISTENT.items():
        loss = made(*method, counts)
        logits = on_grid(fitted_weights(loss, inputs, labels))
        excess = {
            target: excess_risk(logits, loss.logit_offset, prior, q)[0] for target, q in target_priors()
        }
        worst[title] = max(excess.values())
        print(f"{title:32} {excess['uniform']:.3f} {worst[title]:.3f} ({max(excess, key=excess.get)})")
        assert min(excess.values()) > -1e-9
        if method[0] == "logit-adjusted" and loss.logit_offset.any():
            twice = excess_risk(logits, np.zeros(5), prior, uniform_prior(5))[0]
            print(f"{'  the same, offset left out':32} {twice:.3f}")
            assert twice > 1
    assert max(worst.values()) < 0.2, worst


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive", "equalised", "logit-adjusted-adaptive"])
def test_on_gaussians_a_fitted_offset_and_temperature_serve_within_half_a_point_of_bayes(name):
    """No offset of these losses is exact; 10,000 held-out draws, 70 of the rarest class, bring them near."""
    inputs, labels = gaussian_sample(30_000)
    counts = np.bincount(labels.numpy(), minlength=5)
    prior = counts / len(labels)
    loss = made(name, {}, counts)
    weights = fitted_weights(loss, inputs, labels)
    held_inputs, held_labels = gaussian_sample(10_000, seed=1)
    held = held_inputs.numpy() @ weights
    offset, origin = offset_of(loss.logit_offset, loss.offset_status, held, held_labels.numpy())
    assert origin == "fitted"
    start, fitted = (
        np.mean([excess_risk(on_grid(weights), b, prior, q, tau)[0] for _, q in target_priors()])
        for b in (loss.logit_offset, offset)
        for tau in (fit_temperature(held + b, held_labels.numpy()).temperature,)  # tau = T is Bayes' rule
    )
    print(f"\n{name}: mean excess over Bayes at eleven targets {start:.2f} at the start, {fitted:.2f} fitted")
    assert fitted < 0.5
    if name == "equalised":
        assert start > 1


def test_the_table_of_the_docs_has_every_loss_and_says_which_offsets_are_known():
    text = (Path(__file__).parents[2] / "docs" / "maths.md").read_text()
    lines = text.split("| `--loss` |")[1].split("\n\n")[0].splitlines()[2:]  # below the head and its rule
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    rows = {cells[0].split("`")[1]: cells[-1] for cells in table}
    assert set(rows) == set(LOSSES)
    for name in LOSSES:
        status = made(name, {}, np.array([600, 300, 90, 10])).offset_status
        assert rows[name].removesuffix(" where tau1 = tau2") == status, name
