import math

import numpy as np
import pytest
import torch

from lowbit.errors import NonFiniteError
from lowbit.evaluation.metrics import TokenValues, token_kld

T, V = 200, 50


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.fixture(scope="module")
def case():
    p = random_logits(0)
    q = p + 0.3 * random_logits(1)
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    return p, q, targets


def summary(p, q, targets, parts=1):
    values = TokenValues()
    for rows in torch.arange(T).chunk(parts):
        values.add(q[rows].log_softmax(-1), targets[rows], p[rows].log_softmax(-1))
    return values.summary()


def test_figures_equal_a_direct_float64_computation(case):
    p, q, targets = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in case)
    prob_p = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    prob_q = np.exp(q) / np.exp(q).sum(1, keepdims=True)
    kld = (prob_p * np.log(prob_p / prob_q)).sum(1)
    right_p, right_q = prob_p[np.arange(T), targets], prob_q[np.arange(T), targets]
    log_ratio = np.log(right_p / right_q)
    same = (prob_p.argmax(1) == prob_q.argmax(1)).astype(float)
    expected = {
        "ppl_reference": math.exp(-np.log(right_p).mean()),
        "ppl_ratio": math.exp(log_ratio.mean()),
        "ppl_ratio_se": math.exp(log_ratio.mean()) * log_ratio.std(ddof=1) / T**0.5,
        "kld_mean": kld.mean(),
        "kld_se": kld.std(ddof=1) / T**0.5,
        "kld_median": np.median(kld),
        "kld_p99": np.quantile(kld, 0.99),
        "kld_p999": np.quantile(kld, 0.999),
        "kld_max": kld.max(),
        "same_top1": same.mean(),
        "same_top1_se": math.sqrt(same.mean() * (1 - same.mean()) / (T - 1)),
        "delta_p_mean": (right_q - right_p).mean(),
        "delta_p_rms": math.sqrt(((right_q - right_p) ** 2).mean()),
    }
    scores = summary(*case)
    assert scores.tokens == T
    assert scores.ppl == pytest.approx(math.exp(-np.log(right_q).mean()), rel=1e-5)
    assert scores.ppl_se == pytest.approx(scores.ppl * np.log(right_q).std(ddof=1) / T**0.5, rel=1e-5)
    assert vars(scores.divergence) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_identical_models_differ_by_exactly_nothing(case):
    p, _, targets = case
    scores = summary(p, p.clone(), targets)
    d = scores.divergence
    assert (d.kld_mean, d.kld_se, d.kld_max, d.kld_p999) == (0, 0, 0, 0)
    assert (d.same_top1, d.same_top1_se, d.ppl_ratio, d.ppl_ratio_se) == (1, 0, 1, 0)
    assert scores.ppl == d.ppl_reference


@pytest.mark.parametrize("parts", [2, 7, T])
def test_streaming_equals_one_shot(case, parts):
    assert summary(*case, parts=parts) == summary(*case)


def test_without_a_reference_only_perplexity_is_known(case):
    _, q, targets = case
    values = TokenValues()
    values.add(q.log_softmax(-1), targets)
    assert values.summary().divergence is None


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    values = TokenValues()
    values.add(torch.zeros(4, V).log_softmax(-1), torch.arange(4))
    assert values.summary().ppl == pytest.approx(V)


def test_kld_is_not_symmetric_and_the_reference_weighs():
    p = torch.tensor([[0.9, 0.1]]).log()
    q = torch.tensor([[0.5, 0.5]]).log()
    assert token_kld(p, q).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert token_kld(q, p).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_refused(case, bad):
    p, q, targets = case
    broken = q.clone()
    broken[3, 7] = bad
    with pytest.raises(NonFiniteError, match="1 of 200 tokens"):
        summary(p, broken, targets)
