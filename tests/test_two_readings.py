"""Two readings of a caption: in every mode a part feels gradients only in its owner's turn; readings are sentences of the right width; all is saved."""
import pytest
import torch

from jointgen.digits import captioned_digits
from jointgen.sentences import FrozenSentences, SentenceEncoder
from jointgen.two_readings import OWNED, DualTextEncoder

PLAYERS = ('generator', 'discriminator')
SMALL = dict(d=12, hidden=8, embedding=8)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(6).pairs


def build(pairs, mode, **sizes):
    torch.manual_seed(0)
    return DualTextEncoder(pairs.vocab, mode, **SMALL | sizes)


@pytest.mark.parametrize('mode', OWNED)
@pytest.mark.parametrize('player', PLAYERS)
@pytest.mark.parametrize('reader', PLAYERS)
def test_a_part_feels_its_owners_turn_only(pairs, mode, player, reader):
    encoder = build(pairs, mode)
    said = encoder.for_generator(pairs.tokens, player) if reader == 'generator' else encoder.for_discriminator(pairs.tokens, player)
    assert said.sentence.shape == (6, 12) and said.words.shape[:2] == (6, 40) and said.mask.shape == (6, 40)
    if said.sentence.requires_grad: (said.sentence*torch.randn(6, 12)).sum().backward()
    felt = {n.split('.')[1] for n, p in encoder.named_parameters() if p.grad is not None}
    assert felt <= set(OWNED[mode][player])
    reaches = {'swap': reader != player, 'frozen': False, 'shared_d': player == 'discriminator', 'shared_gd': True}
    assert bool(felt) == reaches.get(mode, reader == player)


@pytest.mark.parametrize('mode', OWNED)
def test_parts_that_are_owned_exist(pairs, mode):
    encoder = build(pairs, mode)
    assert all(set(OWNED[mode][p]) <= set(encoder.nets) for p in PLAYERS)
    learn = {n.split('.')[1] for n, p in encoder.named_parameters() if p.requires_grad}
    assert learn == {part for p in PLAYERS for part in OWNED[mode][p]}  # nothing learns that nobody owns


@pytest.mark.parametrize('mode', OWNED)
def test_one_reading_or_two(pairs, mode):
    encoder = build(pairs, mode).eval()
    a, b = encoder.for_generator(pairs.tokens), encoder.for_discriminator(pairs.tokens)
    assert torch.equal(a.sentence, b.sentence) == (mode in ('shared_d', 'shared_gd', 'frozen'))
    again = build(pairs, mode)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.eval().for_generator(pairs.tokens).sentence, a.sentence)


def test_without_gradients_nobody_feels(pairs):
    with torch.no_grad(): assert not build(pairs, 'shared_gd').for_generator(pairs.tokens).sentence.requires_grad


def test_cells_and_modes(pairs):
    assert build(pairs, 'split', cell='lstm').for_generator(pairs.tokens).sentence.shape == (6, 12)
    with pytest.raises(ValueError, match='dual, split, shared_d, shared_gd, frozen, swap fit'): build(pairs, 'both')


@pytest.mark.parametrize('mode, part', [('dual', 'discriminator'), ('split', 'trunk'), ('shared_d', 'trunk'), ('frozen', 'trunk')])
def test_a_taught_reading_is_a_start_and_its_numbers_are_equally_loud(pairs, mode, part):
    many = captioned_digits(100, seed=3).pairs.tokens
    teacher = SentenceEncoder(pairs.vocab, 12, hidden=8, embedding=8)
    with torch.no_grad(): teacher.head.weight.mul_(torch.linspace(0.1, 9, 12)[:, None])    # some numbers are shouted
    encoder = build(pairs, mode).teach(part, teacher, many)
    net, wanted = encoder.nets[part], FrozenSentences(teacher, many)(many).sentence
    said = net(many).sentence
    if mode in ('dual', 'shared_d'): wanted = torch.nn.functional.layer_norm(wanted, (12,))   # a reading that learns ends so
    assert torch.allclose(said, wanted, atol=1e-3) and said.requires_grad == (mode != 'frozen')


def test_only_a_reader_is_taught(pairs):
    teacher = SentenceEncoder(pairs.vocab, 12, hidden=8, embedding=8)
    with pytest.raises(ValueError, match='trunk fits'): build(pairs, 'split').teach('generator', teacher, pairs.tokens)


@pytest.mark.parametrize('mode, part', [('dual', 'generator'), ('frozen', 'trunk')])
def test_a_teacher_of_another_width_is_refused(pairs, mode, part):
    teacher = SentenceEncoder(pairs.vocab, 9, hidden=8, embedding=8)
    with pytest.raises(ValueError, match='sentences of 9 numbers, 12 fits'): build(pairs, mode).teach(part, teacher, pairs.tokens)


@pytest.mark.parametrize('mode', OWNED)
def test_sentences_keep_full_precision_under_autocast(pairs, mode):
    encoder = build(pairs, mode)
    with torch.autocast('cpu', torch.bfloat16):
        for said in (encoder.for_generator(pairs.tokens), encoder.for_discriminator(pairs.tokens)): assert said.sentence.dtype == torch.float32
