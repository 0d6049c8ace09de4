import math
import random
import shutil

import numpy as np
import pytest

from jointgen import caption_metrics as C
from jointgen.digits import captioned_digits

WORDS = [f'w{i}' for i in range(40)]


def corpus(images=150, seed=0, most=14):
    """Captions of random words, some of them copies of a reference, with one to five references."""
    rng = random.Random(seed)
    say = lambda: ' '.join(rng.choices(WORDS, [1/(i + 1) for i in range(40)], k=rng.randint(1, most)))
    references = [[say() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    return [say() if rng.random() < .5 else rng.choice(r) for r in references], references


def published(scorer, candidates, references, **more):
    return scorer.compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}, **more)


# --- against the packages of the field


@pytest.mark.parametrize('seed', range(3))
def test_bleu_equals_the_published_script(seed):
    package = pytest.importorskip('pycocoevalcap.bleu.bleu')
    candidates, references = corpus(seed=seed)
    whole, each = published(package.Bleu(4), candidates, references, verbose=0)
    assert np.abs(C.corpus_bleu(candidates, references) - whole).max() < 1e-6
    assert np.abs(np.array([C.bleu([c], r)[0] for c, r in zip(candidates, references)]).T - each).max() < 1e-6


@pytest.mark.parametrize('order', range(1, 5))
def test_bleu_equals_sacrebleu(order):
    package = pytest.importorskip('sacrebleu')
    candidates, references = corpus(seed=order)
    ours = C.corpus_bleu(candidates, references)[order - 1]
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(5)]
    theirs = package.BLEU(tokenize='none', smooth_method='none', max_ngram_order=order).corpus_score(candidates, columns)
    assert abs(ours - theirs.score/100) < 1e-6


def test_bleu_differs_from_sacrebleu_only_where_nothing_matches_or_is_too_short():
    package = pytest.importorskip('sacrebleu').BLEU(tokenize='none', smooth_method='none')
    equal = 0
    for c, r in zip(*corpus(seed=5)):
        counts, ours, theirs = C.bleu_counts([c], r)[0], C.bleu([c], r)[0, 3], package.sentence_score(c, r).score/100
        if counts[3]: assert abs(ours - theirs) < 1e-6; equal += 1
        else: assert theirs == 0 and 0 < ours < .04
    assert equal > 20


@pytest.mark.parametrize('seed', range(3))
def test_rouge_equals_the_published_script(seed):
    package = pytest.importorskip('pycocoevalcap.rouge.rouge')
    candidates, references = corpus(seed=seed)
    whole, each = published(package.Rouge(), candidates, references)
    ours = [C.rouge_l([c], r)[0] for c, r in zip(candidates, references)]
    assert np.abs(ours - each).max() < 1e-6 and abs(np.mean(ours) - whole) < 1e-6


@pytest.mark.parametrize('seed', range(3))
def test_cider_equals_the_published_script(seed):
    package = pytest.importorskip('pycocoevalcap.cider.cider')
    candidates, references = corpus(seed=seed)
    whole, each = published(package.Cider(), candidates, references)
    df = C.DocumentFrequencies.of(references)
    ours = [C.cider([c], r, df)[0] for c, r in zip(candidates, references)]
    assert np.abs(ours - each).max() < 1e-6 and abs(np.mean(ours) - whole) < 1e-6


def test_all_together_on_real_captions():
    bleu, rouge, cider = (pytest.importorskip(f'pycocoevalcap.{m}.{m}') for m in ('bleu', 'rouge', 'cider'))
    captions = [' '.join(C.caption_words(c)) for c in captioned_digits(400, 'test', seed=3).captions]
    candidates, references = captions[::4], [captions[i:i + 3] for i in range(1, 400, 4)]
    ours = C.caption_scores(candidates, references)
    for n, score in enumerate(published(bleu.Bleu(4), candidates, references, verbose=0)[0], 1): assert abs(ours[f'BLEU-{n}'] - score) < 1e-6
    assert abs(ours['ROUGE-L'] - published(rouge.Rouge(), candidates, references)[0]) < 1e-6
    assert abs(ours['CIDEr-D'] - published(cider.Cider(), candidates, references)[0]) < 1e-6


# --- laws


def test_words():
    assert C.caption_words('The red 7, and -- the "blue" 0.') == ('the', 'red', '7', 'and', 'the', 'blue', '0')
    assert C.caption_words(('The', '.')) == ('The', '.') == C.caption_words(['The', '.'])
    assert C.count_ngrams(C.count_ngrams('a b')) == C.count_ngrams(['a', 'b'])
    assert [len(g) for g in C.count_ngrams('a b a b a').grams] == [5, 4, 3, 2]
    assert C.count_ngrams('a b a').counts == {('a',): 2, ('b',): 1, ('a', 'b'): 1, ('b', 'a'): 1, ('a', 'b', 'a'): 1}


def test_a_copy_is_perfect_and_a_stranger_is_not():
    copies, strangers = C.bleu(['a b c d e', 'v w x y z'], ['a b c d e', 'q'])
    assert np.abs(copies - 1).max() < 1e-8 and strangers.max() < 1e-3
    assert C.rouge_l(['a b c', 'x'], ['a b c', 'q']).tolist() == [1, 0]
    df = C.DocumentFrequencies.of([['a b c d e'], ['v w x y z']])
    assert abs(C.cider(['a b c d e'], ['a b c d e'], df)[0] - 10) < 1e-9
    assert C.cider(['v w x y z'], ['a b c d e'], df)[0] == 0


def test_order_of_candidates_references_and_images_does_not_matter():
    candidates, references = corpus(40, seed=2)
    df = C.DocumentFrequencies.of(references)
    for score in C.bleu, C.rouge_l, lambda c, r: C.cider(c, r, df):
        assert np.allclose(score(candidates, references[0])[::-1], score(candidates[::-1], references[0][::-1]))
    assert np.allclose(C.corpus_bleu(candidates, references), C.corpus_bleu(candidates[::-1], references[::-1]))


def test_bleu_of_one_image_is_the_corpus_of_one_image():
    for c, r in zip(*corpus(30, seed=4)): assert np.allclose(C.bleu([c], r)[0], C.corpus_bleu([c], [r]))


def test_repeats_are_clipped():
    assert C.bleu_counts(['the the the the'], ['the cat', 'the the dog'])[0, 0] == 2
    assert abs(C.bleu(['the the the the'], ['the cat sat down'])[0, 0] - 1/4) < 1e-8
    df = C.DocumentFrequencies.of([['a'], ['b'], ['c']])
    once, often = C.cider_matrix(['a', 'a a a a'], ['a'], df)[:, 0]
    assert once > often


def test_brevity_and_the_closest_reference():
    counts = C.bleu_counts(['a b c'], ['a b', 'a b c d', 'q'])[0]
    assert counts[8:].tolist() == [3, 2]                         # 2 and 4 are as near: the shorter is taken
    short = C.bleu(['a b'], ['a b c d'])[0, 0]
    assert abs(short - math.exp(1 - 4/2)) < 1e-6


def longest(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b): table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_longest_common_subsequence_against_the_table():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices('abcd', k=rng.choice([1, 2, 7, 40, 70])) for _ in range(2))
        common, precision, recall = longest(a, b), longest(a, b)/len(a), longest(a, b)/len(b)
        want = 2.44*precision*recall/(recall + 1.44*precision) if common else 0
        assert abs(C.rouge_l([a], [b])[0] - want) < 1e-9


def test_the_matrix_against_the_definition():
    """CIDEr-D from a dictionary of weights, pair by pair."""
    candidates, references = corpus(12, seed=7)
    df, pool = C.DocumentFrequencies.of(references), [r for row in references for r in row]
    def one(c, r):
        c, r, total = C.count_ngrams(c), C.count_ngrams(r), 0
        for n in range(1, 5):
            a, b = ({g: k*df.idf(g) for g, k in x.counts.items() if len(g) == n} for x in (c, r))
            norm = math.hypot(*a.values())*math.hypot(*b.values())
            total += sum(min(v, b[g])*b[g] for g, v in a.items() if g in b)/norm if norm else 0
        return 10/4*total*math.exp(-(len(c.words) - len(r.words))**2/72)
    assert np.allclose(C.cider_matrix(candidates, pool, df), [[one(c, r) for r in pool] for c in candidates])


def test_document_frequencies():
    df = C.DocumentFrequencies.of([['a b', 'a c'], ['a'], ['d', 'd']])
    assert (df.images, df.counts[('a',)], df.counts[('d',)], df.counts[('a', 'b')]) == (3, 2, 1, 1)
    assert df.idf(('never',)) == df.idf(('d',)) == math.log(3) and abs(df.idf(('a',)) - math.log(3/2)) < 1e-12
    alone = C.DocumentFrequencies.of([['a b c d']])
    assert C.cider(['a b c d'], ['a b c d'], alone)[0] == 0     # with one image no word tells anything


# --- scorers that are programs of their own


def test_what_is_not_available_says_why(monkeypatch):
    scores = C.caption_scores(['a b c d'], [['a b c d']])
    assert set(scores) == {*(f'BLEU-{n}' for n in range(1, 5)), 'ROUGE-L', 'CIDEr-D', 'METEOR', 'SPICE'}
    assert 'java=True' in scores['METEOR'] and 'java=True' in scores['SPICE']
    monkeypatch.setattr(C, 'find_spec', lambda name: None)
    assert all(s.startswith('not available: ') and 'not installed' in s for s in C.java_scores(['a'], [['a']]).values())


def test_no_java(monkeypatch):
    pytest.importorskip('pycocoevalcap')
    monkeypatch.setattr(C.shutil, 'which', lambda name: None)
    assert all('no java' in s for s in C.java_scores(['a'], [['a']]).values())


def test_a_java_that_dies_is_a_reason_and_no_hang(tmp_path, monkeypatch):
    pytest.importorskip('pycocoevalcap')
    (tmp_path / 'java').write_text('#!/bin/sh\nexit 1\n')
    (tmp_path / 'java').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    if shutil.which('java') != str(tmp_path / 'java'): pytest.skip('no shell scripts here')
    assert all(s.startswith('not available: ') for s in C.java_scores(['a b'], [['a b']]).values())


def test_meteor_where_it_runs():
    pytest.importorskip('pycocoevalcap')
    if not shutil.which('java'): pytest.skip('no java')
    scores = C.java_scores(['a red cat sits', 'the large hound runs'], [['a red cat sits'], ['the big dog runs', 'q']])
    if isinstance(scores['METEOR'], str): pytest.skip(scores['METEOR'])
    whole, each = scores['METEOR']
    assert each[0] == 1 and .5 < each[1] < 1 and each[1] < whole < 1        # synonyms are seen
    assert isinstance(scores['SPICE'], tuple) or scores['SPICE'].startswith('not available: ')


def test_our_words_are_those_of_the_fields_tokenizer_on_captions_of_digits():
    package = pytest.importorskip('pycocoevalcap.tokenizer.ptbtokenizer')
    if not shutil.which('java'): pytest.skip('no java')
    captions = [*captioned_digits(60, 'test', seed=1).captions, 'Two cats - one black; one white...', 'a well-known fire-truck']
    cut = package.PTBTokenizer().tokenize({i: [dict(caption=c)] for i, c in enumerate(captions)})
    assert [' '.join(C.caption_words(c)) for c in captions] == [cut[i][0] for i in range(len(captions))]


def test_the_table_keeps_reasons():
    table = C.caption_table(dict(model=C.caption_scores(['a b c d'], [['a b c d']]), other=dict(METEOR=.5)))
    assert 'METEOR' in table.splitlines()[0] and 'SPICE not available: not asked for, write java=True (model)' in table


# --- bad input


@pytest.mark.parametrize('call, match', [
    (lambda: C.bleu(['a'], []), 'no caption in references'),
    (lambda: C.rouge_l([], ['a']), 'no caption in candidates'),
    (lambda: C.cider(['a', ' . '], ['a'], C.DocumentFrequencies({}, 1)), 'holds no word'),
    (lambda: C.bleu('a', ['a']), r'write \[caption\]'),
    (lambda: C.bleu(['a'], 'a'), r'write \[caption\]'),
    (lambda: C.corpus_bleu(['a', 'b'], [['a']]), '2 images and references for 1'),
    (lambda: C.caption_scores(['a'], [['a'], ['b']]), '1 images and references for 2'),
    (lambda: C.caption_scores([], []), 'no image'),
    (lambda: C.java_scores([''], [['a']]), 'holds no word'),
    (lambda: C.DocumentFrequencies.of([[]]), 'no caption')])
def test_bad_input_is_one_line(call, match):
    with pytest.raises(ValueError, match=match) as error: call()
    assert '\n' not in str(error.value)
