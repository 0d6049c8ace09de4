"""HDGAN: every switch trains, draws and saves; each turn moves its player and nobody else; terms by hand; bad input is refused; the stage for 512 px."""
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jointgen.adversaries import GAMES
from jointgen.digits import captioned_digits
from jointgen.image_nets import image_pyramid
from jointgen.joint import capabilities, load_model, save_model
from jointgen.learner import Learner
from jointgen.models.hdgan import HDGAN, SIZES, WEIGHTS, default_widths, grow, pyramid_gaps
from jointgen.pairs import Pairs
from jointgen.sentences import FrozenSentences, SentenceEncoder, Sentences

TINY = dict(side=16, scales=(8, 16), widths=(16, 12, 8), d_text=12, condition=6, noise=4, judge_width=16, text_width=8, encoder_sizes=dict(hidden=16, embedding=8))
PAPER = dict(valid=True, kernel=3, padding='reflect', activation='leaky', init=.02, output='tanh', patches=[1, 3], balance=False)
SWITCHES = [{}, dict(encoder='learned'), dict(scales=(16,)), dict(blocks=2), dict(output='tanh'), dict(text='map'), dict(log_std=-1.5), dict(patches=[1, 5]), PAPER,
            *(dict(game=g) for g in GAMES), dict(weights=dict(local=0.)), dict(hard=0.), dict(hard=1.), dict(careful=True)]
ADAM = dict(lr=2e-3, betas=(.5, .99), weight_decay=0.)
slow = pytest.mark.skipif(not os.environ.get('JOINTGEN_SLOW'), reason='slow: set JOINTGEN_SLOW=1')


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, seed=0, **changes):
    torch.manual_seed(seed)
    return HDGAN(vocab, **TINY | changes)


def fit(model, data, steps, **options):
    return Learner(model, data, **dict(batch_size=8, schedule='constant', optimizer=ADAM, clip=None) | options).fit(steps, progress=False)


def state(module): return {k: v.clone() for k, v in module.state_dict().items()}


def same(before, module): return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(64, side=16).pairs


@pytest.fixture(scope='module')
def vocab(pairs): return pairs.vocab


# --- switches


@pytest.mark.parametrize('switch', SWITCHES, ids=lambda s: '-'.join(f'{k}={v}' for k, v in s.items())[:40] or 'default')
def test_every_switch_trains_draws_and_saves(vocab, pairs, switch, tmp_path):
    model = tiny(vocab, **switch)
    log = fit(model, pairs, 3).log
    assert [r['player'] for r in log[:2]] == ['discriminator', 'generator'] and all(np.isfinite(r['loss']) for r in log)
    model.eval()
    image = model.text_to_image(pairs.tokens[:3], samples=2, generator=generator())
    assert image.shape == (6, 3, 16, 16) and image.abs().max() <= 1 and image.dtype == torch.float32
    loaded = load_model(save_model(model, tmp_path/'m'))
    assert torch.allclose(loaded.text_to_image(pairs.tokens[:3], samples=2, generator=generator()), image, atol=1e-5)


def test_capabilities(vocab):
    assert capabilities(HDGAN) == dict(sample_pairs=False, text_to_image=True, image_to_text=False, reconstruct=False)
    assert set(tiny(vocab).players()) == {'discriminator', 'generator'} and set(SIZES).isdisjoint(WEIGHTS)


def test_default_widths(vocab):
    assert default_widths(32) == (96, 64, 48, 32) and len(default_widths(512)) == 8
    for side in (8, 64): assert HDGAN(vocab, side=side, scales=(side,)).generator.widths == default_widths(side)


# --- the game


@pytest.mark.parametrize('encoder', ['frozen', 'learned'])
def test_a_turn_moves_its_player_and_nobody_else(vocab, pairs, encoder):
    model = tiny(vocab, encoder=encoder).train()
    reader = state(model.encoder)
    learner = Learner(model, pairs, batch_size=8, optimizer=ADAM, clip=None)
    turns = model.turns(pairs[:8])
    judge = next(turns)
    weights = lambda net: {k: p.detach().clone() for k, p in net.named_parameters()}
    maker, judges = weights(model.generator), weights(model.discriminators)
    learner._move(judge, 10)
    assert all(torch.equal(p, maker[k]) for k, p in model.generator.named_parameters())
    assert all(not torch.equal(p, judges[k]) for k, p in model.discriminators.named_parameters())
    assert same(reader, model.encoder) == (encoder == 'frozen')
    judges, heard = weights(model.discriminators), weights(model.encoder)
    learner._move(next(turns), 10)
    assert all(torch.equal(p, judges[k]) for k, p in model.discriminators.named_parameters())
    assert all(torch.equal(p, heard[k]) for k, p in model.encoder.named_parameters())
    assert sum(not torch.equal(p, maker[k]) for k, p in model.generator.named_parameters()) > .9*len(maker)


def test_one_generator_pass_a_step(vocab, pairs):
    model, calls = tiny(vocab).train(), []
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    for turn in model.turns(pairs[:8]): pass
    assert len(calls) == 1


@pytest.mark.parametrize('balance', [True, False])
def test_terms_by_hand(vocab, pairs, balance):
    model = tiny(vocab, balance=balance, weights=dict(pair=2., local=.5), patches=[1, 5]).train()
    torch.manual_seed(1)
    real, fake = ({8: torch.rand(4, 3, 8, 8)*2 - 1, 16: torch.rand(4, 3, 16, 16)*2 - 1} for _ in range(2))
    said, wrong = torch.randn(2, 4, 12)
    terms, logits = model.judge_terms(real, fake, said, wrong)
    assert list(terms) == ['pair_8', 'local_8', 'pair_16', 'local_16'] and logits['local_16'][0].shape == (4, 5, 5)
    for s in (8, 16):
        match, mismatch, made = logits[f'pair_{s}']
        half = .5 if balance else 1.
        assert torch.allclose(terms[f'pair_{s}'], 2*((match - 1).square().mean() + half*(mismatch.square().mean() + made.square().mean())))
        true, false = logits[f'local_{s}']
        assert torch.allclose(terms[f'local_{s}'], .5*((true - 1).square().mean() + false.square().mean()))
    fooled = model.fool_terms(fake, said, logits)
    assert torch.allclose(fooled['pair_8'], 2*(logits['pair_8'][2] - 1).square().mean())  # the discriminators have not moved
    assert torch.allclose(fooled['local_16'], .5*(logits['local_16'][1] - 1).square().mean())


def test_no_weight_no_term(vocab, pairs):
    model = tiny(vocab, weights=dict(local=0.)).train()
    terms, _ = model.judge_terms(*({s: torch.zeros(4, 3, s, s) for s in (8, 16)} for _ in range(2)), torch.zeros(4, 12), torch.zeros(4, 12))
    assert list(terms) == ['pair_8', 'pair_16']


def test_relativistic_generator_compares(vocab, pairs):
    model = tiny(vocab, game='relativistic').train()
    fake = {s: torch.rand(4, 3, s, s, generator=generator()) for s in (8, 16)}
    _, logits = model.judge_terms(fake, fake, torch.zeros(4, 12), torch.zeros(4, 12))
    higher = {k: [row[0] + 5, *row[1:]] for k, row in logits.items()}
    low, high = (sum(model.fool_terms(fake, torch.zeros(4, 12), x).values()) for x in (logits, higher))
    assert low < high and low.item() == pytest.approx(4*np.log(2), abs=1e-3)


def test_what_is_logged(vocab, pairs):
    judge, maker = (turn.log for turn in tiny(vocab).train().turns(pairs[:8]))
    names = {f'pair_{s}_{k}' for s in (8, 16) for k in ('real', 'wrong', 'fake')} | {f'local_{s}_{k}' for s in (8, 16) for k in ('real', 'fake')}
    assert set(judge) == names and set(maker) == {'kl', 'pyramid_8'} and maker['kl'].item() >= 0


def test_the_generator_learns_to_fool_a_frozen_discriminator(vocab, pairs):
    model = tiny(vocab).train()
    fit(model, pairs, 20)
    optimizer, scores = torch.optim.Adam(model.generator.parameters(), 2e-3), []
    for _ in range(40):
        *_, turn = model.turns(pairs[:16])
        images = dict(zip((8, 16), model.generator(model.read(pairs.tokens[:16])).images))
        with torch.no_grad(): scores.append([abs(net(images[int(s)]).local.mean().item() - 1) for s, net in model.discriminators.items()])
        optimizer.zero_grad(); turn.loss.backward(); optimizer.step()
    first, last = np.array(scores[:4]).mean(0), np.array(scores[-4:]).mean(0)
    assert (last < first).all()


def test_a_short_training(vocab):
    data = captioned_digits(200, side=16, subsets=('Single',)).pairs
    log = fit(tiny(vocab, widths=(32, 24, 16)), data, 60, batch_size=16, ema=.9, autocast=torch.bfloat16).log
    gaps = [r['pyramid_8'] for r in log if r['player'] == 'generator']
    assert all(np.isfinite(r['loss']) for r in log) and np.mean(gaps[-10:]) < np.mean(gaps[:10])


def test_resumes_bit_for_bit(vocab, pairs, tmp_path):
    whole = fit(tiny(vocab), pairs, 4, folder=tmp_path/'a')
    fit(tiny(vocab), pairs, 2, folder=tmp_path/'b')
    torch.manual_seed(99)
    resumed = Learner(tiny(vocab, seed=5), pairs, batch_size=8, schedule='constant', optimizer=ADAM, clip=None, folder=tmp_path/'b')
    resumed.resume()
    resumed.fit(4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()))


# --- painting


def test_rows_temperature_and_modes(vocab, pairs):
    model = tiny(vocab, output='tanh')
    fit(model, pairs, 2)
    model.train()
    tokens = pairs.tokens[:3]
    cold = model.text_to_image(tokens, samples=2, temperature=0)
    assert torch.equal(cold[0], cold[1]) and not torch.equal(cold[0], cold[2]) and model.training
    assert torch.equal(cold, model.text_to_image(tokens, samples=2, temperature=0.))
    a, b = (model.text_to_image(tokens, generator=generator(s)) for s in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, model.text_to_image(tokens, generator=generator()))


def test_pyramid_holds_both_noises(vocab, pairs):
    model = tiny(vocab).eval()
    tokens, z, e = pairs.tokens[:3], torch.randn(3, 4), torch.randn(3, 6)
    held = model.pyramid(tokens, noise=z, condition_noise=e)
    assert [x.shape[-1] for x in held] == [8, 16] and all(torch.equal(a, b) for a, b in zip(held, model.pyramid(tokens, noise=z, condition_noise=e)))
    said = model.read(tokens)
    assert all(torch.allclose(a, b) for a, b in zip(held, model.pyramid(said, noise=z, condition_noise=e)))
    for other in (dict(noise=z), dict(condition_noise=e)): assert not torch.equal(model.pyramid(tokens, **other)[-1], held[-1])
    with pytest.raises(ValueError, match='noise is'): model.pyramid(tokens, noise=z[:2])
    with pytest.raises(ValueError, match='temperature is -1'): model.pyramid(tokens, temperature=-1)
    with pytest.raises(ValueError, match='samples is 0'): model.text_to_image(tokens, samples=0)


def test_judge(vocab, pairs):
    model = tiny(vocab, patches=[1, 5])
    seen = model.judge(image_pyramid(pairs.image[:3], (8, 16)), pairs.tokens[:3])
    assert {s: (tuple(p.shape), tuple(m.shape)) for s, (p, m) in seen.items()} == {8: ((3,), (3, 1, 1)), 16: ((3,), (3, 5, 5))}
    assert model.training and not seen[8][0].requires_grad
    with pytest.raises(ValueError, match='1 sizes of pictures'): model.judge([pairs.image[:3]], pairs.tokens[:3])


def test_pyramid_gaps():
    x = torch.rand(2, 3, 16, 16, generator=generator())
    images = dict(zip((4, 8, 16), image_pyramid(x, (4, 8, 16))))
    assert {k: round(v.item(), 6) for k, v in pyramid_gaps(images).items()} == dict(pyramid_4=0., pyramid_8=0.)
    assert pyramid_gaps(images | {4: images[4] + .25})['pyramid_4'].item() == pytest.approx(.25, abs=1e-6) and pyramid_gaps({16: x}) == {}


# --- sentences


class Bag(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.d, self.table = d, nn.Embedding(n, d)

    def forward(self, tokens): return self.table(tokens).mean(1)


def test_encoders_are_plugged_in(vocab, pairs):
    torch.manual_seed(0)
    frozen = tiny(vocab).use_sentences(Bag(len(vocab), 12), pairs.tokens)
    assert isinstance(frozen.encoder, FrozenSentences) and (frozen.read(pairs.tokens).std(0) - 1).abs().max() < 1e-3
    table = frozen.encoder.encoder.table.weight.clone()
    fit(frozen, pairs, 2)
    assert torch.equal(frozen.encoder.encoder.table.weight, table)
    same = FrozenSentences(SentenceEncoder(vocab, 12), pairs.tokens)
    assert tiny(vocab).use_sentences(same).encoder is same
    learned = tiny(vocab, encoder='learned').use_sentences(SentenceEncoder(vocab, 12))
    assert isinstance(learned.encoder(pairs.tokens[:2]), Sentences) and all(p.requires_grad for p in learned.encoder.parameters())


def test_an_encoder_of_another_width(vocab, pairs):
    for encoder in (Bag(len(vocab), 13), FrozenSentences(SentenceEncoder(vocab, 13))):
        with pytest.raises(ValueError, match='13 numbers, 12 fits: build HDGAN with d_text=13'): tiny(vocab).use_sentences(encoder)


# --- bad input


def test_unknown_names_and_sizes(vocab):
    for wrong, words in ((dict(side=32), 'is 16, 32 fits'), (dict(scales=(8, 12, 16)), 'must double'), (dict(patches=[1, 6]), 'R is 6'), (dict(patches=[1]), 'one R each fits'),
                         (dict(encoder='bert'), "'frozen' or 'learned'"), (dict(game='wasserstein'), 'unknown game'), (dict(width=3), 'no size or weight'),
                         (dict(weights=dict(gp=1.)), 'no size or weight'), (dict(widths=(8, 8)), '2 widths lead to 8 px'), (dict(text='film'), "'tile' or 'map'")):
        with pytest.raises(ValueError, match=words): tiny(vocab, **wrong)


def test_batches_without_a_mismatch(vocab, pairs):
    model = tiny(vocab)
    with pytest.raises(ValueError, match='batch of 1 holds no mismatch'): next(model.turns(pairs[:1]))
    alike = Pairs(pairs.image[:4], pairs.tokens[:1].repeat(4, 1), vocab)
    with pytest.raises(ValueError, match='4 captions say the same'): next(model.turns(alike))


def test_pictures_and_captions_that_do_not_fit(vocab, pairs):
    model = tiny(vocab)
    with pytest.raises(ValueError, match='32 x 32, 16 x 16 fits'): next(model.turns(captioned_digits(4, side=32).pairs))
    with pytest.raises(ValueError, match='at most 40'): model.text_to_image(F.pad(pairs.tokens[:2], (0, 1)))
    with pytest.raises(ValueError, match='no known word'): model.text_to_image(torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize('player, net, name', [('discriminator', 'discriminators', 'local_16'), ('generator', 'generator', 'pair_8')])
def test_nan_names_player_and_term(vocab, pairs, player, net, name):
    model = tiny(vocab).train()
    if player == 'discriminator': model.discriminators['16'].local.bias.data.fill_(torch.nan)
    else: model.fool_terms = lambda *args: dict(pair_8=torch.tensor(torch.nan), local_8=torch.tensor(1.))
    with pytest.raises(ValueError, match=f"player '{player}': {name} = nan"): list(model.turns(pairs[:8]))


def test_nan_gradient_names_player_and_term(vocab, pairs):
    model = tiny(vocab, careful=True).train()
    honest = model.fool_terms
    root = lambda fake: (0*fake[8].mean()).sqrt()  # 0, with an endless slope
    model.fool_terms = lambda fake, *rest: honest(fake, *rest) | dict(root=root(fake))
    with pytest.raises(ValueError, match="player 'generator': the gradient of root is not finite"): list(model.turns(pairs[:8]))
    model.sizes['careful'] = False  # then the learner names the player
    with pytest.raises(ValueError, match="player 'generator': grad_norm = nan"): fit(model, pairs, 1)


# --- twice the side


def test_growing(vocab, pairs, tmp_path):
    model = tiny(vocab)
    fit(model, pairs, 2)
    large = grow(model, blocks=1)
    tokens, z, e = pairs.tokens[:2], torch.randn(2, 4), torch.randn(2, 6)
    small = model.pyramid(tokens, noise=z, condition_noise=e)
    grown = large.pyramid(tokens, noise=z, condition_noise=e)
    assert [x.shape[-1] for x in grown] == [8, 16, 32] and all(torch.equal(a, b) for a, b in zip(small, grown))
    before, reader = state(large.generator.base), state(large.encoder)
    log = fit(large, captioned_digits(16, side=32).pairs, 2).log
    assert same(before, large.generator.base) and same(reader, large.encoder) and list(large.discriminators) == ['32']
    assert set(log[-1]) >= {'kl', 'pyramid_8', 'pyramid_16'} and np.isfinite(log[-1]['loss'])
    loaded = load_model(save_model(large.eval(), tmp_path/'m'))
    assert torch.allclose(loaded.text_to_image(tokens, temperature=0), large.text_to_image(tokens, temperature=0), atol=1e-5)
    with pytest.raises(ValueError, match='has grown once'): grow(large)


def test_the_same_term_pulls_to_the_frozen_picture(vocab):
    large = grow(tiny(vocab), blocks=1, weights=WEIGHTS | dict(pair=0., local=0.))
    data = captioned_digits(16, side=32).pairs
    optimizer, gaps = torch.optim.Adam([p for p in large.generator.parameters() if p.requires_grad], 2e-3), []
    large.train()
    large.judge_terms = lambda *args: (dict(none=torch.zeros((), requires_grad=True)), {})
    for _ in range(12):
        *_, turn = large.turns(data)  # with no other term
        gaps.append(turn.loss.item())
        optimizer.zero_grad(); turn.loss.backward(); optimizer.step()
    assert gaps[-1] < .8*gaps[0]


@slow
def test_512_builds_and_steps_at_full_size(vocab):
    """The paper's generator for 256 px, frozen, and its stage for 512 px: one step on pictures of that size."""
    torch.manual_seed(0)
    model = HDGAN(vocab, side=256, scales=(64, 128, 256), widths=(1024, 512, 512, 256, 256, 128, 64), d_text=1024, condition=128, noise=100, patches=[1, 3, 5],
        judge_width=512, text_width=128, **{k: v for k, v in PAPER.items() if k != 'patches'})
    large = grow(model, blocks=3).to(memory_format=torch.channels_last)
    assert large.scales == (64, 128, 256, 512) and large.generator.widths[-1] == 32
    before, new = state(large.generator.base), state(large.generator.stage)
    data = captioned_digits(4, side=64).pairs
    data = Pairs(F.interpolate(data.image, scale_factor=8), data.tokens, vocab)
    log = fit(large, data, 1, batch_size=2, autocast=torch.bfloat16).log
    assert all(np.isfinite(r['loss']) for r in log) and same(before, large.generator.base) and not same(new, large.generator.stage)
    assert large.text_to_image(data.tokens[:1]).shape == (1, 3, 512, 512)
