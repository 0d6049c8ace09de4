"""Topics that move: on the simplex after any number of steps, with the noise they claim, resting where Bayes says, and finding what was planted."""
import math
from itertools import permutations

import pytest
import torch
from torch import nn

from jointgen.topic_learning import TopicSampler, langevin_step, step_sizes
from jointgen.topics import PGBN


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def columns(v, k, seed=0, power=2):
    x = torch.rand(v, k, generator=seeded(seed))**power + 1e-4
    return x/x.sum(0)


def on_simplex(phi): return (phi.sum(0) - 1).abs().max() < 1e-5 and phi.min() >= 0.999e-10


# --- one step


def test_step_sizes():
    assert step_sizes(1) == (1., 1.)
    epsilon, f = zip(*map(step_sizes, range(1, 5000)))
    assert all(a > b for x in (epsilon, f) for a, b in zip(x, x[1:])) and epsilon[-1] < 0.03 and f[-1] < 0.004
    assert epsilon[20] == pytest.approx((41/21)**-0.7) and f[9] == pytest.approx(10**-0.7)
    with pytest.raises(ValueError, match='step 0 came'):
        step_sizes(0)


def test_drift():
    phi, S = columns(5, 3), torch.rand(5, 3, generator=seeded(1))
    new, mass = langevin_step(phi, torch.zeros(3), S, scale=7, sizes=(0.3, 1.), eta=0.2, noise=False)
    assert torch.allclose(mass, S.sum(0))
    want = phi + 0.3/(7*mass)*((7*S + 0.2) - (7*S.sum(0) + 0.2*5)*phi)  # as the equation is written
    assert torch.allclose(new, want, atol=1e-5) and on_simplex(new)
    rest = (7*S + 0.2)/(7*S + 0.2).sum(0)
    assert torch.allclose(langevin_step(rest, mass, S, scale=7, sizes=(0.3, 0.5), eta=0.2, noise=False)[0], rest, atol=1e-6)


def test_mass_remembers():
    S = torch.tensor([[1., 0.], [3., 2.]])
    _, mass = langevin_step(columns(2, 2), torch.tensor([10., 1.]), S, scale=5, sizes=(0.1, 0.25))
    assert torch.allclose(mass, torch.tensor([8.5, 1.25]))


def test_covariance_of_the_projected_noise():
    p, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), 100_000
    phi, rest = p[:, None].expand(4, n).contiguous(), 1000*p[:, None].expand(4, n)
    new, mass = langevin_step(phi, torch.full((n,), 1000.), rest, scale=1., sizes=(0.01, 0.), eta=1e-9, generator=seeded())
    want = 2*0.01/1000*(torch.diag(p) - torch.outer(p, p))
    got = torch.cov(new)
    assert new.min() > 1e-3 and torch.allclose(got, want, rtol=0.03, atol=want.diagonal().mean()*0.01)
    assert torch.allclose(new.mean(1), p, atol=1e-4) and (got.sum(0).abs() < 1e-9).all()


def test_the_walk_rests_in_the_dirichlet():
    a, n = torch.tensor([6., 3., 1.5]), 4000
    phi, S = torch.full((3, n), 1/3), (a - 0.5)[:, None].expand(3, n)
    g, mass = seeded(), torch.zeros(n)
    for _ in range(400): phi, mass = langevin_step(phi, mass, S, scale=1., sizes=(0.02, 1.), eta=0.5, generator=g)
    law = torch.distributions.Dirichlet(a)
    assert torch.allclose(phi.mean(1), law.mean, atol=0.01) and torch.allclose(phi.var(1), law.variance, rtol=0.12)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('scale', [1e-3, 1, 1e4])
def test_columns_stay_on_the_simplex(seed, scale):
    g = seeded(seed)
    phi, mass = columns(30, 8, seed), torch.zeros(8)
    for i in range(1, 60):
        S = torch.poisson(10*columns(30, 8, seed + i, power=30), generator=g)*(torch.rand(8, generator=g) < 0.5)  # half of the topics are silent
        phi, mass = langevin_step(phi, mass, S, scale=scale, sizes=step_sizes(i), eta=0.1, generator=g)
        assert on_simplex(phi) and mass.isfinite().all()


def test_silent_topics_follow_their_prior():
    phi, mass = columns(6, 2000), torch.zeros(2000)
    g = seeded()
    for i in range(1, 200): phi, mass = langevin_step(phi, mass, torch.zeros(6, 2000), scale=100, sizes=(0.1, 0.5), eta=1., generator=g)
    assert on_simplex(phi) and torch.allclose(phi.mean(1), torch.full((6,), 1/6), atol=0.02)


# --- all layers


def planted(words=24, widths=(6, 3), n=1500, seed=0):
    """Blocks of words, pairs of blocks, and documents made of them."""
    truth = PGBN(words, widths, top=0.5)
    truth.put([torch.block_diag(*[torch.ones(words//widths[0], 1)]*widths[0]) + 0.002, torch.block_diag(*[torch.ones(widths[0]//widths[1], 1)]*widths[1]) + 0.002])
    theta = truth.draw(n, seeded(seed))
    return truth, torch.poisson(6*truth.rates(theta[0]), generator=seeded(seed + 1))


def learn(model, sampler, counts, steps, batch=100, seed=3):
    g = seeded(seed)
    for _ in range(steps):
        c = counts[torch.randint(len(counts), (batch,), generator=g)]
        thetas = model.gibbs(c, burn=8, keep=0, generator=g)
        sampler.update(c, thetas, scale=len(counts)/batch, generator=g)


def matched(a, b):
    """Mean cosine of columns in their best order."""
    table = (a/a.norm(dim=0)).T @ (b/b.norm(dim=0))
    return max((table[torch.tensor(p), torch.arange(len(p))].mean().item() for p in permutations(range(len(table)))))


@pytest.mark.parametrize('mode', ['mcmc', 'expected'])
def test_planted_topics_are_found(mode):
    truth, counts = planted()
    counts = counts[counts.sum(1) > 0]
    model = PGBN(24, (6, 3), top=0.5, eta=0.1)
    sampler, before = TopicSampler(model, mode=mode), matched(model.topics[0], truth.topics[0])
    learn(model, sampler, counts, 150)
    assert before < 0.6 and matched(model.topics[0], truth.topics[0]) > 0.9, (before, matched(model.topics[0], truth.topics[0]))
    assert all(map(on_simplex, model.topics)) and int(sampler.steps) == 150


def test_updates_are_in_place_seeded_and_saved():
    _, counts = planted(n=200)
    counts = counts[counts.sum(1) > 0]
    runs = []
    for seed in 1, 1, 2:
        model = PGBN(24, (6, 3))
        sampler, where = TopicSampler(model), [p.data_ptr() for p in model.topics]
        for _ in range(5): sampler.update(counts, model.draw(len(counts), seeded(seed)), scale=10, generator=seeded(seed))
        assert where == [p.data_ptr() for p in model.topics]
        runs.append((model, sampler))
    assert all(map(torch.equal, runs[0][0].topics, runs[1][0].topics)) and not torch.equal(runs[0][0].topics[0], runs[2][0].topics[0])
    whole = nn.ModuleDict(dict(pgbn=runs[0][0], sampler=runs[0][1]))
    assert sorted(whole.state_dict()) == ['pgbn.phi1', 'pgbn.phi2', 'sampler.mass1', 'sampler.mass2', 'sampler.steps'] and not list(whole.parameters())
    model = PGBN(24, (6, 3), seed=9)
    again = nn.ModuleDict(dict(pgbn=model, sampler=TopicSampler(model)))
    again.load_state_dict(whole.state_dict())
    for m in whole, again: m['sampler'].update(counts, m['pgbn'].draw(len(counts), seeded(4)), scale=10, generator=seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values())) and int(again['sampler'].steps) == 6
    assert all(v.half().isfinite().all() for v in whole.state_dict().values())


def test_thetas_with_a_gradient_are_welcome():
    model = PGBN(4, (3, 2))
    thetas = [t.requires_grad_() for t in model.draw(5, seeded())]
    TopicSampler(model).update(torch.ones(5, 4), thetas, scale=1)
    assert not any(p.requires_grad for p in model.topics) and thetas[0].grad is None


def test_learned_topics_are_left_alone():
    model = PGBN(4, (3, 2), learned=True)
    sampler, before = TopicSampler(model, mode='adam'), [p.clone() for p in model.logits]
    sampler.update(torch.ones(5, 4), model.draw(5), scale=1)
    assert all(map(torch.equal, before, model.logits)) and int(sampler.steps) == 0


def test_bad_samplers():
    with pytest.raises(ValueError, match="learned by 'sgd', 'mcmc'"):
        TopicSampler(PGBN(4, (3, 2)), mode='sgd')
    for learned, mode in (False, 'adam'), (True, 'mcmc'), (True, 'expected'):
        with pytest.raises(ValueError, match=f'learned={learned} do not learn'):
            TopicSampler(PGBN(4, (3, 2), learned=learned), mode=mode)
    for scale in 0, -1, math.nan:
        with pytest.raises(ValueError, match='scale is'):
            TopicSampler(PGBN(4, (3, 2))).update(torch.ones(1, 4), [torch.ones(1, 3), torch.ones(1, 2)], scale=scale)
