"""Rotations that are learned: their gradients, what they leave as it is, what they gain, and runs that are stopped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, files_of, write_text
from lowbit.architecture.describing import open_described
from lowbit.architecture.loading import load_model
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.store import BlockStore
from lowbit.calibrate.task import RotationJob
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.distillation import rotations as learning
from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.rotated import MATRIX, RESIDUAL, VALUES, RotatedStudent
from lowbit.errors import UsageError
from lowbit.evaluation.activations import simulation_of
from lowbit.numerics import grid_for
from lowbit.numerics.hadamard import sylvester
from lowbit.numerics.stiefel import cayley_step, orthogonality_error
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.settings import RunOptions, Settings
from lowbit.tensors import RangeSearch
from models import make_model

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
         "tie_word_embeddings": False}  # fmt: skip
IDS = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
LEARNED = {"scheme": "W4A4", "samples": 6, "seqlen": 32, "rotation_steps": 3, "seed": 2}


def make_job(folder, activations=None, rounds=False, online=None) -> RotationJob:
    checkpoint, architecture = open_described(str(folder), OpenOptions(), None)
    spec = SCHEMES["W4A16"].with_group_size(32).weight
    target = GridTarget(spec, grid_for(spec, "float32"), RangeSearch())
    linears = [linear.name for linear in architecture.linears.values() if linear.block is not None]
    return RotationJob(
        checkpoint=checkpoint, architecture=architecture, targets=dict.fromkeys(linears, target) if rounds else {},
        dtypes={}, settings=Settings(), options=OpenOptions(), run=RunOptions(), nearest=frozenset(),
        activations={} if activations is None else dict.fromkeys(linears, activations), online=online or {}, ids=IDS,
    )  # fmt: skip


def make_student(job: RotationJob, resident: bool = True, graphs: bool = False):
    student = RotatedStudent(job, BlockRunner(job.checkpoint), resident, graphs)
    return student, TokenDivergence(BlockRunner(job.checkpoint), student)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "qwen3_moe", "phi3"])
def test_rotations_alone_change_no_logit(tmp_path, family):
    """With biases, norms that add one, experts and stacked q, k, v."""
    sizes = {"tie_word_embeddings": False} if family in ("phi3", "qwen3_moe") else SMALL
    job = make_job(make_model(tmp_path / "model", family, dtype=torch.float32, **sizes))
    student, divergence = make_student(job)
    start = learning.start_of(job)
    assert len(start.now[VALUES]) == 2
    student.prepare(start.now)
    assert divergence.mean(torch.arange(4), start.now, 2) < 1e-6
    other = {RESIDUAL: {MATRIX: start.now[RESIDUAL][MATRIX].roll(1, 0)}, VALUES: start.now[VALUES]}
    assert divergence.mean(torch.arange(4), other, 2) > 1e-4  # of a stream that is turned otherwise than the blocks


@pytest.mark.parametrize(("resident", "graphs"), [(True, True), (False, False)])
def test_gradients_foretell_differences(tmp_path, resident, graphs):
    """Of R1 and R2, along the manifold, with nothing rounded but a model that is not the teacher's."""
    job = make_job(make_model(tmp_path / "model", "qwen2", dtype=torch.float32, **SMALL))
    student, divergence = make_student(job, resident, graphs)
    for handle in student.runner.model.modules():  # something to lose: gates of inputs, smooth
        if isinstance(handle, torch.nn.Linear) and handle.out_features != 384:
            handle.register_forward_pre_hook(lambda _module, inputs: (torch.tanh(inputs[0]),))
    state, windows = learning.start_of(job), torch.arange(4)
    student.prepare(state.now)
    found = learning._zeros(state.now)
    loss = divergence.gradients(windows, state.now, found)
    assert loss == pytest.approx(divergence.mean(windows, state.now, 2), rel=1e-4)
    for kind, name in ((RESIDUAL, MATRIX), (VALUES, "1")):
        matrix, gradient = state.now[kind][name], found[kind][name] / IDS.numel()
        assert gradient.any()
        ends = []
        for sign in (1, -1):
            moved, step = cayley_step(matrix, sign * gradient, torch.zeros_like(matrix), 1e9)
            rate = 1e-3 / step.abs().max().item()
            moved, _ = cayley_step(matrix, sign * gradient, torch.zeros_like(matrix), rate)
            changes = {each: dict(state.now[each]) for each in state.now}
            changes[kind][name] = moved
            student.prepare(changes)
            ends.append((divergence.mean(windows, changes, 4), (gradient * (moved - matrix)).sum().item()))
        student.prepare(state.now)
        foretold = ends[0][1] - ends[1][1]
        assert ends[0][0] - ends[1][0] == pytest.approx(foretold, rel=0.03)


def test_the_student_computes_what_the_written_model_does(tmp_path):
    """Rounded inputs, those behind an online rotation, and weights rounded to nearest: against whole models."""
    folder, text = make_model(tmp_path / "model", dtype=torch.float32, **SMALL), write_text(tmp_path)
    given = {"scheme": "W4A4", "range": "absmax", "samples": 6, "seqlen": 16}
    calibrated(folder, tmp_path / "out", text, "spinquant+hadamard-down", rotation_steps=1, rotation_rate=1e-9, **given)
    spec = SCHEMES["W4A4"].with_group_size(32)
    downs = {f"model.layers.{index}.mlp.down_proj": sylvester(32) for index in range(2)}
    job = make_job(folder, spec.activation, online=downs)
    target = GridTarget(spec.weight, grid_for(spec.weight, "float32"), RangeSearch("absmax"))
    targets = dict.fromkeys(job.activations, target)
    job = RotationJob(**(vars(job) | {"targets": targets, "nearest": frozenset(targets)}))
    student, divergence = make_student(job)
    start = learning.start_of(job).now
    student.prepare(start)
    written = open_checkpoint(tmp_path / "out")
    model, plain = load_model(written), load_model(open_checkpoint(folder))
    with torch.no_grad(), simulation_of(written)(model):
        log_q = model(IDS).logits.log_softmax(-1)
        log_p = plain(IDS).logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert divergence.mean(torch.arange(4), start, 4) == pytest.approx(expected, rel=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One channel of the stream stands out, which rotations spread."""
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path_factory.mktemp("learned") / "model", dtype=torch.float32, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 5] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(model):
    return write_text(model.parent)


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, calibrated(model, out, text, "spinquant+hadamard-down+gptq", **LEARNED)


def test_the_report_says_what_was_learned(whole):
    _, report = whole
    notes = [entry for entry in report.transforms if entry.what == "spinquant"]
    assert [note.point for note in notes] == ["model.layers.0", "model.layers.1"]
    assert "rotations of 64 channels and of the values of 2 blocks, learned: KL" in notes[0].detail
    assert "of 3" in notes[0].detail


def test_learning_gains_on_held_out_windows_and_stays_orthogonal(model, tmp_path):
    job = make_job(model, SCHEMES["W4A4"].activation)
    job = RotationJob(**(vars(job) | {"settings": Settings(method="spinquant", rotation_steps=24)}))
    store = SimpleNamespace(load_learning=lambda what: None, save_learning=lambda *state: kept.append(state))
    kept: list = []
    rotations = learning.learned_rotations(job, store)  # type: ignore[arg-type]
    state = learning.RotationState.of(*kept[-1][:2])
    assert state.lowest < 0.97 * state.start
    for rotation in (rotations.residual, *rotations.values.values()):
        assert orthogonality_error(rotation.matrix().float()) < 1e-5
        assert orthogonality_error(rotation.matrix()) < 1e-11
    assert learning.learned_rotations(job, SimpleNamespace(load_learning=lambda what: kept[-1][:2])) is not rotations  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["while learning", "behind a block"])
def test_a_resumed_run_writes_the_same_bytes(model, text, whole, tmp_path, monkeypatch, where):
    monkeypatch.setattr(learning, "KEEP_EVERY", 0.0)
    owner, name = (BlockStore, "save_learning") if where == "while learning" else (BlockStore, "save")
    save, count = getattr(owner, name), []

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        count.append(1)
        if len(count) == (2 if where == "while learning" else 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, tmp_path / "out", text, "spinquant+hadamard-down+gptq", **LEARNED)
    steps = []
    monkeypatch.setattr(learning, "_move", lambda *given, move=learning._move: (steps.append(1), move(*given)))
    calibrated(model, tmp_path / "out", text, "spinquant+hadamard-down+gptq", run=RunOptions(resume=True), **LEARNED)
    assert len(steps) == (1 if where == "while learning" else 0)
    assert files_of(tmp_path / "out") == files_of(whole[0])


def test_models_that_do_not_allow_it_are_refused(tmp_path):
    for family, why in {"gpt2": "LayerNorms subtract", "olmo2": "follows attention or MLP"}.items():
        with pytest.raises(UsageError, match=why):
            lowbit.dry_run(make_model(tmp_path / family, family), method="spinquant+gptq")


def test_rounded_inputs_of_fused_experts_are_refused(tmp_path):
    folder, text = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=False), write_text(tmp_path)
    with pytest.raises(UsageError, match=r"experts\.\d.* runs inside a fused operation"):
        calibrated(folder, tmp_path / "out", text, "spinquant+gptq", **LEARNED)


@pytest.mark.parametrize(
    ("method", "why"),
    [("hadamard+spinquant+gptq", "rotates the residual stream twice"),
     ("spinquant+rotate+gptq", "learns a rotation of each value head")],
)  # fmt: skip
def test_methods_that_rotate_twice_are_refused(method, why):
    with pytest.raises(UsageError, match=why):
        Settings(method=method)


def test_too_few_windows_and_unread_options_are_refused(model, text, tmp_path):
    with pytest.raises(UsageError, match="spinquant needs 4 windows"):
        calibrated(model, tmp_path / "out", text, "spinquant+gptq", samples=3)
    with pytest.raises(UsageError, match="--rotation-steps 3 is read only by learned rotations"):
        lowbit.dry_run(model, method="hadamard+gptq", rotation_steps=3)
