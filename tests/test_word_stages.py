"""Words for places and places for words: attention mixes words only, the table holds no hand in padding, and each player's modules are moved by that player alone."""
import copy
import math

import pytest
import torch

from jointgen.digits import captioned_digits
from jointgen.joint import capabilities, load_model, save_model
from jointgen.models.dte_gan import OWNED
from jointgen.sentences import Sentences
from jointgen.word_stages import WordAttention, WordDTEGAN, word_places, word_region_loss, word_region_table

TINY = dict(side=8, d_text=16, condition=8, noise=4, text=dict(hidden=16, embedding=8), generator=(8, 8), hidden=8, discriminator=(8, 8), judge=dict(branch=8, tile=8, contrast=16),
    warm=0, space=8, stages=1)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, **options):
    torch.manual_seed(0)
    return WordDTEGAN(vocab, **TINY | options)


@pytest.fixture(scope='module')
def pairs():
    pairs = captioned_digits(12, side=16, subsets='Quad1').pairs
    pairs.image = torch.nn.functional.avg_pool2d(pairs.image, 2)
    return pairs


def some(b=5, d=6, n=9, t=7, seed=0):
    g = seeded(seed)
    mask = torch.arange(t) < torch.randint(2, t + 1, (b, 1), generator=g)
    return torch.randn(b, d, n, generator=g), torch.randn(b, t, d, generator=g), mask


# --- attention


@pytest.mark.parametrize('size', [(1, 1), (4, 4), (3, 5)])
def test_places_mix_words(size):
    layer, g = WordAttention(6, 10), seeded()
    h, (_, words, mask) = torch.randn(5, 10, *size, generator=g), some()
    told, share = layer.attend(h, words, mask)
    assert told.shape == h.shape and share.shape == (5, 7, *size)
    assert torch.allclose(share.sum(1), torch.ones(5, *size), atol=1e-5) and (share[~mask] == 0).all()
    by_hand = torch.einsum('btc,btpq->bcpq', layer.project(words), share)
    assert torch.allclose(told, by_hand, atol=1e-5) and layer(h, words, mask).shape == h.shape


def test_padding_is_never_read():
    layer, g = WordAttention(6, 4), seeded()
    h, (_, words, mask) = torch.randn(5, 4, 3, 3, generator=g), some()
    other = torch.where(mask[..., None], words, torch.full_like(words, 1e4))
    assert torch.equal(layer(h, words, mask), layer(h, other, mask))
    long = torch.cat([words, words], 1), torch.cat([mask, torch.zeros_like(mask)], 1)
    assert torch.allclose(layer(h, words, mask), layer(h, *long), atol=1e-5)


def test_one_word_is_told_everywhere():
    layer = WordAttention(6, 4)
    h, words = torch.randn(2, 4, 3, 3, generator=seeded()), torch.randn(2, 1, 6, generator=seeded(1))
    told, _ = layer.attend(h, words, torch.ones(2, 1, dtype=torch.bool))
    assert torch.allclose(told, layer.project(words)[:, 0, :, None, None].expand_as(told), atol=1e-6)


def test_gradients_reach_all_of_it_and_the_words():
    layer, (_, words, mask) = WordAttention(6, 4), some()
    words, h = words.requires_grad_(), torch.randn(5, 4, 3, 3, generator=seeded(), requires_grad=True)
    layer(h, words, mask).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters()) and h.grad.abs().sum() > 0
    assert words.grad[mask].abs().sum() > 0 and (words.grad[~mask] == 0).all()


def test_attention_under_autocast():
    layer, (_, words, mask) = WordAttention(6, 4), some()
    h = torch.randn(5, 4, 3, 3, generator=seeded())
    with torch.autocast('cpu', torch.bfloat16): low = layer(h, words, mask)
    assert (low.float() - layer(h, words, mask)).abs().max() < .1


def test_attention_refuses(pairs):
    layer, (_, words, mask) = WordAttention(6, 4), some()
    with pytest.raises(ValueError, match='5 captions came with 3 maps'): layer(torch.zeros(3, 4, 2, 2), words, mask)
    with pytest.raises(ValueError, match='no word at all'): layer(torch.zeros(5, 4, 2, 2), words, mask & False)


# --- regions and words


def one_pair(regions, words, sharp=4., vote=5.):
    """The score of one picture with one caption, step by step as AttnGAN writes it (without padding)."""
    alike = words @ regions                                    # t n
    alike = alike.exp()/alike.exp().sum(0, keepdim=True)       # words compete for each region
    share = (sharp*alike).exp()/(sharp*alike).exp().sum(1, keepdim=True)
    found = share @ regions.T                                  # t d
    near = (found*words).sum(1)/(found.norm(dim=1)*words.norm(dim=1))
    return (vote*near).exp().sum().log()/vote


def test_the_table_is_that_of_the_paper():
    regions, words, mask = some()
    table = word_region_table(regions, words, mask)
    for i in range(5):
        for j in range(5): assert table[i, j].item() == pytest.approx(one_pair(regions[i], words[j][mask[j]]).item(), abs=1e-4)


def test_words_share_out_their_looks():
    regions, words, mask = some()
    places = word_places(regions, words, mask)
    assert places.shape == (5, 5, 7, 9) and torch.allclose(places.sum(3), torch.ones(5, 5, 7), atol=1e-5)
    assert torch.allclose(places[:, ~mask], torch.full((), 1/9), atol=1e-6)  # padding chooses nothing


def test_the_loss_is_chance_where_nothing_differs_and_low_where_all_fits():
    mask = torch.ones(6, 3, dtype=torch.bool)
    assert word_region_loss(torch.ones(6, 4, 5), torch.ones(6, 3, 4), mask).item() == pytest.approx(math.log(6), abs=1e-4)
    own = torch.eye(6)[:, :, None]
    fits = word_region_loss(own.expand(6, 6, 5), own.transpose(1, 2).expand(6, 3, 6), mask)
    wrong = word_region_loss(own.roll(1, 0).expand(6, 6, 5), own.transpose(1, 2).expand(6, 3, 6), mask)
    assert fits < .02 and wrong > 5


def test_equal_content_is_no_rival():
    regions, words, mask = some(b=4)
    keys = torch.tensor([0, 0, 1, 2])
    free = word_region_table(regions, words, mask)*10
    free[0, 1] = free[1, 0] = -math.inf
    own = torch.arange(4)
    by_hand = (torch.nn.functional.cross_entropy(free, own) + torch.nn.functional.cross_entropy(free.T, own))/2
    assert word_region_loss(regions, words, mask, keys=keys).item() == pytest.approx(by_hand.item(), abs=1e-5)
    with pytest.raises(ValueError, match='4 pictures meet 3'): word_region_loss(regions, words[:3], mask[:3])


# --- the model


@pytest.mark.parametrize('mode', list(OWNED))
def test_each_turn_moves_its_player_only(pairs, mode):
    model = tiny(pairs.vocab, mode=mode, penalty_rows=4)
    players = {name: [p for part in parts for p in part.parameters() if p.requires_grad] for name, parts in model.players().items()}
    assert {id(p) for p in model.lookups.parameters()} <= {id(p) for p in players['generator']}
    assert {id(p) for p in model.matcher.parameters()} <= {id(p) for p in players['discriminator']}
    for turn in model.turns(pairs):
        assert ('words' if turn.player == 'discriminator' else 'fake_words') in turn.log
        mine = players[turn.player]
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters(): p.grad = None
        turn.loss.backward()
        own = {id(p) for p in mine}
        strangers = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any() and id(p) not in own]
        assert not strangers
        torch.optim.SGD(mine, .01).step()
        moved = {name for name, v in model.named_parameters() if not torch.equal(v, before[name])}
        assert moved and all(id(p) in own for name, p in model.named_parameters() if name in moved)


def test_words_change_the_picture(pairs):
    model = tiny(pairs.vocab)
    said, plain = model.encoder.for_generator(pairs.tokens), torch.zeros(12, 8, 8, 8)
    assert model.first == 0 and not torch.equal(model.refine(plain, 0, said), plain)
    bare = tiny(pairs.vocab, stages=0)
    assert torch.equal(bare.refine(plain, 0, said), plain) and not len(bare.lookups)
    with pytest.raises(ValueError, match='stages is 2, 0 to 1 fits'): tiny(pairs.vocab, stages=2)


def test_switches(pairs):
    off = tiny(pairs.vocab, word_weight=0., fake_word_weight=0.)
    assert all(not {'words', 'fake_words'} & set(turn.log) for turn in off.turns(pairs))
    model, twice = tiny(pairs.vocab), tiny(pairs.vocab, word_weight=2.)
    look, said, keys = model.discriminator.look(pairs.image), model.encoder.for_discriminator(pairs.tokens), torch.arange(12)
    assert torch.allclose(2*model.extra_terms('discriminator', look, said, keys)['words'], twice.extra_terms('discriminator', look, said, keys)['words'])


def test_pictures_of_the_lookups(pairs):
    model = tiny(pairs.vocab)
    places = model.where_words_look(pairs.image, pairs.tokens)
    assert places.shape[:2] == pairs.tokens.shape and torch.allclose(places.sum((2, 3)), torch.ones(pairs.tokens.shape), atol=1e-5)
    image, seen = model.which_words_draw(pairs.tokens, generator=seeded())
    assert len(seen) == 1 and seen[0].shape == (12, pairs.tokens.shape[1], 8, 8)
    assert torch.equal(image, model.text_to_image(pairs.tokens, generator=seeded())) and not model.lookups[0]._forward_pre_hooks


def test_it_is_a_dte_gan(pairs, tmp_path):
    model = tiny(pairs.vocab)
    assert capabilities(model) == dict(sample_pairs=False, text_to_image=True, image_to_text=False, reconstruct=False)
    again = load_model(save_model(model, tmp_path/'words'))
    assert torch.equal(model.text_to_image(pairs.tokens, generator=seeded()), again.text_to_image(pairs.tokens, generator=seeded()))
    assert isinstance(model.encoder.for_generator(pairs.tokens), Sentences)
