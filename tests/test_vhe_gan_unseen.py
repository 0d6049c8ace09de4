"""Classes that training never showed: what is left out, what is counted, who is named."""
import pytest
import torch

from jointgen.digits import CLASSES, COLORS, captioned_digits, draw_slots, write_caption
from jointgen.recipes import vhe_gan as recipe
from jointgen.recipes import vhe_gan_unseen as unseen
from tiny_vhe_gan import SIZES, TINY

torch.set_num_threads(1)


def test_every_colour_and_digit_stays():
    held = set(unseen.HELD)
    assert len(held) == 10 and {d for _, d in held} == set(CLASSES) and {c for c, _ in held} == set(COLORS) and held < set(unseen.CASES)
    assert {c for c, d in set(unseen.CASES) - held} == set(COLORS) and {d for c, d in set(unseen.CASES) - held} == set(CLASSES)


def test_what_is_held_out_is_out():
    data = captioned_digits(400)
    kept = unseen.without(data)
    rows = [i for i, s in enumerate(data.slots) if not set(s.values()) & set(unseen.HELD)]
    assert torch.equal(kept.tokens, data.pairs.tokens[rows]) and torch.equal(kept.image, data.pairs.image[rows]) and 0 < len(kept) < 400
    assert len(unseen.without(data, [])) == 400
    with pytest.raises(ValueError, match="hold out fewer"): unseen.without(data, unseen.CASES)


@pytest.mark.parametrize("bound", [True, False])
def test_names_that_bind_colour_and_digit_have_no_say(bound, monkeypatch):
    from jointgen.models.vhe_gan import VHEGAN
    torch.manual_seed(0)
    model = VHEGAN(captioned_digits(1).vocab, **SIZES, bound=bound).eval()
    image = draw_slots([dict(whole=c) for c in unseen.HELD], split="test")
    said = model.vocab.encode([write_caption(dict(whole=c)) for c in unseen.CASES])
    rates = model.image_to_bag(image)
    monkeypatch.setattr(model, "image_to_bag", lambda x: rates)
    scores = unseen.name_pictures(model, image, said)
    assert scores.shape == (10, 40) and torch.allclose(scores, rates.log() @ torch.where(torch.tensor(["_" in n for n in model.bag.names]), 0., model.bag.count(said)).T, atol=1e-3)


def test_shares_count_what_they_say():
    truth = torch.arange(40)
    assert unseen.shares(torch.eye(40), truth) == dict(among_ten=1., among_forty=1., seen_among_forty=1.)
    seen = torch.tensor([c not in unseen.HELD for c in unseen.CASES])
    assert unseen.shares(torch.eye(40) + 2*seen, truth) == dict(among_ten=1., among_forty=0., seen_among_forty=1.)
    assert unseen.shares(-torch.eye(40), truth) == dict(among_ten=0., among_forty=0., seen_among_forty=0.)


def test_the_study_runs_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "tutorial", TINY)
    first = unseen.compare(tmp_path/"u.json", seeds=(0,), steps=2, pairs=100, n=1)
    assert unseen.compare(tmp_path/"u.json", seeds=(0,), steps=2, pairs=100, n=1) == first
    assert set(first) == set(unseen.BAGS) and all(0 <= x <= 1 for row in first.values() for x in row[0].values())
