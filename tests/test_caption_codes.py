"""The two text paths keep one contract: encode, logits, write."""
import pytest
import torch

from jointgen.caption_codes import TextByAttention, TextByConvolution, start_wide_
from jointgen.digits import captioned_digits
from jointgen.pairs import BOS, EOS, PAD

PAIRS = captioned_digits(12).pairs
VOCAB = PAIRS.vocab
PATHS = [TextByAttention, TextByConvolution]


def build(path, **options):
    torch.manual_seed(0)
    return path(VOCAB, 16, 8, d=32, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("joint", [True, False])
def test_shapes_and_gradients(path, joint):
    text, z = build(path, joint_split=joint), torch.randn(12, 24, 32, requires_grad=True)
    codes = text.encode(PAIRS.tokens)
    logits = text.logits(z, PAIRS.tokens)
    assert codes.shape == (12, 8, 32) and logits.shape == (12, 39, len(VOCAB))
    (logits.square().mean() + codes.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in text.parameters())
    seen = z.grad.abs().sum((0, 2)) > 0
    assert seen[16:].all() and seen[:16].all() == joint and seen[:16].any() == joint


@pytest.mark.parametrize("path", PATHS)
def test_what_is_written_ends_once_and_is_padded(path):
    tokens = build(path).eval().write(torch.randn(12, 24, 32))
    assert tokens.shape == (12, 40)
    for row in tokens.tolist():
        after = row[row.index(EOS) + 1:] if EOS in row else []
        assert all(t == PAD for t in after)
    if path is TextByAttention: assert (tokens[:, 0] == BOS).all()


def test_word_by_word_cannot_look_ahead():
    text, z = build(TextByAttention).eval(), torch.randn(1, 24, 32)
    a, b = PAIRS.tokens[:1].clone(), PAIRS.tokens[:1].clone()
    b[0, 4] = (b[0, 4] + 1) % len(VOCAB)
    gap = (text.logits(z, a) - text.logits(z, b)).abs().amax(-1)[0]
    assert (gap[:4] < 1e-6).all() and gap[4] > 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_learns_one_batch(path):
    text = build(path)
    opt, losses = torch.optim.Adam(text.parameters(), 3e-3), []
    for _ in range(60):
        z = torch.cat([torch.zeros(12, 16, 32), text.encode(PAIRS.tokens)], 1)
        loss = torch.nn.functional.cross_entropy(text.logits(z, PAIRS.tokens).transpose(1, 2), PAIRS.tokens[:, 1:], ignore_index=PAD)
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_wide_start_spares_positions_and_norms():
    text = build(TextByAttention)
    place, norm = text.decoder.body.position.weight.detach().clone(), text.encoder.norm.weight.detach().clone()
    start_wide_(text)
    assert torch.equal(text.decoder.body.position.weight, place) and torch.equal(text.encoder.norm.weight, norm)
    assert abs(text.word.weight.std().item() - 1) < 0.1
