"""The Poisson gamma belief network: a sampler that draws what it should, by Geweke's joint test and by brute force; and topics that stay on the simplex."""
import copy
import math

import pytest
import torch
from torch import nn

import jointgen.topics as tp
from jointgen.topics import PGBN, Augmented, gamma_draw, onto, simplex


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def toy(widths=(3, 2), words=5, top=0.8, seed=0):
    model = PGBN(words, widths, top=top)
    model.put([torch.rand(s, generator=seeded(seed + i))**2 + 0.02 for i, s in enumerate(zip((words, *widths), widths))])
    return model


def documents(model, n, seed=0):
    counts = torch.poisson(model.rates(model.draw(n, seeded(seed))[0]), generator=seeded(seed + 1))
    return counts[counts.sum(1) > 0]


# --- the pieces


def test_gamma_draws():
    x = gamma_draw(torch.tensor([0.5, 3.]).repeat(40000, 1), 2., seeded())
    assert torch.allclose(x.mean(0), torch.tensor([0.25, 1.5]), rtol=0.03) and torch.allclose(x.var(0), torch.tensor([0.125, 0.75]), rtol=0.06)
    assert gamma_draw(torch.full((100,), 1e-3), generator=seeded()).min() == pytest.approx(1e-12)
    assert torch.equal(gamma_draw(torch.ones(9), generator=seeded(2)), gamma_draw(torch.ones(9), generator=seeded(2)))


def test_precision_inside_autocast():
    model, theta = toy(), torch.rand(4, 3, generator=seeded())
    counts = documents(model, 20)[:4]
    before = model.rates(theta), model.log_likelihood(counts, model.rates(theta)), model.upward(counts, [theta, theta[:, :2]], expected=True).statistics[0]
    with torch.autocast('cpu', torch.bfloat16):
        during = model.rates(theta), model.log_likelihood(counts, model.rates(theta)), model.upward(counts, [theta, theta[:, :2]], expected=True).statistics[0]
        assert onto(theta.bfloat16(), model.topics[0]).dtype == torch.float32
    assert all(map(torch.equal, before, during))


def test_simplex():
    phi = simplex(torch.tensor([[2., 0.], [2., 5.]]))
    assert torch.allclose(phi, torch.tensor([[0.5, 1e-10], [0.5, 1.]])) and phi.min() > 9e-11
    assert torch.equal(simplex(phi), phi)
    for bad in (torch.tensor([[1., 0.], [1., 0.]]), torch.tensor([[1., -1.], [1., 3.]]), torch.tensor([[1., math.nan], [1., 1.]]), torch.tensor([[1., math.inf], [1., 1.]])):
        with pytest.raises(ValueError, match='topic 1 sums to'):
            simplex(bad)


# --- the network


@pytest.mark.parametrize('widths', [(3, 2), (8, 8), (7, 5, 3), (9, 6, 3, 1)])
def test_shapes(widths):
    model = PGBN(11, widths)
    assert model.widths == widths and [p.shape for p in model.topics] == list(zip((11, *widths), widths)) and model.top == 1/widths[-1]
    assert not list(model.parameters()) and len(list(model.buffers())) == len(widths)
    thetas = model.draw(6, seeded())
    assert [t.shape for t in thetas] == [(6, k) for k in widths] and all((t > 0).all() for t in thetas)
    assert model.shape_of(len(widths) - 1).shape == widths[-1:] and (model.shape_of(len(widths) - 1) == model.top).all()
    for l in range(len(widths)):
        assert model.words_of(l).shape == (11, widths[l]) and torch.allclose(model.words_of(l).sum(0), torch.ones(widths[l]))
        if l: assert torch.allclose(model.shape_of(l - 1, thetas[l]), thetas[l] @ model.topics[l].T)
    assert torch.allclose(model.rates(thetas[0]).sum(1), thetas[0].sum(1), rtol=1e-5)
    counts = documents(model, 50)
    up = model.upward(counts, model.draw(len(counts), seeded()), generator=seeded())
    assert isinstance(up, Augmented) and [m.shape[1] for m in up.topic_counts] == list(widths) and [S.shape for S in up.statistics] == [p.shape for p in model.topics]
    assert torch.equal(up.topic_counts[0].sum(1), counts.sum(1))
    for below, m, S in zip(up.topic_counts, up.topic_counts[1:], up.statistics[1:]):
        assert (m.sum(1) <= below.sum(1)).all() and (m.sum(1) >= (below > 0).sum(1)).all()
        assert torch.equal(S.sum(0), m.sum(0))


def test_start_is_seeded_and_apart_from_the_global_seed():
    a, b, c = PGBN(9, (4, 3)), PGBN(9, (4, 3)), PGBN(9, (4, 3), seed=1)
    assert all(map(torch.equal, a.topics, b.topics)) and not torch.equal(a.topics[0], c.topics[0])
    assert all(torch.allclose(p.sum(0), torch.ones(p.shape[1])) and p.min() > 0 for p in a.topics)
    with torch.device('meta'):
        assert PGBN(9, (4, 3)).widths == (4, 3)


def test_log_likelihood():
    model, counts = toy(), torch.tensor([[0., 1., 0., 2., 5.]])
    rates = torch.rand(1, 5, generator=seeded()) + 0.1
    assert model.log_likelihood(counts, rates).item() == pytest.approx(torch.distributions.Poisson(rates).log_prob(counts).sum().item(), rel=1e-5)
    assert model.log_likelihood(counts, torch.zeros(1, 5)).isfinite().all()
    many = torch.rand(7, 1, 5, generator=seeded()) + 0.1
    assert torch.allclose(model.log_likelihood(counts[None], many)[:, 0], torch.cat([model.log_likelihood(counts, r) for r in many]))
    theta = torch.rand(1, 3, requires_grad=True)
    model.log_likelihood(counts, model.rates(theta)).sum().backward()
    assert theta.grad.isfinite().all() and theta.grad.abs().min() > 0


def test_learned_topics():
    model = PGBN(6, (3, 2), learned=True)
    assert [p.shape for p in model.parameters()] == [(6, 3), (3, 2)] and all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.topics, PGBN(6, (3, 2)).topics))
    thetas = model.draw(4, seeded())
    (model.log_likelihood(torch.ones(4, 6), model.rates(thetas[0])).sum() + model.shape_of(0, thetas[1]).lgamma().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    planted = toy((3, 2), 6).topics
    model.put(planted)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.topics, planted))
    assert [t.shape for t in model.gibbs(torch.ones(2, 6), burn=2, keep=2, generator=seeded())] == [(2, 3), (2, 2)]


def test_stored_with_few_digits():
    model = toy()
    model.put([torch.tensor([1., 1e-9, 0, 0, 0])[:, None].expand(5, 3), model.topics[1]])
    state = {k: v.half() for k, v in model.state_dict().items()}
    assert state['phi1'].min() == 0
    again = nn.ModuleDict(dict(inner=PGBN(5, (3, 2))))
    again.load_state_dict({f'inner.{k}': v for k, v in state.items()})
    for a, b in zip(again['inner'].topics, model.topics):
        assert b.min() > 0 and torch.allclose(a, b, atol=1e-3) and torch.allclose(a.sum(0), torch.ones(a.shape[1])) and a.min() >= 0.99e-10
    exact = PGBN(5, (3, 2))
    exact.load_state_dict(model.state_dict())
    assert all(map(torch.equal, exact.topics, model.topics))
    with pytest.raises(ValueError, match='topic 0 sums to 0'):
        exact.load_state_dict({k: v*0 for k, v in state.items()})
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    assert copied.topics[0].min() > 0 and model.topics[0].data_ptr() != copied.topics[0].data_ptr()


@pytest.mark.parametrize('options, says', [
    (dict(widths=(256,)), '1 topic layer came'), (dict(widths=()), '0 topic layer came'), (dict(widths=(3, 5)), 'do not grow upward'), (dict(widths=(3, 0)), 'widths'),
    (dict(words=1), '1 words came'), (dict(eta=0), 'eta is 0'), (dict(top=-1.), 'top -1')])
def test_bad_networks(options, says):
    with pytest.raises(ValueError, match=says):
        PGBN(options.pop('words', 9), **options)


def test_bad_topics_and_documents():
    model, phi = toy(), toy().topics
    with pytest.raises(ValueError, match='topic 2 sums to 0'):
        model.put([phi[0]*torch.tensor([1., 1., 0.]), phi[1]])
    for bad in phi[:1], [phi[0].T, phi[1]], phi[::-1]:
        with pytest.raises(ValueError, match=r'topics of shapes .* came, \[\(5, 3\), \(3, 2\)\] fit'):
            model.put(bad)
    assert all(map(torch.equal, model.topics, phi))  # refused before anything moved
    for bad, says in (torch.zeros(1, 5), 'document 0 is empty'), (-torch.ones(1, 5), 'a count is -1'), (torch.full((1, 5), 0.5), 'whole numbers'), (torch.ones(1, 4), r'shape \[1, 4\], \[b, 5\] fits'):
        with pytest.raises(ValueError, match=says):
            model.gibbs(bad)
        with pytest.raises(ValueError, match=says):
            model.upward(bad, model.draw(1))
    with pytest.raises(ValueError, match='0 sweeps before and 0 kept'):
        model.gibbs(torch.ones(1, 5), burn=0, keep=0)


# --- the sampler


def joint_z(model, sweep, n=6000, rounds=25):
    """Geweke: pairs drawn forward, and pairs that were redrawn in turns, documents by thetas and thetas by documents; differences of means in standard errors."""
    start, other = model.draw(n, seeded(1)), model.draw(n, seeded(2))
    for i in range(rounds):
        counts = torch.poisson(model.rates(start[0]), generator=seeded(100 + i))
        start = sweep(counts, start, seeded(200 + i))
    told = lambda thetas: torch.cat([f(t) for t in thetas for f in (lambda t: t, torch.sqrt, lambda t: (t + 0.01).log(), lambda t: t.sum(1, True)**2)], 1)
    a, b = told(start), told(other)
    return (a.mean(0) - b.mean(0))/((a.var(0) + b.var(0))/n).sqrt()


def test_geweke():
    model = toy()
    z = joint_z(model, model.sweep)
    assert len(z) == 17 and z.abs().max() < 4 and z.square().mean() < 3, z


def test_geweke_three_layers():
    model = toy((4, 3, 2), top=0.6)
    assert joint_z(model, model.sweep).abs().max() < 4


def test_geweke_sees_mistakes(monkeypatch):
    model = toy()
    with monkeypatch.context() as m:
        m.setattr(tp, 'tables', lambda counts, rho, generator=None: counts)  # each guest a table
        assert joint_z(model, model.sweep).abs().max() > 10
    with monkeypatch.context() as m:
        m.setattr(tp.math, 'log1p', lambda q: q)                             # the same rate on every layer
        assert joint_z(model, model.sweep).abs().max() > 10


def test_posterior_agrees_with_brute_force():
    model, counts = toy(), torch.tensor([[3., 0., 1., 0., 2.], [0., 6., 0., 0., 1.]])
    prior = model.draw(400_000, seeded())
    rates = model.rates(prior[0])
    for i, c in enumerate(counts):
        w = model.log_likelihood(c[None], rates).softmax(0)
        assert 1/w.square().sum() > 1000  # enough draws carry weight
        gibbs = model.gibbs(c.repeat(1000, 1), burn=20, keep=40, generator=seeded(i))
        for theta, mean in zip(prior, gibbs):
            assert torch.allclose((w[:, None]*theta).sum(0), mean.mean(0), atol=0.06)


def test_gibbs_is_told_starts_and_averages():
    model, seen = toy(), []
    counts = documents(model, 30)
    mean = model.gibbs(counts, burn=3, keep=4, generator=seeded(), watch=lambda i, thetas: seen.append((i, [t.clone() for t in thetas])))
    assert [i for i, _ in seen] == list(range(7))
    for l, m in enumerate(mean): assert torch.allclose(m, torch.stack([t[l] for i, t in seen if i >= 3]).mean(0), atol=1e-5)
    last = model.gibbs(counts, burn=7, keep=0, generator=seeded())
    assert all(map(torch.equal, last, seen[-1][1]))
    again = model.gibbs(counts, burn=4, keep=0, thetas=seen[2][1], generator=None)
    assert [a.shape for a in again] == [t.shape for t in last] and all((a >= 1e-12).all() for a in again)
    start = model.draw(len(counts), seeded())
    kept = [t.clone() for t in start]
    model.gibbs(counts, burn=1, keep=1, thetas=start)
    assert all(map(torch.equal, start, kept))
