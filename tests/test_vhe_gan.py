"""VHE-GAN: whose loss reaches whom, the four directions, both wirings and every switch, topics that survive a file, two seeds, two steps, and what is refused."""
import json
import os

import numpy as np
import pytest
import torch

from jointgen.adversaries import GAMES
from jointgen.bags import Bag
from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits
from jointgen.joint import capabilities, load_model, save_model
from jointgen.learner import Learner
from jointgen.models.vhe_gan import SIZES, VHEGAN, WEIGHTS
from jointgen.pairs import Pairs, Vocab

TINY = dict(side=16, widths=(12, 8, 4), trunk=(8, 12), d=16, rows=((8,), (8, 16)), scales=(8, 16), generator=dict(width=16, squeeze=4), judge=dict(width=12),
            warm=0, documents=64, gibbs_sweeps=2, burn=4, keep=4)
SWITCHES = [{}, dict(wiring='stack'), dict(topics='expected'), dict(topics='adam'), dict(end_to_end=False), dict(joint=False, warm=1), dict(ladder=False), dict(bound=False),
            dict(length=0), dict(gibbs_share=0.), dict(gibbs_share=1.), dict(gibbs_keep=2), dict(hard=.5), dict(hard=1., gibbs_share=1.), dict(rows=((8, 16),)),
            dict(refine=0), dict(weights=dict(reread=0.)), dict(widths=(12, 8)), dict(judge=dict(width=8, code='tile')), dict(judge=dict(width=12, patches=[1, 2], balance=False, lazy=[1, 0])),
            dict(generator=dict(width=16, squeeze=0, blocks=2, output='tanh')), dict(encoder=dict(k_range=[.5, 10.], hidden=[8, 8, 8])), dict(weights=dict(kl=[.1, .03, .01], uncond=0.)),
            dict(weights=dict(r1=.1, r2=.1)), *(dict(game=g) for g in GAMES if g != 'logistic')]
NAMES = [' '.join(f'{k}={v}' for k, v in s.items())[:40] or 'default' for s in SWITCHES]
slow = pytest.mark.skipif(not os.environ.get('JOINTGEN_SLOW'), reason='slow: set JOINTGEN_SLOW=1')


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, seed=0, **changes):
    torch.manual_seed(seed)
    return VHEGAN(vocab, **TINY | changes)


def fit(model, data, steps, **options):
    torch.manual_seed(0)
    return Learner(model, data, **dict(batch_size=8, schedule='constant', clip=None) | options).fit(steps, progress=False)


def state(module): return {k: v.clone() for k, v in module.state_dict().items()}


def same(before, module): return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(48, side=16).pairs


@pytest.fixture(scope='module')
def vocab(pairs): return pairs.vocab


@pytest.fixture(scope='module')
def model(vocab, pairs):
    model = tiny(vocab)
    fit(model, pairs, 3)
    return model.eval()


# --- switches


@pytest.mark.parametrize('switch', SWITCHES, ids=NAMES)
def test_every_switch_trains_draws_and_saves(vocab, pairs, switch, tmp_path):
    model = tiny(vocab, **switch)
    topics = state(model.pgbn)
    log = fit(model, pairs, 3).log
    players = ['discriminator', 'generator', *(['topics'] if switch.get('topics') == 'adam' else [])]
    assert [r['player'] for r in log[-len(players):]] == players and all(np.isfinite(r['loss']) for r in log)
    assert not same(topics, model.pgbn) and int(model.trained) == 3
    for phi in model.pgbn.topics: assert torch.allclose(phi.sum(0), torch.ones(phi.shape[1]), atol=1e-5) and (phi > 0).all()
    model.eval()
    image = model.text_to_image(pairs.tokens[:3], samples=2, generator=generator())
    assert image.shape == (6, 3, 16, 16) and image.abs().max() <= 1 and image.dtype == torch.float32
    loaded = load_model(save_model(model, tmp_path/'m'))
    assert torch.allclose(loaded.text_to_image(pairs.tokens[:3], samples=2, generator=generator()), image, atol=1e-5)
    assert torch.equal(loaded.image_to_text(pairs.image[:3], generator=generator()), model.image_to_text(pairs.image[:3], generator=generator()))


def test_capabilities(vocab, model):
    assert capabilities(VHEGAN) == dict(sample_pairs=True, text_to_image=True, image_to_text=True, reconstruct=True) and not VHEGAN.word_order
    assert set(model.players()) == {'discriminator', 'generator'} and set(tiny(vocab, topics='adam').players()) == {'discriminator', 'generator', 'topics'}
    assert set(SIZES).isdisjoint(WEIGHTS)


def test_a_config_survives_json(vocab, pairs, model):
    again = VHEGAN(vocab, **json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval().text_to_image(pairs.tokens[:2], generator=generator()), model.text_to_image(pairs.tokens[:2], generator=generator()))
    assert again.config == model.config


# --- whose loss reaches whom


def terms_of(model, pairs):
    "Return the terms of the second turn."
    turns = model.train().turns(pairs)
    next(turns)
    return next(turns).log


def slopes(terms, module):
    found = torch.autograd.grad(sum(terms), list(module.parameters()), allow_unused=True, retain_graph=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize('wiring', ['raster', 'stack'])
@pytest.mark.parametrize('end_to_end', [True, False])
def test_end_to_end_or_exactly_not(vocab, pairs, wiring, end_to_end):
    model = tiny(vocab, wiring=wiring, end_to_end=end_to_end)
    log = terms_of(model, pairs[:8])
    game = [v for k, v in log.items() if k.startswith(('pair', 'uncond'))]
    assert len(game) == 2*len(model.discriminators) and slopes(game, model.generator)
    for part in (model.trunk, model.encoder):
        assert any(g.any() for g in slopes(game, part)) == end_to_end  # exactly zero, not nearly
        assert sum(g.abs().sum() for g in slopes([log['text']], part)) > 0
    assert not slopes([log['text']], model.generator)


def test_texts_that_were_heard_carry_no_gradient(vocab, pairs):
    model = tiny(vocab, gibbs_share=1.)
    log = terms_of(model, pairs[:8])
    assert not any(g.any() for g in slopes([v for k, v in log.items() if k.startswith('pair')], model.encoder))


@pytest.mark.parametrize('topics', ['mcmc', 'adam'])
def test_a_turn_moves_its_player_and_nobody_else(vocab, pairs, topics):
    model = tiny(vocab, topics=topics).train()
    learner, players = Learner(model, pairs, batch_size=8, clip=None), model.players()
    weights = lambda: {n: p.detach().clone() for n, p in model.named_parameters()}
    owned = {name: {id(p) for m in (player if isinstance(player, list) else [player]) for p in m.parameters()} for name, player in players.items()}
    for turn in model.turns(pairs[:8]):
        before = weights()
        learner._move(turn, 10)
        changed = {id(p) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed <= owned[turn.player] and len(changed) > .9*len(owned[turn.player])
    every = {id(p) for p in model.parameters()}
    assert set.union(*owned.values()) == every and sum(map(len, owned.values())) == len(every)


def test_the_bound_alone_comes_first(vocab, pairs):
    model = tiny(vocab, warm=2)
    log, still = fit(model, pairs, 2).log, state(tiny(vocab, warm=2).discriminators)
    assert [r['player'] for r in log] == ['generator', 'generator'] and same(still, model.discriminators)
    assert [t.player for t in model.turns(pairs[:8])] == ['discriminator', 'generator']


def test_two_steps_stand_still(vocab, pairs):
    model = tiny(vocab, joint=False, warm=2)
    parts = lambda: [model.trunk, model.encoder, model.pgbn, model.sampler]
    fit(model, pairs, 2)
    learned = [state(m) for m in parts()]
    log = fit(model, pairs, 2).log
    assert all(same(s, m) for s, m in zip(learned, parts())) and 'text' not in log[-1]
    assert model.trunk.training and int(model.trained) == 4


def test_the_topics_move_after_the_turns(vocab, pairs):
    model = tiny(vocab).train()
    topics, turns = state(model.pgbn), model.turns(pairs[:8])
    for turn in turns: assert same(topics, model.pgbn)
    assert not same(topics, model.pgbn) and int(model.sampler.steps) == 1


def test_one_pass_of_the_generator_a_step(vocab, pairs):
    model, calls = tiny(vocab).train(), []
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    for turn in model.turns(pairs[:8]): pass
    assert len(calls) == 1


def test_what_is_logged(vocab, pairs):
    judge, maker = (turn.log for turn in tiny(vocab).train().turns(pairs[:8]))
    assert set(judge) == {f'{k}_{n}_{x}' for k in ('pair', 'uncond') for n in ('2_8', '1_8', '1_16') for x in ('real', 'wrong', 'fake')}
    assert {'text', 'perplexity', 'bound', 'kl_1', 'kl_2', 'kl_3'} <= set(maker) and maker['perplexity'] > 1


def test_every_player_learns(vocab, pairs):
    model = tiny(vocab, warm=60)
    log = fit(model, pairs, 60, optimizer=dict(lr=4e-3)).log
    text = [r['perplexity'] for r in log]
    assert np.mean(text[-5:]) < .9*np.mean(text[:5])


# --- the cast of a game


def test_wrong_pictures_differ_and_wrong_codes_are_beside_the_right_picture(vocab, pairs):
    model, batch = tiny(vocab, gibbs_share=.5, hard=.5), pairs[:16]
    counts, keys = model.bag.count(batch.tokens), caption_keys(batch.tokens, vocab)
    drawn = model.encode(batch.image, generator=generator()).thetas
    thetas, wrong, swap = model.cast(batch, counts, drawn)
    assert swap[:4].tolist() == [0, 1, 2, 3] and (keys[swap[4:]] != keys[4:]).all()
    right = model.codes(thetas)
    for a, b in zip(right, wrong):
        assert torch.equal(a[4:], b[4:]) and not any(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))
    for d, t in zip(drawn, thetas): assert torch.equal(d[8:], t[8:]) and not torch.equal(d[:8], t[:8])


# --- four directions


def test_text_to_image_never_asks_the_encoder(model, pairs, monkeypatch):
    def never(*args, **options): raise AssertionError('the encoder was asked')
    for part in (model.trunk, model.encoder): monkeypatch.setattr(part, 'forward', never)
    for temperature in (0, .5, 1): model.text_to_image(pairs.tokens[:2], temperature=temperature, generator=generator())
    model.read(pairs.tokens[:2]), model.pyramid(pairs.tokens[:2]), model.sample_pairs(2)
    with pytest.raises(AssertionError, match='was asked'): model.image_to_text(pairs.image[:2])


@pytest.mark.parametrize('draw', [lambda m, p, g: m.text_to_image(p.tokens[:3], samples=2, generator=g), lambda m, p, g: m.text_to_image(p.tokens[:3], temperature=.5, generator=g),
    lambda m, p, g: m.image_to_bag(p.image[:3], temperature=1, generator=g), lambda m, p, g: m.sample_pairs(4, generator=g).image, lambda m, p, g: m.encode(p.image[:3], generator=g).thetas[1],
    lambda m, p, g: m.read(p.tokens[:3], generator=g)[2], lambda m, p, g: m.pyramid(p.tokens[:3], generator=g)[0], lambda m, p, g: m.reconstruct(p[:3]).image], ids='abcdefgh')
def test_one_seed_one_draw(model, pairs, draw):
    random, training = torch.get_rng_state(), model.training
    first, again = draw(model, pairs, generator()), draw(model, pairs, generator())
    assert torch.equal(first, again) and torch.equal(random, torch.get_rng_state()) and model.training == training and not first.requires_grad


def test_draws_differ_and_means_do_not(model, pairs):
    two = model.text_to_image(pairs.tokens[:2], samples=2, generator=generator())
    assert not torch.equal(two[0], two[1])
    mean = model.text_to_image(pairs.tokens[:2], samples=2, temperature=0, generator=generator())
    assert torch.equal(mean[0], mean[1]) and not torch.equal(mean[0], mean[2])
    bags = model.image_to_bag(pairs.image[:2], samples=2)
    assert torch.equal(bags[0], bags[1])


def test_kinds_and_shapes(model, pairs, vocab):
    p = pairs[:4]
    drawn, back = model.sample_pairs(3, generator=generator()), model.reconstruct(p)
    assert isinstance(drawn, Pairs) and drawn.image.shape == (3, 3, 16, 16) and back.tokens.shape == p.tokens.shape
    assert model.image_to_bag(p.image).shape == (4, model.bag.size) and (model.image_to_bag(p.image) > 0).all()
    told = model.image_to_text(p.image, samples=2, temperature=0)
    assert told.shape == (8, vocab.max_len) and torch.equal(told[0], told[1]) and all(vocab.decode(told))
    rows = model.paint(model.read(p.tokens))
    assert [[x.shape[-1] for x in row] for row in rows] == [[8], [8, 16]] and [x.shape[-1] for x in model.pyramid(p.tokens)] == [8, 16]
    thetas = model.read(p.tokens, generator=generator())
    assert torch.equal(model.pyramid(thetas)[-1], model.pyramid(p.tokens, temperature=0, generator=generator())[-1])


def test_both_sides_out_of_nothing_come_from_one_code(vocab, monkeypatch):
    from jointgen.vhe_parts import draw_topics
    model, codes = tiny(vocab).eval(), []
    whole, drawn = model.paint, draw_topics(model.pgbn, 5, length=model.sizes['length'], generator=generator())
    monkeypatch.setattr(model, 'paint', lambda thetas: codes.append(thetas) or whole(thetas))
    for settle in (False, True):
        pairs = model.sample_pairs(5, settle=settle, generator=generator())
        assert torch.equal(pairs.tokens, model.bag.tell(model.pgbn.rates(codes[-1][0]))) and torch.equal(pairs.image, whole(codes[-1])[-1][-1].clamp(-1, 1))
    assert all(torch.equal(a, b) for a, b in zip(codes[0], drawn)) and not torch.allclose(codes[1][0], drawn[0])


def test_codes_of_both_wirings(vocab, model, pairs):
    thetas = model.read(pairs.tokens[:3])
    assert [c.shape[1] for c in model.codes(thetas)] == [8, 12] and [c.shape[1] for c in tiny(vocab, wiring='stack').codes(thetas)] == [24]
    twice = model.codes([2*t for t in thetas])
    for a, b in zip(twice, model.codes(thetas)): assert torch.allclose(a, b, atol=1e-5)  # the length of a document is forgotten
    assert not torch.allclose(tiny(vocab, length=0).codes(thetas)[0], tiny(vocab, length=0).codes([2*t for t in thetas])[0])


def test_watch_the_chain(model, pairs):
    steps = []
    model.read(pairs.tokens[:2], burn=3, keep=2, watch=lambda i, thetas: steps.append((i, thetas[0].shape)))
    assert steps == [(i, (2, 12)) for i in range(5)]


def test_ranks_by_hand(model, pairs):
    p = pairs[:3]
    rates, counts = model.image_to_bag(p.image), model.bag.count(p.tokens)
    table = torch.stack([torch.distributions.Poisson(rates).log_prob(c).sum(1) for c in counts], 1)
    assert torch.allclose(model.ranks(p.image, p.tokens), table, rtol=1e-3, atol=1e-2)
    assert torch.equal(model.zero_shot(p.image, model.vocab.decode(p.tokens)), model.ranks(p.image, p.tokens))


# --- files and seeds


def test_topics_and_mass_survive_a_file(model, pairs, tmp_path):
    loaded = load_model(save_model(model, tmp_path/'whole'))
    assert same(state(model), loaded) and any('mass' in k and v.sum() > 0 for k, v in state(loaded).items())


def test_half_precision_leaves_topics_on_the_simplex(vocab, pairs, model, tmp_path):
    sharp = tiny(vocab).eval()
    sharp.load_state_dict(model.state_dict())
    with torch.no_grad():
        for phi in sharp.pgbn.topics:
            phi[1:] = 1e-10
            phi[0] = 1 - phi[1:].sum(0)
    loaded = load_model(save_model(sharp, tmp_path/'half', dtype=torch.float16))
    for phi, exact in zip(loaded.pgbn.topics, sharp.pgbn.topics):
        assert (phi > 0).all() and torch.allclose(phi.sum(0), torch.ones(phi.shape[1]), atol=1e-6) and torch.allclose(phi, exact, rtol=1e-2)
    assert loaded.text_to_image(pairs.tokens[:2]).isfinite().all()


def test_averages_stay_on_the_simplex(vocab, pairs):
    averaged = fit(tiny(vocab), pairs, 3, ema=.9).averaged()
    for phi in averaged.pgbn.topics: assert torch.allclose(phi.sum(0), torch.ones(phi.shape[1]), atol=1e-5)
    assert averaged.sampler.pgbn is averaged.pgbn


@pytest.mark.parametrize('topics', ['mcmc', 'expected', 'adam'])
def test_one_seed_one_training(vocab, pairs, topics):
    first, again, other = (tiny(vocab, seed=s, topics=topics, hard=.5) for s in (0, 0, 1))
    for m in (first, again): fit(m, pairs, 3)
    assert same(state(first), again) and not same(state(first), other)


def test_a_broken_run_goes_on_as_if_it_had_not(vocab, pairs, tmp_path):
    whole = tiny(vocab)
    fit(whole, pairs, 4)
    half = tiny(vocab)
    fit(half, pairs, 2, folder=tmp_path)
    rest = tiny(vocab, seed=5)
    learner = Learner(rest, pairs, batch_size=8, schedule='constant', clip=None, folder=tmp_path)
    assert learner.resume()
    learner.fit(4, progress=False)
    assert same(state(whole), rest)


def test_autocast_and_channels_last(vocab, pairs):
    model = tiny(vocab, hard=.5).to(memory_format=torch.channels_last)
    log = fit(model, pairs, 3, autocast=torch.bfloat16).log
    assert all(np.isfinite(r['loss']) for r in log) and all(p.dtype == torch.float32 for p in (*model.parameters(), *model.pgbn.topics))


# --- other vocabularies


def test_words_without_the_grammar():
    vocab = Vocab.from_captions(['a small yellow bird', 'a large gray bird with a red beak', 'the brown owl'])
    pairs = Pairs(torch.rand(6, 3, 16, 16)*2 - 1, vocab.encode(['a small yellow bird', 'a large gray bird', 'the brown owl']*2), vocab)
    model = tiny(vocab, hard=.5)
    fit(model, pairs, 2, batch_size=6)
    assert not model.bag.bound and model.image_to_text(pairs.image).shape == (6, vocab.max_len) and model.sample_pairs(2).image.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match='bound tokens need the grammar'): tiny(vocab, bound=True)


# --- bad input


@pytest.mark.parametrize('changes, words', [(dict(wiring='grid'), "'raster' or 'stack' fit"), (dict(topics='gibbs'), "topics|learned"), (dict(game='chess'), 'unknown game'),
    (dict(width=8), "'width' is no size or weight"), (dict(weights=dict(kll=1.)), "'kll' is no size or weight"), (dict(weights=dict(kl=[1., 1.])), '2 values came for 3 places'),
    (dict(rows=((8,), (8,))), 'grow fit|16 fits'), (dict(rows=((8,), (8,), (8,), (16,))), '4 rows meet 3 layers'), (dict(side=32), '32 fits'), (dict(widths=(12,)), '1 to 1 rows'), (dict(widths=(12,), rows=((8, 16),)), '2 or more'),
    (dict(widths=(4, 8)), 'grow|shrink'), (dict(judge=dict(code='words')), "'map', or 'tile'|'map' or 'tile' fit")])
def test_models_that_are_refused(vocab, changes, words):
    with pytest.raises(ValueError, match=words): tiny(vocab, **changes)


def test_input_that_is_refused(model, pairs, vocab):
    p = pairs[:2]
    for call, words in [(lambda: model.text_to_image(p.tokens, samples=0), 'ask for 1 or more'), (lambda: model.text_to_image(p.tokens, temperature=-1), 'at 0 or more'),
                        (lambda: model.text_to_image(torch.zeros(2, vocab.max_len + 1, dtype=torch.long)), 'reads at most'), (lambda: model.text_to_image(p.tokens*0), 'no known word'),
                        (lambda: model.image_to_text(torch.zeros(2, 3, 32, 32)), 'resize'), (lambda: model.sample_pairs(0), 'ask for 1 or more'),
                        (lambda: model.codes(model.read(p.tokens)[:2]), '2 layers came, 3 fit'), (lambda: model.read(p.tokens, burn=0, keep=0), 'at least one'),
                        (lambda: next(model.turns(Pairs(torch.zeros(2, 3, 32, 32), p.tokens, vocab))), '16'), (lambda: model.pgbn.gibbs(Bag(vocab).count(p.tokens) - 1), '0 or more|from 0 on')]:
        with pytest.raises(ValueError, match=words): call()


def test_a_batch_that_says_one_thing_is_refused(vocab, pairs):
    with pytest.raises(ValueError, match='say the same'): next(tiny(vocab).train().turns(pairs[[0, 0]]))


# --- the paper's sizes


@slow
def test_the_sizes_of_the_paper_step_once(vocab):
    torch.manual_seed(0)
    columns = [[256, 128, 64, 32, 16], [512, 256, 128, 64, 32, 16], [1024, 512, 256, 128, 64, 32, 16]]
    model = VHEGAN(vocab, side=256, widths=(256, 128, 64), rows=((16, 32, 64), (32, 64, 128), (64, 128, 256)), trunk=(32, 64, 128, 256, 256, 256), d=512, top=.01,
        generator=dict(width=columns, blocks=2, squeeze=0, output='tanh', thin=2), judge=dict(width=[128, 256, 512], base=64, code='tile', balance=False), weights=dict(kl=.01, uncond=1.), warm=0, gibbs_share=0., end_to_end=False)
    millions = lambda m: sum(p.numel() for p in m.parameters())/1e6
    assert millions(model.generator) == pytest.approx(35.4, rel=.02) and millions(model.discriminators) == pytest.approx(127.8, rel=.02)
    batch = captioned_digits(2, side=256).pairs
    for turn in model.train().turns(batch):
        model.zero_grad(set_to_none=True)
        turn.loss.backward()
    assert model.text_to_image(batch.tokens[:1]).shape == (1, 3, 256, 256)
