import pytest
import torch
from torch.nn import functional as F

from jointgen.image_nets import ImageDecoder, ImageEncoder, ResBlock, image_pyramid

PAPER = dict(widths=(64, 128, 256), d=128, res_blocks=6)


def parameters(model): return sum(p.numel() for p in model.parameters())


def test_res_block_keeps_its_input():
    torch.manual_seed(0)
    block, x = ResBlock(5), torch.randn(2, 5, 7, 3)
    before = x.clone()
    y = block(x)
    assert torch.equal(x, before)
    torch.nn.init.zeros_(block.conv1.weight)
    assert torch.equal(block(x), x)  # without a correction the block is the identity, negative values included
    assert not torch.equal(y, x)


@pytest.mark.parametrize('widths', [(8,), (8, 12), (8, 12, 16)])
@pytest.mark.parametrize('res_blocks', [0, 1, 3])
@pytest.mark.parametrize('h,w', [(16, 16), (32, 16)])
def test_decoder_mirrors_encoder(widths, res_blocks, h, w):
    torch.manual_seed(0)
    encoder, decoder = (net(widths, 10, res_blocks=res_blocks, channels=2) for net in (ImageEncoder, ImageDecoder))
    x = torch.randn(3, 2, h, w)
    z = encoder(x)
    assert z.shape == (3, 10, h//2**len(widths), w//2**len(widths))
    y = decoder(z)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for net in (encoder, decoder) for p in net.parameters())


def test_rows_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    encoder, decoder, x = ImageEncoder(), ImageDecoder(), torch.randn(4, 3, 32, 32)
    y = decoder(encoder(x))
    assert torch.allclose(decoder(encoder(x[2:3])), y[2:3], atol=1e-5)


def test_paper_sizes():
    assert round(parameters(ImageEncoder(**PAPER))/1e6, 2) == 5.21
    assert round(parameters(ImageDecoder(**PAPER))/1e6, 2) == 4.89
    assert ImageEncoder(**PAPER)(torch.zeros(1, 3, 64, 64)).shape == (1, 128, 8, 8)


def test_output_is_linear_so_any_value_can_be_reached():
    torch.manual_seed(0)
    decoder = ImageDecoder()
    assert decoder(100*torch.randn(1, 64, 4, 4)).abs().max() > 1


def test_black_only_moves_the_scale():
    torch.manual_seed(0)
    plain, shifted = (torch.nn.Sequential(ImageEncoder(black=b), ImageDecoder(black=b)) for b in (-1., 0.))
    shifted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(shifted(x), plain(x + 1) - 1, atol=1e-5) and not torch.allclose(shifted(x), plain(x), atol=1e-2)


def test_overfits_a_picture():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(2, 3, 4, 4)*2 - 1, scale_factor=4)
    net = torch.nn.Sequential(ImageEncoder((8, 16), 16, res_blocks=1), ImageDecoder((8, 16), 16, res_blocks=1))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(x), x)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3*losses[0]


@pytest.mark.parametrize('side', [30, 31, 2, 0])
def test_sides_that_do_not_fit(side):
    with pytest.raises(ValueError, match='multiples of 4'): ImageEncoder()(torch.zeros(1, 3, side, side))


@pytest.mark.parametrize('net', [ImageEncoder, ImageDecoder])
@pytest.mark.parametrize('bad', [dict(widths=()), dict(widths=(8, 0)), dict(d=0), dict(channels=0), dict(res_blocks=-1)])
def test_sizes_that_make_no_sense(net, bad):
    with pytest.raises(ValueError, match='give'): net(**bad)


def test_pyramid_averages():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 8)*2 - 1
    levels = image_pyramid(x, [2, 4, 16])
    assert [tuple(level.shape) for level in levels] == [(2, 3, 2, 1), (2, 3, 4, 2), (2, 3, 16, 8)]
    assert torch.equal(levels[2], x)
    for level in levels: assert torch.allclose(level.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(levels[1][:, :, 1, 1], x[:, :, 4:8, 4:8].mean((2, 3)), atol=1e-6)
    assert all(level.abs().max() <= 1 for level in levels)


@pytest.mark.parametrize('sides', [[17], [0], [-4], [4, 32], [3]])
def test_pyramid_refuses_other_sides(sides):
    with pytest.raises(ValueError, match='does not fit'): image_pyramid(torch.zeros(1, 3, 16, 8), sides)
