"""Nets of nested games: sizes at every scale, gradients from every side output, maps of R x R patches, and the published sizes."""
import pytest
import torch
from torch import nn

from jointgen.game_nets import (GrownGenerator, Judged, NestedDiscriminator, NestedGenerator, NormedResBlock, SideOutput, check_scales, conv, down, start_normal_,
    stretch, trunk)

TINY = dict(widths=(8, 6, 4), condition=5, noise=3)
count = lambda net: sum(p.numel() for p in net.parameters())


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def sentences(n=4, d=7): return torch.randn(n, d, generator=seeded())


# --- scales


@pytest.mark.parametrize('scales, side', [((8,), 8), ((8, 16, 32), 32), ((8, 32), 32), ([64, 128, 256], 256), ((512,), 512)])
def test_scales_that_fit(scales, side): assert check_scales(scales, side) == tuple(scales)


@pytest.mark.parametrize('scales', [(), (8, 12, 24), (4, 8), (16, 8), (8, 8), (8., 16.), (0, 8)])
def test_scales_that_do_not_double(scales):
    with pytest.raises(ValueError, match='must double'): check_scales(scales, 32)


def test_scales_must_end_at_the_side():
    with pytest.raises(ValueError, match='is 16, 32 fits'): check_scales((8, 16), 32)


# --- generator


@pytest.mark.parametrize('changes', [{}, dict(blocks=2), dict(padding='reflect'), dict(output='tanh'), dict(activation='leaky')], ids=str)
@pytest.mark.parametrize('scales', [(16,), (8, 16)])
def test_generator_shapes(scales, changes):
    torch.manual_seed(0)
    net = NestedGenerator(7, scales, **TINY, **changes)
    painted = net(sentences())
    assert [tuple(x.shape) for x in painted.images] == [(4, 3, s, s) for s in scales] and painted.features.shape == (4, 4, 16, 16)
    assert painted.condition.c.shape == (4, 5) and all(x.dtype == torch.float32 for x in painted.images)
    if changes.get('output') == 'tanh': assert all(x.abs().max() <= 1 for x in painted.images)


def test_both_noises_can_be_held():
    torch.manual_seed(0)
    net, said = NestedGenerator(7, (8, 16), **TINY).eval(), sentences()
    z, e = torch.randn(4, 3), torch.randn(4, 5)
    with torch.no_grad():
        held = [net(said, z, e).images[-1] for _ in range(2)]
        assert torch.equal(*held)
        assert not torch.equal(net(said, z).images[-1], held[0]) and not torch.equal(net(said, None, e).images[-1], held[0])
        assert torch.equal(net(said, generator=seeded()).images[-1], net(said, generator=seeded()).images[-1])


@pytest.mark.parametrize('at', [0, 1, 2])
def test_each_side_output_alone_reaches_the_first_layer(at):
    torch.manual_seed(0)
    net = NestedGenerator(7, (8, 16, 32), **TINY | dict(widths=(8, 6, 4, 4)))
    net(sentences()).images[at].square().mean().backward()
    assert net.start.weight.grad.abs().sum() > 0 and net.augment.head.weight.grad.abs().sum() > 0
    heads = [h.head.weight.grad is not None for h in net.heads.values()]
    assert heads == [i == at for i in range(3)]


def test_generator_bad_sizes():
    with pytest.raises(ValueError, match='3 widths lead to 16 px'): NestedGenerator(7, (8, 32), **TINY)
    with pytest.raises(ValueError, match="'linear' or 'tanh'"): NestedGenerator(7, (8, 16), **TINY, output='sigmoid')
    with pytest.raises(ValueError, match='7 fits'): NestedGenerator(7, (8, 16), **TINY)(sentences(d=8))
    with pytest.raises(ValueError, match='noise is'): NestedGenerator(7, (8, 16), **TINY)(sentences(), torch.zeros(4, 2))


def test_blocks():
    x = torch.randn(2, 6, 4, 4, generator=seeded())
    block = NormedResBlock(6)
    nn.init.zeros_(block.net[-1].weight)
    assert torch.equal(block(x), x)
    assert torch.equal(stretch(6, 6)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3)) and stretch(6, 3)(x).shape == (2, 3, 8, 8)
    assert conv(3, 4, 'reflect')(x[:, :3]).shape == (2, 4, 4, 4) and down(6, 2)(x).shape == (2, 2, 2, 2)
    dark = SideOutput(6)
    nn.init.zeros_(dark.head.weight), nn.init.zeros_(dark.head.bias)
    assert (dark(x) == -1).all()


# --- one more stage


def test_a_grown_generator_keeps_its_base():
    torch.manual_seed(0)
    base = NestedGenerator(7, (8, 16), **TINY)
    net = GrownGenerator(base, 2, blocks=1).train()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    painted = net(sentences())
    assert [x.shape[-1] for x in painted.images] == [8, 16, 32] and net.widths == (8, 6, 4, 2) and net.noise == 3
    painted.images[-1].square().mean().backward()
    assert net.training and not base.training and all(p.grad is None for p in base.parameters())
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())  # nor do the batch norms move
    assert all(p.grad is not None for p in [*net.stage.parameters(), *net.head.parameters()])


# --- discriminators


@pytest.mark.parametrize('valid, kernel', [(False, 4), (True, 3)])
@pytest.mark.parametrize('patches', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('side', [8, 16, 32, 64])
def test_trunk_and_branches(side, patches, valid, kernel):
    torch.manual_seed(0)
    net = NestedDiscriminator(side, 7, patches=patches, width=16, text_width=5, kernel=kernel, valid=valid).eval()
    image = torch.rand(2, 3, side, side, generator=seeded())*2 - 1
    assert net.trunk(image).shape == (2, 16, patches + 3, patches + 3)
    seen = net(image)
    assert isinstance(seen, Judged) and seen.local.shape == (2, patches, patches) and seen.features.shape == (2, 16, 4, 4)
    assert net.match(seen.features, sentences(2)).shape == (2,)


@pytest.mark.parametrize('text', ['tile', 'map'])
def test_only_the_match_hears_the_sentence(text):
    torch.manual_seed(0)
    net = NestedDiscriminator(16, 7, width=16, text=text).eval()
    image = torch.rand(4, 3, 16, 16, generator=seeded()).mul(2).sub(1).requires_grad_()
    said = sentences().requires_grad_()
    seen = net(image)
    assert torch.autograd.grad(seen.local.sum(), [image, said], allow_unused=True, retain_graph=True)[1] is None
    slopes = torch.autograd.grad(net.match(seen.features, said).sum(), [image, said])
    assert all(s.abs().sum() > 0 for s in slopes)


def test_black_is_nothing_inside():
    torch.manual_seed(0)
    net = trunk(16, 16, 1, valid=True)
    assert net[0][0].bias is not None and net[1][0].bias is None and not any(isinstance(m, nn.BatchNorm2d) for m in net[0])
    d = NestedDiscriminator(16, 7)
    for m in d.trunk.modules():
        if getattr(m, 'bias', None) is not None: nn.init.zeros_(m.bias)
    d.eval()
    assert (d(-torch.ones(1, 3, 16, 16)).features == 0).all()


def test_discriminator_bad_input():
    for r in (0, 6):
        with pytest.raises(ValueError, match=f'R is {r}'): NestedDiscriminator(32, 7, patches=r)
    with pytest.raises(ValueError, match="'tile' or 'map'"): NestedDiscriminator(32, 7, text='film')
    net = NestedDiscriminator(16, 7)
    with pytest.raises(ValueError, match=r'\[3, 16, 16\] fits'): net(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match='7 fits'): net.match(net(torch.zeros(2, 3, 16, 16)).features, sentences(2, 8))


# --- published sizes


def test_published_sizes():
    with torch.device('meta'):
        net = NestedGenerator(1024, (64, 128, 256), widths=(1024, 512, 512, 256, 256, 128, 64), condition=128, noise=100)
        judges = [NestedDiscriminator(s, 1024, patches=r, width=512, text_width=128, kernel=3, valid=True) for s, r in ((64, 1), (128, 1), (256, 5))]
    assert abs(count(net)/1e6 - 41.4) < .1
    assert [round(count(d)/1e6, 1) for d in judges] == [8.5, 8.6, 8.6]
    assert [m.out_channels for m in judges[2].trunk.modules() if isinstance(m, nn.Conv2d)] == [32, 64, 128, 256, 512]


def test_start_normal():
    torch.manual_seed(0)
    net = NestedGenerator(64, (8, 16), widths=(64, 48, 32))
    start_normal_(net, .02)
    weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d)])
    scales = torch.cat([m.weight for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))])
    assert abs(weights.std() - .02) < 1e-3 and abs(scales.mean() - 1) < 2e-3 and abs(scales.std() - .02) < 2e-3
