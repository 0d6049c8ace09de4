"""Manipulation: the picture enters where it stands, an untrained net changes nothing, each turn moves its player only, and training goes on where it was cut off."""
import json

import pytest
import torch

from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits
from jointgen.edit_scores import ask, edit_report
from jointgen.joint import capabilities, read_about, shipped, weights_folder
from jointgen.learner import Learner, player_parameters
from jointgen.manipulation import (RECIPE, WEIGHTS, Combination, ManipulationGame, Manipulator, PictureStages, flat_then_down, load_manipulator, train_manipulator)
from jointgen.metrics import load_reader
from jointgen.pairs import Pairs, Vocab

TINY = dict(editor=dict(widths=(8, 12, 8), picture=(12, 8), condition=8, noise=4, hidden=8, text=dict(d=16, hidden=16, embedding=8)), judge=dict(widths=(8, 8, 12), branch=8, tile=8, contrast=16))


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, **options):
    torch.manual_seed(0)
    return ManipulationGame(vocab, side=16, **TINY | options)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(12, side=16, subsets='Quad1').pairs


@pytest.fixture(scope='module')
def wanted(pairs): return ask(pairs.tokens, pairs.vocab, two=0., generator=seeded())


# --- parts


def test_combination_is_affine_in_the_map():
    layer, g = Combination(4, 3), seeded()
    a, b, r = (torch.randn(2, c, 5, 5, generator=g) for c in (4, 4, 3))
    assert torch.allclose(layer(a, r) + layer(b, r), 2*layer((a + b)/2, r), atol=1e-5)
    torch.nn.init.zeros_(layer.write.weight), torch.nn.init.zeros_(layer.write.bias)
    assert torch.equal(layer(a, r), a)


def test_combination_sees_two_pixels_far():
    layer, g = Combination(4, 3), seeded()
    h, r = torch.randn(1, 4, 9, 9, generator=g), torch.randn(1, 3, 9, 9, generator=g)
    other = r.clone(); other[..., 4, 4] += 1
    moved = (layer(h, other) != layer(h, r)).any(1)[0].nonzero()
    assert ((moved - 4).abs() <= 2).all() and len(moved) > 9


@pytest.mark.parametrize('widths, side', [((8,), 8), ((16, 8), 16), ((16, 8, 4), 32), ((16, 8, 4, 4), 64)])
def test_stages_fit_the_scales(widths, side):
    seen = PictureStages(widths)(torch.rand(2, 3, side, side)*2 - 1)
    assert [tuple(x.shape[1:]) for x in seen] == [(c, 8*2**i, 8*2**i) for i, c in enumerate(widths)]


# --- the manipulator


def test_an_untrained_one_changes_next_to_nothing(pairs, wanted):
    editor = tiny(pairs.vocab).editor
    after = editor.edit(pairs.image, wanted, generator=seeded())
    assert after.shape == pairs.image.shape and 0 < (after - pairs.image).abs().mean() < .1 and after.abs().max() <= 1


def test_same_generator_same_edit(pairs, wanted):
    editor = tiny(pairs.vocab).editor
    one, same, other = (editor.edit(pairs.image, wanted, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(editor.edit(pairs.image, wanted, temperature=0, generator=seeded(1)), editor.edit(pairs.image, wanted, temperature=0, generator=seeded(2)))


def test_edit_leaves_no_trace(pairs, wanted):
    editor = tiny(pairs.vocab).editor.train()
    before = {k: v.clone() for k, v in editor.state_dict().items()}
    editor.edit(pairs.image, wanted)
    assert editor.training and all(torch.equal(v, before[k]) for k, v in editor.state_dict().items())


def test_every_part_learns(pairs, wanted):
    editor = tiny(pairs.vocab).editor
    for p in editor.generator.parameters(): p.data += .1  # modulations start at zero and would hide the condition
    out, c = editor(pairs.image, wanted)
    (out.square().sum() + c.log_std.sum()).backward()
    assert [n for n, p in editor.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('lookups', [0, 1, 2])
def test_lookups_are_a_switch(pairs, wanted, lookups):
    editor = Manipulator(pairs.vocab, side=16, **TINY['editor'] | dict(lookups=lookups))
    assert len(editor.lookups) == lookups and editor.edit(pairs.image, wanted).shape == pairs.image.shape


def test_bad_input(pairs, wanted):
    editor = tiny(pairs.vocab).editor
    for image, message in ((pairs.image[..., ::2, ::2], 'pictures are 8 x 8, 16 x 16 fits'), (pairs.image*torch.nan, 'NaN'), (3*pairs.image, 'pictures run from')):
        with pytest.raises(ValueError, match=message): editor.edit(image, wanted)
    with pytest.raises(ValueError, match='tokens have length 50'): editor.edit(pairs.image, torch.ones(12, 50, dtype=torch.long))
    with pytest.raises(ValueError, match='temperature is -1'): editor.edit(pairs.image, wanted, temperature=-1)
    with pytest.raises(ValueError, match='2 widths fit'): Manipulator(pairs.vocab, side=16, widths=(8, 8, 8), picture=(8,))
    with pytest.raises(ValueError, match="'lr' is no weight"): tiny(pairs.vocab, weights=dict(lr=1.))


# --- the game


@pytest.mark.parametrize('warm', [0, 5])
def test_each_turn_moves_its_player_only(pairs, warm):
    game = tiny(pairs.vocab, warm=warm)
    players = {name: player_parameters(player) for name, player in game.players().items()}
    assert not {id(p) for p in players['editor']} & {id(p) for p in players['discriminator']}
    assert sum(map(len, players.values())) == len(list(game.parameters()))
    played = []
    for turn in game.turns(pairs):
        before = {n: p.clone() for n, p in game.named_parameters()}
        for p in game.parameters(): p.grad = None
        turn.loss.backward()
        own = {id(p) for p in players[turn.player]}
        assert not [n for n, p in game.named_parameters() if p.grad is not None and p.grad.any() and id(p) not in own]
        torch.optim.SGD(players[turn.player], .01).step()
        moved = [n for n, p in game.named_parameters() if not torch.equal(p, before[n])]
        assert moved and all(n.startswith('editor.') == (turn.player == 'editor') for n in moved)
        played.append((turn.player, set(turn.log)))
    alone = dict(discriminator={'contrast', 'edits', 'pair', 'matched', 'mismatched'}, editor={'restore', 'kl'})
    full = dict(discriminator=alone['discriminator'] | {'patch', 'made'}, editor=alone['editor'] | {'still', 'pair', 'patch', 'fake_contrast', 'fake_edits'})
    assert dict(played) == (alone if warm else full) and int(game.trained) == 1


def test_warming_up_ends(pairs):
    game = tiny(pairs.vocab, warm=2)
    learner = Learner(game, pairs, batch_size=8).fit(3, progress=False)
    assert ['made' in r for r in learner.log if r['player'] == 'discriminator'] == [False, False, True]


def test_weights_weigh(pairs):
    game = tiny(pairs.vocab)
    one = torch.tensor(1.)
    for name, weight in WEIGHTS.items():
        if name != 'temperature': assert game.turn('editor', {name: one}).loss.item() == pytest.approx(weight)
    assert game.turn('editor', dict(pair=one), dict(made=one)).log.keys() == {'pair', 'made'}
    with pytest.raises(ValueError, match="player 'editor': pair = nan"): game.turn('editor', dict(pair=one*torch.nan))


def test_the_game_refuses(pairs):
    game = tiny(pairs.vocab)
    with pytest.raises(ValueError, match='one pair came'): next(iter(game.turns(pairs[:1])))
    with pytest.raises(ValueError, match='16 x 16 fits'): next(iter(game.turns(Pairs(pairs.image[..., ::2, ::2], pairs.tokens, pairs.vocab))))
    with pytest.raises(ValueError, match='no digit groups'): next(iter(tiny(Vocab(['bird', 'a'], 5)).turns(Pairs(pairs.image, torch.full((12, 4), 5)))))


def test_restoring_learns_one_batch(pairs):
    game = tiny(pairs.vocab, warm=10**6)
    log = Learner(game, lambda step: pairs, optimizer=dict(lr=5e-3, weight_decay=0.)).fit(200, progress=False).log
    restored = [r['restore'] for r in log if 'restore' in r]
    assert sum(restored[-40:]) < .85*sum(restored[:40])


# --- recipe and weights


def test_schedule():
    assert flat_then_down(0, 100) == .02 and flat_then_down(50, 100) == 1 and flat_then_down(75, 100) == pytest.approx(.501)
    assert 0 < flat_then_down(99, 100) < .03


def test_training_can_be_cut_off(tmp_path):
    whole = train_manipulator(tmp_path/'a', side=16, steps=4, checkpoint_every=2, warm=2, **TINY)
    train_manipulator(tmp_path/'b', side=16, steps=4, checkpoint_every=2, warm=2, **TINY)  # the same again ...
    for later in tmp_path.glob('b/*4'): __import__('shutil').rmtree(later)                    # ... then cut off
    again = train_manipulator(tmp_path/'b', side=16, steps=4, checkpoint_every=2, resume=True, warm=2, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    about = read_about(tmp_path/'a'/'manipulator_16')
    assert about['kind'] == 'manipulator' and about['facts']['steps'] == 4 and set(RECIPE) == set(about['facts']['recipe']) and 'train_manipulator' in about['facts']['command']
    loaded = load_manipulator(16, folder=tmp_path/'a')
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match=r'no manipulator for side 32, \[16\]'): load_manipulator(32, folder=tmp_path/'a')


def test_shipped_weights_are_small_and_edit():
    file = weights_folder()/'manipulator_32.safetensors'
    assert file.stat().st_size <= 1_000_000 and 'manipulator-32' not in shipped()
    assert json.loads(file.with_suffix('.json').read_text())['kind'] == 'manipulator'
    editor, pairs = load_manipulator(), captioned_digits(200, 'test', seed=12).pairs
    wanted = ask(pairs.tokens, pairs.vocab, two=0., generator=seeded(3))
    assert (caption_keys(wanted, pairs.vocab) != caption_keys(pairs.tokens, pairs.vocab)).all()
    score = edit_report(pairs, wanted, editor.edit(pairs.image, wanted, generator=seeded(4)), load_reader(32))
    assert score['asked'] > .02 and score['kept'] > .7 and score['l1'] < .03
    assert not any(capabilities(editor).values())
