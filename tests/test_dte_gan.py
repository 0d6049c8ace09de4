"""DTE-GAN: each turn moves its own reading of the caption and no other, in every mode; contrasts start at chance; every switch plays; bad input is refused."""
import math

import numpy as np
import pytest
import torch

from jointgen.adversaries import GAMES
from jointgen.contrasts import caption_keys, info_nce
from jointgen.digits import captioned_digits
from jointgen.joint import capabilities, load_model, save_model
from jointgen.learner import Learner
from jointgen.models.dte_gan import DTEGAN, OWNED, SIZES, WEIGHTS, DualTextEncoder
from jointgen.pairs import Pairs
from jointgen.sentences import FrozenSentences, SentenceEncoder

TINY = dict(side=16, d_text=16, condition=8, noise=8, text=dict(hidden=16, embedding=8), generator=(12, 12, 8), hidden=16, discriminator=(8, 12, 16),
            judge=dict(branch=12, tile=8, contrast=16), warm=0, penalty_every=2, penalty_rows=4)
SWITCHES = [{}, dict(norm='cbn'), dict(tanh=True), dict(hidden=0), dict(uncond=False), dict(patch=False), dict(uncond=False, patch=False), dict(shift=0.),
            dict(text_from_game=False), dict(hard=0.), dict(hard=1.), dict(penalty_every=1, penalty_rows=0), dict(warm=2), dict(text=dict(hidden=16, cell='lstm', dropout=.1)),
            dict(judge=dict(projection=True)), dict(judge=dict(norm=True)), dict(judge=dict(text='tile')), dict(judge=dict(text='tile', tile=None, gate=1.)), dict(seed=False), dict(log_std=0.), dict(rehearse=False), dict(weights=dict(r1=1., r2=1., penalty=0.)),
            dict(weights=dict(images=.2)), dict(weights=dict(contrast=0., edits=0., fake_contrast=0., fake_edits=0.)), *(dict(game=g) for g in GAMES)]


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, seed=0, **changes):
    torch.manual_seed(seed)
    return DTEGAN(vocab, **TINY | changes)


def lively(model):
    "Take a model away from its start, where gates are shut and conditions are not heard yet."
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn(p.shape, generator=generator(1)))
    return model


def fit(model, data, steps, **options):
    return Learner(model, data, **dict(batch_size=8, schedule='constant') | options).fit(steps, progress=False)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(48, side=16).pairs


@pytest.fixture(scope='module')
def vocab(pairs): return pairs.vocab


# --- the gradient contract


def moved_by(model, pairs, player):
    "Play one step with plain optimizers that could move everything; return the names of parameters that `player`'s turn changed."
    changed = set()
    for turn in model.turns(pairs):
        model.zero_grad(set_to_none=True)
        turn.loss.backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        torch.optim.SGD(model.parameters(), .1).step()
        if turn.player == player: changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        felt = {n for n, p in model.named_parameters() if p.grad is not None}
        if turn.player == player: assert changed <= felt
    return changed


@pytest.mark.parametrize('mode', OWNED)
@pytest.mark.parametrize('player', ['discriminator', 'generator'])
def test_a_turn_moves_its_own_and_nobody_elses(vocab, pairs, mode, player):
    model = lively(tiny(vocab, mode=mode))
    changed, other = moved_by(model, pairs[:8], player), dict(generator='discriminator', discriminator='generator')[player]
    encoder = {n for n in changed if n.startswith('encoder.')}
    owned = {f'encoder.nets.{part}.{n}' for part in OWNED[mode][player] for n, _ in model.encoder.nets[part].named_parameters()}
    assert encoder <= owned  # all others are bit-identical
    assert {n for n in owned if not n.endswith('ask.bias')} <= encoder  # each of its own moves (a softmax does not feel its bias)
    assert {n.split('.')[0] for n in changed} - {'encoder'} == {'generator': {'condition', 'generator'}, 'discriminator': {'discriminator'}}[player]
    if mode in ('dual', 'split', 'swap'): assert not owned & {f'encoder.nets.{p}.{n}' for p in OWNED[mode][other] for n, _ in model.encoder.nets[p].named_parameters()}
    if mode == 'shared_gd': assert encoder
    if mode == 'frozen': assert not encoder


@pytest.mark.parametrize('mode', OWNED)
def test_the_learner_keeps_the_contract(vocab, pairs, mode):
    "With AdamW, momentum and decay, each encoder moves in its owner's turn only."
    model = lively(tiny(vocab, mode=mode))
    learner = Learner(model, pairs, batch_size=8, schedule='constant')
    move, seen = Learner._move, {}
    def watched(turn, steps):
        before = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
        move(learner, turn, steps)
        seen.setdefault(turn.player, set()).update(n for n, p in model.encoder.named_parameters() if not torch.equal(p, before[n]))
    learner._move = watched
    learner.fit(3, progress=False)
    for player, names in seen.items():
        assert {n.split('.')[1] for n in names} == set(OWNED[mode][player])


def test_no_reading_feels_the_other_players_turn(vocab, pairs):
    "In dual mode the other encoder has no gradient at all, not one of zeros."
    model = lively(tiny(vocab))
    for turn, other in zip(model.turns(pairs[:8]), ('generator', 'discriminator')):
        model.zero_grad(set_to_none=True)
        turn.loss.backward()
        assert all(p.grad is None for p in model.encoder.nets[other].parameters())
        nets = [model.generator, model.condition] if other == 'generator' else [model.discriminator]
        assert all(p.grad is None for net in nets for p in net.parameters())


def test_the_warm_start_compares_only(vocab, pairs):
    model = tiny(vocab, warm=2)
    log = fit(model, pairs, 3).log
    assert [r['player'] for r in log] == ['discriminator', 'generator']*3 and int(model.trained) == 3
    assert {'contrast', 'edits'} <= set(log[0]) and {'rehearsed_contrast', 'rehearsed_edits'} <= set(log[1])
    assert 'pair' not in log[0] and 'kl' not in log[1] and 'pair' in log[4] and 'kl' in log[5]
    assert [r['player'] for r in fit(tiny(vocab, warm=1, rehearse=False), pairs, 2).log] == ['discriminator', 'discriminator', 'generator']


@pytest.mark.parametrize('mode', OWNED)
@pytest.mark.parametrize('player', ['discriminator', 'generator'])
def test_the_warm_start_keeps_the_contract(vocab, pairs, mode, player):
    model = lively(tiny(vocab, mode=mode, warm=5))
    changed = moved_by(model, pairs[:8], player)
    assert {n.split('.')[2] for n in changed if n.startswith('encoder.')} <= set(OWNED[mode][player])
    assert {n.split('.')[0] for n in changed} - {'encoder'} <= ({'discriminator'} if player == 'discriminator' else {'rehearsal'})
    if mode in ('dual', 'split', 'shared_gd'): assert any(n.startswith('encoder.') for n in changed)


def test_the_game_can_leave_the_text_to_the_contrast(vocab, pairs):
    for heard in (True, False):
        model = lively(tiny(vocab, text_from_game=heard, weights=dict(contrast=0., edits=0.)))
        turn = next(model.turns(pairs[:8]))
        turn.loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.encoder.nets['discriminator'].parameters()) == heard


# --- the terms


def test_contrast_starts_at_chance(vocab):
    many = captioned_digits(64, side=16).pairs
    turn = next(tiny(vocab, warm=5, judge=dict(TINY['judge'], gate=0.)).turns(many))
    assert abs(turn.log['contrast'].item() - math.log(64)) < .6 and abs(turn.log['edits'].item() - math.log(2)) < .2


def test_a_perfect_diagonal_costs_nothing():
    assert info_nce(torch.eye(8), torch.eye(8), temperature=.05) < 1e-6


def test_captions_that_say_the_same_are_no_rivals(vocab, pairs):
    "Twice the same caption: without the mask, no model could tell them apart."
    model, tokens = tiny(vocab), pairs.tokens[:4].repeat(2, 1)
    keys, v = caption_keys(tokens, vocab), torch.eye(4, 16).repeat(2, 1)
    terms = model.contrasts('', v, v, v.roll(1, 0), keys)
    assert terms['contrast'] < 1e-3 and terms['edits'] < 1e-3
    assert info_nce(v, v, temperature=.1) > .6  # log 2


def test_a_step_is_what_the_page_says(vocab, pairs):
    model = lively(tiny(vocab, weights=dict(images=.3)))
    d, g = model.turns(pairs[:8])
    assert set(d.log) == {'contrast', 'edits', 'pair', 'uncond', 'patch', 'penalty', 'matched', 'mismatched', 'made'}
    assert set(g.log) == {'fake_contrast', 'fake_edits', 'pair', 'uncond', 'patch', 'images', 'kl'}
    for turn in (d, g):
        terms = {k: v for k, v in turn.log.items() if k not in ('matched', 'mismatched', 'made')}
        assert torch.isclose(turn.loss, sum(model.weights.get(k, 1.)*v for k, v in terms.items()), atol=1e-4)


def test_penalties_are_lazy_and_know_no_encoder(vocab, pairs):
    model = lively(tiny(vocab, weights=dict(r1=1., r2=1.)))
    text = model.encoder.for_discriminator(pairs.tokens[:8]).sentence
    due = model.penalties(pairs.image[:8], pairs.image[8:16], text)
    assert set(due) == {'penalty', 'r1', 'r2'}
    sum(due.values()).backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and any(p.grad is not None for p in model.discriminator.parameters())
    model.trained += 1
    assert model.penalties(pairs.image[:8], pairs.image[8:16], text) == {}


# --- switches


@pytest.mark.parametrize('switch', SWITCHES, ids=lambda s: '-'.join(f'{k}={v}' for k, v in s.items()).replace(' ', '')[:60] or 'default')
def test_every_switch_plays_paints_and_saves(vocab, pairs, switch, tmp_path):
    judge = TINY['judge'] | switch.get('judge', {})
    model = tiny(vocab, **switch | dict(judge=judge))
    log = fit(model, pairs, 4).log
    assert all(np.isfinite(r['loss']) for r in log) and int(model.trained) == 4 and {r['player'] for r in log} == {'discriminator', 'generator'}
    image = model.eval().text_to_image(pairs.tokens[:3], samples=2, generator=generator())
    assert image.shape == (6, 3, 16, 16) and image.abs().max() <= 1
    loaded = load_model(save_model(model, tmp_path/'m'))
    assert torch.allclose(loaded.text_to_image(pairs.tokens[:3], samples=2, generator=generator()), image, atol=1e-5)


@pytest.mark.parametrize('mode', OWNED)
def test_every_mode_plays_under_half_precision_and_saves(vocab, pairs, mode, tmp_path):
    model = tiny(vocab, mode=mode).to(memory_format=torch.channels_last)
    assert all(np.isfinite(r['loss']) for r in fit(model, pairs, 3, autocast=torch.bfloat16).log)
    a, b = model.eval().embeddings(pairs.tokens[:4])
    assert a.shape == b.shape == (4, 16) and torch.equal(a, b) == (mode in ('shared_d', 'shared_gd', 'frozen'))
    loaded = load_model(save_model(model, tmp_path/'m'))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(loaded.embeddings(pairs.tokens[:4]), (a, b)))
    assert torch.allclose(loaded.rank_captions(pairs.image[:3], pairs.tokens[:5]), model.rank_captions(pairs.image[:3], pairs.tokens[:5]), atol=1e-4)


def test_swap_exchanges_the_readers(vocab, pairs):
    encoder = DualTextEncoder(vocab, 'swap', 16, hidden=16, embedding=8)
    assert torch.equal(encoder.for_generator(pairs.tokens[:2]).sentence, encoder.nets['discriminator'](pairs.tokens[:2]).sentence)
    assert not encoder.for_generator(pairs.tokens[:2]).sentence.requires_grad and encoder.for_generator(pairs.tokens[:2], 'discriminator').sentence.requires_grad


def test_another_frozen_encoder(vocab, pairs, tmp_path):
    torch.manual_seed(1)
    model, other = tiny(vocab, mode='frozen'), SentenceEncoder(vocab, 16, hidden=16, embedding=8)
    model.use_sentences(FrozenSentences(other, pairs.tokens))
    s = model.embeddings(pairs.tokens)[0]
    assert s.mean(0).abs().max() < 1e-4 and (s.std(0) - 1).abs().max() < 1e-3
    loaded = load_model(save_model(model.eval(), tmp_path/'m'))
    assert torch.allclose(loaded.embeddings(pairs.tokens)[0], s, atol=1e-5)
    with pytest.raises(ValueError, match='sentences of 24 numbers, 16 fits'): model.use_sentences(SentenceEncoder(vocab, 24))
    with pytest.raises(ValueError, match="'frozen' fits"): tiny(vocab).use_sentences(other)


def test_capabilities(): assert [k for k, v in capabilities(DTEGAN).items() if v] == ['text_to_image']


def test_it_learns_to_compare(vocab):
    data = captioned_digits(64, side=16).pairs
    log = fit(tiny(vocab, warm=10**6, discriminator=(12, 24, 32)), lambda step: data, 60, optimizer=dict(lr=5e-3)).log
    nats = [r['contrast'] for r in log if 'contrast' in r]
    assert np.mean(nats[-5:]) < .6*nats[0]


# --- drawing


@pytest.fixture(scope='module')
def model(vocab, pairs):
    model = tiny(vocab)
    fit(model, pairs, 6)
    return lively(model).eval()


def test_averages_paint_the_same_given_the_noises(vocab, pairs):
    learner = fit(tiny(vocab), pairs, 4, ema=.9)
    mean, (z, e) = learner.averaged(), tiny(vocab).draw(3, generator())
    with torch.no_grad(): a, b = (mean.paint(pairs.tokens[:3], noise=z, condition_noise=e)[0] for _ in range(2))
    assert torch.equal(a, b)
    for part in ('generator', 'condition', 'encoder'):  # all that paints is averaged together
        assert any(not torch.equal(p, q) for p, q in zip(getattr(mean, part).parameters(), getattr(learner.model, part).parameters())), part


def test_both_noises_can_be_held(model, pairs):
    tokens, (z, e) = pairs.tokens[:3], model.draw(3, generator())
    with torch.no_grad():
        one, (_, mean, log_std) = model.paint(tokens, noise=z, condition_noise=e)
        said = model.encoder.for_generator(tokens)
        assert torch.equal(model.paint(said, noise=z, condition_noise=e)[0], one)
        assert not torch.equal(model.paint(tokens, noise=z)[0], model.paint(tokens, noise=z)[0])
        assert not torch.equal(model.paint(tokens, condition_noise=e)[0], model.paint(tokens, condition_noise=e)[0])
    assert mean.shape == log_std.shape == (3, 8)


def test_samples_stand_beside_each_other_and_chance_has_a_source(model, pairs):
    still = model.text_to_image(pairs.tokens[:3], samples=4, temperature=0).unflatten(0, (3, 4))
    assert torch.allclose(still, still[:, :1].expand_as(still), atol=1e-5)
    torch.manual_seed(0)
    a = model.text_to_image(pairs.tokens[:3], samples=2, generator=generator(1))
    torch.manual_seed(1)
    b = model.text_to_image(pairs.tokens[:3], samples=2, generator=generator(1))
    assert torch.equal(a, b) and not torch.equal(a, model.text_to_image(pairs.tokens[:3], samples=2, generator=generator(2)))


def test_drawing_leaves_no_trace(model, pairs):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    image, table = model.text_to_image(pairs.tokens[:2]), model.rank_captions(pairs.image[:2], pairs.tokens[:4])
    assert model.training and not image.requires_grad and not table.requires_grad
    model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_ranking_is_by_cosine(model, pairs):
    table = model.rank_captions(pairs.image[:5], pairs.tokens[:7])
    assert table.shape == (5, 7) and table.abs().max() <= 1 + 1e-5
    assert torch.allclose(table[2:3, 4:5], model.rank_captions(pairs.image[2:3], pairs.tokens[4:5]), atol=1e-5)


# --- bad input


@pytest.mark.parametrize('wrong, words', [(dict(mode='both'), 'dual, split'), (dict(game='poker'), 'unknown game'), (dict(shard=3), 'no size or weight'),
    (dict(weights=dict(gama=1.)), 'no size or weight'), (dict(norm='batch'), "'cbn'"), (dict(generator=(8, 8)), '3 of them fit'), (dict(side=20), 'power of two'),
    (dict(discriminator=(8, 8)), '3 of them fit'), (dict(text=dict(dropout=1.)), 'below 1'), (dict(shift=.5), 'captions name')])
def test_sizes_that_make_no_model(vocab, wrong, words):
    with pytest.raises(ValueError, match=words): tiny(vocab, **wrong)


def test_batches_that_make_no_game(vocab, pairs):
    model = tiny(vocab)
    with pytest.raises(ValueError, match='batch of 1 holds no mismatch'): next(model.turns(pairs[:1]))
    alike = Pairs(pairs.image[:4], pairs.tokens[:1].repeat(4, 1), vocab)
    with pytest.raises(ValueError, match='all 4 captions say the same'): next(model.turns(alike))
    with pytest.raises(ValueError, match='resize'): next(model.turns(captioned_digits(4).pairs))
    with pytest.raises(ValueError, match='no known word'): next(model.turns(Pairs(pairs.image[:2], torch.tensor([[1, 4, 2], [1, 7, 2]]), vocab)))
    with pytest.raises(ValueError, match='NaN'): next(model.turns(Pairs(torch.full((2, 3, 16, 16), math.nan), pairs.tokens[:2], vocab)))


@pytest.mark.parametrize('part, player, term', [('discriminator.said', 'discriminator', 'contrast'), ('discriminator.joint', 'discriminator', 'pair'), ('condition', 'generator', 'kl')])
def test_what_is_not_finite_is_named(vocab, pairs, part, player, term):
    model = tiny(vocab)
    turns = model.turns(pairs[:8])
    if player == 'generator': next(turns)
    module = model.get_submodule(part)
    with torch.no_grad(): next(module.parameters()).fill_(math.nan)
    if part == 'condition': turns = model.turns(pairs[:8])
    with pytest.raises(ValueError, match=f"player '.*': .*|player '{player}'.*{term}"):
        for _ in turns: pass


def test_a_gradient_that_is_not_finite_is_named(vocab, pairs):
    model = tiny(vocab)
    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, g: g*math.nan)
    plain = model.discriminator.text_vector
    model.discriminator.text_vector = lambda x: Broken.apply(plain(x))
    list(model.turns(pairs[:8]))  # the values are fine
    with pytest.raises(ValueError, match="player 'discriminator': the gradient of contrast is not finite"): list(model.turns(pairs[:8], search=True))
    with pytest.raises(ValueError, match="player 'discriminator'.*grad_norm"): fit(model, pairs, 1)


@pytest.mark.parametrize('call', [lambda m, p: m.text_to_image(p.tokens, samples=0), lambda m, p: m.text_to_image(p.tokens, temperature=-1), lambda m, p: m.text_to_image(p.tokens, temperature=math.nan)])
def test_draws_that_cannot_be(model, pairs, call):
    with pytest.raises(ValueError, match='ask for 1 or more'): call(model, pairs[:2])


def test_questions_that_cannot_be(model, pairs):
    with pytest.raises(ValueError, match='looks at'): model.rank_captions(torch.zeros(1, 3, 32, 32), pairs.tokens[:2])
    with pytest.raises(ValueError, match='no known word'): model.text_to_image(torch.tensor([[1, 4, 4, 2]]))
    with pytest.raises(ValueError, match='at most'): model.text_to_image(torch.full((1, 41), 7))
    with pytest.raises(ValueError, match='noise is'): model.paint(pairs.tokens[:2], condition_noise=torch.zeros(2, 3))


def test_the_words_of_a_model():
    assert set(WEIGHTS) >= {'contrast', 'edits', 'fake_contrast', 'images', 'kl', 'penalty', 'r1', 'r2'} and SIZES['uncond'] and SIZES['patch'] and not SIZES['tanh']


def test_the_papers_sizes_paint(vocab):
    widths = (256, 256, 256, 256, 128, 64, 32)
    torch.manual_seed(0)
    model = DTEGAN(vocab, side=256, d_text=256, condition=100, noise=100, text=dict(hidden=256, embedding=300, cell='lstm', queries=0, dropout=.5), generator=widths, hidden=0,
                   tanh=True, seed=False, log_std=0., discriminator=widths[::-1], judge=dict(text='tile', tile=None, contrast=256), uncond=False, patch=False, shift=0., rehearse=False)
    image = model.eval().text_to_image(vocab.encode(['the 3 is red.']), generator=generator())
    assert image.shape == (1, 3, 256, 256) and model.rank_captions(image, vocab.encode(['the 3 is red.', 'the 4 is red.'])).shape == (1, 2)
    assert list(model.discriminator.unaware(model.discriminator.look(image))) == []
