"""Counts on their way up: nothing is lost, draws have the law they claim, and their means are those of the expectation."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jointgen.topic_counts import expected_counts, expected_tables, split_counts, tables, tally, token_topics, uniform


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def simplex(*shape, seed=0, power=3):
    x = torch.rand(*shape, generator=seeded(seed))**power + 1e-6
    return x / x.sum(0)


def case(b=5, v=11, k=4, seed=0):
    counts = torch.randint(0, 4, (b, v), generator=seeded(seed)).float()
    return counts, simplex(v, k, seed=seed + 1), 3*torch.rand(b, k, generator=seeded(seed + 2))**3 + 1e-6


# --- which topic said it


@pytest.mark.parametrize('b, v, k', [(1, 2, 1), (5, 11, 4), (64, 134, 100), (3, 1, 7), (7, 500, 33), (4, 9, 2), (4, 9, 3), (4, 9, 16), (4, 9, 17)])
def test_no_token_is_lost(b, v, k):
    counts, phi, theta = case(b, v, k)
    document, word, topic = token_topics(counts, phi, theta, seeded())
    assert len(topic) == counts.sum() and 0 <= topic.min() and topic.max() < k
    assert torch.equal(tally(document, word, counts.shape), counts)
    m, S = split_counts(counts, phi, theta, seeded())
    assert m.shape == theta.shape and S.shape == phi.shape
    assert torch.equal(m.sum(1), counts.sum(1)) and torch.equal(S.sum(1), counts.sum(0)) and torch.equal(m.sum(0), S.sum(0))
    assert torch.equal(m, m.round()) and m.min() >= 0
    m, S = expected_counts(counts, phi, theta)
    assert torch.allclose(m.sum(1), counts.sum(1), rtol=1e-5) and torch.allclose(S.sum(1), counts.sum(0), rtol=1e-5)
    assert torch.allclose(m.sum(0), S.sum(0), rtol=1e-4)


def test_mean_and_covariance_of_a_split():
    phi, theta, n = simplex(3, 4, power=1), torch.tensor([[0.5, 2., 0.1, 1.]]), 40000
    counts = torch.tensor([[0., 6., 1.]])
    m, S = split_counts(counts.repeat(n, 1), phi, theta.repeat(n, 1), seeded())
    want, table = expected_counts(counts, phi, theta)
    assert torch.allclose(m.mean(0), want[0], atol=0.03) and torch.allclose(S/n, table, atol=0.03)
    p = phi[1:]*theta
    p /= p.sum(1, keepdim=True)
    cov = sum(c*(torch.diag(q) - torch.outer(q, q)) for c, q in zip((6, 1), p))  # of a multinomial
    assert torch.allclose(torch.cov(m.T), cov, atol=0.05)


def test_a_topic_that_cannot_have_said_it_never_gets_it():
    phi = torch.tensor([[1., 0., 0.5, 0.], [0., 1., 0.5, 1.]])
    m, S = split_counts(torch.full((2000, 2), 3.), phi, torch.tensor([[1., 0., 1., 1.]]).repeat(2000, 1), seeded())
    assert (m[:, 1] == 0).all() and torch.equal(S > 0, torch.tensor([[True, False, True, False], [False, False, True, True]]))


@pytest.mark.parametrize('k', [1, 2, 3, 5, 8, 31, 64])
def test_every_topic_can_be_drawn_and_none_beyond(k):
    for phi in torch.ones(1, k), torch.eye(k)[:1] + 1e-9, torch.eye(k)[-1:] + 1e-9:
        m, _ = split_counts(torch.full((1, 1), 20000.), phi, torch.ones(1, k), seeded())
        assert torch.allclose(m[0]/20000, phi[0]/phi.sum(), atol=0.02)


def test_big_and_lopsided_counts():
    counts, theta = torch.tensor([[200000., 0., 1.]]), torch.tensor([[1e-12, 1., 1e6]])
    m, _ = split_counts(counts, torch.full((3, 3), 1/3), theta, seeded())
    assert m.sum() == 200001 and m[0, 0] == 0 and m[0, 2] > 199990
    m, _ = split_counts(counts, torch.full((3, 3), 1e-10), torch.full((1, 3), 1e-12), seeded())
    assert (m - 200001/3).abs().max() < 5*math.sqrt(200001*2/9)


def test_a_word_nobody_says():
    phi = torch.tensor([[0., 0.], [1., 1.]])
    with pytest.raises(ValueError, match='no topic can say'):
        split_counts(torch.ones(1, 2), phi, torch.ones(1, 2))
    assert split_counts(torch.tensor([[0., 2.]]), phi, torch.ones(1, 2))[0].sum() == 2


def test_no_words_at_all():
    m, S = split_counts(torch.zeros(2, 3), simplex(3, 4), torch.ones(2, 4))
    assert m.shape == (2, 4) and S.shape == (3, 4) and m.sum() == S.sum() == 0
    assert tables(m, torch.ones(2, 4)).sum() == 0 == expected_tables(m, torch.ones(2, 4)).sum()


# --- tables


@pytest.mark.parametrize('rho', [1e-12, 1e-3, 0.3, 5., 1e5])
def test_tables_lie_between_one_and_the_guests(rho):
    m = torch.tensor([[0., 1., 2., 7., 300.]]).repeat(50, 1)
    t, e = tables(m, torch.full_like(m, rho), seeded()), expected_tables(m, torch.full_like(m, rho))
    for x, slack in (t, 0), (e, 1e-3):
        assert (x[:, 0] == 0).all() and (x[:, 1:] >= 1 - slack).all() and (x <= m*(1 + slack)).all()
    assert torch.equal(t, t.round())
    if rho == 1e-12: assert (t[:, 1:] == 1).all()
    if rho == 1e5: assert (t[:, :4] == m[:, :4]).float().mean() > 0.99


def test_mean_and_law_of_tables():
    m = torch.tensor([[1., 2., 3., 12., 50.]])
    rho = torch.tensor([[0.7, 0.4, 2., 1.3, 0.05]])
    t = tables(m.repeat(40000, 1), rho.repeat(40000, 1), seeded())
    i = torch.arange(50)
    each = torch.where(i < m.T, rho.T/(rho.T + i), 0)  # a guest's chance to open a table
    assert torch.allclose(expected_tables(m, rho)[0], each.sum(1), rtol=1e-4)
    assert torch.allclose(t.mean(0), each.sum(1), atol=0.04) and torch.allclose(t.var(0), (each*(1 - each)).sum(1), atol=0.08)
    r = rho[0, 2].item()  # three guests: Stirling numbers 2, 3, 1
    chance = torch.tensor([2*r, 3*r**2, r**3])/(r*(r + 1)*(r + 2))
    assert torch.allclose(torch.bincount(t[:, 2].long(), minlength=4)[1:]/40000, chance, atol=0.01)


def test_expected_tables_grow_with_fractional_guests():
    m = torch.linspace(0, 10, 101)[None]
    e = expected_tables(m, torch.full_like(m, 0.5))
    assert (e.diff() > 0).all() and e[0, 0] == 0 and e[0, 10] == pytest.approx(1, rel=1e-5)


# --- all of it


def test_same_generator_same_draw():
    counts, phi, theta = case()
    a, b, c = (split_counts(counts, phi, theta, seeded(s)) for s in (3, 3, 4))
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))
    assert torch.equal(tables(a[0], theta, seeded(1)), tables(a[0], theta, seeded(1)))
    torch.manual_seed(5)
    d = split_counts(counts, phi, theta)
    torch.manual_seed(5)
    assert all(map(torch.equal, d, split_counts(counts, phi, theta)))
    u = uniform(1000, phi, seeded())
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1


def test_no_loop_over_tokens_topics_or_documents():
    """As many calls of torch, whatever the size."""
    class Calls(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.n += 1
            return f(*args, **(kwargs or {}))

    def calls(b, v, k):
        counts, phi, theta = case(b, v, k)
        with Calls() as seen:
            m, _ = split_counts(counts, phi, theta, seeded())
            tables(m, theta, seeded())
            expected_tables(expected_counts(counts, phi, theta)[0], theta)
        return seen.n

    assert calls(2, 5, 33) == calls(40, 300, 33) == calls(40, 300, 60) < 150  # six looks each
    assert calls(2, 5, 600) - calls(2, 5, 60) < 40
