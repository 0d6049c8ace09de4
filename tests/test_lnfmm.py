"""LNFMM and its recipe: every switch trains, draws and saves; the objective's terms do what they say; bad input is refused."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jointgen.digits import captioned_digits
from jointgen.joint import capabilities, load_model, save_model
from jointgen.learner import Learner
from jointgen.models.lnfmm import LNFMM, RELEASED, SIZES, WEIGHTS
from jointgen.pairs import Pairs
from jointgen.recipes import lnfmm as recipe
from jointgen.tied_codes import Mixed, kl_nats

TINY = dict(side=16, shared=16, private_v=8, private_t=4, widths=(8, 8, 8), res_blocks=1, encoder=dict(slots=4, width=8, layers=1),
            decoder=dict(slots=4, width=16, layers=1), link_sizes=dict(steps=2, hidden=8), prior_sizes=dict(steps=2, hidden=8),
            joint_sizes=dict(steps=2, hidden=8), warm_up=2)
LSTM = dict(text='lstm', encoder=dict(width=8, embedding=8), decoder=dict(hidden=8, embedding=8))
RELEASED_TINY = dict(RELEASED, prior_sizes=dict(steps=2, hidden=8, bound='sigmoid', base_std=.25))
SWITCHES = [{}, dict(link='affine'), dict(link='identity'), dict(prior='gaussian'), dict(posterior='learned'), dict(prior='gaussian', posterior='learned'),
            dict(private_v=0), LSTM, RELEASED_TINY, dict(weights=dict(adversary=.1)), dict(features=3*16*16), dict(warm_up=0)]


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, seed=0, **changes):
    torch.manual_seed(seed)
    return LNFMM(vocab, **TINY | changes)


def lively(model):
    "Take a model away from its start, where conditions are not heard yet."
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn(p.shape, generator=generator(1)))
    return model


def fit(model, data, steps, **options):
    return Learner(model, data, **dict(batch_size=8, schedule='constant') | options).fit(steps, progress=False)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(48, side=16).pairs


@pytest.fixture(scope='module')
def vocab(pairs): return pairs.vocab


# --- switches


@pytest.mark.parametrize('switch', SWITCHES, ids=lambda s: '-'.join(s) or 'default')
def test_every_switch_trains_draws_and_saves(vocab, pairs, switch, tmp_path):
    model = tiny(vocab, **switch)
    log = fit(model, pairs, 5).log
    players = ['discriminator', 'model'] if 'adversary' in switch.get('weights', {}) else ['model']
    assert [r['player'] for r in log[:len(players)]] == players and all(np.isfinite(r['loss']) for r in log) and int(model.trained) == 5
    model.eval()
    few = pairs[:3]
    words, image = model.image_to_text(few.image, samples=2, generator=generator()), model.text_to_image(few.tokens, samples=2, generator=generator())
    assert words.shape == (6, 40) and image.shape == (6, 3, 16, 16) and image.abs().max() <= 1
    assert model.reconstruct(few).image.shape == (3, 3, 16, 16) and len(model.sample_pairs(2, generator=generator())) == 2
    loaded = load_model(save_model(model, tmp_path/'m'))
    assert torch.equal(loaded.image_to_text(few.image, samples=2, generator=generator()), words)
    assert torch.allclose(loaded.text_to_image(few.tokens, samples=2, generator=generator()), image, atol=1e-5)


def test_capabilities(): assert all(capabilities(LNFMM).values())


def test_unknown_names_and_sizes(vocab):
    for wrong, words in ((dict(shard=3), 'no size or weight'), (dict(weights=dict(gama=1.)), 'no size or weight'), (dict(link='linear'), "use 'affine'"),
                         (dict(prior='normal'), "use 'flow'"), (dict(posterior='free'), "use 'fixed'"), (dict(text='conv'), "use 'attention'"),
                         (dict(private_t=0), 'only private_v may be 0'), (dict(shared=18), 'dealt'), (dict(private_t=3), 'dealt')):
        with pytest.raises(ValueError, match=words): LNFMM(vocab, **TINY | wrong)
    with pytest.raises(ValueError, match='even width'): LNFMM(vocab, **TINY | LSTM | dict(private_t=3))


# --- the objective


def terms_of(model, pairs):
    v, t = model.encode_image(pairs.image), model.encode_text(pairs.tokens)
    return model.pair_terms(pairs, v, t, model.draw(v, t))


def reached(term, module):
    grads = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.any()) for g in grads)


def test_nats_do_not_change_with_the_batch(vocab, pairs):
    model = tiny(vocab).eval()
    v, t = model.encode_image(pairs.image), model.encode_text(pairs.tokens)
    for nats in (model.word_nats(pairs.tokens, t.s, t.z), model.pixel_nats(pairs.image, model.paint(v.s, v.z)), kl_nats(model.prior_t, t.z, t.log_std, t.s)):
        assert nats.shape == (48,)
    assert torch.allclose(model.word_nats(pairs.tokens, t.s, t.z)[:5], model.word_nats(pairs.tokens[:5], t.s[:5], t.z[:5]), atol=1e-4)


def test_the_picture_leads_and_private_codes_are_shut_at_first(vocab, pairs):
    model = tiny(vocab, warm_up=100)
    terms = terms_of(model, pairs[:8])
    assert terms['text_drawn'] == 0 and terms['kl_t'] == 0 and terms['kl_v'] == 0
    assert not reached(terms['gap'], model.image_encoder) and reached(terms['gap'], model.text_encoder) and reached(terms['gap'], model.link)


@pytest.mark.parametrize('pull', [0., 1.])
def test_pull_says_who_moves_afterwards(vocab, pairs, pull):
    model = lively(tiny(vocab, warm_up=0, weights=dict(pull=pull)))
    terms = terms_of(model, pairs[:8])
    assert reached(terms['gap'], model.image_encoder) == bool(pull)
    assert reached(terms['text_crossed'], model.image_encoder) and reached(terms['image_crossed'], model.text_encoder)
    assert reached(terms['kl_t'], model.image_encoder) and reached(terms['kl_v'], model.text_encoder)  # conditions cross
    assert not reached(terms['text_drawn'], model.prior_t) and not reached(terms['image_drawn'], model.prior_v)


def test_every_weight_has_a_say(vocab, pairs):
    model = lively(tiny(vocab, link='affine', warm_up=0))
    terms = {k: x.detach() for k, x in terms_of(model, pairs[:16]).items()}
    whole = model.weigh(terms)
    for name in ('crossed', 'drawn_t', 'drawn_v', 'align', 'volume', 'free_t', 'free_v'):
        model.weights = WEIGHTS | {name: WEIGHTS[name] + .5}
        assert model.weigh(terms) != whole or (name.startswith('free') and terms[f'kl_{name[-1]}'] < WEIGHTS[name]), name
    model.weights = WEIGHTS | dict(align=0.)
    assert model.weigh(terms | dict(gap=torch.tensor(1e9))) == model.weigh(terms)  # the released code: alignment off


def test_codes_meet_where_they_must(vocab, pairs):
    model = tiny(vocab, link='identity', warm_up=0, weights=dict(align=1.))
    log = fit(model, pairs, 60, optimizer=dict(lr=3e-3)).log
    assert sum(r['gap'] for r in log[-10:]) < .5*sum(r['gap'] for r in log[:10])


def test_it_learns(vocab, pairs):
    log = fit(tiny(vocab, warm_up=20), lambda step: pairs[:16], 90, optimizer=dict(lr=5e-3)).log
    for name in ('text_own', 'text_crossed', 'image_own', 'image_crossed'):
        assert sum(r[name] for r in log[-8:]) < .85*sum(r[name] for r in log[:8]), name


# --- missing sides


@pytest.mark.parametrize('kind', ['image', 'tokens', 'both', 'all'])
def test_batches_with_missing_sides(vocab, pairs, kind):
    model = tiny(vocab, warm_up=0)
    parts = dict(image=dict(image=pairs.image[:4]), tokens=dict(tokens=pairs.tokens[:4]), both=dict(image=pairs.image[:4], tokens=pairs.tokens[:6]),
                 all=dict(pairs=pairs[:4], image=pairs.image[4:8], tokens=pairs.tokens[8:11]))[kind]
    turn, = model.turns(Mixed(**parts))
    turn.loss.backward()
    touched = lambda m: any(p.grad is not None and bool(p.grad.any()) for p in m.parameters())
    assert touched(model.image_encoder) == (kind != 'tokens') and touched(model.text_encoder) == (kind != 'image')
    assert touched(model.link) == (kind == 'all') and bool(turn.log) == (kind == 'all')


def test_a_lone_side_does_not_move_its_condition(vocab, pairs):
    model = tiny(vocab, warm_up=0, weights=dict(free_v=-1e9))
    model.pixel_nats = lambda image, painted: 0*painted.flatten(1).sum(1)  # only the KL is left
    loss = model.alone_terms(Mixed(image=pairs.image[:4]))
    rows = torch.autograd.grad(loss, model.image_encoder.net.layers[-1].weight)[0].flatten(1)
    shared = rows[:4]  # four cells: the channels that write s come first
    assert not shared.any() and rows.any()


def test_nothing_at_all(vocab, pairs):
    model = tiny(vocab)
    with pytest.raises(ValueError, match='neither pairs'): next(model.turns(pairs[:0]))
    for image, tokens in ((pairs.image[:1], pairs.tokens[:1]),):
        with pytest.raises(ValueError, match='2 or more fit'): next(model.turns(Pairs(image, tokens, vocab)))


# --- drawing


@pytest.fixture(scope='module')
def model(vocab, pairs):
    model = tiny(vocab, warm_up=4)
    fit(model, pairs, 10, optimizer=dict(lr=3e-3))
    return model.eval()


def test_samples_stand_beside_each_other(model, pairs):
    image, tokens = model.text_to_image(pairs.tokens[:3], samples=4, temperature=0), model.image_to_text(pairs.image[:3], samples=4, temperature=0)
    for x in (image, tokens):
        groups = x.unflatten(0, (3, 4))
        assert torch.allclose(groups.float(), groups[:, :1].float().expand_as(groups), atol=1e-5)
    single = model.text_to_image(pairs.tokens[:3], temperature=0)
    assert torch.allclose(single, image[::4], atol=1e-5)


def test_a_code_depends_on_its_own_caption_and_picture_only(model, pairs):
    v, t = model.encode_image(pairs.image), model.encode_text(pairs.tokens)
    for i in (0, 7):
        assert torch.allclose(model.encode_text(pairs.tokens[i:i + 1]).s, t.s[i:i + 1], atol=1e-5)
        assert torch.allclose(model.encode_image(pairs.image[i:i + 1]).s, v.s[i:i + 1], atol=1e-5)


def test_chance_comes_from_the_generator(model, pairs):
    torch.manual_seed(0)
    a = model.text_to_image(pairs.tokens[:2], samples=3, generator=generator(1)), model.image_to_text(pairs.image[:2], words=1., generator=generator(1)), model.sample_pairs(3, generator=generator(1))
    torch.manual_seed(1)
    b = model.text_to_image(pairs.tokens[:2], samples=3, generator=generator(1)), model.image_to_text(pairs.image[:2], words=1., generator=generator(1)), model.sample_pairs(3, generator=generator(1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2].image, b[2].image) and torch.equal(a[2].tokens, b[2].tokens)
    assert not torch.equal(a[0], model.text_to_image(pairs.tokens[:2], samples=3, generator=generator(2)))


def test_drawing_leaves_no_trace(model, pairs):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    image = model.text_to_image(pairs.tokens[:2])
    assert model.training and not image.requires_grad
    model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('call', [lambda m, p: m.image_to_text(p.image, samples=0), lambda m, p: m.text_to_image(p.tokens, samples=-1),
                                  lambda m, p: m.text_to_image(p.tokens, temperature=-1), lambda m, p: m.image_to_text(p.image, temperature=float('nan')),
                                  lambda m, p: m.sample_pairs(0), lambda m, p: m.sample_pairs(2, temperature=-.1)])
def test_draws_that_cannot_be(model, pairs, call):
    with pytest.raises(ValueError, match='ask for 1 or more'): call(model, pairs[:2])


def test_bad_input(model, pairs):
    with pytest.raises(ValueError, match='no known word'): model.text_to_image(torch.tensor([[1, 4, 4, 2]]))
    with pytest.raises(ValueError, match='at most 40'): model.text_to_image(torch.full((1, 41), 7))
    with pytest.raises(ValueError, match='16 x 16 fits'): model.image_to_text(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match='NaN|not finite|infinite|finite'): model.image_to_text(torch.full((1, 3, 16, 16), float('nan')))
    with pytest.raises(ValueError, match='resize'): next(model.turns(captioned_digits(4).pairs))


# --- the recipe


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    stage = dict(pairs=48, steps=5, batch_size=8, lr=1e-3)
    small = {k: v for k, v in TINY.items() if k != 'side'} | dict(side=32, widths=(8, 8, 8), shared=32, private_v=16)
    recipe.PRESETS['tiny'] = dict(model=small, copies=1, stage1=stage, stage2=stage)
    try: yield folder, recipe.train(folder, preset='tiny', seed=3)
    finally: del recipe.PRESETS['tiny']


def test_what_is_saved_is_what_was_trained(trained):
    folder, model = trained
    loaded, facts = load_model(folder/'lnfmm'), json.loads((folder/'lnfmm.json').read_text())['facts']
    assert loaded.config == model.config and facts['seed'] == 3 and '--preset tiny --seed 3' in facts['command'] and facts['stage2']['steps'] == 5
    for a, b in zip(loaded.parameters(), model.parameters()): assert torch.allclose(a, b, atol=2e-3)  # stored in float16
    assert {'stage1', 'stage2'} == set(json.loads((folder/'lnfmm_log.json').read_text()))


def test_a_finished_run_resumes_to_itself(trained):
    folder, model = trained
    again = recipe.train(folder, preset='tiny', seed=3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_scores_are_complete_and_json(trained):
    report = recipe.evaluate(trained[1], n=12, samples=3)
    assert json.loads(json.dumps(report, default=float))
    assert {'settings', 'captions', 'variety', 'images', 'codes', 'reconstructions', 'pairs'} <= set(report)
    assert {'exact', 'best', 'distinct'} <= set(report['captions']['all']) and 'average' in report['images']['slots']
    assert report['settings']['command'].startswith('jointgen evaluate lnfmm')
    assert recipe.score_codes(trained[1], captioned_digits(8, 'test')) == recipe.score_codes(trained[1], captioned_digits(8, 'test'))


def test_kinds_are_all_there():
    data = captioned_digits(40, 'test')
    kinds = recipe.kinds(data)
    assert sorted(kinds['all']) == list(range(40)) and sorted(kinds['Quad1-2']) == sorted(kinds['Quad1'] + kinds['Quad2'])
    said = [[c] for c in data.captions]
    assert all(v['exact'] == v['best'] == v['distinct'] == 1 for v in recipe.score_captions(said, data).values())


def test_unknown_preset():
    with pytest.raises(ValueError, match='tutorial or paper'): recipe.train('nowhere', preset='tutorail')


def test_pairs_can_be_taken_apart(pairs):
    batch = recipe.partly_paired(pairs, .5, batch_size=16, seed=1)
    a, b = batch(3), batch(3)
    assert torch.equal(a.image, b.image) and [len(a.pairs), len(a.image), len(a.tokens)] == [8, 4, 4]
    known = {tuple(t) for t in pairs[:24].tokens.tolist()}
    assert all(tuple(t) in known for t in a.pairs.tokens.tolist())
    assert recipe.partly_paired(pairs, 1.) is pairs
    for wrong in (0., 1.5):
        with pytest.raises(ValueError, match='more than 0'): recipe.partly_paired(pairs, wrong)


def test_handwriting_is_written_anew():
    assert recipe.more_handwriting(0) is None
    glyphs, labels = recipe.more_handwriting(1, seed=2)
    assert glyphs.shape == (8000, 28, 28) and len(labels) == 8000 and 0 <= glyphs.min() and glyphs.max() <= 1
    assert (recipe.more_handwriting(1, seed=2)[0] == glyphs).all()


def test_learning_rate():
    curve = [recipe.rise_and_fall(i, 2000) for i in range(2000)]
    assert curve[0] < .01 and max(curve) == curve[199] and curve[-1] < 1e-4 and all(b < a for a, b in zip(curve[199:], curve[200:]))


def test_comparisons_go_on_where_they_stopped(tmp_path, monkeypatch):
    calls = []
    def fake(changes, *, seed, **options): calls.append((tuple(changes), seed)); return dict(exact=.5 + .1*seed)
    monkeypatch.setattr(recipe, 'one_run', fake)
    out = tmp_path/'c.json'
    recipe.compare(out, {'a': {}, 'b': dict(link='identity')}, seeds=(0, 1))
    results = recipe.compare(out, {'a': {}, 'b': dict(link='identity')}, seeds=(0, 1, 2))
    assert len(calls) == 6 and [len(v) for v in results.values()] == [3, 3]
    assert '0.600 +-0.100' in recipe.spread_table(results)


def test_the_committed_results_meet_their_claims():
    report = json.loads((Path(__file__).parents[1]/'nbs/results/lnfmm.json').read_text())
    few = report['captions']['Quad1-2']
    assert report['settings']['n'] >= 2000 and few['exact'] >= .60 and few['best'] >= .85 and few['distinct'] >= 5
    assert report['images']['slots']['average'] >= .80 and report['pairs']['samples']['average'] >= .90


def test_the_papers_sizes_make_a_step():
    preset = recipe.PRESETS['paper']
    pairs = captioned_digits(4, side=64).pairs
    model = LNFMM(pairs.vocab, **preset['model'])
    assert model.widths == (992, 64, 32)
    log = Learner(model, pairs, batch_size=4, optimizer=dict(lr=1e-4)).fit(1, progress=False).log
    assert np.isfinite(log[0]['loss'])
    assert model.eval().image_to_text(pairs.image[:1], samples=2).shape == (2, 40)
