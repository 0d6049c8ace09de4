"""Batches, vocabulary, seeds and figures."""
import copy, json, pickle

import numpy as np
import pytest
import torch
from jointgen.pairs import BOS, EOS, MASK, PAD, SPECIALS, UNK, Pairs, Vocab, check_pairs, set_seed, show_pairs, split_words, to_uint8, use_style

CAPTIONS = ['a red disc.', 'a blue disc, and a red square.', 'a green disc.', 'a red disc, a blue disc.']


@pytest.fixture
def vocab(): return Vocab.from_captions(CAPTIONS)


@pytest.fixture
def pairs(vocab):
    image = torch.linspace(-1, 1, 4*3*8*8).reshape(4, 3, 8, 8)
    return Pairs(image, vocab.encode(CAPTIONS), vocab)


def test_specials_have_their_ids(vocab):
    assert SPECIALS == ('<pad>', '<bos>', '<eos>', '<mask>', '<unk>')
    assert [vocab.index(s) for s in SPECIALS] == [PAD, BOS, EOS, MASK, UNK] == [0, 1, 2, 3, 4]


def test_seed_sets_all_sources_and_gives_a_fresh_generator():
    import random
    draw = lambda g: (random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=g).item())
    assert draw(set_seed(3)) == draw(set_seed(3)) != draw(set_seed(4))
    assert draw(set_seed()) == draw(set_seed(42))


@pytest.mark.parametrize('text,words', [
    ('A red,DISC.', ['a', 'red', ',', 'disc', '.']), ('', []), ("it's a t-shirt", ["it's", 'a', 't-shirt']),
    ('Ｒｅｄ  7', ['red', '7']), ('- a-', ['-', 'a', '-']), ('été Ñ', ['été', 'ñ'])])
def test_words(text, words): assert split_words(text) == words


def test_encode_and_decode_are_inverse(vocab):
    tokens = vocab.encode(CAPTIONS)
    assert tokens.dtype == torch.int64 and tokens.shape == (4, vocab.max_len) == (4, 11)
    assert vocab.decode(tokens) == CAPTIONS
    assert (tokens[:, 0] == BOS).all() and ((tokens == EOS).sum(1) == 1).all()
    assert vocab.encode([]).shape == (0, 11) and vocab.decode(vocab.encode([])) == []
    assert torch.equal(vocab.encode([c.upper() for c in CAPTIONS]), tokens)


def test_rows_do_not_depend_on_the_batch(vocab):
    tokens = vocab.encode(CAPTIONS)
    assert all(torch.equal(vocab.encode([c])[0], row) for c, row in zip(CAPTIONS, tokens))


def test_decode_stops_at_the_first_end(vocab):
    a, red = vocab.index('a'), vocab.index('red')
    assert vocab.decode(torch.tensor([[BOS, a, EOS, red, EOS], [a, MASK, red, UNK, PAD]])) == ['a', 'a red']


def test_words_are_ordered_by_frequency_then_alphabet(vocab):
    assert vocab.words == ['a', 'disc', '.', 'red', ',', 'blue', 'and', 'green', 'square']
    assert vocab == Vocab.from_captions(CAPTIONS[::-1])


@pytest.mark.parametrize('call,reason', [
    (lambda v: v.encode(['a purple disc.']), "unknown word 'purple'"),
    (lambda v: v.encode(['a red disc ' * 4]), 'reads at most 11'),
    (lambda v: v.encode('a red disc.'), 'list of str fits'),
    (lambda v: v.encode(['<pad>']), 'unknown word'),
    (lambda v: v.decode(torch.tensor([[99]])), 'decode with the vocabulary'),
    (lambda v: v.decode(torch.tensor([[-1]])), 'decode with the vocabulary'),
    (lambda v: v.index('purple'), 'not in the vocabulary'),
    (lambda v: Vocab(['two words'], 9), 'not one lower-case word'),
    (lambda v: Vocab(['Red'], 9), 'not one lower-case word'),
    (lambda v: Vocab(['red', 'red'], 9), 'listed twice'),
    (lambda v: Vocab(['red'], 1), '2 or more fit')])
def test_vocab_errors(vocab, call, reason):
    with pytest.raises(ValueError, match=reason) as e: call(vocab)
    assert '\n' not in str(e.value)


def test_rare_words_become_unknown_only_when_asked():
    v = Vocab.from_captions(CAPTIONS, min_count=2)
    assert 'green' not in v.words and (v.encode(['a green disc.'])[0] == UNK).sum() == 1
    assert Vocab.from_dict(v.to_dict()) == v


def test_vocab_is_plain_data(vocab):
    again = Vocab.from_dict(json.loads(json.dumps(vocab.to_dict())))
    assert again == vocab and again.hash == vocab.hash and hash(again) == hash(vocab) and len(vocab.hash) == 12
    for twin in (copy.deepcopy(vocab), pickle.loads(pickle.dumps(vocab))):
        assert twin == vocab and torch.equal(twin.encode(CAPTIONS), vocab.encode(CAPTIONS))
    assert Vocab(vocab.words, 12) != vocab and Vocab(vocab.words, 12).hash != vocab.hash != Vocab(vocab.words[::-1], 11).hash
    assert vocab != 'a vocabulary' and vocab is not None


def test_the_hash_is_a_fixed_function_of_the_words():
    assert Vocab(['a', 'b'], 4).hash == 'ad61c30eb83b'


@pytest.mark.parametrize('i,wanted', [
    (3, [3]), (-1, [3]), (slice(1, 3), [1, 2]), ([2, 0], [2, 0]), (torch.tensor([2, 0]), [2, 0]), (np.array([2, 0]), [2, 0]), (torch.tensor(2), [2]),
    (np.int64(2), [2]), (torch.tensor([True, False, False, True]), [0, 3]), ([], []), (slice(4, None), [])])
def test_indexing_keeps_the_batch_axis(pairs, i, wanted):
    some = pairs[i]
    assert isinstance(some, Pairs) and len(some) == len(wanted) and some.vocab is pairs.vocab
    assert some.captions == [CAPTIONS[j] for j in wanted] and torch.equal(some.image, pairs.image[wanted])


def test_index_out_of_range(pairs):
    for i in (4, -5):
        with pytest.raises(IndexError): pairs[i]
    assert [p.captions[0] for p in pairs] == CAPTIONS      # so a plain loop ends


def test_cat_to_and_captions(pairs):
    both = Pairs.cat([pairs[:1], pairs[1:]])
    assert torch.equal(both.image, pairs.image) and torch.equal(both.tokens, pairs.tokens) and both.vocab == pairs.vocab
    assert pairs.to('cpu').captions == CAPTIONS and pairs.to(torch.device('cpu')).vocab is pairs.vocab
    bare = Pairs(pairs.image, pairs.tokens)
    with pytest.raises(ValueError, match='no vocabulary'): bare.captions
    with pytest.raises(ValueError, match='different vocabularies'): Pairs.cat([pairs, bare])
    with pytest.raises(ValueError, match='nothing to join'): Pairs.cat([])
    with pytest.raises((ValueError, TypeError), match='one caption a picture|tokens'): Pairs(pairs.image, pairs.tokens[:2])    # a checked type speaks first


@pytest.mark.parametrize('change,reason', [
    (dict(image=lambda x: x*float('nan')), 'NaN'), (dict(image=lambda x: x*float('inf')), 'NaN or infinity'),
    (dict(image=lambda x: x*2), r'\[-1, 1\] fits'), (dict(image=lambda x: x[..., :6]), '8 x 8 fits'),
    (dict(tokens=lambda t: t + 50), 'token ids run'), (dict(tokens=lambda t: t - 5), 'token ids run'),
    (dict(tokens=lambda t: torch.cat([t, t], 1)), 'reads at most 11')])
def test_check_pairs(pairs, change, reason):
    assert check_pairs(pairs, side=8, max_len=11, vocab=pairs.vocab) is pairs
    same = lambda x: x
    bad = Pairs(change.get('image', same)(pairs.image), change.get('tokens', same)(pairs.tokens), pairs.vocab)
    with pytest.raises(ValueError, match=reason) as e: check_pairs(bad, side=8, max_len=11)
    assert '\n' not in str(e.value)


def test_empty_pairs_pass(pairs): assert len(check_pairs(pairs[:0], side=8)) == 0


def test_bytes_survive_the_way_to_floats_and_back():
    x = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)/127.5 - 1
    y = to_uint8(x)
    assert y.dtype == np.uint8 and y.shape == (1, 16, 16, 1) and y.flatten().tolist() == list(range(256))
    assert to_uint8(x.half()).shape == (1, 16, 16, 1) and to_uint8(x.requires_grad_()).shape == (1, 16, 16, 1)


def test_figures(pairs):
    use_style()
    fig = show_pairs(pairs, marks=[True, False, True, True], titles=list('abcd'), cols=3)
    assert len(fig.axes) == 4 and [t.get_text().replace('\n', ' ') for t in fig.texts] == CAPTIONS
    assert [ax.get_title() for ax in fig.axes] == list('abcd')
    colors = [ax.spines['left'].get_edgecolor() for ax in fig.axes]
    assert colors[0] == colors[2] == colors[3] != colors[1]
    assert len(show_pairs(pairs, n=2).axes) == 2
    assert not any(t.get_text() for t in show_pairs(Pairs(pairs.image, pairs.tokens)).texts)
    gray = Pairs(pairs.image[:, :1], pairs.tokens)
    assert gray._repr_png_()[1:4] == pairs[:0]._repr_png_()[1:4] == b'PNG'
    assert repr(pairs) == 'Pairs(4: image [4, 3, 8, 8], tokens [4, 11])'
