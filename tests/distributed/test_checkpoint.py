"""An interrupted run goes on bit for bit; a damaged checkpoint is never taken for a whole one."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_amrlhf.checkpoint import folders as checkpoint_folders
from megatron_amrlhf.checkpoint import store
from megatron_amrlhf.checkpoint.folders import Retention, find_latest, read_manifest, step_of
from megatron_amrlhf.checkpoint.loading import load_checkpoint
from megatron_amrlhf.checkpoint.store import CheckpointWriter
from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import sha256_of
from megatron_amrlhf.owned import make_folder
from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.processes import run_on
from tests.distributed.small_run import (
    VOCAB,
    build_engine,
    fingerprint,
    save_checkpoint,
    take_steps,
)
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

HIDDEN = 45  # odd, so that most parameters are not divisible by DP 2
DTYPES = ("float32", "bfloat16")
STATE = {"consumed": 24, "running_baseline": {"mean": 0.1 + 0.2, "count": 3}, "none": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, tied=True, seed=1, vocab_size=VOCAB, hidden=HIDDEN, layers=2)
    return str(folder)


STAGE_TOLERANCE = 1e-5  # AdamW's vector and scalar loops round differently


def tied_master(role: Role) -> bytes | None:
    if role.tied is None:
        return None
    return role.weights.read_states()[f"{role.tied}.master"].numpy().tobytes()


def dtypes_of(persist: int) -> tuple[str, ...]:
    return DTYPES[1:] if persist else DTYPES


def first_run(folder: str, checkpoints: str, tensor: int, pipeline: int, persist: int) -> list:
    """Three steps in one go; and two steps, a checkpoint, the third step."""
    mesh = build_mesh(tensor, pipeline)
    results = []
    for dtype in dtypes_of(persist):
        engine = build_engine(folder, mesh, dtype, persist)
        steps = take_steps(engine, range(3))
        whole = steps, fingerprint(engine)

        engine = build_engine(folder, mesh, dtype, persist)
        take_steps(engine, range(2))
        engine.skipped_steps = 7
        on_last = mesh.is_last_stage
        state = STATE | {"here": "last"} if on_last else {"here": "an earlier stage"}
        path = save_checkpoint(engine, Path(checkpoints) / dtype, 2, state, keep=2)
        assert path == Path(checkpoints) / dtype / "step-2" and find_latest(path.parent) == path
        steps = take_steps(engine, range(2, 3))
        copies = tied_master(engine.roles["actor"])
        results.append((whole, (steps, fingerprint(engine)), copies))
    return results


def second_run(folder: str, checkpoints: str, tensor: int, pipeline: int, persist: int) -> list:
    """A new process that goes on from the checkpoint with the third step."""
    mesh = build_mesh(tensor, pipeline)
    results = []
    for dtype in dtypes_of(persist):
        engine = build_engine(folder, mesh, dtype, persist)
        path = find_latest(Path(checkpoints) / dtype)
        assert step_of(path) == 2
        state = load_checkpoint(engine, path).state
        assert state == STATE | {"here": "last"} and engine.skipped_steps == 7
        results.append((take_steps(engine, range(2, 3)), fingerprint(engine)))
    return results


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "persist"),
    [(1, 1, 1, 0), (1, 1, 2, 0), (1, 1, 2, 100), (2, 2, 1, 0)],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    model, tmp_path, tensor, pipeline, data, persist
):
    world = tensor * pipeline * data
    arguments = (model, str(tmp_path), tensor, pipeline, persist)
    first = run_on(world, first_run, *arguments)
    second = run_on(world, second_run, *arguments)
    dtypes = dtypes_of(persist)
    for index, dtype in enumerate(dtypes):
        for rank in range(world):
            (steps, prints), saved, _ = first[rank][index]
            assert saved[0] == steps[-2:] and saved[1] == prints, "saving changed the run"
            assert second[rank][index][0] == steps[-2:], (dtype, rank)
            resumed = second[rank][index][1]
            assert [key for key in prints if prints[key] != resumed[key]] == [], (dtype, rank)
        copies = {first[rank][index][2] for rank in range(world)} - {None}
        assert len(copies) == (tensor if pipeline > 1 else 0), "tied copies drifted apart"
    assert_every_element_is_saved_once(tmp_path / dtypes[-1] / "step-2", tensor, pipeline, data)


def assert_every_element_is_saved_once(path: Path, tensor: int, pipeline: int, data: int) -> None:
    """The slices of all DP ranks tile each shard; what a later resharding relies on."""
    for role in ("actor", "critic"):
        for place in range(tensor * pipeline):
            tp, pp = place % tensor, place // tensor
            ends: dict[str, int] = {}
            for dp in range(data):
                part = path / f"{role}-tp{tp:02d}-pp{pp:02d}-dp{dp:04d}.safetensors"
                with safe_open(part, framework="pt") as file:
                    slices = json.loads(file.metadata()["slices"])
                    assert set(file.keys()) == {
                        f"{name}.{kind}"
                        for name in slices
                        for kind in ("master", "exp_avg", "exp_avg_sq")
                    }
                    for name, here in slices.items():
                        assert here["start"] == ends.get(name, 0)
                        assert file.get_slice(f"{name}.master").get_shape() == [here["length"]]
                        ends[name] = here["start"] + here["length"]
            for name, here in slices.items():
                assert ends[name] == torch.Size(here["shape"]).numel()
    assert not list(path.glob("reference-*"))
    assert json.loads((path / "state.json").read_text())["layout"] == {
        "tensor": tensor,
        "pipeline": pipeline,
        "data": data,
        "virtual_stages": 1,
        "first_stage_layers": None,
        "last_stage_layers": None,
    }


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses longer files, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def trouble(folder: str, root: str) -> dict:
    """On two DP ranks: all that can go wrong. Returns messages and what is on the disk."""
    mesh = build_mesh(1, 1)
    engine = build_engine(folder, mesh, "float32")
    checkpoints, seen = Path(root) / "checkpoints", {}
    fresh = save_checkpoint(engine, checkpoints, 0, {}, keep=2)
    before = fingerprint(engine)
    take_steps(engine, range(1))
    if mesh.is_main:
        make_folder(checkpoints / "tmp-step-9", "checkpoint")  # as a killed save leaves it
        (checkpoints / "tmp-step-9" / "manifest.json").write_text("{}")
    for step in (1, 2, 3, 3):
        save_checkpoint(engine, checkpoints, step, {"step": step}, keep=2)
    seen["kept"] = sorted(path.name for path in checkpoints.iterdir())
    after = fingerprint(engine)

    with file_size_limit(4096 if mesh.rank == 1 else resource.RLIM_INFINITY):
        seen["full"] = error_of(save_checkpoint, engine, checkpoints, 4, {}, 2)
    dist.barrier()  # rank 0 has cleaned up
    seen["after full"] = sorted(path.name for path in checkpoints.iterdir())
    monkey = pytest.MonkeyPatch()
    monkey.setattr(store, "BYTES_PER_ELEMENT", 1 << 50)
    seen["no room"] = error_of(save_checkpoint, engine, checkpoints, 4, {}, 2)
    monkey.undo()
    dist.barrier()  # rank 0 has cleaned up
    seen["after no room"] = sorted(path.name for path in checkpoints.iterdir())

    seen |= damaged(engine, checkpoints, Path(root) / "damaged")
    assert fingerprint(engine) == after, "a refused checkpoint changed the engine"
    assert load_checkpoint(engine, checkpoints / "step-3").state == {"step": 3}
    assert fresh.name == "step-0" and not fresh.exists()

    early = save_checkpoint(build_engine(folder, mesh, "float32"), Path(root) / "early", 0, {}, 1)
    load_checkpoint(engine, early)  # from before Adam's first step
    assert fingerprint(engine) == before

    seen["dtype"] = error_of(load_checkpoint, build_engine(folder, mesh, "bfloat16"), early)
    return seen


def damaged(engine: Zero3Engine, checkpoints: Path, root: Path) -> dict[str, str]:
    """What is said about a checkpoint (and an older, whole one) with one file spoiled."""
    part = "actor-tp00-pp00-dp0001.safetensors"

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def rewrite(section: str, **values) -> Callable[[Path], None]:
        """Other values under a hash that fits."""

        def spoil(file: Path) -> None:
            header = json.loads(file.read_text())
            (header[section] if section else header).update(values)
            file.write_text(json.dumps(header))
            manifest = json.loads(file.with_name("manifest.json").read_text())
            manifest["files"]["state.json"] = {
                "size": file.stat().st_size,
                "sha256": sha256_of(file),
            }
            file.with_name("manifest.json").write_text(json.dumps(manifest))

        return spoil

    spoilers = {
        "negative step": ("state.json", rewrite("", step=-5)),
        "endless layout": ("state.json", rewrite("layout", data=1 << 20)),
        "other layout": ("state.json", rewrite("layout", virtual_stages=2)),
        "missing": (part, Path.unlink),
        "truncated": (part, lambda file: file.write_bytes(file.read_bytes()[:-100])),
        "flipped": (part, flip),
        "state flipped": ("state.json", flip),
        "manifest": ("manifest.json", Path.unlink),
    }
    seen = {}
    checkpoint_folders.LONGEST_LAG_SECONDS = 0.0
    for name, (file, spoil) in spoilers.items():
        if engine.mesh.is_main:
            shutil.copytree(checkpoints, root / name)
            spoil(root / name / "step-3" / file)
        dist.barrier()
        seen[name] = error_of(load_checkpoint, engine, root / name / "step-3")
        if name in ("missing", "truncated", "manifest"):  # what is seen without reading all
            seen[f"{name} latest"] = error_of(find_latest, root / name)
    if engine.mesh.is_main:
        shutil.rmtree(root / "flipped" / "step-2")
    dist.barrier()
    seen["no older"] = error_of(load_checkpoint, engine, root / "flipped" / "step-3")
    return seen


def test_a_damaged_or_unfinished_checkpoint_is_refused_and_older_ones_stay(model, tmp_path):
    ranks = run_on(2, trouble, model, str(tmp_path))
    assert ranks[0] == ranks[1], "all ranks say the same"
    seen = ranks[0]
    kept = ["latest", "step-2", "step-3"]
    assert seen["kept"] == seen["after full"] == seen["after no room"] == kept
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-3\n"
    assert "cannot write the checkpoint" in seen["full"] and "rank 1" in seen["full"]
    assert "File too large" in seen["full"]
    assert "no room" in seen["no room"]

    part = "step-3/actor-tp00-pp00-dp0001.safetensors"
    for name, words in (
        ("missing", f"{part} is missing"),
        ("truncated", f"{part} has "),
        ("flipped", f"{part} is damaged"),
        ("state flipped", "step-3/state.json is damaged"),
        ("manifest", "step-3/manifest.json is missing"),
    ):
        assert words in seen[name]
        assert str(tmp_path / "damaged" / name / "step-2") in seen[name], "names the older one"
    assert "state.json is damaged: step: " in seen["negative step"]
    assert "state.json is damaged: its layout has" in seen["endless layout"]
    assert "its layout is another one" in seen["other layout"]
    for name in ("missing", "truncated", "manifest"):  # never an older one without a word
        assert seen[f"{name} latest"] == seen[name]
    assert "no older complete checkpoint" in seen["no older"]
    assert "actor (float32)" in seen["dtype"] and "actor (bfloat16)" in seen["dtype"]


def test_find_latest_of_no_checkpoints_is_none(tmp_path):
    assert find_latest(tmp_path / "absent") is None
    (tmp_path / "step-1").mkdir()
    assert find_latest(tmp_path) is None


def other_stage(folder: str, checkpoints: str) -> None:
    """Two steps at each ZeRO stage, a checkpoint, and the third step at every stage."""
    mesh, expected = build_mesh(1, 1), None
    for before in (0, 1, 3):
        engine = build_engine(folder, mesh, "float32", zero_stage=before)
        take_steps(engine, range(2))
        path = save_checkpoint(engine, Path(checkpoints) / str(before), 2, {}, keep=1)
        for after in (0, 1, 3):
            resumed = build_engine(folder, mesh, "float32", zero_stage=after)
            load_checkpoint(resumed, path)
            steps = take_steps(resumed, range(2, 3))
            states = resumed.roles["actor"].weights.read_states()
            expected = expected or (steps, states)
            for (*_, norm, rate), (*_, wanted, wanted_rate) in zip(steps, expected[0], strict=True):
                assert norm == pytest.approx(wanted, rel=STAGE_TOLERANCE) and rate == wanted_rate
            for name, state in states.items():
                off = (state - expected[1][name]).abs().max() / expected[1][name].abs().max()
                assert off <= STAGE_TOLERANCE, (before, after, name, off)


def test_a_checkpoint_resumes_at_any_zero_stage(model, tmp_path):
    run_on(2, other_stage, model, str(tmp_path))


def in_the_background(folder: str, root: str) -> list:
    """Asynchronous saves while training goes on, and what waiting ones hold of each step."""
    mesh, seen = build_mesh(1, 1), []
    for asynchronous in (False, True):
        engine = build_engine(folder, mesh, "bfloat16")
        writer = CheckpointWriter(
            engine, Path(root) / str(asynchronous), Retention(9), asynchronous
        )
        for step in range(3):
            take_steps(engine, range(step, step + 1))
            writer.save(step + 1, {"step": step + 1})
            seen.append(writer.poll())
        writer.finish()
        assert writer.poll() is writer.finish() is None
    return seen


def test_an_asynchronous_checkpoint_is_the_synchronous_one(model, tmp_path):
    run_on(2, in_the_background, model, str(tmp_path))
    for step in (1, 2, 3):
        there, here = (tmp_path / x / f"step-{step}" for x in ("False", "True"))
        assert read_manifest(there) == read_manifest(here) is not None
    assert (tmp_path / "True" / "latest").read_text() == "step-3\n"
    assert sorted(x.name for x in (tmp_path / "True").iterdir()) == [
        "latest",
        "step-1",
        "step-2",
        "step-3",
    ]


def background_trouble(folder: str, root: str) -> tuple[str, list[str]]:
    """A disk that fills up on one rank while training goes on."""
    mesh, checkpoints = build_mesh(1, 1), Path(root)
    engine = build_engine(folder, mesh, "float32")
    writer = CheckpointWriter(engine, checkpoints, Retention(2), asynchronous=True)
    writer.save(1, {})
    writer.finish()
    with file_size_limit(4096 if mesh.rank == 1 else resource.RLIM_INFINITY):
        writer.save(2, {})
        message = error_of(writer.finish)
    dist.barrier()  # rank 0 has cleaned up
    return message, sorted(x.name for x in checkpoints.iterdir())


def test_a_failed_asynchronous_save_is_told_on_every_rank(model, tmp_path):
    (first, left), second = run_on(2, background_trouble, model, str(tmp_path))
    assert second == (first, left) and left == ["latest", "step-1"]
    assert "step-2" in first and "rank 1" in first and "File too large" in first
