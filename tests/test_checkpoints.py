"""Checkpoints that were damaged, or made to do harm, after they were written."""

import enum
import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from tests.checkpoints import seal
from tests.ranks import run_ranks
from tests.runs import command, in_folder, losses_of, make_trainer, run_to_the_end, with_keys

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json", "tokenizer.json", "manifest.json"]


def truncate(file):
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - 3)])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {"cut off": truncate, "flipped": flip, "removed": os.remove}


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A run of six steps with the checkpoints of steps 4 and 6, by two ranks; config and folder."""
    from tests.runs import small_config

    folder = tmp_path_factory.mktemp("made")
    tree = with_keys(small_config(text, folder), parallel={"expert": 2}, train={"steps": 6}, evaluation={"interval": 9})
    run_ranks(run_to_the_end, 2, tree)
    return tree, folder


@pytest.fixture
def copied(made, tmp_path):
    """That run, in a folder of the test's own."""
    tree, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return in_folder(tree, tmp_path)


def what_is_said(rank, world_size, trees):
    """For each config, what refuses it."""
    from megatron.core import parallel_state

    from peer_dist.megatron import CheckpointError

    said = []
    for tree in trees:
        try:
            make_trainer(tree)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
        parallel_state.destroy_model_parallel()
    return said


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_file_is_named_and_the_one_before_is_offered(copied, tmp_path, kind):
    """On every rank alike; nothing is deleted or renamed unless asked for."""
    trees = []
    for name in FILES:
        folder = tmp_path / name
        shutil.copytree(copied["checkpoint"]["dir"], folder)
        assert {file.name for file in (folder / "step-00000006").iterdir()} == set(FILES)
        DAMAGES[kind](folder / "step-00000006" / name)
        trees.append(with_keys(copied, checkpoint={"dir": str(folder)}))
    for said in run_ranks(what_is_said, 2, trees):
        for name, sentence in zip(FILES, said):
            assert f"step-00000006/{name}: is {'missing' if kind == 'removed' else 'damaged'}" in sentence
            assert "go on from step-00000004 with checkpoint.fall_back=true" in sentence
    for tree in trees:
        assert sorted(os.listdir(tree["checkpoint"]["dir"])) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(("name", "kind"), [("__1_0.distcp", "flipped"), ("manifest.json", "removed")])
def test_a_run_falls_back_where_it_is_told_to(copied, name, kind):
    """It ends as if nothing had happened, and the damaged checkpoint is kept under another name."""
    losses, folder = losses_of(copied), Path(copied["checkpoint"]["dir"])
    DAMAGES[kind](folder / "step-00000006" / name)
    shutil.copytree(folder / "step-00000006", folder / "step-00000006.damaged")  # an earlier accident
    run_ranks(run_to_the_end, 2, with_keys(copied, checkpoint={"fall_back": True}))
    assert losses_of(copied) == losses
    names = ["step-00000004", "step-00000006", "step-00000006.damaged", "step-00000006.damaged-2"]
    assert sorted(os.listdir(folder)) == names
    assert run_ranks(what_is_said, 2, [copied]) == [[""]] * 2


def test_two_damaged_checkpoints_leave_none(copied):
    folder = Path(copied["checkpoint"]["dir"])
    for step in ("step-00000004", "step-00000006"):
        flip(folder / step / "common.pt")
    for (said,) in run_ranks(what_is_said, 2, [with_keys(copied, checkpoint={"fall_back": True})]):
        assert "step-00000004/common.pt: is damaged" in said
        assert "has no other checkpoint: restore the file" in said
    assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000006.damaged"]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_of_a_version_with_more_keys_is_read(copied, tmp_path):
    """``parallel.context`` accepted only 1, and is gone."""
    for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["config"]["parallel"]["context"] = 1
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        seal(checkpoint)
    assert run_ranks(what_is_said, 2, [copied]) == [[""], [""]]
    assert run_ranks(stored_configs, 1, str(tmp_path / "checkpoints")) == [2]


def stored_configs(rank, world_size, folder):
    """How many configs of the folder's checkpoints are those of this version."""
    from peer_dist.checkpoints.manifest import read_manifest
    from peer_dist.config import parse_config

    return len([parse_config(read_manifest(path)["config"], "stored") for path in Path(folder).glob("step-*")])


def poison_metadata(checkpoint, trap):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(trap))


def poison_inside_metadata(checkpoint, trap):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = trap
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_common(checkpoint, trap):
    torch.save({"harmless": trap}, checkpoint / "common.pt")


def poison_common_in_the_old_format(checkpoint, trap):
    torch.save({"harmless": trap}, checkpoint / "common.pt", _use_new_zipfile_serialization=False)


def poison_tensor(checkpoint, trap):
    """Every tensor of rank 0 is replaced by the trap, where .metadata says that it is."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    torch.save({"harmless": trap}, checkpoint / "trap")
    content = (checkpoint / "trap").read_bytes()
    (checkpoint / "trap").unlink()
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    begin = len(data)
    data += content
    (checkpoint / "__0_0.distcp").write_bytes(data)
    for info in metadata.storage_data.values():
        if info.relative_path == "__0_0.distcp":
            info.offset, info.length = begin, len(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_bytes(checkpoint, trap):
    """A tensor is said to be bytes, which torch unpickles freely."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    poison_tensor(checkpoint, trap)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for key in metadata.state_dict_metadata:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_class(checkpoint, trap):
    """A pickle of allowed names only, which changes a class of torch's."""
    text = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"  # the class itself
        b"N}X\x07\x00\x00\x00versionX\x05\x00\x00\x00taints\x86b."  # BUILD (None, {"version": "taint"})
    )
    (checkpoint / ".metadata").write_bytes(text)


def poison_getattr(checkpoint, trap):
    """The name by which older Pythons pickle members of enumerations, for something else."""
    text = (
        b"\x80\x02cbuiltins\ngetattr\nctorch.distributed.checkpoint.metadata\nMetadata\nX\x08\x00\x00\x00__init__\x86R."
    )
    (checkpoint / ".metadata").write_bytes(text)


def poison_path(checkpoint, trap):
    """Tensors are said to lie in a file elsewhere."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


POISONS = {
    poison_metadata: ".metadata",
    poison_inside_metadata: ".metadata",
    poison_common: "common.pt",
    poison_common_in_the_old_format: "common.pt",
    poison_tensor: "",  # torch says what its own loader refuses, and not where
    poison_bytes: ".metadata",
    poison_class: ".metadata",
    poison_getattr: ".metadata",
    poison_path: ".metadata",
}


def every_reader(rank, world_size, tree, checkpoints):
    """What resuming, starting from weights, and evaluating or generating say of each checkpoint."""
    from megatron.core import parallel_state
    from torch.distributed.checkpoint.metadata import Metadata

    from peer_dist.evaluation.loading import load_model
    from peer_dist.megatron import CheckpointError

    said = []
    for checkpoint in checkpoints:
        for reader in (
            lambda path: make_trainer(with_keys(tree, checkpoint={"dir": path})),
            lambda path: make_trainer(with_keys(tree, checkpoint={"dir": path + "-new", "init_from": path})),
            lambda path: load_model(path, world_size),
        ):
            try:
                reader(checkpoint)
                said.append("nothing")
            except CheckpointError as error:
                said.append(str(error))
            parallel_state.destroy_model_parallel()
    assert Metadata.version is None, "a class was changed"
    return said


def test_nothing_that_a_checkpoint_holds_is_run(copied, tmp_path):
    """Real traps in each file that is a pickle, in a checkpoint that is consistent, and every way to read one."""
    trap, checkpoints = tmp_path / "sprung", []
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists(), "the trap must work"
    trap.unlink()
    for poison in POISONS:
        folder = tmp_path / poison.__name__
        shutil.copytree(copied["checkpoint"]["dir"], folder)
        shutil.rmtree(folder / "step-00000004")
        poison(folder / "step-00000006", Touch(trap))
        seal(folder / "step-00000006")
        checkpoints.append(str(folder))
    for said in run_ranks(every_reader, 2, copied, checkpoints, timeout=240):
        for number, (poison, name) in enumerate(POISONS.items()):
            for sentence in said[3 * number : 3 * number + 3]:
                assert str(Path(checkpoints[number]) / "step-00000006" / name) in sentence, poison.__name__
                assert "\n" not in sentence
    assert not trap.exists()
    assert not list(tmp_path.glob("*/*.damaged"))


def test_metadata_of_older_pythons_is_read(copied):
    """Before 3.11.4 they pickle a member of an enumeration as ``getattr`` of its class."""
    from peer_dist.megatron.reader import read_metadata

    class Older(pickle.Pickler):
        def reducer_override(self, value):
            return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented

    written = pickle.loads((Path(copied["checkpoint"]["dir"]) / "step-00000006" / ".metadata").read_bytes())
    text = io.BytesIO()
    Older(text).dump(written)
    assert b"getattr" in text.getvalue()
    assert read_metadata(io.BytesIO(text.getvalue())) == written


def test_the_traps_spring_where_torch_reads_by_itself(copied, tmp_path):
    """Or the test above would prove nothing."""
    checkpoint = Path(copied["checkpoint"]["dir"]) / "step-00000006"
    poison_inside_metadata(checkpoint, Touch(tmp_path / "sprung"))
    torch.distributed.checkpoint.FileSystemReader(checkpoint).read_metadata()
    assert (tmp_path / "sprung").exists()


def traced_save(rank, world_size, tree, asynchronous):
    """What a save does to the disk, in order: names of files synced, folders synced, renames."""
    done, real_sync, real_rename = [], os.fsync, Path.rename

    def sync(handle):
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        real_sync(handle)

    def rename(self, target):
        done.append(("rename", str(self), str(target)))
        return real_rename(self, target)

    trainer = make_trainer(with_keys(tree, checkpoint={"asynchronous": asynchronous}))
    trainer.step()
    os.fsync, Path.rename = sync, rename
    trainer.save()
    trainer.store.finish()
    return done


@pytest.mark.parametrize("asynchronous", [False, True])
def test_everything_is_on_disk_before_the_name_is(small, asynchronous):
    """Every file, then its folder, then the rename, then the folder that has the name."""
    folder = Path(small["checkpoint"]["dir"])
    partial, final = folder / ".step-00000001.partial", folder / "step-00000001"
    theirs, leftover = folder / ".step-by-step", folder / ".step-00000003.partial"
    theirs.mkdir(parents=True)
    leftover.mkdir()
    ranks = run_ranks(traced_save, 2, with_keys(small, parallel={"expert": 2}), asynchronous)
    at = ranks[0].index(("rename", str(partial), str(final)))
    assert ranks[0][at - 2 : at] == [("sync", str(partial / "manifest.json")), ("sync", str(partial))]
    assert ranks[0][at + 1] == ("sync", str(folder))
    synced = {event[1] for event in [*ranks[0][: at - 1], *ranks[1]] if event[0] == "sync"}
    assert {str(partial / file.name) for file in final.iterdir()} <= synced
    assert not [event for event in ranks[1] if event[0] == "rename"]
    assert theirs.exists()  # somebody's, with a name that no run gives
    assert not leftover.exists()
    assert set(json.loads((final / "manifest.json").read_text())["files"]) == set(FILES) - {"manifest.json"}


def retyped(change):
    """A change of what ``.metadata`` says of its first tensor."""

    def change_metadata(checkpoint):
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        change(metadata, next(iter(metadata.state_dict_metadata)), next(iter(metadata.storage_data)))
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))

    return change_metadata


def set_on(owner, name, value):
    object.__setattr__(owner, name, value)


RETYPED = {
    "no tensors": lambda m, key, index: set_on(m, "state_dict_metadata", {}),
    "no storage": lambda m, key, index: set_on(m, "storage_data", None),
    "storage a list": lambda m, key, index: set_on(m, "storage_data", [1]),
    "a key a number": lambda m, key, index: m.state_dict_metadata.update({5: m.state_dict_metadata[key]}),
    "size a string": lambda m, key, index: set_on(m.state_dict_metadata[key], "size", "12"),
    "size negative": lambda m, key, index: set_on(m.state_dict_metadata[key], "size", torch.Size([-1, 3])),
    "size huge": lambda m, key, index: set_on(m.state_dict_metadata[key], "size", torch.Size([2**62, 2])),
    "chunks none": lambda m, key, index: set_on(m.state_dict_metadata[key], "chunks", None),
    "chunks numbers": lambda m, key, index: set_on(m.state_dict_metadata[key], "chunks", [1, 2]),
    "an offset before": lambda m, key, index: set_on(m.storage_data[index], "offset", -5),
    "an offset beyond": lambda m, key, index: set_on(m.storage_data[index], "offset", 2**60),
    "an offset a string": lambda m, key, index: set_on(m.storage_data[index], "offset", "0"),
    "a length of 0": lambda m, key, index: set_on(m.storage_data[index], "length", 0),
    "a length beyond": lambda m, key, index: set_on(m.storage_data[index], "length", 2**60),
    "no place": lambda m, key, index: m.storage_data.pop(index),
    "a file of another name": lambda m, key, index: set_on(m.storage_data[index], "relative_path", "__7_0.distcp"),
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_contradicts_itself_is_a_sentence(copied, tmp_path, ranks):
    """Each rank says it, whichever found it."""
    trees, names = [], []
    for name, change in RETYPED.items():
        folder = tmp_path / f"retyped {name}"
        shutil.copytree(Path(copied["checkpoint"]["dir"]) / "step-00000006", folder / "step-00000006")
        retyped(change)(folder / "step-00000006")
        seal(folder / "step-00000006")
        trees.append(with_keys(copied, checkpoint={"dir": str(folder)}, parallel={"expert": ranks}))
        names.append(name)
    for said in run_ranks(what_is_said, ranks, trees, timeout=240):
        for name, sentence in zip(names, said, strict=True):
            assert "step-00000006" in sentence, name
            assert "\n" not in sentence, name
            assert len(sentence) < 1000, name


def sealed(manifest):
    """The manifest with a checksum of its own, as who rewrites it can compute it."""
    manifest = {key: value for key, value in manifest.items() if key != "checksum"}
    return {**manifest, "checksum": zlib.crc32(json.dumps(manifest, sort_keys=True).encode())}


def changed(**keys):
    return lambda manifest: json.dumps(sealed({**manifest, **keys}))


def with_file(name, value=(1, 2)):
    return lambda manifest: json.dumps(sealed({**manifest, "files": {**manifest["files"], name: list(value)}}))


MANIFESTS = {
    "null": lambda _: "null",
    "a list": lambda _: "[]",
    "a number": lambda _: "5",
    "nothing": lambda _: "",
    "deep": lambda _: "[" * 100_000,
    "deep objects": lambda _: '{"a":' * 100_000,
    "half of it": lambda manifest: json.dumps(manifest)[:200],
    "no text": lambda _: "\udcff",
    "a key twice": lambda manifest: json.dumps(manifest)[:-1] + ', "step": 6}',
    "digits": lambda _: '{"step": ' + "9" * 5000 + "}",
    "no checksum": lambda manifest: json.dumps({**manifest, "checksum": None}),
    **{f"step {value!r}": changed(step=value) for value in ("6", True, -6, 6.0, None, [6], {"a": 6}, 10**30)},
    **{f"updates {value!r}": changed(updates=value) for value in ("6", True, -1, 7, None)},
    **{f"files {value!r}": changed(files=value) for value in (None, [], "x", {"a": 1}, {"a": [1]}, {"a": [-1, 2]})},
    **{f"config {value!r}": changed(config=value) for value in (None, [], "x", {"model": 5}, {"a\nb": {}})},
    **{f"guard {value!r}": changed(guard=value) for value in ([], {"losses": 5}, {"losses": ["a"]}, {"spikes": "1"})},
    **{f"file {name!r}": with_file(name) for name in ("../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b")},
    "a size that is none": with_file("common.pt", ("1", 2)),
}


def test_a_manifest_that_is_none_is_a_sentence(copied):
    """Whatever it holds, its own checksum in order; and nothing that it names elsewhere is read."""
    from peer_dist.checkpoints.manifest import DamagedError, read_manifest
    from peer_dist.checkpoints.store import CheckpointStore, find_checkpoint

    folder = Path(copied["checkpoint"]["dir"])
    file = folder / "step-00000006" / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, make in MANIFESTS.items():
        file.write_bytes(make(manifest).encode("utf-8", "surrogateescape"))
        for read in (read_manifest, find_checkpoint, lambda _: CheckpointStore(folder).look(False)):
            with pytest.raises(DamagedError) as refusal:
                read(file.parent)
            assert "step-00000006/manifest.json: is damaged (" in str(refusal.value), name
            assert "\n" not in str(refusal.value), name
        assert CheckpointStore(folder).steps() == [4]
        assert CheckpointStore(folder).look(fall_back=True) == folder / "step-00000004"


def test_a_manifest_without_what_only_a_run_needs_is_no_traceback(copied):
    """A sound checksum of its own; a value of several lines is shown in one."""
    from peer_dist.checkpoints.manifest import read_manifest
    from peer_dist.checkpoints.resuming import check_resumable
    from peer_dist.config import parse_config
    from peer_dist.megatron import CheckpointError

    path = Path(copied["checkpoint"]["dir"]) / "step-00000006"
    config = parse_config(copied, "test")
    manifest = read_manifest(path)
    for name, other in {
        "was made from other data": {key: value for key, value in manifest.items() if key != "data"},
        "model.num_layers = a b": {**manifest, "config": {"model": {"num_layers": "a\nb"}}},
    }.items():
        with pytest.raises(CheckpointError) as refusal:
            check_resumable(path, config, [], other)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)


def resumed_at(rank, world_size, tree):
    trainer = make_trainer(tree)
    return trainer.steps_done, trainer.guard.not_finite  # what has been left out


def test_a_manifest_without_updates_counts_a_step_as_one(copied):
    path = Path(copied["checkpoint"]["dir"]) / "step-00000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["updates"]
    path.write_text(json.dumps(sealed(manifest)))
    assert run_ranks(resumed_at, 2, copied) == [(6, 0)] * 2


def rename(folder):
    (folder / "step-00000006").rename(folder / "step-00000007")


def copy_far(folder):
    shutil.copytree(folder / "step-00000006", folder / "step-99999999")


@pytest.mark.parametrize(("change", "name"), [(rename, "step-00000007"), (copy_far, "step-99999999")])
def test_a_name_that_the_manifest_denies_is_not_believed(copied, change, name):
    """Neither by a run nor by what evaluates; and a run that falls back goes on from what is true."""
    from peer_dist.checkpoints.store import find_checkpoint
    from peer_dist.megatron import CheckpointError

    folder = Path(copied["checkpoint"]["dir"])
    losses = losses_of(copied)
    change(folder)
    ((said,), _) = run_ranks(what_is_said, 2, [copied])
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint(folder)
    for sentence in (said, str(refusal.value)):
        assert (
            f"{name}: is named as the checkpoint of step {int(name[5:])}, but its manifest.json says step 6" in sentence
        )
        assert "step-00000006" in sentence if change is rename else "remove this copy" in sentence
    run_ranks(run_to_the_end, 2, with_keys(copied, checkpoint={"fall_back": True}))
    assert losses_of(copied) == losses
    assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000006", f"{name}.damaged"]


def save_twice(rank, world_size, tree):
    """Steps that have checkpoints after a copy of one came during the run, under a name far ahead."""
    trainer = make_trainer(tree)
    for _ in range(3):
        trainer.step()
        trainer.save()
        copy = trainer.store.path(99999999)
        if not copy.exists():
            shutil.copytree(trainer.store.path(1), copy)
    return trainer.store.steps()


def test_a_copy_ahead_makes_no_good_checkpoint_old(small):
    assert run_ranks(save_twice, 1, with_keys(small, checkpoint={"keep": 2})) == [[2, 3]]
    assert sorted(os.listdir(small["checkpoint"]["dir"])) == ["step-00000002", "step-00000003", "step-99999999"]


def test_a_checkpoint_is_found_by_what_people_call_it(copied):
    """By a name of its own, in the folder of its run, and in a folder that lost its manifest by that folder's name."""
    from peer_dist.checkpoints.store import find_checkpoint
    from peer_dist.megatron import CheckpointError

    folder = Path(copied["checkpoint"]["dir"])
    assert find_checkpoint(folder.parent) == folder / "step-00000006"
    shutil.copytree(folder / "step-00000006", folder / "best")
    assert find_checkpoint(folder / "best") == folder / "best"
    (folder / "step-00000006" / "manifest.json").unlink()
    for path in (folder, folder / "step-00000006"):
        with pytest.raises(CheckpointError, match=r"step-00000006/manifest.json: is missing; .*step-00000004, the one"):
            find_checkpoint(path)
    for path in (folder / "nothing", folder / ("n" * 300), Path("a\0b")):
        with pytest.raises(CheckpointError, match="name a checkpoint, or a folder of them"):
            find_checkpoint(path)


def replace_by(make):
    def replaced(file):
        file.unlink()
        make(file)

    return replaced


ODD = {
    "a folder": replace_by(Path.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "a loop": replace_by(lambda file: file.symlink_to(file)),
    "a link to nothing": replace_by(lambda file: file.symlink_to("/nowhere")),
    "a link out": replace_by(lambda file: file.symlink_to("/etc/hostname")),
    "cut off": truncate,
    "gone": os.remove,
}


@pytest.mark.parametrize("starts", ["resumed", "init_from"])
def test_damage_is_known_before_ranks_meet(copied, tmp_path, starts):
    """As far as it shows without reading tensors; and nothing is made."""
    from peer_dist.checkpoints.manifest import DamagedError
    from peer_dist.config import parse_config
    from peer_dist.training.readiness import check_ready

    new = tmp_path / "new" / "run"
    for name in FILES:
        for kind, damage in ODD.items():
            folder = tmp_path / f"{name}-{kind}"
            shutil.copytree(copied["checkpoint"]["dir"], folder)
            damage(folder / "step-00000006" / name)
            keys = {"dir": str(folder)} if starts == "resumed" else {"dir": str(new), "init_from": str(folder)}
            tree = with_keys(copied, checkpoint=keys, logging={"dir": str(new / "logs")})
            with pytest.raises(DamagedError) as refusal:
                check_ready(parse_config(tree, "test"), 2)
            assert f"step-00000006/{name}: " in str(refusal.value), (name, kind)
            assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("memory", "lazy"), [("device", False), ("host", True)])
def test_tables_that_no_memory_holds_are_refused(copied, memory, lazy):
    """Before they are drawn, in the course of which the system would kill the run without a word."""
    from peer_dist.config import ConfigError, parse_config
    from peer_dist.training.readiness import check_ready

    peer = {"num_experts": 2**40, "table_memory": memory}
    tree = with_keys(copied, peer=peer, table_optimizer={"name": "rowwise_adagrad", "lazy": lazy})
    if memory == "device" and torch.cuda.is_available():
        pytest.skip("they would be in a GPU's memory")
    with pytest.raises(ConfigError, match=rf"peer.table_memory: {memory} would have .* GB, in memory, but .*to disk"):
        check_ready(parse_config(tree, "test"), 2, 2)


def test_folders_that_a_run_would_remove_are_refused(copied, tmp_path):
    """A run in a checkpoint would go with it, and logs in one, or checkpoints among the logs, would be set aside."""
    from peer_dist.config import ConfigError, parse_config
    from peer_dist.training.readiness import check_ready

    own, other, logs = tmp_path / "own", tmp_path / "other/step-00000004", tmp_path / "mine"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(other)

    def check(checkpoints, logs):
        tree = with_keys(copied, checkpoint={"dir": str(checkpoints)}, logging={"dir": str(logs)})
        check_ready(parse_config(tree, "test"), 2)

    for fine in (
        (own, logs),
        (own, own),
        (own, own / "logs"),
        (logs / "checkpoints", logs),
        (tmp_path / "step-1", logs),
        (own, own / "step-logs"),
        (own, own / ".step-logs"),
    ):
        check(*fine)
    for checkpoints in (other, other / "deeper", tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"^checkpoint.dir: .* lies in the checkpoint step-00000004, .*above it"):
            check(checkpoints, logs)
    for inside in (other, own / "step-00000009", own / "step-00000009/logs", own / ".step-00000009.partial/logs"):
        with pytest.raises(
            ConfigError, match=r"^logging.dir: .* lies in the checkpoint \.?step-.*; name another folder"
        ):
            check(own, inside)
    for name in ("metrics.jsonl", "images/x"):
        with pytest.raises(ConfigError, match=r"^checkpoint.dir: .* of logging.dir"):
            check(logs / name, logs)


def test_files_may_be_links(copied, tmp_path):
    """As in a hub's cache or an annex, whose large files lie elsewhere."""
    from peer_dist.checkpoints.store import visible_damage

    checkpoint, blobs = Path(copied["checkpoint"]["dir"]) / "step-00000006", tmp_path / "blobs"
    blobs.mkdir()
    for file in list(checkpoint.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..") / ".." / os.path.relpath(blobs / file.name, checkpoint.parents[1]))
    assert visible_damage(checkpoint) is None
    truncate(blobs / "common.pt")
    assert "common.pt: is damaged" in str(visible_damage(checkpoint))


def test_a_refusal_leaves_no_empty_folders(copied, tmp_path):
    """Nor does one that needs the bytes of a tensor to be known."""
    flip(Path(copied["checkpoint"]["dir"]) / "step-00000006" / "__1_0.distcp")
    new = tmp_path / "new" / "run"
    keys = {"dir": str(new / "checkpoints"), "init_from": copied["checkpoint"]["dir"]}
    tree = with_keys(copied, checkpoint=keys, logging={"dir": str(new / "logs")})
    with command(tree, tmp_path) as run:
        assert run.codes(60)[0] == 2
        assert "__1_0.distcp: is damaged" in run.words(0)
    assert not (tmp_path / "new").exists()
