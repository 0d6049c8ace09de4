"""Blocks of a one-stage game: modulations begin as nothing, blocks keep shapes at every size, the judge's switches are real, stillness ends."""
import pytest
import torch
from torch.nn import functional as F

from jointgen.digits import captioned_digits
from jointgen.game_blocks import DownBlock, Look, ModulatedGenerator, Modulations, TwoBranches, UpBlock, halvings, readable, still

PAPER = (256, 256, 256, 256, 128, 64, 32)
size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731


@pytest.mark.parametrize('hidden', [0, 7])
def test_modulations_begin_as_nothing(hidden):
    torch.manual_seed(0)
    m = Modulations([3, 5, 5], 4, hidden)
    parts = m(torch.randn(2, 4))
    assert [s.shape[1] for s, _ in parts] == [3, 5, 5]
    for scale, shift in parts: assert (scale == 1).all() and (shift == 0).all()
    sum(s.sum() + b.sum() for s, b in parts).backward()
    last = m.heads[0] if hidden else m.heads[0][-1]
    assert last.bias.grad.any()  # it will not stay so


@pytest.mark.parametrize('hidden', [0, 7])
def test_modulations_hear_their_own_row(hidden):
    torch.manual_seed(0)
    m = Modulations([3], 4, hidden)
    for p in m.parameters(): torch.nn.init.normal_(p)
    y = torch.randn(3, 4)
    (scale, shift), (one, two) = m(y)[0], m(y[1:2])[0]
    assert torch.allclose(scale[1:2], one, atol=1e-5) and torch.allclose(shift[1:2], two, atol=1e-5) and not torch.allclose(scale[0], scale[1])


@pytest.mark.parametrize('norm', [None, 'cbn'])
@pytest.mark.parametrize('widths', [(4, 4), (6, 3)])
def test_up_block_is_what_the_long_way_gives(norm, widths):
    "Doubling after what acts on each pixel alone changes nothing."
    torch.manual_seed(0)
    a, b = widths
    block = UpBlock(a, b, 5, hidden=8, norm=norm)
    for p in block.modulations.parameters(): torch.nn.init.normal_(p, std=.3)
    h, y = torch.randn(4, a, 3, 3), torch.randn(4, 5)
    parts, up = block.modulations(y), F.interpolate(h, scale_factor=2)
    def fuse(x, i):
        for j in (i, i + 1):
            if norm: x = F.batch_norm(x, None, None, training=True)
            x = F.leaky_relu(x*parts[j][0] + parts[j][1], .2)
        return x
    long = block.conv2(fuse(block.conv1(fuse(up, 0)), 2)) + block.shortcut(up)
    assert torch.allclose(block(h, y), long, atol=1e-4)


def test_down_block_opens_its_gate():
    torch.manual_seed(0)
    shut, wide = DownBlock(4, 4), DownBlock(4, 6, gate=1., norm=True)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(shut(x), F.avg_pool2d(x, 2)) and wide(x).shape == (2, 6, 4, 4)
    shut(x).square().sum().backward()
    assert shut.gate.grad.abs() > 0 and not shut.main[0].weight.grad.any()  # the gate moves first


@pytest.mark.parametrize('side, n', [(8, 1), (16, 2), (32, 3), (256, 6)])
def test_every_side(side, n):
    torch.manual_seed(0)
    assert halvings(side, [4]*(n + 1)) == n
    if side > 32: return
    g, d = ModulatedGenerator(side, noise=3, condition=2, widths=[4]*(n + 1), hidden=4), TwoBranches(side, d_text=5, widths=[4]*(n + 1), branch=4, text='tile', tile=None, contrast=6)
    x = g(torch.randn(2, 3), torch.randn(2, 2))
    look = d.look(x)
    assert x.shape == (2, 3, side, side) and look.grid.shape == (2, 4, 4, 4) and look.regions.shape == (2, 4, 8, 8)
    text = torch.randn(2, 5)
    assert d.pair(look, text).shape == (2,) and d.unaware(look)['patch'].shape == (2, 5, 5) and d.unaware(look)['uncond'].shape == (2,)
    assert d.picture_vector(look).shape == d.text_vector(text).shape == (2, 6)


@pytest.mark.parametrize('side, widths', [(4, (4,)), (24, (4,)*4), (33, (4,)*4), (32, (4,)*3), (32, (4, 4, 4, 0)), (32, (4,)*5)])
@pytest.mark.parametrize('net', [ModulatedGenerator, TwoBranches])
def test_sizes_that_make_no_net(side, widths, net):
    with pytest.raises(ValueError, match='resize the pictures|of them fit'): net(side, widths=widths)


def test_switches():
    torch.manual_seed(0)
    small = dict(widths=(4, 4, 4, 4), d_text=6, branch=4, contrast=4)
    with pytest.raises(ValueError, match="'cbn'"): UpBlock(2, 2, 2, norm='batch')
    assert TwoBranches(**small, uncond=False, patch=False).unaware(Look(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 8, 8))) == {}
    assert list(TwoBranches(**small, patch=False).unaware(Look(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 8, 8)))) == ['uncond']
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in TwoBranches(**small, norm=True).modules()) == 7
    image, text = torch.randn(2, 3, 32, 32), torch.randn(2, 6)
    d = TwoBranches(**small, projection=True)
    look = d.look(image)
    plain = TwoBranches(**small)
    plain.load_state_dict({k: v for k, v in d.state_dict().items() if 'project' not in k})
    assert torch.allclose(d.pair(look, text), plain.pair(look, text) + (look.grid.sum((2, 3))*d.project(text)).sum(1)/4, atol=1e-5)
    with pytest.raises(ValueError, match="'map' or 'tile'"): TwoBranches(**small, text='film')
    tiled = TwoBranches(**small, text='tile', tile=3)
    assert tiled.pair(tiled.look(image), text).shape == (2,) and tiled.joint[0].in_channels == 4 + 3 and plain.joint[0].in_channels == 4 + 4
    noise, other = torch.randn(2, 32), torch.randn(2, 64)
    for seed in (False, True):  # before the modulations have learned, only the seed tells
        g = ModulatedGenerator(seed=seed)
        assert torch.allclose(g(noise, other), g(noise, other + 1)) == (not seed)
    for tanh in (False, True):
        g = ModulatedGenerator(tanh=tanh)
        with torch.no_grad(): g.rgb.weight.mul_(1000)
        assert (g(torch.randn(2, 32), torch.randn(2, 64)).abs().max() <= 1) == tanh


def test_the_papers_sizes():
    g, d = ModulatedGenerator(256, noise=100, condition=256, widths=PAPER, hidden=0, seed=False), TwoBranches(256, d_text=256, widths=PAPER[::-1], text='tile', tile=None, contrast=256)
    assert abs(size(g)/1e6 - 9.7) < .1 and abs(size(d) - size(d.seen) - size(d.said) - 6.6e6) < .2e6
    with torch.no_grad():
        x = g(torch.randn(1, 100), torch.randn(1, 256))
        assert x.shape == (1, 3, 256, 256) and d.look(x).grid.shape == (1, 256, 4, 4)


def test_still_ends_even_after_an_error():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError), still(net): raise RuntimeError
    with still(net): y = net(x)
    y.sum().backward()
    assert x.grad.any() and all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    with still(): pass


def test_captions_that_cannot_be_read():
    pairs = captioned_digits(3).pairs
    assert readable(pairs.tokens, pairs.vocab) is pairs.tokens
    with pytest.raises(ValueError, match='no known word'): readable(torch.tensor([[1, 4, 2, 0]]), pairs.vocab)
    with pytest.raises(ValueError, match='at most'): readable(torch.full((1, pairs.vocab.max_len + 1), 7), pairs.vocab)
