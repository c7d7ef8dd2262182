"""What is compiled ahead is what a run asks for; and the process that compiles it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from tests.conftest import PATIENCE_S, random_state
from wan_vae import WanVAE
from wan_vae.commands.cli import main
from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.errors import BackendError
from wan_vae.kernels import contenders, registry, select
from wan_vae.kernels.cuda import driver, program
from wan_vae.kernels.device import CARDS, IMITATE, Device
from wan_vae.kernels.kernel import Family
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.choice import EAGER, Choice
from wan_vae.kernels.proof.prove import Verdict
from wan_vae.kernels.proof.timing import Times
from wan_vae.kernels.select import SelectRequest, select_kernels
from wan_vae.network.sites import layer_sites
from wan_vae.runs import ahead
from wan_vae.runs.ahead import Ahead, AheadJob, Work, jobs_of_work
from wan_vae.workers import ahead as worker
from wan_vae.workers.ahead import AheadCompiler, Ended
from wan_vae.workers.lock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"wan2.1": wan21(dim=32), "wan2.2": wan22(dim=32, decoder_dim=64)}
WORK = jobs_of_work(("decoder", "encoder"))
NAMES = ("H100", "RTX 4090", "RTX 2060", "RX 7900 XTX")


def job_for(config: WanVAEConfig, card: Device, *work: Work, **changes) -> AheadJob:
    dtype = "float16" if card.capability == (7, 5) else "bfloat16"
    return replace(AheadJob(config, card, dtype, None, work or WORK), **changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("WAN_VAE_CACHE", str(folder))
    monkeypatch.delenv(IMITATE, raising=False)
    return folder


@pytest.fixture(scope="module", params=SMALL)
def vae(request) -> WanVAE:
    return WanVAE.from_state_dict(random_state(SMALL[request.param]), device="cpu")


def run_of(vae: WanVAE, job: AheadJob, work: Work, proofs: ProofCache, monkeypatch) -> list[str]:
    """The proof keys that a run builds on a card where everything is right, in order."""
    built: list[str] = []
    lock = threading.Lock()

    def build(kernel, problem, config, device) -> None:
        with lock:
            built.append(contenders.proof_key(kernel, problem, config, None))

    monkeypatch.setattr(contenders, "_build_failure", build)
    monkeypatch.setattr(select, "prove_kernel", lambda *_: Verdict(True, "", 0.0))
    monkeypatch.setattr(
        select, "time_kernels", lambda these, *_: Times((1.0,) * len(these), eager_ms=9.0)
    )
    monkeypatch.setattr(select, "_BUDGET_S", PATIENCE_S)
    model = vae.model.to(getattr(torch, job.dtype))
    select_kernels(
        SelectRequest(
            tuple(layer_sites(model, work.part, work.only_frame)),
            registry.families_of("auto", job.device),
            job.device,
            torch.device("cpu"),
            proofs,
            timer=lambda run: 1.0,
        )
    )
    return built


@pytest.mark.parametrize("work", WORK, ids=lambda w: f"{w.part}-{'image' * w.only_frame}")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n == "RTX 4090" else ()) for n in NAMES],
)
def test_what_is_compiled_ahead_is_what_a_run_builds(name, work, vae, monkeypatch):
    job = job_for(vae.config, CARDS[name])
    wanted = [build.key for build in Ahead(job).builds(work)]
    assert len(wanted) == len(set(wanted)) > 5
    built = run_of(vae, job, work, ProofCache({}, None), monkeypatch)
    assert sorted(built) == sorted(wanted)


def test_where_a_run_has_chosen_its_choice_is_compiled_and_nothing_else(
    vae, own_cache, monkeypatch
):
    job = job_for(vae.config, CARDS["H100"], environment={"device": "a test"})
    work, known = WORK[0], dict(job.environment)
    first = run_of(vae, job, work, ProofCache(known, own_cache), monkeypatch)
    wanted = [build.key for build in Ahead(job).builds(work)]
    assert set(wanted) < set(first)
    again = run_of(vae, job, work, ProofCache(known, own_cache), monkeypatch)
    # Triton finds what is proven when it launches it.
    assert sorted(again) == [key for key in sorted(wanted) if not key.startswith("triton")]


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[str, tuple]]:
    """The programs that are compiled: none is, they are noted."""
    noted: list[tuple[str, tuple]] = []

    def compile_source(source, defines, machine_code, folder) -> bytes:
        noted.append((source, (machine_code, *sorted(defines.items()))))
        return b"code"

    build = program.build
    build.cache_clear()
    monkeypatch.setattr(program, "compile_source", compile_source)
    yield noted
    build.cache_clear()


ALPHA = {"alpha": replace(wan21(dim=32), colours=4, decoder_colours=4)}


@pytest.mark.parametrize("config", [*SMALL.values(), *ALPHA.values()], ids=[*SMALL, *ALPHA])
@pytest.mark.parametrize(
    "name",
    ["H100", *(pytest.param(card, marks=pytest.mark.full) for card in ("RTX 4090", "RTX 2060"))],
)
def test_the_network_launches_no_program_that_was_not_built(name, config, compiled, monkeypatch):
    launched = []
    real = program._queue
    monkeypatch.setattr(program, "_queue", lambda *args: (launched.append(args[0]), real(*args)))
    job = Ahead(job_for(config, CARDS[name], backend="cuda"))
    job.families = ("cuda",)
    for work in WORK:
        for build in job.builds(work):
            build.contender.kernel.build(build.problem, build.contender.config, job.job.device)
        built, seen = len(compiled), len(launched)
        for lengths in ((1,),) if work.only_frame else ((2, 2), (1, 3), (1, 1, 1)):
            monkeypatch.setattr(ahead, "_CHUNKS", lengths)
            ahead.run_on_meta(job._layers(work), job._ops(work, {}))
        assert len(compiled) == built
        assert len(launched) > seen + 10


def test_what_cannot_be_built_is_said_and_the_rest_is_compiled(compiled, monkeypatch):
    real = program.build

    def build(one):
        if one.entry == "attention":
            raise driver.BuildError("NVRTC: no such luck")
        return real(one)

    for module in ("base", "program"):
        monkeypatch.setattr(
            importlib.import_module(f"wan_vae.kernels.cuda.{module}"), "build", build
        )
    work = Work("decoder", only_frame=False)
    (outcome,) = Ahead(job_for(SMALL["wan2.1"], CARDS["RTX 2060"], work)).compile(2)
    assert set(outcome.refused.values()) == {"NVRTC: no such luck"}
    assert all("attention" in key for key in outcome.refused)
    assert len(compiled) > 5


# Compiles for an H100, then launches the same on a CPU through a driver that launches nothing.
_LAUNCH = """
import os, sys
from types import SimpleNamespace
import torch, triton
from pathlib import Path
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.proof.cases import Inputs, checks_of
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.triton.ahead import compile_for, _AheadDriver, target_of
from wan_vae.ops.problem import NormConvProblem, UpsampleProblem
card, half = CARDS["H100"], torch.bfloat16
launched = []
class Driver(_AheadDriver):
    def __init__(self):
        self._target = target_of(card)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
        )
    launcher_cls = staticmethod(lambda src, metadata: lambda *args: launched.append(src.fn))
problems = NormConvProblem(32, 32, half, 2), UpsampleProblem(32, 16, half)
def each():
    for problem in problems:
        kernel = next(k for k in kernels_of(problem.operation, ("triton",))
                      if k.requires.unmet(card, problem) is None)
        yield kernel, problem, kernel.candidates(problem, card)[0]
def entries():
    return sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))
compile_for(card)
for kernel, problem, config in each():
    kernel.build(problem, config, card)
ahead = entries()
assert len(ahead) >= 3 and not launched
triton.runtime.driver.set_active(Driver())
for kernel, problem, config in each():
    for function in {name: value for name, value in vars(sys.modules["wan_vae.kernels.triton.norm"]
                     ).items() if hasattr(value, "device_caches")}.values():
        function.device_caches.clear()
    inputs = Inputs(torch.device("cpu"), half, None, (5, 21, 19))
    for check in checks_of(kernel, problem, config, card, inputs):
        check.kernel()
assert len(launched) >= 3, launched
assert entries() == ahead, set(entries()) - set(ahead)
print("same", len(ahead))
"""


def test_triton_finds_what_was_compiled_ahead_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("same")


# -- the process -----------------------------------------------------------------------------------


@pytest.fixture
def one_kernel(own_cache) -> AheadJob:
    """A job of one configuration: for all other classes eager is chosen."""
    config = wan21(dim=8)
    known = {"device": "a test"}
    job = job_for(
        config, CARDS["RTX 2060"], Work("decoder", True), environment=known, backend="cuda"
    )
    proofs = ProofCache(known, own_cache)
    asked = Ahead(replace(job, environment=None))._layers(job.work[0]).classes
    for one in contenders.distinct(asked):
        key = one.key_of(one.contenders[0])
        winner = key if one.problem.operation == "head" else EAGER
        proofs.keep_choice(one.key, Choice(winner, {winner: 1.0}))
    return job


@pytest.fixture
def compiler() -> Iterator[tuple[AheadCompiler, list[Ended]]]:
    ended: list[Ended] = []
    made = AheadCompiler(ended.append)
    yield made, ended
    made.close()


needs_nvrtc = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("nvidia") is None,
    reason="no NVRTC here, which compiles CUDA C++",
)


@needs_nvrtc
def test_two_prompts_are_one_process_and_a_third_is_none(one_kernel, compiler, own_cache):
    asked, ended = compiler
    asked.ask(one_kernel)
    asked.ask(one_kernel)
    assert asked.wait(PATIENCE_S)
    (only,) = ended
    assert only.code == 0, only.said
    (outcome,) = only.outcomes
    assert [key.split(":")[0] for key in outcome["wanted"]] == ["cuda mma"]
    assert outcome["refused"] == {}
    kept = {path.name for path in (own_cache / "kernels").iterdir()}
    # The head, its norm, and the note that the work is done.
    assert sorted(name.rpartition(".")[2] for name in kept) == ["cubin", "cubin", "done"]
    # What a run compiles is there.
    assert len(_programs(one_kernel)) == 2
    for made in _programs(one_kernel):
        assert program.build(made)
    assert {path.name for path in (own_cache / "kernels").iterdir()} == kept
    asked.ask(one_kernel)
    assert asked.wait(PATIENCE_S)
    assert ended == [only]


def _programs(job: AheadJob) -> list[program.Program]:
    (build,) = Ahead(job).builds(job.work[0])
    return list(build.contender.kernel.programs(build.problem, build.contender.config, job.device))


def test_nothing_starts_while_another_process_compiles(one_kernel, compiler, own_cache):
    asked, ended = compiler
    other = FileLock(own_cache / worker.LOCK)
    assert other.acquire()
    asked.ask(one_kernel)
    assert asked.wait(PATIENCE_S)
    assert ended == [] and one_kernel.left() == one_kernel
    other.release()
    assert not worker._is_busy()


def test_what_fails_is_tried_once(one_kernel, compiler, tmp_path):
    asked, ended = compiler
    impossible = replace(one_kernel, device=CARDS["Apple M3"], backend="auto")
    for job in (replace(one_kernel, source=str(tmp_path / "none.safetensors")), impossible) * 2:
        asked.ask(job)
        assert asked.wait(PATIENCE_S)
    (only,) = ended
    assert only.code == worker.IMPOSSIBLE
    assert only.said.startswith("no kernels to compile: used by default on NVIDIA cards")


def test_a_lock_goes_with_the_process_that_has_it(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from wan_vae.workers.lock import FileLock; "
        f"print(FileLock(Path({str(path)!r})).acquire(), flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "True\n"
        lock = FileLock(path)
        assert not lock.acquire()
        holder.kill()
    assert lock.acquire()
    assert not FileLock(path).acquire()
    lock.release()


def test_the_process_ends_with_the_one_that_started_it(one_kernel, own_cache):
    code = "from wan_vae.workers.ahead import main; main()"
    long = job_for(wan21(), CARDS["H100"], Work("decoder", False))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    out, _ = process.communicate(json.dumps(long.as_dict()).encode() + b"\n", PATIENCE_S)
    assert process.returncode == 0 and out == b""
    assert long.left() == long


def test_a_job_goes_through_json_and_files_of_one_model_are_one_job(tmp_path):
    imitating = replace(CARDS["RTX 4090"], runs_on=CARDS["H100"])
    job = job_for(wan22(), imitating, environment={"torch": "2"})
    assert AheadJob.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    mini = str(REPOSITORY / "examples/wan_vae_mini.safetensors")
    of_file = replace(job, source=mini).of_config()
    assert isinstance(of_file.source, WanVAEConfig) and of_file.source.family == "wan2.1"
    for work in job.work:
        of_file.note_done(work)
    assert of_file.left().work == () and job.left() == job
    other = replace(of_file, dtype="float16")
    assert other.left() == other


def test_a_card_without_kernels_is_an_error_in_words():
    with pytest.raises(BackendError, match="no kernels to compile"):
        Ahead(job_for(wan21(), CARDS["Apple M3"]))


# -- by hand ---------------------------------------------------------------------------------------


def test_warm_says_what_was_compiled_for_a_card_that_is_not_here(compiled, monkeypatch, capsys):
    monkeypatch.setattr(worker, "Family", ())  # Triton stays with the interpreter
    mini = str(REPOSITORY / "examples/wan_vae_mini.safetensors")
    assert main(["warm", mini, "--card", "7.5"]) == 0
    said = capsys.readouterr().out
    assert "compute capability 7.5, float16" in said
    for what in ("decoder, video", "decoder, one image", "encoder, video"):
        assert f"  {what}: " in said
    assert compiled
    assert main(["warm", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "cpu (CPU): nothing to compile (no GPU)\n"
    assert main(["warm", "--card", "GTX 960"]) == 1
    assert "expected a compute capability" in capsys.readouterr().err


def test_warm_says_what_is_missing_here(monkeypatch, capsys):
    """A PyTorch without CUDA has no compiler, and a file may not be there."""

    def not_there():
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(driver, "_nvrtc", not_there)
    assert main(["warm", "--card", "RTX 4090"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("wan-vae: RTX 4090: NVRTC") and "nvidia-cuda-nvrtc" in told
    assert "standard output" not in told
    assert main(["warm", "nothing.safetensors", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "wan-vae: nothing.safetensors: no such file\n"


# -- a queued prompt -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queued():
    """The module `nodes.queued` as ComfyUI imports it: relative to the pack."""
    spec = importlib.util.spec_from_file_location(
        "queued_pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    sys.modules["queued_pack"] = importlib.util.module_from_spec(spec)
    yield importlib.import_module("queued_pack.nodes.queued")
    for name in [name for name in sys.modules if name.partition(".")[0] == "queued_pack"]:
        del sys.modules[name]


def path_of(name: str) -> str | None:
    return f"/models/{name}" if name.startswith("wan") else None


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def test_a_prompt_names_the_file_behind_our_nodes(queued):
    prompt = {
        "1": node("VAELoader", vae_name="wan21.safetensors"),
        "2": node("CheckpointLoaderSimple", ckpt_name="wan_all.safetensors"),
        "3": node("AnyPatch", vae=["1", 0], mode="wan.txt"),
        "4": node("WanImageToVideo", vae=["2", 2], length=81),
        "5": node("WanVAEDecode", vae=["3", 0], samples=["4", 2]),
        "6": node("WanVAEEncode", vae=["1", 0], pixels=["9", 0], precision="fp16"),
        "7": node("WanVAEEncode", vae=["3", 0], pixels=["9", 0]),
        "8": node("VAEDecode", vae=["2", 2], samples=["4", 2]),
    }
    found = queued.wishes(prompt, path_of)
    file = "/models/wan21.safetensors"
    assert found == [
        queued.Wish(file, ("decoder", "encoder"), "auto", False),
        queued.Wish(file, ("encoder",), "fp16", False),
    ]
    del prompt["4"]
    assert [wish.images_first for wish in queued.wishes(prompt, path_of)] == [True, True]


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        [],
        {"1": None, "2": {"inputs": 3}},
        {"1": node("WanVAEDecode")},
        {"1": node("WanVAEDecode", vae=["1", 0])},
        {"1": node("WanVAEDecode", vae=[])},
        {"1": node("WanVAEDecode", vae=["2", 0]), "2": node("VAELoader", vae_name="other.sft")},
        {"1": node("WanVAEInspect", vae=["2", 0]), "2": node("L", vae_name="wan.safetensors")},
        {"1": node("WanVAEDecode", vae=["2", 0]), "2": node("VAELoader", vae_name="wan.pth")},
    ],
)
def test_a_prompt_without_a_file_is_no_wish(queued, prompt):
    assert queued.wishes(prompt, path_of) == []


# -- the process that decodes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("winners", "got_ready"),
    [
        ((), ["triton", "kitchen"]),  # a new machine, on which all of them are proven
        (("triton narrow: a: b", EAGER), ["triton"]),
        (("kitchen wmma: a: b", "triton narrow: c: d"), ["triton", "kitchen"]),
    ],
)
def test_a_process_gets_ready_for_the_kernels_that_are_chosen(
    winners, got_ready, own_cache, monkeypatch
):
    known, ready = {"device": "a card"}, []
    for place, winner in enumerate(winners):
        ProofCache(known, own_cache).keep_choice(f"class {place}", Choice(winner, {winner: 1.0}))

    def family(name: str):
        return Family(name, (), lambda device: None, get_ready=lambda: ready.append(name))

    monkeypatch.setattr(registry, "load", family)
    ahead.get_ready(CARDS["RX 7900 XTX"], known)
    assert ready == got_ready
    ahead.get_ready(CARDS["CPU"], known)
    assert ready == got_ready, "there are no kernels for it"
    monkeypatch.setattr(registry, "load", lambda name: "cannot be imported: no libcuda")
    ahead.get_ready(CARDS["RX 7900 XTX"], known)


_WITHOUT_TRITON = """
import sys
import torch
from wan_vae.config import wan21
from wan_vae.kernels.cuda import driver
from wan_vae.kernels.device import CARDS
from wan_vae.runs.ahead import Ahead, AheadJob, get_ready, jobs_of_work
driver._nvrtc = lambda: None  # it is here
job = AheadJob(wan21(dim=32), CARDS["H100"], "bfloat16", None, jobs_of_work(("decoder", "encoder")))
get_ready(job.device, {})
wanted = [build.key for work in job.work for build in Ahead(job).builds(work)]
print(*{key.split()[0] for key in wanted}, "triton" in sys.modules)
"""


def test_nvidia_cards_get_ready_and_compile_ahead_without_triton():
    code = [sys.executable, "-c", _WITHOUT_TRITON]
    done = subprocess.run(code, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "cuda False", done.stderr[-3000:]


def test_what_a_first_launch_hashes_is_hashed_before():
    from triton.runtime.cache import triton_key

    triton_key.cache_clear()
    family = registry.load("triton")
    assert isinstance(family, Family)
    family.get_ready()
    assert triton_key.cache_info().currsize == 1
