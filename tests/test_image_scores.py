"""One protocol for whatever paints captions: perfect painters score as real pictures, bad ones lose where they should."""
import json

import pytest
import torch
from torch import nn

from jointgen.digits import captioned_digits, draw_slots
from jointgen.image_scores import candidates_for, fit_similarity, judge_pictures, paint, pyramid_consistency, real_draws, score_pictures, slot_features
from jointgen.matching import Matcher, load_matcher
from jointgen.metrics import caption_slots, load_reader

torch.set_num_threads(1)


class Painter(nn.Module):
    """Draws what the caption says, in training handwriting; `wrong` says something else."""
    def __init__(self, vocab, *, same=False, wrong=False):
        super().__init__()
        self.weight, self.vocab, self.same, self.wrong, self.calls = nn.Parameter(torch.zeros(1)), vocab, same, wrong, 0

    def text_to_image(self, tokens, *, generator=None, dim=1.):
        slots = caption_slots(self.vocab.decode(tokens))
        if self.wrong: slots = slots[2:] + slots[:2]  # two draws of a caption stand side by side
        if self.same: return torch.cat([draw_slots([row], seed=3) for row in slots])
        seed = int(torch.randint(10**6, (1,), generator=generator))
        return (draw_slots(slots, seed=seed) + 1)*dim - 1


@pytest.fixture(scope="module")
def world():
    data, reader = captioned_digits(60, "test", seed=4), load_reader(32)
    return data, load_matcher(32), reader, fit_similarity(reader, 400, steps=300)


@pytest.fixture(scope="module")
def scores(world):
    data, matcher, _, maps = world
    return {name: score_pictures(Painter(data.vocab, **o), data, matcher=matcher, maps=maps) for name, o in dict(good={}, same=dict(same=True), wrong=dict(wrong=True)).items()}


def test_a_true_painter_scores_as_real_pictures(scores):
    images, real = scores["good"]["images"], scores["good"]["real"]
    for key in ("presence", "color", "digit", "object", "caption", "r_precision"): assert images[key] > 0.9 and real[key] > 0.9, key
    assert 0.6 < images["spread_ratio"] < 1.6 and real["spread_ratio"] == 1
    assert set(images) == set(real) and images["pictures"]["average"] > 0.9 and images["false_objects"] < 0.05
    assert scores["good"]["speed"]["images_per_second"] > 0 and json.loads(json.dumps(scores["good"]))


def test_a_painter_of_one_picture_a_caption_is_caught(scores):
    images = scores["same"]["images"]
    assert images["spread_ratio"] < 1e-3 and images["ms_ssim"] > 0.999 and images["caption"] > 0.9


def test_a_painter_of_other_captions_is_caught(scores):
    images, good = scores["wrong"]["images"], scores["good"]["images"]
    assert images["caption"] < 0.2 and images["r_precision"] < 0.2 and images["object"] < 0.4
    assert images["vs_similarity"] < good["vs_similarity"] - 0.2 and images["spread_ratio"] > 0.5


def test_the_same_seed_paints_the_same(world):
    data, *_ = world
    model, tokens = Painter(data.vocab), data.pairs.tokens[:6]
    assert torch.equal(paint(model, tokens, 3, seed=1), paint(model, tokens, 3, seed=1))
    assert not torch.equal(paint(model, tokens, 3, seed=1), paint(model, tokens, 3, seed=2))
    assert paint(model, tokens, 3, batch_size=4).shape == (6, 3, 3, 32, 32)
    assert paint(model, tokens, 1, dim=0.5).max() <= 0


def test_real_draws_say_the_same_in_other_hands(world):
    data, _, reader, _ = world
    image = real_draws(data, 3)
    assert image.shape == (60, 3, 3, 32, 32) and torch.equal(image[:, 0], data.pairs.image)
    assert not torch.equal(image[:, 1], image[:, 2]) and not torch.equal(image[:, 0], image[:, 1])


def test_a_fit_needs_no_help(world):
    data, matcher, *_ = world
    few = captioned_digits(8, "test", seed=9)
    assert score_pictures(Painter(few.vocab), few, matcher=matcher)["real"]["vs_similarity"] > 0.2


def test_slot_features_are_the_content(world):
    data, _, reader, _ = world
    x = slot_features(data.pairs.tokens, data.vocab, reader)
    assert x.shape == (60, 5*(10 + 4)) and set(x.unique().tolist()) == {0., 1.}
    assert (x.sum(1) == torch.tensor([2.*len(s) for s in data.slots])).all()


def test_candidates_are_as_many_as_differ(world):
    data, *_ = world
    assert candidates_for(data.pairs.tokens, data.vocab) <= 60
    twice = data.pairs.tokens[:10].repeat(2, 1)
    assert candidates_for(twice, data.vocab) == 19 and candidates_for(twice, data.vocab, 7) == 7


def test_bad_input(world):
    data, matcher, reader, maps = world
    tokens, vocab = data.pairs.tokens, data.vocab
    judge = dict(matcher=matcher, reader=reader, maps=maps)
    with pytest.raises(ValueError, match="2 or more fit"): judge_pictures(data.pairs.image[:, None], tokens, vocab, **judge)
    with pytest.raises(ValueError, match="one row of pictures each"): judge_pictures(data.pairs.image[:5, None].repeat(1, 2, 1, 1, 1), tokens, vocab, **judge)
    with pytest.raises(ValueError, match="no text_to_image"): paint(nn.Linear(1, 1), tokens)
    with pytest.raises(ValueError, match="1 or more of each"): paint(Painter(vocab), tokens, 0)
    with pytest.raises(ValueError, match="no pyramid"): pyramid_consistency(Painter(vocab), tokens)
    with pytest.raises(ValueError, match="matcher looks at"): score_pictures(Painter(vocab), data, matcher=Matcher(vocab, 16), maps=maps)


def test_a_pyramid_of_shrunk_pictures_agrees(world):
    data, *_ = world

    class Nest(Painter):
        def pyramid(self, tokens, *, generator=None):
            large = self.text_to_image(tokens, generator=generator)
            small = [nn.functional.adaptive_avg_pool2d(large, s) for s in (8, 16)]
            return [small[0] + 0.25, small[1], large]

    found = pyramid_consistency(Nest(data.vocab).train(), data.pairs.tokens, batch_size=25)
    assert list(found) == ["8 px", "16 px"] and found["16 px"] < 1e-6 and 0.1 < found["8 px"] <= 0.2501
