"""The switch: who computes, what is refused, and that nothing needs Triton until it is asked for."""
import importlib.machinery
import itertools
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from jointgen.kernels import backend as module
from jointgen.kernels.backend import GRID, KERNELS, NAMES, Configuration, check_grid, fused, has_triton, interpreting, resolve_backend, traced


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv('JOINTGEN_BACKEND', raising=False)


def claims(device):
    "A tensor that claims to be on `device`, which need not exist."
    with FakeTensorMode(): return torch.empty(3, device=device)


def run(code, **env):
    "Run Python text in a process of its own, without the test process's choice of interpreter."
    kept = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'JOINTGEN_BACKEND')}
    done = subprocess.run([sys.executable, '-c', code], env=kept | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- the rule


def test_argument():
    x = torch.zeros(3)
    assert [resolve_backend(x, backend=b) for b in ('auto', 'torch', 'reference')] == ['torch', 'torch', 'reference']
    assert resolve_backend(x) == resolve_backend(x, None, x[:0], nn.Parameter(x)) == resolve_backend() == 'torch'
    for b in NAMES[1:3]: assert resolve_backend(x, backend=resolve_backend(x, backend=b)) == b


def test_variable_is_read_at_each_call(monkeypatch):
    x = torch.zeros(3)
    for value, wanted in (('reference', 'reference'), ('torch', 'torch'), ('auto', 'torch'), ('', 'torch'), ('reference', 'reference')):
        monkeypatch.setenv('JOINTGEN_BACKEND', value)
        assert resolve_backend(x) == wanted
        assert resolve_backend(x, backend='torch') == 'torch' and resolve_backend(x, backend='reference') == 'reference'
    monkeypatch.delenv('JOINTGEN_BACKEND')
    assert resolve_backend(x) == 'torch'


@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_cuda(device, monkeypatch):
    x = claims(device)
    monkeypatch.setattr(module, 'has_triton', lambda: True)
    assert [resolve_backend(x, x, backend=b) for b in NAMES] == ['triton', 'reference', 'torch', 'triton']
    monkeypatch.setattr(module, 'has_triton', lambda: False)
    assert resolve_backend(x) == 'torch'
    with pytest.raises(ValueError, match='not installed'): resolve_backend(x, backend='triton')


@pytest.mark.parametrize('device', ['meta', 'xpu', 'mps'])
def test_other_devices(device):
    x = torch.empty(3, device='meta') if device == 'meta' else claims(device)
    assert resolve_backend(x) == 'torch'
    if has_triton():
        with pytest.raises(ValueError, match=f'on {device}.*CUDA fits'): resolve_backend(x, backend='triton')


def test_interpreter_takes_cpu_tensors(monkeypatch):
    monkeypatch.setattr(module, 'has_triton', lambda: True)
    for answer in True, False:
        monkeypatch.setattr(module, 'interpreting', lambda: answer)
        if answer: assert resolve_backend(torch.zeros(3), backend='triton') == 'triton'
        else:
            with pytest.raises(ValueError, match='TRITON_INTERPRET=1 before the start'): resolve_backend(torch.zeros(3), backend='triton')


def test_unknown_name(monkeypatch):
    for name in ('numpy', 'Triton', ''):
        with pytest.raises(ValueError, match=f"^backend is '{name}', known are 'auto', 'reference', 'torch', 'triton'"):
            resolve_backend(torch.zeros(3), backend=name)
    monkeypatch.setenv('JOINTGEN_BACKEND', 'numpy')
    with pytest.raises(ValueError, match="^JOINTGEN_BACKEND is 'numpy'"): resolve_backend(torch.zeros(3))
    monkeypatch.setenv('JOINTGEN_BACKEND', 'triton')
    monkeypatch.setattr(module, 'has_triton', lambda: False)
    with pytest.raises(ValueError, match="^JOINTGEN_BACKEND is 'triton', but"): resolve_backend(torch.zeros(3))


def test_two_devices():
    x, away = torch.zeros(3), torch.zeros(3, device='meta')
    for backend in NAMES:
        with pytest.raises(ValueError, match='on cpu and meta, one device fits'): resolve_backend(x, None, away, backend=backend)
    with pytest.raises(ValueError, match='cuda:0 and cuda:1'): resolve_backend(claims('cuda:0'), claims('cuda:1'))


def test_errors_are_one_line():
    calls = [lambda: resolve_backend(backend='?'), lambda: resolve_backend(torch.zeros(1, device='meta'), backend='triton'),
             lambda: check_grid(2**40, what='x'), lambda: fused('?')]
    for call in calls:
        with pytest.raises(ValueError) as caught: call()
        assert '\n' not in str(caught.value) and ':' in str(caught.value)


# --- the grid


def test_grid():
    check_grid(what='nothing')
    for programs in ((0,), (2**31 - 1,), (1, 65535), (2**31 - 1, 65535, 65535)): check_grid(*programs, what='a kernel')
    for axis, most in enumerate(GRID):
        programs = [1]*axis + [most + 1]
        with pytest.raises(ValueError, match=f'^a kernel needs .*{most + 1} programs, at most .*{most} fit'): check_grid(*programs, what='a kernel')


# --- tracing


def test_traced():
    x = torch.zeros(3, requires_grad=True)
    assert not traced() and not traced(None) and not traced(x, None, x + 1, nn.Parameter(x), x.detach())
    assert traced(x, claims('cpu')) and traced(None, claims('cuda'))
    with FakeTensorMode(): assert traced(nn.Linear(2, 2).weight)
    assert not traced(x)


@pytest.mark.parametrize('dynamic', [False, True])
def test_traced_under_compile(dynamic):
    def f(x, y):
        check_grid(x.shape[0], what='f')
        return x + (1 if traced(x, None) else 2), resolve_backend(x, y, None)
    compiled = torch.compile(f, backend='eager', fullgraph=True, dynamic=dynamic)
    for n in 3, 5:
        out, where = compiled(torch.zeros(n), torch.zeros(2))
        assert out.tolist() == [1]*n and where == 'torch'
    assert f(torch.zeros(3), None)[0].tolist() == [2]*3


def test_traced_by_subclass():
    class Marked(torch.Tensor): pass
    assert traced(torch.zeros(3).as_subclass(Marked))


# --- Triton, imported late


def test_import_leaves_triton_alone():
    assert run("import sys, jointgen, jointgen.kernels.backend as b; b.has_triton(); b.interpreting(); print('triton' in sys.modules)") == ['False']


BLOCKED = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(f'no module named {name}', name=name)
'''
WITHOUT = '''
import importlib, pkgutil, torch, jointgen, jointgen.kernels
from jointgen.kernels.backend import fused, has_triton, resolve_backend
for m in pkgutil.iter_modules(jointgen.kernels.__path__):
    if not m.name.startswith('triton_'): importlib.import_module(f'jointgen.kernels.{m.name}')
assert not has_triton() and 'triton' not in [k for k, v in sys.modules.items() if v]
from jointgen.kernels.nearest_code import nearest_code
z, e = torch.randn(9, 4), torch.randn(5, 4)
assert torch.equal(nearest_code(z, e), nearest_code(z, e, backend='reference'))
from jointgen.kernels.coupling import affine_coupling
for a, b in zip(affine_coupling(z, z), affine_coupling(z, z, backend='reference')): assert torch.allclose(a, b, atol=1e-5)
for call in (lambda: resolve_backend(z, backend='triton'), lambda: fused('coupling'), lambda: nearest_code(z, e, backend='triton'), lambda: affine_coupling(z, z, backend='triton')):
    try: call()
    except ValueError as error: assert 'install it' in str(error), error
    else: raise SystemExit('no error')
'''


@pytest.mark.parametrize('block', ['sys.meta_path.insert(0, Blocked())', "sys.modules['triton'] = None"])
def test_without_triton(block):
    run(BLOCKED + block + WITHOUT)


def test_broken_triton():
    broken = "import sys, tempfile, pathlib; p = pathlib.Path(tempfile.mkdtemp())/'triton.py'; p.write_text('raise RuntimeError(\"no driver\")'); sys.path.insert(0, str(p.parent))"
    run(broken + '''
from jointgen.kernels.backend import fused, has_triton
assert has_triton()
try: fused('coupling')
except ValueError as e: assert 'no driver' in str(e) and 'install it' in str(e)
else: raise SystemExit('no error')''')


def test_triton_on_a_cpu_tensor_without_the_interpreter():
    pytest.importorskip('triton')
    code = '''
import torch
from jointgen.kernels.backend import fused, interpreting, resolve_backend
def refused():
    assert not interpreting()
    try: resolve_backend(torch.zeros(3), backend='triton')
    except ValueError as e: return 'TRITON_INTERPRET=1' in str(e)
assert refused()
fused('coupling')
import os
os.environ['TRITON_INTERPRET'] = '1'   # too late: the kernels are compiled ones
assert refused()'''
    run(code, TRITON_INTERPRET='0')
    run(code)


@pytest.mark.parametrize('value', ['1', 'on', 'TRUE', 'y', 'Yes', '0', '', 'off', '2', 't'])
def test_interpreting_reads_the_variable_as_triton_does(value, monkeypatch):
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(module, 'KERNELS', ())  # as long as no kernel is loaded
    monkeypatch.setenv('TRITON_INTERPRET', value)
    assert interpreting() == triton.knobs.runtime.interpret
    monkeypatch.delenv('TRITON_INTERPRET')
    assert not interpreting() and not triton.knobs.runtime.interpret


@pytest.mark.parametrize('kind', ['InterpretedFunction', 'JITFunction'])
def test_interpreting_asks_a_loaded_kernel(kind, monkeypatch):
    for name in KERNELS: monkeypatch.delitem(sys.modules, f'jointgen.kernels.triton_{name}', raising=False)
    loaded = types.ModuleType('loaded')
    loaded.number, loaded.kernel = 1, type(kind, (), {})()
    monkeypatch.setitem(sys.modules, 'jointgen.kernels.triton_coupling', loaded)
    for value in '0', '1':
        monkeypatch.setenv('TRITON_INTERPRET', value)
        assert interpreting() == (kind == 'InterpretedFunction')
    del loaded.kernel
    assert interpreting()  # nothing to ask: the variable, again


def test_fused_refuses_other_names():
    for name in ('', 'backend', 'triton_coupling', '..models'):
        with pytest.raises(ValueError, match='known are nearest_code, coupling, codebook'): fused(name)


@pytest.mark.parametrize('name,capability', list(itertools.product(KERNELS, (80, 90))))
def test_kernels_say_how_they_are_launched(name, capability):
    pytest.importorskip('triton')
    kernels = fused(name)
    assert kernels is fused(name) and kernels.__name__ == f'jointgen.kernels.triton_{name}'
    listed = list(kernels.configurations(capability))
    assert listed and len({c.name for c in listed}) == len(listed), 'two configurations with one name'
    for c in listed:
        assert isinstance(c, Configuration)
        assert sorted([*c.signature, *c.constants]) == sorted(c.kernel.arg_names), c.name
        assert set(c.divisible) <= set(c.signature) and set(c.expect) <= {'mma', 'v4'}
        assert c.num_warps in (1, 2, 4, 8, 16) and 1 <= c.num_stages <= 8


def test_has_triton():
    assert has_triton() == (importlib.machinery.PathFinder.find_spec('triton') is not None)
