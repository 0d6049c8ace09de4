"""Stage 2: stored codes are the codes, only priors move, the stage lowers what it says."""
import pytest
import torch

from jointgen.code_priors import PriorStage, pack_codes, unpack_codes
from jointgen.digits import captioned_digits
from jointgen.learner import Learner
from jointgen.models.lnfmm import LNFMM

TINY = dict(side=16, shared=16, private_v=8, private_t=4, widths=(8, 8, 8), res_blocks=1, encoder=dict(slots=4, width=8, layers=1),
            decoder=dict(slots=4, width=16, layers=1), link_sizes=dict(steps=2, hidden=8), prior_sizes=dict(steps=2, hidden=8), joint_sizes=dict(steps=2, hidden=8))


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(24, side=16).pairs


@pytest.mark.parametrize('changes', [{}, dict(posterior='learned'), dict(private_v=0), dict(prior='gaussian'), dict(link='identity')], ids=str)
def test_only_priors_move(pairs, changes):
    torch.manual_seed(0)
    model = LNFMM(pairs.vocab, **TINY | changes).eval()
    rows = pack_codes(model, pairs, batch_size=7)
    assert torch.allclose(rows, pack_codes(model, pairs), atol=1e-5) and not rows.requires_grad
    v, t = unpack_codes(model, rows)
    assert torch.allclose(v.s, model.encode_image(pairs.image).s, atol=1e-5) and torch.allclose(t.log_std, model.encode_text(pairs.tokens).log_std, atol=1e-5)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    log = Learner(PriorStage(model), rows, batch_size=8, optimizer=dict(lr=1e-2), schedule='constant').fit(12, progress=False).log
    moved = {k for k, x in model.state_dict().items() if not torch.equal(x, before[k])}
    assert moved and all(k.startswith('prior_') for k in moved) and any(k.startswith('prior_s') for k in moved)
    assert log[-1]['loss'] < log[0]['loss'] and ('nats_v' in log[0]) == (model.prior_v is not None)
