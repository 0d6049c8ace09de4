"""Input masking: how much is hidden, where, and that nothing else changes."""
import pytest
import torch

from jointgen.masks import hide_patches, hide_words
from jointgen.pairs import MASK, PAD, SPECIALS

generator = lambda seed=0: torch.Generator().manual_seed(seed)  # noqa: E731


@pytest.mark.parametrize("ratio", [0., 0.1, 0.3, 0.99, 1.])
@pytest.mark.parametrize("side, patches", [(16, 4), (32, 8), (64, 8)])
def test_exactly_the_asked_patches_are_hidden(ratio, side, patches):
    image = torch.rand(5, 3, side, side, generator=generator()) * 0.5 + 0.4  # nowhere zero
    masked, mask = hide_patches(image, ratio, patches=patches, generator=generator())
    assert mask.sum((1, 2)).tolist() == [int(ratio * patches**2)] * 5
    hidden = mask.repeat_interleave(side // patches, 1).repeat_interleave(side // patches, 2)[:, None].expand_as(image)
    assert (masked[hidden] == 0).all() and torch.equal(masked[~hidden], image[~hidden])


def test_every_patch_is_hidden_equally_often():
    _, mask = hide_patches(torch.ones(4000, 1, 16, 16), 0.3, generator=generator())
    often = mask.float().mean(0)
    assert (often - 19 / 64).abs().max() < 0.04  # the last patch as well


def test_pictures_are_masked_independently():
    _, mask = hide_patches(torch.ones(64, 1, 16, 16), 0.3, generator=generator())
    assert len({tuple(m.flatten().tolist()) for m in mask}) == 64


def test_words_padding_is_never_hidden_and_counts_are_exact():
    tokens = torch.full((200, 12), 9)
    lengths = torch.arange(200) % 12 + 1
    tokens[torch.arange(12) >= lengths[:, None]] = PAD
    masked, mask = hide_words(tokens, 0.3, vocab_size=20, generator=generator())
    assert torch.equal(mask.sum(1), (0.3 * lengths).long())
    assert not mask[tokens == PAD].any() and torch.equal(masked[~mask], tokens[~mask])
    assert (masked[mask] == MASK).all()


def test_random_words_are_words():
    tokens = torch.full((500, 12), 9)
    masked, mask = hide_words(tokens, 0.5, vocab_size=20, random_words=0.5, generator=generator())
    share = (masked[mask] == MASK).float().mean().item()
    others = masked[mask & (masked != MASK)]
    assert 0.45 < share < 0.55
    assert others.min() >= len(SPECIALS) and others.max() < 20 and len(others.unique()) == 20 - len(SPECIALS)


def test_inputs_stay_as_they_are_and_a_generator_decides():
    image, tokens = torch.ones(3, 3, 16, 16), torch.full((3, 12), 9)
    before = image.clone(), tokens.clone()
    a = hide_patches(image, 0.3, generator=generator(1))[0], hide_words(tokens, 0.3, vocab_size=20, generator=generator(1))[0]
    b = hide_patches(image, 0.3, generator=generator(1))[0], hide_words(tokens, 0.3, vocab_size=20, generator=generator(1))[0]
    assert torch.equal(image, before[0]) and torch.equal(tokens, before[1])
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_is_a_share(ratio):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"): hide_patches(torch.ones(2, 3, 16, 16), ratio)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"): hide_words(torch.full((2, 5), 9), ratio, vocab_size=20)
