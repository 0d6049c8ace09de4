"""Manipulation: each hand does its own work, only the choice learns, what is kept is kept exactly, and training goes on where it was cut off."""
import json

import pytest
import torch

from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits, draw_slots
from jointgen.edit_scores import ask, edit_report, spoil
from jointgen.joint import capabilities, load, read_about, shipped, weights_folder
from jointgen.learner import Learner, player_parameters
from jointgen.manipulation import HANDS, RECIPE, Choice, Manipulator, Restoration, flat_then_down, load_manipulator, needed_hands, tint, train_manipulator
from jointgen.metrics import load_reader
from jointgen.models.dte_gan import DTEGAN
from jointgen.pairs import Pairs

TINY = dict(side=16, d_text=16, condition=8, noise=4, text=dict(hidden=16, embedding=8), generator=(8, 12, 8), hidden=8, discriminator=(8, 8, 12), judge=dict(branch=8, tile=8, contrast=16))


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, hand=None):
    torch.manual_seed(0)
    editor = Manipulator(vocab, side=16, hidden=8, painter=TINY)
    if hand is not None:
        with torch.no_grad(): editor.choice.choose.bias[hand] += 99
    return editor


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(12, side=16, subsets='Quad1').pairs


@pytest.fixture(scope='module')
def wanted(pairs): return ask(pairs.tokens, pairs.vocab, two=0., generator=seeded())


# --- hands


def test_a_tint_keeps_strokes_and_changes_hues():
    blue, red = (draw_slots([{'upper left': (color, '3')}], split='test', seed=4) for color in ('blue', 'red'))
    assert torch.allclose(tint(blue, red), red, atol=1e-5) and torch.allclose(tint(blue, blue), blue, atol=1e-5)
    other = draw_slots([{'upper left': ('red', '8')}], split='test', seed=5)
    assert torch.allclose(tint(blue, other)[:, 1:], torch.tensor(-1.), atol=1e-5)  # no green, no blue
    black = torch.full_like(blue, -1)
    assert torch.equal(tint(black, red), black) and tint(blue, black).isfinite().all()


@pytest.mark.parametrize('side', [16, 32, 64])
def test_needed_hands_know_their_work(side):
    draw = lambda *slots: draw_slots([dict([s]) for s in slots], split='test', seed=4, side=side)
    real = draw(('upper left', ('blue', '3')))
    need = lambda x: needed_hands(real, x)[0]
    assert not need(real).any()
    hues, strokes, gone = need(draw(('upper left', ('red', '3')))), need(draw(('upper left', ('blue', '8')))), need(torch.full_like(real, -1))
    assert set(hues.unique().tolist()) == {0, 1} and 2 in strokes and 1 not in strokes and 2 in gone
    for x in (hues, strokes, gone): assert x.shape == (4, 4) and not x[2:].any() and not x[:, 2:].any()


def test_most_spoilt_pictures_need_a_hand():
    real = captioned_digits(64, seed=1).pairs.image
    need = needed_hands(real, spoil(real, generator=seeded()))
    assert need.flatten(1).any(1).float().mean() > .7 and all((need == i).any() for i in range(3))


# --- the manipulator


def test_choice_compares():
    torch.manual_seed(0)
    choice, maps = Choice(6, 8), torch.randn(3, 2, 6, 4, 4, generator=seeded())
    out = choice(*maps)
    assert out.shape == (2, len(HANDS), 4, 4) and out.dtype == torch.float32
    for i in range(3):
        other = maps.clone(); other[i] += 1
        assert not torch.allclose(choice(*other), out)
    assert torch.allclose(choice(*maps.flip(1)), out.flip(0), atol=1e-5)


@pytest.mark.parametrize('hand', range(3))
def test_each_hand_does_its_work(pairs, wanted, hand):
    editor = tiny(pairs.vocab, hand)
    after = editor.edit(pairs.image, wanted, generator=seeded(1))
    noises = editor.painter.draw(len(pairs), seeded(1))
    painting = editor.painter.paint(wanted, noise=noises[0], condition_noise=noises[1])[0].clamp(-1, 1)
    assert torch.allclose(after, (pairs.image, tint(pairs.image, painting), painting)[hand], atol=1e-5) and after.abs().max() <= 1
    if hand == 0: assert torch.equal(after, pairs.image)


def test_same_generator_same_edit(pairs, wanted):
    editor = tiny(pairs.vocab, 2)
    one, same, other = (editor.edit(pairs.image, wanted, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(editor.edit(pairs.image, wanted, temperature=0, generator=seeded(1)), editor.edit(pairs.image, wanted, temperature=0, generator=seeded(2)))


def test_edit_leaves_no_trace(pairs, wanted):
    editor = tiny(pairs.vocab).train()
    before = {k: v.clone() for k, v in editor.state_dict().items()}
    editor.edit(pairs.image, wanted)
    assert editor.training and not editor.painter.training and all(torch.equal(v, before[k]) for k, v in editor.state_dict().items())


def test_only_the_choice_learns(pairs):
    torch.manual_seed(0)
    lesson = Restoration(pairs.vocab, editor=dict(side=16, painter=TINY))
    assert {id(p) for p in player_parameters(lesson)} == {id(p) for p in lesson.editor.choice.parameters()}
    before = {k: v.clone() for k, v in lesson.state_dict().items()}
    Learner(lesson, pairs, batch_size=8).fit(2, progress=False)
    assert {k.split('.')[1] for k, v in lesson.state_dict().items() if not torch.equal(v, before[k])} == {'choice'}


def test_bad_input(pairs, wanted):
    editor = tiny(pairs.vocab)
    for image, message in ((pairs.image[..., ::2, ::2], 'pictures are 8 x 8, 16 x 16 fits'), (pairs.image*torch.nan, 'NaN'), (3*pairs.image, 'pictures run from')):
        with pytest.raises(ValueError, match=message): editor.edit(image, wanted)
    with pytest.raises(ValueError, match='tokens have length 50'): editor.edit(pairs.image, torch.ones(12, 50, dtype=torch.long))
    with pytest.raises(ValueError, match='temperature is -1'): editor.edit(pairs.image, wanted, temperature=-1)
    with pytest.raises(ValueError, match="'depth' is no size"): Manipulator(pairs.vocab, painter=dict(depth=3))


# --- learning


def test_restoring_refuses(pairs):
    lesson = Restoration(pairs.vocab, editor=dict(side=16, painter=TINY))
    with pytest.raises(ValueError, match='one pair came'): lesson.loss(pairs[:1])
    with pytest.raises(ValueError, match='16 x 16 fits'): lesson.loss(Pairs(pairs.image[..., ::2, ::2], pairs.tokens, pairs.vocab))


def test_the_third_hand_counts_more(pairs):
    losses = []
    for repaint in (1., 4.):
        lesson = Restoration(pairs.vocab, repaint=repaint, editor=dict(side=16, hidden=8, painter=TINY))
        lesson.editor.load_state_dict(tiny(pairs.vocab, 0).state_dict())   # always keeps
        torch.manual_seed(1)
        losses.append(lesson.loss(pairs)[0].item())
    assert losses[1] > 1.3*losses[0]


def test_restoring_learns_one_batch(pairs):
    torch.manual_seed(0)
    lesson = Restoration(pairs.vocab, editor=dict(side=16, painter=TINY))
    log = Learner(lesson, lambda step: pairs, optimizer=dict(lr=5e-3, weight_decay=0.)).fit(150, progress=False).log
    losses = [r['loss'] for r in log]
    assert sum(losses[-30:]) < .9*sum(losses[:30])


# --- recipe and weights


def test_schedule():
    assert flat_then_down(0, 100) == .02 and flat_then_down(50, 100) == 1 and flat_then_down(75, 100) == pytest.approx(.501)
    assert 0 < flat_then_down(99, 100) < .03


def test_training_can_be_cut_off(tmp_path, pairs):
    torch.manual_seed(0)
    options = dict(steps=4, checkpoint_every=2, painter=DTEGAN(pairs.vocab, **TINY))
    whole = train_manipulator(tmp_path/'a', **options)
    train_manipulator(tmp_path/'b', **options)                                                # the same again ...
    for later in tmp_path.glob('b/*4'): __import__('shutil').rmtree(later)                    # ... then cut off
    again = train_manipulator(tmp_path/'b', resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    about = read_about(tmp_path/'a'/'manipulator_16')
    assert about['kind'] == 'manipulator' and about['facts']['steps'] == 4 and set(RECIPE) == set(about['facts']['recipe']) and 'train_manipulator' in about['facts']['command']
    assert about['facts']['painter'] == 'given'
    loaded = load_manipulator(16, folder=tmp_path/'a')
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match=r'no manipulator for side 32, \[16\]'): load_manipulator(32, folder=tmp_path/'a')


def test_shipped_weights_are_small_and_edit():
    file = weights_folder()/'manipulator_32.safetensors'
    assert file.stat().st_size <= 6_000_000 and 'manipulator-32' not in shipped()
    assert json.loads(file.with_suffix('.json').read_text())['kind'] == 'manipulator'
    editor, pairs = load_manipulator(), captioned_digits(300, 'test', seed=12).pairs
    wanted = ask(pairs.tokens, pairs.vocab, two=0., generator=seeded(3))
    assert (caption_keys(wanted, pairs.vocab) != caption_keys(pairs.tokens, pairs.vocab)).all()
    score = edit_report(pairs, wanted, editor.edit(pairs.image, wanted, generator=seeded(4)), load_reader(32))
    assert score['digit'] > .6 and score['color'] > .85 and score['place'] > .8 and score['kept'] > .95 and score['l1'] < .01
    assert not any(capabilities(editor).values())
    own = edit_report(pairs, wanted, load('dte-gan').text_to_image(wanted, generator=seeded(4)), load_reader(32))
    assert score['l1'] < .1*own['l1']    # a painting of the same captions has another handwriting
