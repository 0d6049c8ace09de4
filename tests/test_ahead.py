"""Every configuration of every kernel compiles for GPUs that are not here, and a bad one is found out."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from jointgen.kernels import ahead  # noqa: E402
from jointgen.kernels.ahead import Compiled, chip, compile_ahead, compile_all, complaints, distinct, instructions, nvidia_tool, programs_at_once  # noqa: E402
from jointgen.kernels.backend import KERNELS, Configuration  # noqa: E402

BAD = textwrap.dedent('''
    import triton
    import triton.language as tl
    from jointgen.kernels.backend import Configuration

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, K, N: tl.constexpr, D: tl.constexpr):
        rows, columns, inner = tl.arange(0, N), tl.arange(0, N), tl.arange(0, D)
        total = tl.zeros((N, N), tl.float32)
        for k in range(0, K, D):
            a = tl.load(a_ptr + rows[:, None]*K + (k + inner)[None, :])
            b = tl.load(b_ptr + columns[None, :]*K + (k + inner)[:, None])
            total = tl.dot(a, b, total, input_precision='ieee')
        tl.store(c_ptr + rows[:, None]*N + columns[None, :], total)

    @triton.jit
    def copy(a_ptr, b_ptr, stride, N: tl.constexpr):
        at = tl.program_id(0)*stride + tl.arange(0, N)
        tl.store(b_ptr + at, tl.load(a_ptr + at))

    @triton.jit
    def nonsense(a_ptr, N: tl.constexpr):
        tl.store(a_ptr + tl.arange(0, N), no_such_name)

    def made(name, kernel, dtype='*bf16', divisible=True, expect=(), stages=3, **constants):
        arguments = [n for n in kernel.arg_names if n not in constants]
        pointers = [n for n in arguments if n.endswith('_ptr')]
        types = {n: (dtype if n != 'c_ptr' else '*fp32') if n in pointers else 'i32' for n in arguments}
        return Configuration(name, kernel, types, constants, 4, stages, tuple(arguments) if divisible else (), expect)

    def configurations(capability):
        yield made('good product', product, expect=('mma', 'v4'), N=64, D=64)
        yield made('large product', product, expect=('mma',), stages=4, N=128, D=256)
        yield made('slow product', product, '*fp32', expect=('mma',), N=32, D=32)
        yield made('good copy', copy, '*fp32', expect=('v4',), N=1024)
        yield made('odd copy', copy, '*fp32', divisible=False, expect=('v4',), N=1024)
        yield made('nonsense', nonsense, '*fp32', N=32)
''')


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "bad.py"
    path.write_text(BAD)
    return path


# --- all kernels of the package


@pytest.fixture(scope="module")
def everything():
    return compile_all()


def test_every_configuration_fits_the_gpu(everything):
    wrong = [f"{c.name} on {c.capability}: {text}" for c in everything for text in c.complaints]
    assert not wrong, "\n".join(wrong)


def test_nothing_was_left_out(everything):
    code = ("import json; from jointgen.kernels.ahead import distinct, kernel_module\n"
            f"print(json.dumps([c.name for n in (80, 90) for m in {KERNELS} for c in distinct(kernel_module(m).configurations(n))]))")
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    names = json.loads(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert [c.name for c in everything] == names and {c.capability for c in everything} == {80, 90}


def test_numbers_are_plausible(everything):
    for c in everything:
        assert 16 <= c.registers <= 255 and c.stack == 0 and 0 <= c.shared <= chip(c.capability).limit, c
        assert programs_at_once(c) >= 1 and c.instructions["loads"] >= c.instructions["wide"] >= 0, c
    products = [c for c in everything if c.instructions["wgmma"] + c.instructions["mma"]]
    assert {c.capability for c in products} == {80, 90}, "nearest codes are found by tensor cores on both"


def test_the_stored_file_is_in_step(everything):
    path = Path(__file__).parents[1] / "nbs" / "results" / "kernels_ahead.jsonl"
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(c["name"], c["capability"]) for c in stored] == [(c.name, c.capability) for c in everything], \
        "run python -m jointgen.kernels.ahead > nbs/results/kernels_ahead.jsonl"


# --- a check must be able to fail


def test_bad_kernels_are_found_out(bad):
    found = {(c.name, c.capability): c for c in compile_all(modules=(bad,))}
    told = {key: " ".join(c.complaints) for key, c in found.items()}
    for n, product in (80, "mma"), (90, "wgmma"):
        assert told["good product", n] == told["good copy", n] == ""
        assert found["good product", n].instructions[product] and found["good copy", n].instructions["wide"]
        assert "KiB of shared memory" in told["large product", n] and programs_at_once(found["large product", n]) == 0
        assert "no tensor cores" in told["slow product", n]
        assert "no load of 16 bytes" in told["odd copy", n] and found["odd copy", n].instructions["loads"]
        assert "does not compile" in told["nonsense", n] and "no_such_name" in told["nonsense", n]


def test_one_process_or_three_say_the_same(bad):
    small = [compile_all((90,), (bad,), workers=w) for w in (1, 3)]
    assert [c._replace(seconds=0.) for c in small[0]] == [c._replace(seconds=0.) for c in small[1]]


def test_the_assembler_says_the_same_as_the_machine_code(bad):
    code = textwrap.dedent(f"""
        from jointgen.kernels import ahead
        compiled = [ahead.assemble(c, 90).asm for c in ahead.kernel_module({str(bad)!r}).configurations(90) if 'good' in c.name]
        first = [ahead.resources(asm) for asm in compiled]
        find = ahead.nvidia_tool
        ahead.nvidia_tool = lambda name: None if name == 'cuobjdump' else find(name)
        assert find('cuobjdump') and first == [ahead.resources(asm) for asm in compiled], first
        """)
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_module_that_breaks_is_an_error(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        compile_all(modules=(tmp_path / "broken.py",), workers=1)


# --- the small parts


def test_complaints():
    none = dict(wgmma=0, mma=0, wide=0, loads=4, atomics=0)
    fine = Compiled("x", 90, 4, 40, 0, 1024, none)
    assert complaints(fine) == ()
    assert len(complaints(fine, ("mma", "v4"))) == 2
    assert complaints(fine._replace(instructions={**none, "wgmma": 1, "wide": 1}), ("mma", "v4")) == ()
    assert "no wgmma" in complaints(fine._replace(instructions={**none, "mma": 1}), ("mma",))[0]
    assert complaints(fine._replace(capability=80, instructions={**none, "mma": 1}), ("mma",)) == ()
    assert "spills 8 bytes" in complaints(fine._replace(stack=8))[0]
    assert complaints(fine._replace(shared=227 * 1024)) == () and "228 KiB" in complaints(fine._replace(shared=228 * 1024))[0]
    assert "163 KiB fit" in complaints(fine._replace(capability=80, shared=200 * 1024))[0]


def test_programs_at_once():
    one = Compiled("x", 90, 8, 128, 0, 64 * 1024, {})
    assert programs_at_once(one) == 2  # 128 registers for 256 threads: two programs
    assert programs_at_once(one._replace(registers=32)) == 3  # shared memory: three
    assert programs_at_once(one._replace(registers=32, shared=0)) == 8  # 64 warps: eight
    assert programs_at_once(one._replace(registers=129)) == 1  # handed out in steps


def test_unknown_chip():
    with pytest.raises(ValueError, match="capability is 70, known are 80, 86, 89, 90"):
        chip(70)


@pytest.mark.parametrize("ptx, counts", [
    ("ld.global.v4.b32 {%r1}, [%rd1];\nld.global.b32 %r1, [%rd2];", dict(wide=1, loads=2)),
    ("ld.global.L1::evict_last.v4.b32 {%r1}, [%rd1];\nld.global.nc.v2.b64 {%rd1}, [%rd2];", dict(wide=2, loads=2)),
    ("@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd14 + 0 ], 0x10, %r101;\ncp.async.ca.shared.global [ %r1 ], [ %rd1 ], 0x4, %r1;", dict(wide=1, loads=2)),
    ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {", dict(wgmma=1, mma=0)),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", dict(wgmma=0, mma=1)),
    ("@%p1 atom.global.gpu.relaxed.add.u32 %r1, [ %rd1 ], %r2;\nred.global.add.f32 [%rd1], %f1;", dict(atomics=2))])
def test_instructions(ptx, counts):
    assert counts.items() <= instructions(ptx).items()


def test_distinct_drops_equal_code_only():
    def kernel(): pass
    a = Configuration("a", kernel, {"x_ptr": "*fp32"}, {"N": 1})
    assert [c.name for c in distinct([a, a._replace(name="b"), a._replace(name="c", num_warps=8)])] == ["a", "c"]


def test_an_interpreted_kernel_is_refused():
    def kernel(x_ptr): pass
    with pytest.raises(ValueError, match="decorated for the interpreter"):
        compile_ahead(Configuration("k", kernel, {"x_ptr": "*fp32"}, {}), 90)


def test_tools_are_found():
    assert os.access(nvidia_tool("ptxas"), os.X_OK) and nvidia_tool("no such tool") is None
    assert ahead.kernel_module.__doc__
