import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jointgen.digits import captioned_digits, draw_slots, parse_caption
from jointgen.joint import JointModel, SamplesPairs, capabilities
from jointgen.metrics import load_reader, pair_consistency
from jointgen.models.mxq_vae import MXQVAE
from jointgen.pairs import Pairs
from jointgen.sampling import GivenCaptions, code_nats, continue_codes, controls, crossover, draw_pairs, draw_scores, drawable, sweep, temperature_sweep


def generator(seed=0): return torch.Generator().manual_seed(seed)


def equal(a, b): return torch.equal(a.image, b.image) and torch.equal(a.tokens, b.tokens)


class Painter:
    "Paint what a caption says; with chance `slip`, what its neighbour says."
    def __init__(self, vocab): self.vocab = vocab

    def text_to_image(self, tokens, *, generator=None, slip=0.):
        slips = torch.rand(len(tokens), generator=generator) < slip
        return draw_slots([parse_caption(c) for c in self.vocab.decode(torch.where(slips[:, None], tokens.roll(1, 0), tokens))])


class Stubborn(JointModel):
    "Draw the same pair for ever, or any pair, as the temperature says; leave no seed unused."
    def __init__(self, data): super().__init__(data.vocab); self.pairs, self.asked = data.pairs, []

    def sample_pairs(self, n, *, generator=None, temperature=1.):
        self.asked.append(n)
        i = (torch.randint(len(self.pairs), (n,), generator=generator)*temperature).long()
        return self.pairs[i]


@pytest.fixture(scope='module')
def data(): return captioned_digits(200, 'test')


@pytest.fixture(scope='module')
def reader(): return load_reader(32)


@pytest.fixture(scope='module')
def model(data):
    "A tiny model, untrained, whose answers differ clearly."
    torch.manual_seed(0)
    model = MXQVAE(data.vocab, k=16, d=16, n_text=2, widths=(4, 4, 4), res_blocks=0, text_sizes=dict(width=16, layers=1), prior=dict(d=16, layers=2, heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3*torch.randn(p.shape, generator=generator(1)))
    return model


# --- one seed, one draw

@pytest.mark.parametrize('n', [0, 1, 31, 32, 33, 70])
def test_pair_i_does_not_depend_on_how_many_are_drawn(model, n):
    many, few = draw_pairs(model, 70, seed=3), draw_pairs(model, n, seed=3)
    assert len(few) == n and equal(few, many[:n]) and few.vocab == model.vocab


def test_a_draw_depends_on_its_seed_alone(model):
    torch.manual_seed(0); first = draw_pairs(model, 5, seed=3)
    torch.manual_seed(1); torch.rand(7)
    assert equal(first, draw_pairs(model, 5, seed=3)) and not equal(first, draw_pairs(model, 5, seed=4))
    assert not first.image.requires_grad and (first.image*2).requires_grad_().sum().backward() is None  # fit for training


def test_blocks_have_one_size(data):
    model = Stubborn(data)
    draw_pairs(model, 70); draw_pairs(model, 10, block=4)
    assert model.asked == [32, 32, 32, 4, 4, 4]


def test_options_follow_the_model(model, data):
    assert controls(model) == ('temperature', 'top_k', 'top_p') and controls(Stubborn(data)) == ('temperature',)
    assert controls(GivenCaptions(Painter(data.vocab), data.captions)) == ('slip',)
    assert equal(draw_pairs(model, 4, temperature=.1, top_k=None), draw_pairs(model, 4, temperature=.1))
    assert not equal(draw_pairs(model, 4, temperature=.1), draw_pairs(model, 4))
    assert equal(draw_pairs(model, 4, seed=1, top_k=1), draw_pairs(model, 4, seed=2, temperature=0.))


@pytest.mark.parametrize('options, says', [(dict(n=1, warmth=1.), 'Stubborn has no warmth, it takes temperature'), (dict(n=1, top_k=3), 'no top_k'),
                                           (dict(n=-1), 'n is -1'), (dict(n=1, block=0), 'block is 0')])
def test_draws_that_make_no_sense_are_refused(data, options, says):
    with pytest.raises(ValueError, match=says): draw_pairs(Stubborn(data), **options)


def test_what_draws_no_pairs_is_refused(data):
    for other in (Painter(data.vocab), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match='draws no pairs by itself'): draw_pairs(other, 1)


# --- scores

def test_scores_of_real_and_of_repeated_pairs(data, reader):
    real, same = draw_scores(data.pairs, reader), draw_scores(data.pairs[[0]*50], reader)
    assert real['consistency'] == pair_consistency(data.pairs, data.vocab, reader)['average'] > .97
    assert real['parsed'] == 1 and real['mix'] < .12 and real['distinct'] > .7 and .5 < real['spread'] < 1.3
    assert abs(same['distinct'] - .02) < 1e-9 and abs(same['mix'] - .8) < 1e-9 and same['spread'] < 1e-6
    shuffled = Pairs(data.pairs.image, data.pairs.tokens.roll(1, 0), data.vocab)
    assert draw_scores(shuffled, reader)['consistency'] < .1


def test_a_sweep_is_its_single_draws(data, reader):
    model = Stubborn(data)
    rows = temperature_sweep(model, (0., .5, 1.), 64, 5, reader=reader)
    assert [r['temperature'] for r in rows] == [0., .5, 1.]
    for r in rows: assert r == dict(temperature=r['temperature']) | draw_scores(draw_pairs(model, 64, seed=5, temperature=r['temperature']), reader)
    assert rows[0]['spread'] < 1e-6 < rows[2]['spread'] and rows[0]['distinct'] < rows[1]['distinct']
    assert sweep(model, [{}], n=64, seed=5, reader=reader) == [{k: v for k, v in rows[2].items() if k != 'temperature'}]


# --- codes

def test_nothing_given_is_plain_sampling_and_everything_given_comes_back(model):
    plain = model.prior.sample(6, legal=model.legal, generator=generator(2))
    assert torch.equal(continue_codes(model, plain[:, :0], generator=generator(2)), plain)
    assert torch.equal(continue_codes(model, plain), plain)


@pytest.mark.parametrize('options', [dict(), dict(temperature=0), dict(top_k=3), dict(top_p=.5)])
def test_a_continuation_is_what_forced_sampling_draws(model, options):
    given = torch.randint(model.k, (1, 7), generator=generator())
    forced = torch.ones(model.n, model.k, dtype=torch.bool)
    forced[:7] = F.one_hot(given[0], model.k).bool()
    want = model.prior.sample(1, legal=forced, generator=generator(), top_k=1)
    assert torch.equal(continue_codes(model, given, temperature=0), want)
    many = continue_codes(model, given.expand(300, -1), generator=generator(), **options)
    assert torch.equal(many[:, :7], given.expand(300, -1))
    with torch.no_grad(): p = model.prior(want)[0, 7].div(options.get('temperature', 1.) or 1e-6).softmax(-1)
    if options: assert p[many[:, 7]].min() > 0 and len(many[:, 7].unique()) <= (3 if 'top_k' in options else model.k)
    else: assert (torch.bincount(many[:, 7], minlength=model.k)/300 - p).abs().max() < .12


def test_rows_go_on_from_their_own_beginnings(model):
    given = torch.randint(model.k, (9, 5), generator=generator())
    together = continue_codes(model, given, temperature=0)
    assert all(torch.equal(together[i:i + 1], continue_codes(model, given[i:i + 1], temperature=0)) for i in range(9))


def test_a_continuation_obeys_legal_and_keeps_the_mode(model):
    old = model.legal.clone()
    try:
        model.legal[:, ::2] = False
        codes = continue_codes(model, torch.zeros(50, 4, dtype=torch.int64), temperature=30., generator=generator())
        assert not codes[:, :4].any() and (codes[:, 4:] % 2 == 1).all() and not model.training
    finally: model.legal.copy_(old)


def test_beginnings_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=f'has {model.n + 1} codes, a sequence has {model.n}'): continue_codes(model, torch.zeros(1, model.n + 1, dtype=torch.int64))
    for code in (-1, model.k):
        with pytest.raises(ValueError, match='0 to 15 fits'): continue_codes(model, torch.full((1, 3), code))


def test_nats_add_up_to_the_priors_loss(model):
    codes = torch.randint(model.k, (5, model.n), generator=generator())
    nats = code_nats(model, codes)
    assert nats.shape == codes.shape and (nats > 0).all() and abs(nats.mean().item() - model.prior.loss(codes).item()) < 1e-4
    changed = codes.clone(); changed[:, -1] = (changed[:, -1] + 1) % model.k
    assert torch.allclose(code_nats(model, changed)[:, :-1], nats[:, :-1], atol=1e-5)  # the past does not know the future
    every = torch.stack([torch.cat([codes[0, :-1], torch.tensor([k])]) for k in range(model.k)])
    assert math.isclose(code_nats(model, every)[:, -1].neg().exp().sum().item(), 1, abs_tol=1e-4)


def test_a_crossover_begins_with_one_and_ends_with_the_other():
    a, b = torch.arange(6), torch.arange(6) + 10
    rows = crossover(a, b, range(7))
    assert torch.equal(rows[0], a) and torch.equal(rows[-1], b)
    assert all((rows[c] >= 10).sum() == c and torch.equal(rows[c] % 10, a) for c in range(7))
    assert crossover(a, b, []).shape == (0, 6)
    for cuts in ([7], [-1]):
        with pytest.raises(ValueError, match='0 to 6 fit'): crossover(a, b, cuts)
    with pytest.raises(ValueError, match='6 and 5 codes'): crossover(a, b[:5], [1])


# --- pairs by composition

def test_given_captions_draws_pairs_from_captions_of_data(data, reader):
    painter = GivenCaptions(Painter(data.vocab), data.captions[:50])
    assert isinstance(painter, SamplesPairs) and capabilities(painter) == dict(sample_pairs=True, text_to_image=False, image_to_text=False, reconstruct=False)
    assert 'p_data(text) p(image | text)' in repr(painter) and 'Painter' in repr(painter)
    drawn = draw_pairs(painter, 100, seed=2)
    assert set(drawn.captions) <= set(data.captions[:50]) and len(set(drawn.captions)) < 50  # with replacement
    assert equal(drawn, draw_pairs(painter, 100, seed=2))
    scores = [draw_scores(draw_pairs(painter, 200, seed=2, slip=slip), reader)['consistency'] for slip in (0., .5, 1.)]
    assert scores[0] > .97 > .7 > scores[1] > .3 > .1 > scores[2]


def test_any_model_that_paints_can_draw_pairs(data, model, reader):
    assert drawable(model) is model
    painter = drawable(Painter(data.vocab))
    assert isinstance(painter, GivenCaptions) and len(painter.tokens) == 1000
    held_out = set(captioned_digits(1000, 'test', seed=1).captions)
    assert set(draw_pairs(painter, 40).captions) <= held_out
    with pytest.raises(ValueError, match='paints no captions'): drawable(reader)


def test_what_needs_no_given_captions_is_refused(data, model, reader):
    with pytest.raises(ValueError, match='MXQVAE draws pairs itself'): GivenCaptions(model, data.captions)
    with pytest.raises(ValueError, match='Reader paints no captions'): GivenCaptions(reader, data.captions)
    with pytest.raises(ValueError, match='no captions'): GivenCaptions(Painter(data.vocab), [])
    with pytest.raises(ValueError, match="unknown word 'purple'"): GivenCaptions(Painter(data.vocab), ['this is purple 3.'])
