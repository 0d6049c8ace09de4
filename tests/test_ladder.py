"""The ladder of beliefs: shapes, the downward switch, who gets gradients, finite slopes at the clamps, divergences above zero, bad input."""
import pytest
import torch
from torch import nn

from jointgen.ladder import LadderEncoder, PictureTrunk, Posterior
from jointgen.topics import PGBN
from jointgen.weibull import weibull_kl, weibull_mean

WIDTHS = (12, 6, 4)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def parts(seed=0, b=5, **options):
    torch.manual_seed(seed)
    return LadderEncoder(WIDTHS, d=16, **options), PGBN(20, WIDTHS), torch.randn(b, 16, generator=seeded(seed))


def noise(value=None, b=5): return [torch.rand(b, w, generator=seeded(1)) if value is None else torch.full((b, w), value) for w in WIDTHS]


# --- the trunk


@pytest.mark.parametrize('side, widths', [(32, (8, 12, 16)), (16, (8, 12)), (16, (8, 12, 16)), (64, (4, 8, 12, 16)), (8, (6,))])
def test_trunk_shapes(side, widths):
    torch.manual_seed(0)
    net = PictureTrunk(side, widths, 10, look=3).eval()
    assert net(torch.zeros(2, 3, side, side)).shape == (2, 10)
    assert net.look(net.trunk(torch.zeros(2, 3, side, side))).shape == (2, 12)  # four quadrants


@pytest.mark.parametrize('side, widths', [(24, (4, 8, 16)), (8, (4, 8, 16)), (20, (4, 8))])
def test_trunk_sides_that_do_not_fit(side, widths):
    with pytest.raises(ValueError, match='a multiple of'): PictureTrunk(side, widths)


def test_trunk_sees_black_as_nothing_and_refuses_other_sizes():
    torch.manual_seed(0)
    net = PictureTrunk(16, (4, 8), 10).eval()
    assert (net.trunk(torch.zeros(1, 3, 16, 16)) == 0).all()
    with pytest.raises(ValueError, match=r'\[3, 16, 16\] fits'): net(torch.zeros(1, 3, 8, 8))


def test_trunk_answers_in_float32_under_autocast():
    torch.manual_seed(0)
    net = PictureTrunk(16, (4, 8), 10)
    with torch.autocast('cpu', torch.bfloat16): features = net(torch.zeros(2, 3, 16, 16))
    assert features.dtype == torch.float32


# --- beliefs


@pytest.mark.parametrize('downward', [True, False])
@pytest.mark.parametrize('mean', [True, False])
def test_belief_shapes_and_ranges(downward, mean):
    encoder, pgbn, features = parts(downward=downward)
    belief = encoder(features, pgbn, mean=mean, generator=seeded())
    assert isinstance(belief, Posterior)
    for part in belief: assert [x.shape for x in part] == [(5, w) for w in WIDTHS] and all(x.dtype == torch.float32 for x in part)
    assert all((t > 0).all() for t in belief.thetas) and all(((k >= .1) & (k <= 20)).all() for k in belief.k)
    for theta, k, lam in zip(*belief[:3]):
        if mean: torch.testing.assert_close(weibull_mean(k, lam), theta, rtol=1e-4, atol=1e-6)


def test_prior_shapes_come_from_the_draw_above():
    encoder, pgbn, features = parts()
    belief = encoder(features, pgbn, generator=seeded())
    for l in (0, 1): torch.testing.assert_close(belief.shapes[l], belief.thetas[l + 1] @ pgbn.topics[l + 1].T)
    assert torch.equal(belief.shapes[2], torch.full((5, 4), pgbn.top))


def test_the_downward_switch_adds_the_priors_shape():
    encoder, pgbn, features = parts()
    ladder, u = encoder(features, pgbn, u=noise()), noise()
    encoder.downward = False
    flat = encoder(features, pgbn, u=u)
    assert torch.equal(flat.thetas[2], ladder.thetas[2]) and torch.equal(flat.shapes[1], ladder.shapes[1])
    torch.testing.assert_close(ladder.k[1], (flat.k[1] + ladder.shapes[1]).clamp(.1, 20))
    assert not torch.equal(flat.thetas[0], ladder.thetas[0])


def test_the_same_noise_gives_the_same_draw():
    encoder, pgbn, features = parts()
    one, two = (encoder(features, pgbn, generator=seeded(3)).thetas for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], encoder(features, pgbn, generator=seeded(4)).thetas[0])


def test_under_autocast_nothing_is_rounded():
    encoder, pgbn, features = parts()
    with torch.autocast('cpu', torch.bfloat16): inside = encoder(features, pgbn, u=noise())
    for a, b in zip(inside.thetas, encoder(features, pgbn, u=noise()).thetas): assert torch.equal(a, b)


@pytest.mark.parametrize('end', [0., 1e-7, .5, 1.])
@pytest.mark.parametrize('size', [1., 1e3, -1e3])
def test_slopes_are_finite_at_the_clamps(end, size):
    encoder, pgbn, features = parts()
    belief = encoder(features*size, pgbn, u=noise(end))
    loss = sum(t.sum() for t in belief.thetas) + sum(x.sum() for x in encoder.kl(belief)) - pgbn.log_likelihood(torch.ones(5, 20), pgbn.rates(belief.thetas[0])).sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in encoder.parameters())


def test_start_total_and_hidden_widths():
    encoder, _, features = parts(total=7.)
    for h in encoder.heads: nn.init.zeros_(h.weight)
    for _, m in encoder.upward(features): torch.testing.assert_close(m.sum(1), torch.full((5,), 7.), rtol=1e-4, atol=1e-4)
    assert [u.out_features for u in LadderEncoder(WIDTHS, d=16, hidden=(9, 8, 7)).up] == [9, 8, 7]
    assert [u.out_features for u in LadderEncoder().up] == [256, 128, 64]


# --- divergences


def test_divergences_are_positive_and_closed_form():
    encoder, pgbn, features = parts()
    belief = encoder(features, pgbn, generator=seeded())
    far = encoder.kl(belief)
    assert [x.shape for x in far] == [(5,)]*3 and all((x > 0).all() for x in far)
    one = weibull_kl(belief.k[0], belief.lam[0], belief.shapes[0], torch.ones(5, 12))
    torch.testing.assert_close(far[0], one.sum(1))


def test_a_lower_layers_divergence_teaches_the_layer_above():
    encoder, pgbn, features = parts()
    far = encoder.kl(encoder(features, pgbn, generator=seeded()))
    slopes = torch.autograd.grad(far[0].sum(), [h.weight for h in encoder.heads], allow_unused=True, retain_graph=True)
    assert all(s is not None and s.abs().sum() > 0 for s in slopes)
    top = torch.autograd.grad(far[2].sum(), [h.weight for h in encoder.heads], allow_unused=True)
    assert top[0] is None and top[1] is None and top[2].abs().sum() > 0


def test_learned_topics_hear_of_the_prior_but_not_of_the_ladder():
    torch.manual_seed(0)
    encoder, pgbn = LadderEncoder(WIDTHS, d=16), PGBN(20, WIDTHS, learned=True)
    belief = encoder(torch.randn(5, 16), pgbn, generator=seeded())
    grads = torch.autograd.grad(sum(t.sum() for t in belief.thetas), list(pgbn.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None or (g == 0).all() for g in grads)
    heard = torch.autograd.grad(sum(x.sum() for x in encoder.kl(belief)), list(pgbn.parameters()), allow_unused=True)
    assert heard[0] is None and all(g.abs().sum() > 0 for g in heard[1:])


# --- bad input


@pytest.mark.parametrize('widths', [(24, 48), (12,), (), (4, 0)])
def test_layers_that_grow_or_are_too_few(widths):
    with pytest.raises(ValueError, match='never grow upward'): LadderEncoder(widths)


def test_other_bad_input():
    encoder, pgbn, features = parts()
    with pytest.raises(ValueError, match='16 fits'): encoder(features[:, :9], pgbn)
    with pytest.raises(ValueError, match='build both with the same widths'): encoder(features, PGBN(20, (12, 6)))
    with pytest.raises(ValueError, match='hidden has 1 widths'): LadderEncoder(WIDTHS, hidden=(9,))
    for low, high in ((0., 2.), (3., 2.)):
        with pytest.raises(ValueError, match='0 < low < high'): LadderEncoder(WIDTHS, k_range=(low, high))


# --- together


def test_one_batch_is_learned():
    torch.manual_seed(0)
    encoder, pgbn, features = parts(b=8)
    counts = torch.poisson(torch.rand(8, 20, generator=seeded())*2, generator=seeded())
    optimizer, told = torch.optim.Adam(encoder.parameters(), 1e-2), []
    phi = torch.eye(20, 12)*.9 + .005
    pgbn.put([phi/phi.sum(0), *pgbn.topics[1:]])
    for _ in range(60):
        belief = encoder(features, pgbn, generator=seeded(5))
        likelihood = pgbn.log_likelihood(counts, pgbn.rates(belief.thetas[0])).mean()
        optimizer.zero_grad(); (.01*sum(x.mean() for x in encoder.kl(belief)) - likelihood).backward(); optimizer.step()
        told.append(likelihood.item())
    assert told[-1] > told[0] + 5
