"""Augmentation: identities, agreement of real and made, gradients, and what a vocabulary forbids."""
import pytest
import torch

from jointgen.augmentation import PLACE_WORDS, SIDES, TINTS, DiffAugment, hide_square, move, named, recolor
from jointgen.captions import digit_vocab
from jointgen.pairs import Vocab

FREE = Vocab(['bird', 'with', 'wings'], 8)
ALL = dict(translation=.25, cutout=.4, brightness=.3, saturation=.5, contrast=.5, flip=.5)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0): return torch.rand(*shape, generator=seeded(seed))*2 - 1


def test_nothing_asked_is_nothing_done():
    x = pictures(4, 3, 8, 8)
    assert torch.equal(DiffAugment(FREE, translation=0.)(x), x)
    assert torch.equal(DiffAugment(FREE)(x, torch.full((1, 8), .5)), x)


@pytest.mark.parametrize('name', ALL)
def test_neutral_draws(name):
    """In the middle of its range a shift or a tint does nothing; a flip needs a draw below its chance."""
    x, chances = pictures(4, 3, 8, 8), torch.full((1, 8), .5)
    out = DiffAugment(FREE, **{'translation': 0., name: ALL[name]})(x, chances)
    if name == 'cutout': assert (out == 0).any() and torch.equal(out[out != 0], x[out != 0])
    else: assert torch.allclose(out, x, atol=1e-6)


@pytest.mark.parametrize('shape', [(5, 3, 32, 32), (5, 3, 9, 13), (1, 1, 4, 4), (0, 3, 8, 8)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_type(shape, dtype):
    out = DiffAugment(FREE, **ALL)(pictures(*shape).to(dtype))
    assert out.shape == shape and out.dtype == dtype and out.isfinite().all()


def test_one_draw_for_real_and_made():
    augment, real = DiffAugment(FREE, **ALL), pictures(6, 3, 16, 16)
    for n in (1, 6):
        chances = augment.draw(n, generator=seeded())
        assert torch.equal(augment(real, chances), augment(real.clone(), chances))
        assert torch.equal(augment(real, chances)[2:4], augment(real[2:4], chances[2:4] if n == 6 else chances))
    assert torch.equal(augment(real, generator=seeded(1)), augment(real, generator=seeded(1)))
    assert not torch.equal(augment(real, generator=seeded(1)), augment(real, generator=seeded(2)))
    same = augment(real[:1].expand(6, -1, -1, -1), augment.draw(1))
    assert torch.equal(same, same[:1].expand_as(same))
    with pytest.raises(ValueError, match='4 draws came with 6'): augment(real, augment.draw(4))


def test_move_by_hand():
    x = torch.arange(16.).view(1, 1, 4, 4)
    still = torch.tensor([False])
    down = move(x, torch.tensor([[.25], [0.]]), still)[0, 0]
    assert torch.equal(down[1:], x[0, 0, :3]) and torch.equal(down[0], x[0, 0, 0])  # the border repeats
    right = move(x, torch.tensor([[0.], [.5]]), still)[0, 0]
    assert torch.equal(right[:, 2:], x[0, 0, :, :2])
    assert torch.equal(move(x, torch.zeros(2, 1), ~still), x.flip(3))


@pytest.mark.parametrize('seed', range(5))
def test_shift_stays_within_its_bound(seed):
    x = torch.full((64, 1, 33, 33), -1.)
    x[:, :, 16, 16] = 1
    at = (DiffAugment(FREE, translation=.25)(x, generator=seeded(seed))[:, 0] == 1).nonzero()
    assert len(at) == 64 and (at[:, 1:] - 16).abs().max() <= 8 and (at[:, 1:] - 16).abs().max() >= 6


def test_hidden_square_by_hand():
    x = torch.ones(1, 2, 8, 8)
    out = hide_square(x, torch.tensor([[.5], [.25]]), .25)
    assert (out == 0).sum() == 2*4 and (out[0, :, 3:5, 1:3] == 0).all()


def test_colors_by_hand():
    x, u = pictures(2, 3, 4, 4), torch.ones(3, 2)
    none = dict(brightness=0, saturation=0, contrast=0)
    assert torch.allclose(recolor(x, u, none | dict(brightness=.2)), x + .2)
    assert torch.allclose(recolor(x, 0*u, none | dict(saturation=1)), x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    assert torch.allclose(recolor(x, 0*u, none | dict(contrast=1)).std((1, 2, 3)), x.std((1, 2, 3))/2)


def test_gradients():
    augment = DiffAugment(FREE, **ALL)
    chances = augment.draw(2, generator=seeded())
    x = pictures(2, 3, 5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, chances), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, chances).square(), x)


def test_what_captions_forbid():
    v = digit_vocab()
    for name in ('flip', 'brightness', 'saturation', 'contrast'):
        with pytest.raises(ValueError, match=f'{name} is 0.1'): DiffAugment(v, **{name: .1})
    with pytest.raises(ValueError, match='bottom, left'): DiffAugment(v, translation=.3)
    with pytest.raises(ValueError, match='cutout'): DiffAugment(v, cutout=.5)
    DiffAugment(v, translation=.2, cutout=.4)
    for caption, option in (('a reddish bird', 'saturation'), ('a dark-red bird', 'contrast'), ('a bird at left', 'flip'), ('a pale bird', 'brightness')):
        with pytest.raises(ValueError, match='captions name'): DiffAugment(Vocab.from_captions([caption]), **{option: .2})
    DiffAugment(Vocab.from_captions(['a bird left the nest']), flip=.5, allow=['left'])
    with pytest.raises(ValueError, match='a share'): DiffAugment(FREE, flip=2.)
    assert named(v, TINTS) == ['blue', 'green', 'red', 'white'] and named(v, SIDES) == ['left', 'right'] and SIDES < PLACE_WORDS
