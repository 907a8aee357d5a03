"""A file of torch.save from elsewhere is read as numbers, or refused; nothing in it runs, and no size in it is believed
beyond its own."""

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from families import small_model
from safetensors.torch import load_file, save_file

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import formats, mamba_ssm, megatron, torch_files
from nemotron_h.checkpoints.megatron import ranks
from nemotron_h.checkpoints.writing import convert


class Program(torch.nn.Module):
    """Writes over a file when it is read: TorchScript has `torch.save`."""

    def __init__(self, victim: str):
        super().__init__()
        self.x = torch.zeros(1)
        self.victim = victim

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.x, self.victim, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.x = state[0]
        self.victim = state[1]
        self.training = state[2]
        torch.save("written by the file that was read", self.victim)


def save_program(path, victim):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(Program(str(victim))), str(path))
    victim.write_text("precious")


def renamed(path, names):
    """The archive with other names for its records, which torch finds by their ends."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(names(name), contents)


def rank_file(folder):
    return folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"


def published(folder):
    small_model("mamba", torch.float32, hybrid_override_pattern="MM").save_pretrained(folder)
    return folder


PLACES = {
    "a rank file": (rank_file, lambda folder: formats.conversion(folder, "huggingface")),
    "a rank file without optimizer": (
        lambda folder: folder / "mp_rank_00" / "model_rng.pt",
        lambda folder: ranks.RankFolders(folder),
    ),
    "common.pt": (lambda folder: folder / "common.pt", lambda folder: megatron.DistFolder(folder)),
    "mamba-ssm's": (
        lambda folder: folder / "pytorch_model.bin",
        lambda folder: mamba_ssm.TorchFile(folder / "pytorch_model.bin"),
    ),
    "pytorch_model.bin": (
        lambda folder: folder / "pytorch_model.bin",
        lambda folder: NemotronHForCausalLM.from_pretrained(folder),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("top", [None, "code", "archive"])
def test_a_program_is_refused_and_does_not_run(place, top, tmp_path):
    where, read = PLACES[place]
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    if place == "pytorch_model.bin":
        (published(folder) / "model.safetensors").unlink()
    save_program(where(folder), victim)
    (folder / ".metadata").write_bytes(b"")  # of a distributed checkpoint
    if place != "common.pt":
        (folder / ".metadata").unlink()
    if top:
        renamed(where(folder), lambda name: f"{top}/{name.partition('/')[2]}")
    with pytest.raises(ValueError, match=r"is a TorchScript archive.*save the model's state_dict\(\)"):
        read(folder)
    assert victim.read_text() == "precious"


def test_old_formats_are_refused_without_being_unpacked(tmp_path, monkeypatch):
    contents = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(x=1)}
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *args, **kwargs: pytest.fail("unpacked"))
    old, tar, text = (tmp_path / name for name in ("old.pt", "tar.pt", "text.pt"))
    torch.save(contents, old, _use_new_zipfile_serialization=False)
    with tarfile.open(tar, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    text.write_text("no torch file")
    for path in (old, tar, text):
        for read in (torch_files.load, mamba_ssm.TorchFile):
            with pytest.raises(ValueError, match=r"no zip file.*save it again with a newer torch"):
                read(path)
    torch.save(contents, tmp_path / "new.pt")
    assert torch.equal(torch_files.load(tmp_path / "new.pt")["model"]["a"], torch.ones(2))


def with_pickle(path, data):
    """A file of torch.save whose pickle is `data`."""
    torch.save({"model": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else contents)
    return path


def called(module, name, *arguments):
    """The pickle of a call."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R."


REFUSED_PICKLES = {
    "a storage of 10^13 bytes": called("torch.storage", "TypedStorage", 10**13),
    "a bytearray of 10^12 bytes": called("builtins", "bytearray", 10**12),
    "bytes of 10^12": called("builtins", "bytes", 10**12),
    "bytes said to be 10^12 long": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"abc.",
    "state for a class": b"\x80\x02cargparse\nNamespace\nN}X\x06\x00\x00\x00pollutK\x01s\x86b.",
    "state for a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x06\x00\x00\x00pollutK\x01sb.",
    "a list as it is": b"\x80\x02].",
    "cut short": b"\x80\x02(((",
    "nothing": b"",
}


@pytest.mark.parametrize("what", REFUSED_PICKLES)
def test_a_pickle_makes_nothing_but_what_a_model_has(what, tmp_path):
    rank = with_pickle(tmp_path / "model_optim_rng.pt", REFUSED_PICKLES[what])
    folder = tmp_path / "m" / "mp_rank_00"
    folder.mkdir(parents=True)
    rank.rename(folder / rank.name)
    with pytest.raises(ValueError, match=r"^[^\n]*model_optim_rng\.pt (cannot be read|has no 'model')[^\n]*$"):
        ranks.RankFolders(tmp_path / "m")
    assert not hasattr(argparse.Namespace, "pollut") and not hasattr(torch._utils._rebuild_tensor_v2, "pollut")


def test_an_object_kept_under_a_large_number_takes_no_room(tmp_path):
    """C's unpickler makes a table of 2^31 places for it, 17 GB."""
    kept = b"\x80\x02}X\x05\x00\x00\x00model}r\xff\xff\xff\x7fs."
    assert torch_files.load(with_pickle(tmp_path / "x.pt", kept)) == {"model": {}}


def test_packed_parts_are_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in records.items():
            archive.writestr(name, contents)
    with pytest.raises(ValueError, match=r"packed.*write it with torch\.save"):
        torch_files.load(tmp_path / "x.pt")


# -- what a distributed checkpoint's index says ----------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    convert(megatron.from_huggingface(published(tmp_path / "ours")), tmp_path / "dist")
    return tmp_path / "dist" / "iter_0000001"


def change(folder, how):
    index = pickle.loads((folder / ".metadata").read_bytes())
    name = next(name for name in index.state_dict_metadata if name.endswith("in_proj.weight.z"))
    how(index, name)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _elsewhere(path):
    def how(index, name):
        for key, info in index.storage_data.items():
            if key.fqn == name:
                info.relative_path = path

    return how


def _larger(index, name):
    entry = index.state_dict_metadata[name]
    entry.size = torch.Size((10**12, *entry.size[1:]))
    entry.chunks[0].sizes = entry.size


def _twice(index, name):
    entry = index.state_dict_metadata[name]
    entry.chunks.append(entry.chunks[0])
    entry.size = torch.Size((2 * entry.size[0], *entry.size[1:]))


def _negative(index, name):
    for key, info in index.storage_data.items():
        if key.fqn == name:
            info.offset = -1


INDEX = {
    "a file above": (_elsewhere("../__0_0.distcp"), "leads out of its folder"),
    "an absolute file": (_elsewhere("/etc/passwd"), "leads out of its folder"),
    "a device": (_elsewhere("/dev/zero"), "leads out of its folder"),
    "no name": (_elsewhere(5), "is no name"),
    "10^12 rows in a few bytes": (_larger, "which cannot be"),
    "a part twice": (_twice, "only a part"),
    "before the file": (_negative, "which cannot be"),
    "entries that are none": (lambda index, name: index.state_dict_metadata.update({name: 5}), "lacks the tensor"),
    "no chunks": (lambda index, name: setattr(index.state_dict_metadata[name], "chunks", 5), "cannot be read"),
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_leads_nowhere_and_is_believed_as_far_as_its_files_go(what, written):
    how, words = INDEX[what]
    change(written, how)
    with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
        conversion = formats.conversion(written.parent, "huggingface")
        conversion.plan.check()


def test_experts_without_elements_are_not_counted_one_by_one(tmp_path):
    """10^12 of them, which take no bytes."""
    name = "backbone.layers.0.mixer.experts.up_proj"
    folder = published(tmp_path / "ours")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.empty(0, 3, 3)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name]["shape"] = [10**12, 0, 3]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=rf"has the tensor {name}, which no layer"):
        formats.conversion(folder, "huggingface").plan.check()


def test_a_tracker_names_a_folder_inside(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("../outside", "/", "..", "a\\b"):
        (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text(name)
        with pytest.raises(ValueError, match="leads out of its folder"):
            formats.conversion(tmp_path / "m", "huggingface")


@pytest.mark.parametrize("name", ["expert_tensor_parallel_size", "mtp_num_layers"])
def test_numbers_among_the_arguments_are_believed_as_far_as_a_model_goes(name, tmp_path):
    convert(ranks.from_huggingface(published(tmp_path / "ours")), tmp_path / "ranks")
    (tmp_path / "ranks" / "config.json").unlink()
    file = rank_file(tmp_path / "ranks")
    contents = torch.load(file, weights_only=False)
    setattr(contents["args"], name, 10**12)
    contents["args"].mtp_hybrid_override_pattern = "*E"
    torch.save(contents, file)
    with pytest.raises(ValueError, match=rf"{name}.* 1000000000000"):
        formats.conversion(tmp_path / "ranks", "huggingface")


def _pickled(path, pickled: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def _doubled(pair: bytes, levels: int) -> bytes:
    """A value that holds the one before it twice, so many times over: small to write, endless to walk through."""
    return b"\x80\x04" + pair + b"\x940" + b"".join(b"h%ch%c" % (i, i) + b"\x86\x940" for i in range(levels))


_TEXT = b"\x8c\x08aaaaaaaa"
_HEX = b"".join(b"\x8c\x07_codecs\x8c\x06encode\x93h%c\x8c\x03hex\x86R\x940" % i for i in range(40))
ENDLESS = {
    "a set of tuples of tuples": _doubled(_TEXT, 40) + b"\x8c\x08builtins\x8c\x09frozenset\x93]h\x28a\x85R.",
    "a set by its own letter": _doubled(_TEXT, 40) + b"\x8f(h\x28\x90.",
    "a key of tuples of tuples": _doubled(_TEXT, 40) + b"}h\x28K\x01s.",
    "keys of tuples of tuples": _doubled(_TEXT, 40) + b"}(h\x28K\x01u.",
    "a dictionary of such pairs": _doubled(_TEXT, 40)
    + b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93]h\x28K\x01\x86a\x85R.",
    "the text of lists of lists": _doubled(_TEXT, 40) + b"\x8c\x08builtins\x8c\x03str\x93h\x28\x85R.",
    "bytes encoded again and again": b"\x80\x04C\x08aaaaaaaa\x940" + _HEX + b"K\x01.",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_few_bytes_that_stand_for_endless_work_are_refused(what, tmp_path):
    path = _pickled(tmp_path / "file.pt", ENDLESS[what])
    assert path.stat().st_size < 3_000
    try:
        found = torch_files.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # it holds the tuples as they are, and nobody looks at them
        assert what == "a set of tuples of tuples" and type(found) is list


def test_a_pipe_for_a_rank_file_is_not_waited_for(tmp_path):
    path = rank_file(tmp_path / "ranks")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no plain file"):
        formats.conversion(tmp_path / "ranks", "huggingface")
    with pytest.raises(ValueError, match="is no plain file"):
        torch_files.load(path)
