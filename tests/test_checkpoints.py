import json, random

import numpy, pytest, torch
from torch import nn

from jointgen.checkpoints import (batch_at, check_identity, checkpoints, epoch_order, file_facts, load_state, model_identity, model_state, random_state,
                                  read_checkpoint, read_log, read_tensors, set_random_state, to_device, writable_folder, write_checkpoint)
from jointgen.pairs import Pairs

WHO = {'class': 'a:B', 'config': {}, 'vocab_hash': None}


@pytest.mark.parametrize('n, batch_size', [(10, 5), (23, 4), (64, 64), (3, 8), (1, 1)])
def test_an_epoch_visits_everything_once(n, batch_size):
    data, per_epoch = torch.arange(n), max(1, n//batch_size)
    for epoch in range(3):
        seen = torch.cat([batch_at(data, epoch*per_epoch + i, batch_size=batch_size) for i in range(per_epoch)])
        assert len(seen) == len(set(seen.tolist())) == min(n, per_epoch*batch_size)


def test_batches_depend_on_step_and_seed_only():
    data = torch.arange(100)
    late = batch_at(data, 37, batch_size=8, seed=1)
    epoch_order.cache_clear()
    assert torch.equal(late, batch_at(data, 37, batch_size=8, seed=1))
    assert not torch.equal(late, batch_at(data, 37, batch_size=8, seed=2))
    assert not torch.equal(epoch_order(100, 0, 0), epoch_order(100, 0, 1))


def test_a_function_is_data_too():
    assert batch_at(lambda step: step*2, 21, batch_size=8) == 42


def test_to_device_keeps_the_container():
    pairs = Pairs(torch.zeros(2, 3, 4, 4), torch.ones(2, 5, dtype=torch.int64))
    moved = to_device(dict(a=(torch.ones(1), [pairs, 'text'])), torch.device('cpu'))
    assert isinstance(moved['a'], tuple) and isinstance(moved['a'][1][0], Pairs) and moved['a'][1][1] == 'text'


def test_state_holds_buffers_and_tied_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    tensors, extra = model_state(model)
    assert set(tensors) == set(model.state_dict()) and extra == {}
    assert tensors['0.weight'].data_ptr() != tensors['1.weight'].data_ptr()


def test_load_state_is_all_or_nothing():
    model, other = nn.Linear(3, 2), nn.Linear(3, 4)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r'here does not fit Linear: bias is \(4,\) in the file and \(2,\) in the model \(2 such\)'):
        load_state(model, model_state(other)[0], {}, 'here')
    with pytest.raises(ValueError, match='weight is missing in the file'): load_state(model, {'bias': torch.zeros(2)}, {}, 'here')
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize('change, message', [({'class': 'a:C'}, 'holds a B, not a C'), ({'vocab_hash': 'ff'}, 'vocabulary None, not ff'), ({'config': {'d': 3}}, 'd=None, not 3')])
def test_identities_must_agree(change, message):
    check_identity(WHO, dict(WHO), 'here')
    with pytest.raises(ValueError, match=message): check_identity(WHO, {**WHO, **change}, 'here')


def test_identity_of_a_plain_module():
    assert model_identity(nn.Linear(1, 1)) == {'class': 'torch.nn.modules.linear:Linear', 'config': {}, 'vocab_hash': None}


def test_files_that_are_damaged_are_refused(tmp_path):
    path = write_checkpoint(tmp_path, 5, dict(model={'w': torch.arange(100.)}), WHO)
    files, about = read_checkpoint(path, WHO)
    assert torch.equal(files['model']['w'], torch.arange(100.)) and about['step'] == 5
    file = path/'model.safetensors'
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match='cut short'): read_checkpoint(path, WHO)
    file.write_bytes(whole[:-1] + b'?')
    with pytest.raises(ValueError, match='changed since it was written'): read_checkpoint(path, WHO)
    file.unlink()
    with pytest.raises(ValueError, match='missing'): read_checkpoint(path, WHO)
    file.write_bytes(whole)
    (path/'checkpoint.json').write_text((path/'checkpoint.json').read_text()[:40])
    with pytest.raises(ValueError, match='missing or cut short'): read_checkpoint(path, WHO)


def test_a_file_that_is_no_tensors(tmp_path):
    (tmp_path/'x').write_bytes(b'hello')
    with pytest.raises(ValueError, match='holds no tensors'): read_tensors(tmp_path/'x', file_facts(tmp_path/'x'))


def test_two_checkpoints_are_kept_and_leftovers_removed(tmp_path):
    (tmp_path/'tmp-1').mkdir()
    for step in (1, 2, 3, 3): write_checkpoint(tmp_path, step, dict(model={'w': torch.ones(1)}), WHO)
    assert list(checkpoints(tmp_path)) == [2, 3] and sorted(p.name for p in tmp_path.iterdir()) == ['step-00000002', 'step-00000003']
    assert checkpoints(None) == {} == checkpoints(tmp_path/'absent')


def test_memory_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match='make it a buffer'): write_checkpoint(tmp_path, 1, {}, dict(extra={1, 2}))
    assert checkpoints(tmp_path) == {}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='cannot be written .*choose another'): writable_folder(tmp_path/'file'/'below')
    assert writable_folder(tmp_path/'a'/'b').is_dir() and not any((tmp_path/'a'/'b').iterdir())


def test_random_numbers_go_on_where_they_stood():
    own = torch.Generator().manual_seed(3)
    draw = lambda: (torch.rand(3).tolist(), torch.randn(3).tolist(), numpy.random.randn(3).tolist(), random.random(), random.gauss(0, 1), torch.rand(2, generator=own).tolist())
    draw()
    tensors, numbers = random_state([own])
    numbers = json.loads(json.dumps(numbers))  # as a checkpoint keeps them
    first = draw()
    set_random_state(tensors, numbers, [own])
    assert draw() == first


def test_log_forgets_what_came_later(tmp_path):
    assert read_log(tmp_path) == []
    (tmp_path/'log.jsonl').write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [r['step'] for r in read_log(tmp_path)] == [1, 2, 3]
    assert [r['step'] for r in read_log(tmp_path, 2)] == [1, 2] == [r['step'] for r in read_log(tmp_path)]
