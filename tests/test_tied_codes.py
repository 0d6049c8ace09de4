"""Codes with fixed noise: what they cost, what ties them, batches with missing sides."""
import math

import pytest
import torch

from jointgen.change_of_variables import shaken
from jointgen.digits import captioned_digits
from jointgen.flows import conditional_flow
from jointgen.tied_codes import Codes, Mixed, Same, kl_nats, make_link, make_prior, noisy


def test_noise_has_the_width_it_says():
    torch.manual_seed(0)
    codes = Codes(torch.zeros(4000, 3), torch.ones(4000, 2), torch.tensor([math.log(.1), math.log(.5)]).expand(4000, 2))
    s, z = noisy(codes, .3)
    assert torch.allclose(s.std(0), torch.full((3,), .3), atol=.02) and torch.allclose(z.std(0), torch.tensor([.1, .5]), atol=.02)


@pytest.mark.parametrize('mean, std', [(0., 1.), (1., .3), (-2., .05)])
def test_kl_of_a_gaussian_prior_is_the_closed_form(mean, std):
    torch.manual_seed(0)
    prior, s = make_prior('gaussian', 2, 3, hidden=4), torch.zeros(20_000, 3)  # at its start N(0, 1)
    codes = Codes(s, torch.full((20_000, 2), mean), torch.full((20_000, 2), math.log(std)))
    with torch.no_grad(): drawn = kl_nats(prior, noisy(codes, 0.)[1], codes.log_std, s).mean().item()
    assert abs(drawn - 2*(.5*(std**2 + mean**2 - 1) - math.log(std))) < .05


def test_contracting_scales_have_a_floor():
    torch.manual_seed(0)
    flow, base_std, d = conditional_flow(4, 2, steps=2, hidden=8, bound='sigmoid', base_std=.25), .25, 4
    for std in (.02, .05, .1):
        for spread in (0., .3):
            prior, s = shaken(flow, spread).float(), torch.randn(4000, 2)
            with torch.no_grad(): cost = kl_nats(prior, std*torch.randn(4000, d), torch.full((4000, d), math.log(std)), s).mean().item()
            assert cost > d*(math.log(base_std/std) - .5) - .05


@pytest.mark.parametrize('kind', ['affine', 'additive', 'identity'])
@pytest.mark.parametrize('steps, d', [(1, 2), (3, 6), (4, 16)])
def test_links(kind, steps, d):
    x, link = torch.randn(5, d), make_link(kind, d, steps=steps, hidden=8)
    y, logdet = link(x)
    assert torch.equal(y, x) and (logdet == 0).all()  # the identity at its start, numbers in their places
    if kind == 'identity': return
    wild = shaken(link, .3)
    y, logdet = wild(x.double())
    back, undone = wild.inverse(y)
    assert torch.allclose(back, x.double(), atol=1e-9) and torch.allclose(logdet, -undone, atol=1e-9) and not torch.allclose(y, x.double())
    assert (logdet == 0).all() == (kind == 'additive')


def test_names_and_widths():
    with pytest.raises(ValueError, match="use 'affine'"): make_link('linear', 4)
    with pytest.raises(ValueError, match="use 'flow'"): make_prior('normal', 4, 4)
    with pytest.raises(ValueError, match='even width'): make_link('affine', 5)
    assert make_prior('flow', 0, 4) is None and make_prior('gaussian', 0, 4) is None
    assert torch.equal(kl_nats(None, torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3, 4)), torch.zeros(3))
    assert isinstance(make_link('identity', 3), Same)


def test_batches_with_missing_sides():
    pairs = captioned_digits(6).pairs
    for parts, n in (((pairs, None, None), 6), ((None, pairs.image, None), 6), ((None, None, pairs.tokens[:2]), 2), ((pairs[:1], pairs.image[:2], pairs.tokens), 9)):
        assert len(Mixed(*parts)) == n == len(Mixed(*parts).to('cpu'))
    for nothing in ((), (pairs[:0],), (None, pairs.image[:0], pairs.tokens[:0])):
        with pytest.raises(ValueError, match='neither pairs, nor pictures, nor captions'): Mixed(*nothing)
