"""Nets whose latents are grids and slots: shapes, who hears whom, lengths, refusals."""
import pytest
import torch

from jointgen.digits import captioned_digits
from jointgen.latent_nets import (Discriminator, FeatureEncoder, GridDecoder, GridEncoder, PooledEncoder, SlotDecoder, SlotEncoder, by_length, drop_words,
                                  share_of)
from jointgen.pairs import BOS, PAD, UNK


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(24).pairs


@pytest.mark.parametrize('n', [1, 2, 3, 24])
@pytest.mark.parametrize('parts', [1, 4, 7, None])
def test_groups_by_length_change_nothing(pairs, n, parts):
    torch.manual_seed(0)
    tokens, net = pairs.tokens[:n], PooledEncoder(pairs.vocab, 6)
    assert torch.allclose(by_length(net, tokens, parts=parts), net(tokens), atol=1e-5)
    rest = torch.arange(n)
    assert torch.equal(by_length(lambda t, r: r, tokens, rest, parts=parts), rest)


def test_one_group_a_length_makes_codes_of_captions_alone(pairs):
    torch.manual_seed(0)
    net = SlotEncoder(pairs.vocab, 32, width=16, layers=1)
    whole = by_length(net, pairs.tokens, parts=None)
    for i in (0, 5, 11): assert torch.allclose(by_length(net, pairs.tokens[i:i + 1], parts=None), whole[i:i + 1], atol=1e-5)


def test_groups_are_cut_to_their_longest(pairs):
    lengths = []
    by_length(lambda t: (lengths.append((t.shape[1], int((t != PAD).sum(1).max()))), t[:, 0])[1], pairs.tokens)
    assert len(lengths) == 4 and all(a == b for a, b in lengths)


@pytest.mark.parametrize('share', [0., .5, 1.])
def test_words_hide_and_marks_do_not(pairs, share):
    torch.manual_seed(0)
    tokens = pairs.tokens
    hidden = drop_words(tokens, share)
    kept = (tokens == PAD) | (tokens == BOS)
    assert torch.equal(hidden[kept], tokens[kept]) and ((hidden == tokens) | (hidden == UNK)).all()
    assert abs((hidden[~kept] == UNK).float().mean() - share) < .08


@pytest.mark.parametrize('side, widths, d', [(32, (8, 8, 8), 48), (16, (8, 8), 32), (64, (8, 8, 8, 8), 64)])
def test_grids(side, widths, d):
    encoder, decoder = GridEncoder(side, d, widths=widths, res_blocks=1), GridDecoder(side, d, widths=widths, res_blocks=1)
    image = torch.rand(2, 3, side, side)*2 - 1
    h = encoder(image)
    assert h.shape == (2, d) and decoder(h).shape == image.shape


def test_a_cell_writes_what_stands_in_it():
    encoder = GridEncoder(32, 64, widths=(8, 8, 8), res_blocks=0)
    a, b = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    b[..., :4, :4] = 1  # the corner of the first cell
    changed = (encoder(a) - encoder(b)).abs().unflatten(1, (4, 4, 4)).sum((0, 1)) > 1e-7
    assert changed[0, 0] and not changed[3].any() and not changed[:, 3].any()


def test_sizes_that_do_not_fit(pairs):
    for d, cells in ((7, 8), (12, 8), (0, 4)):
        with pytest.raises(ValueError, match='cannot be dealt'): share_of(d, cells)
    with pytest.raises(ValueError, match='32 x 32 fits'): GridEncoder(32, 32)(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match='gives 768 features'): FeatureEncoder(5, 3, hidden=4)(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match='dealt to 16 cells'): SlotDecoder(pairs.vocab, 20)


def test_a_trunk_can_be_put_in():
    encoder = FeatureEncoder(6, 3, hidden=4)
    encoder.trunk = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(12, 6))
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_slots_read_order_and_write_causally(pairs):
    torch.manual_seed(0)
    encoder, decoder = SlotEncoder(pairs.vocab, 32, width=16, layers=1), SlotDecoder(pairs.vocab, 32, width=16, layers=1)
    tokens = pairs.tokens[:4]
    h = encoder(tokens)
    other = tokens.clone(); other[:, [2, 3]] = other[:, [3, 2]]
    assert h.shape == (4, 32) and not torch.allclose(encoder(other), h)
    changed = tokens.clone(); changed[:, 6:] = 7
    a, b = decoder(tokens, h), decoder(changed, h)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and not torch.allclose(a[:, 6:], b[:, 6:])
    written = decoder.generate(h)
    assert written.shape == (4, pairs.vocab.max_len) and (written[:, 0] == BOS).all()


def test_every_slot_is_heard(pairs):
    torch.manual_seed(0)
    decoder = SlotDecoder(pairs.vocab, 32, width=16, layers=1)
    latent = torch.randn(2, 32, requires_grad=True)
    decoder(pairs.tokens[:2], latent).square().sum().backward()
    assert latent.grad.unflatten(1, (2, 16)).abs().sum((0, 1)).min() > 0


def test_a_judge_hears_picture_and_code():
    torch.manual_seed(0)
    judge, image, code = Discriminator(6, widths=(8, 8)), torch.rand(3, 3, 32, 32, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    judge(image, code).sum().backward()
    assert image.grad.abs().sum() > 0 and code.grad.abs().sum() > 0
