"""Sentences: padding is never heard, frozen means frozen, mismatches are never matches, and contrastive training tells one changed word apart."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jointgen.contrasts import caption_keys, edit_words
from jointgen.digits import captioned_digits
from jointgen.pairs import PAD, Pairs, Vocab
from jointgen.sentences import EDITS, FrozenSentences, Glance, SentenceEncoder, Sentences, contrast_terms, contrastive_sentences, editable, hard_negatives


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(400, side=16).pairs


@pytest.fixture(scope='module')
def vocab(pairs): return pairs.vocab


@pytest.fixture(scope='module')
def birds():
    """A vocabulary about which nothing is known."""
    words = ['a', 'bird', 'with', 'wings', 'brown', 'grey', 'long', 'beak', 'short', 'tail']
    vocab = Vocab(words, max_len=8)
    captions = [f'a {c} bird with {l} {p}' for c in ('brown', 'grey') for l in ('long', 'short') for p in ('beak', 'tail', 'wings')]
    return Pairs(torch.randn(12, 3, 16, 16, generator=seeded()).clamp(-1, 1), vocab.encode(captions), vocab)


# --- the encoder


@pytest.mark.parametrize('sizes', [{}, dict(queries=0), dict(cell='lstm'), dict(norm=True), dict(hidden=6, embedding=4, queries=1), dict(dropout=.5), dict(dropout=.5, queries=0)], ids=str)
def test_shapes_and_padding(vocab, pairs, sizes):
    torch.manual_seed(0)
    encoder = SentenceEncoder(vocab, 10, **sizes).eval()
    tokens = pairs.tokens[:5]
    said = encoder(tokens)
    assert isinstance(said, Sentences) and said.sentence.shape == (5, 10) and said.words.shape == (5, tokens.shape[1], encoder.hidden)
    assert torch.equal(said.mask, tokens != PAD) and said.words[~said.mask].abs().max() == 0
    cut = tokens[:, :int((tokens != PAD).sum(1).max())]
    assert torch.allclose(encoder(cut).sentence, said.sentence, atol=1e-6)          # padding is not heard
    assert torch.allclose(encoder(tokens[2:3]).sentence, said.sentence[2:3], atol=1e-6)  # nor are the others
    if sizes.get('norm'): assert said.sentence.mean(1).abs().max() < 1e-5


@pytest.mark.parametrize('queries', [0, 4])
def test_gradients_reach_every_weight(vocab, pairs, queries):
    encoder = SentenceEncoder(vocab, 8, queries=queries)
    encoder(pairs.tokens).sentence.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in encoder.named_parameters() if name != 'ask.bias')  # a softmax does not hear a shift
    assert encoder.reader.embedding.weight.grad[PAD].abs().sum() == 0


def test_float32_under_autocast(vocab, pairs):
    encoder = SentenceEncoder(vocab, 8)
    with torch.autocast('cpu', torch.bfloat16): inside = encoder(pairs.tokens[:4]).sentence
    assert inside.dtype == torch.float32 and torch.equal(inside, encoder(pairs.tokens[:4]).sentence)


def test_dropout_only_in_training(vocab, pairs):
    encoder = SentenceEncoder(vocab, 8, dropout=.5)
    assert not torch.equal(encoder(pairs.tokens[:4]).sentence, encoder(pairs.tokens[:4]).sentence)
    encoder.eval()
    assert torch.equal(encoder(pairs.tokens[:4]).sentence, encoder(pairs.tokens[:4]).sentence)


def test_bad_sizes_and_tokens(vocab, pairs):
    with pytest.raises(ValueError, match='dropout is 1'): SentenceEncoder(vocab, dropout=1.)
    with pytest.raises(ValueError, match="choose 'gru' or 'lstm'"): SentenceEncoder(vocab, cell='rnn')
    encoder = SentenceEncoder(vocab, 8)
    with pytest.raises(ValueError, match='reads at most 40'): encoder(F.pad(pairs.tokens, (0, 1)))
    with pytest.raises(ValueError, match='no word at all'): encoder(torch.zeros(2, 5, dtype=torch.int64))


# --- frozen


def test_frozen_is_standardised_and_never_learns(vocab, pairs):
    torch.manual_seed(0)
    frozen = FrozenSentences(SentenceEncoder(vocab, 8, dropout=.3), pairs.tokens).train()
    said = frozen(pairs.tokens)
    assert not frozen.training and not frozen.encoder.training and not any(p.requires_grad for p in frozen.parameters())
    assert said.sentence.mean(0).abs().max() < 1e-4 and (said.sentence.std(0) - 1).abs().max() < 1e-3
    assert not said.sentence.requires_grad and torch.equal(said.sentence, frozen(pairs.tokens).sentence)
    holder = nn.ModuleList([frozen, nn.Linear(8, 1)]).train()
    assert holder.training and not frozen.encoder.training


def test_a_saved_frozen_encoder_carries_its_norm(vocab, pairs):
    torch.manual_seed(0)
    frozen, other = FrozenSentences(SentenceEncoder(vocab, 8), pairs.tokens), FrozenSentences(SentenceEncoder(vocab, 8))
    assert not torch.allclose(other(pairs.tokens).sentence, frozen(pairs.tokens).sentence)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(pairs.tokens).sentence, frozen(pairs.tokens).sentence)


class Bag(nn.Module):
    """An encoder of another house: captions to vectors, nothing else."""
    def __init__(self, n, d):
        super().__init__()
        self.table = nn.Embedding(n, d)

    def forward(self, tokens): return self.table(tokens).sum(1)


def test_any_encoder_can_be_frozen(vocab, pairs):
    torch.manual_seed(0)
    frozen = FrozenSentences(Bag(len(vocab), 6), pairs.tokens, d=6)
    said = frozen(pairs.tokens[:7])
    assert said.sentence.shape == (7, 6) and said.words.shape == (7, 1, 6) and said.mask.all()
    with pytest.raises(ValueError, match='6 numbers'): FrozenSentences(Bag(len(vocab), 6), pairs.tokens, d=5)


def test_a_constant_sentence_is_no_division_by_zero(vocab, pairs):
    frozen = FrozenSentences(SentenceEncoder(vocab, 8), pairs.tokens[:1].repeat(4, 1))
    assert frozen(pairs.tokens).sentence.isfinite().all()


# --- mismatches


@pytest.mark.parametrize('share', [0., .5, 1.])
def test_negatives_never_match(vocab, pairs, share):
    keys = caption_keys(pairs.tokens, vocab)
    for seed in range(5):
        wrong = hard_negatives(pairs.tokens, vocab, share=share, generator=seeded(seed))
        assert wrong.shape == pairs.tokens.shape and (caption_keys(wrong, vocab) != keys).all()
        one = ((wrong != pairs.tokens).sum(1) == 1).float().mean()
        assert abs(one - share) < .12
    assert torch.equal(wrong, hard_negatives(pairs.tokens, vocab, share=share, generator=seeded(4)))


def test_negatives_without_known_words(birds):
    assert editable(birds.vocab) is None
    wrong = hard_negatives(birds.tokens, birds.vocab, generator=seeded())
    rows = {tuple(r) for r in birds.tokens.tolist()}
    assert all(tuple(r) in rows for r in wrong.tolist()) and (wrong != birds.tokens).any(1).all()


def test_negatives_follow_given_keys(vocab, pairs):
    keys = torch.arange(400) % 2  # two classes
    wrong = hard_negatives(pairs.tokens, vocab, keys, share=0., generator=seeded())
    other = {tuple(r): k for r, k in zip(pairs.tokens.tolist(), keys.tolist())}
    if len(other) == 400: assert all(other[tuple(w)] != k for w, k in zip(wrong.tolist(), keys.tolist()))


def test_no_mismatch_exists(vocab, pairs):
    with pytest.raises(ValueError, match='batch of 1 holds no mismatch'): hard_negatives(pairs.tokens[:1], vocab)
    with pytest.raises(ValueError, match='captions say the same'): hard_negatives(pairs.tokens[:1].repeat(4, 1), vocab)
    with pytest.raises(ValueError, match='share is 2'): hard_negatives(pairs.tokens, vocab, share=2.)


# --- contrastive training


@pytest.mark.parametrize('side', [8, 16, 32])
def test_glance(side):
    glance = Glance(10, (4, 8), 3).eval()
    image = torch.rand(3, 3, side, side, generator=seeded())*2 - 1
    assert glance(image).shape == (3, 10) and torch.allclose(glance(image[:1]), glance(image)[:1], atol=1e-5)


def test_terms_at_chance_and_known(vocab, pairs, birds):
    few = pairs[:8]
    same = lambda tokens: Sentences(torch.ones(len(tokens), 4), torch.zeros(len(tokens), 1, 1), torch.ones(len(tokens), 1, dtype=torch.bool))
    terms = contrast_terms(same, lambda image: torch.ones(len(image), 4), few, vocab, generator=seeded())
    assert terms['edit'].item() == pytest.approx(0.6931, abs=1e-3) and 0 < terms['batch'].item() <= 2.0795  # log 2; at most log 8
    assert set(contrast_terms(same, lambda image: torch.ones(len(image), 4), birds, birds.vocab)) == {'batch'}


def test_training_learns_and_repeats(vocab, pairs):
    seen = []
    train = lambda steps, watch=None: contrastive_sentences(vocab, pairs, d=16, hidden=32, embedding=16, steps=steps, batch_size=32, lr=8e-3, watch=watch)
    state = torch.get_rng_state()
    encoder = train(60, lambda step, terms: seen.append((step, terms)))
    assert torch.equal(torch.get_rng_state(), state) and not encoder.training
    assert [s for s, _ in seen] == list(range(1, 61)) and set(seen[0][1]) == {'batch', 'edit'}
    mean = lambda rows: sum(t['batch'] for _, t in rows)/len(rows)
    assert mean(seen[-10:]) < .75*mean(seen[:10])
    again = train(3)
    assert all(torch.equal(a, b) for a, b in zip(train(3).parameters(), again.parameters()))


def test_training_on_unknown_words(birds):
    encoder = contrastive_sentences(birds.vocab, birds, d=8, hidden=8, embedding=4, steps=2, batch_size=6)
    assert encoder(birds.tokens).sentence.shape == (12, 8)


def test_edits_weigh_what_the_groups_know(vocab, pairs):
    assert set(EDITS) <= set(editable(vocab).names)
    edit_words(pairs.tokens, editable(vocab), weights=EDITS)
