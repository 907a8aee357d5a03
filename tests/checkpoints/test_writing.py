"""The writer: what is there is whole, what was interrupted goes on, and nothing of somebody else's is touched."""

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoints import writing
from nemotron_h.checkpoints.tensors import Entry, Plan, SafetensorsFolder, Spec
from nemotron_h.checkpoints.writing import Conversion, convert, write_safetensors

SHARD = 2_000


def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {f"t{i:02}": torch.randn(10 + i, 16, generator=generator) for i in range(12)}
    found["half"] = torch.randn(3, 5, generator=generator).bfloat16()  # 30 bytes: what follows must still be aligned
    found["bytes"] = torch.arange(7, dtype=torch.uint8)
    return found


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    save_file(tensors(), tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def conversion(source, shard_bytes=SHARD, options=()):
    """Every tensor twice as large in value, and the tokenizer."""
    folder = SafetensorsFolder(source)
    entries = [
        Entry(name, spec, {name: spec.shape}, (lambda t: t * 2) if spec.dtype.is_floating_point else None)
        for name, spec in folder.specs.items()
    ]
    plan = Plan(folder, entries)

    def write(folder, done):
        writing.copy_companions(source, folder)
        write_safetensors(plan, folder, done, shard_bytes)

    return Conversion("doubled", plan, write, options)


def doubled():
    return {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in tensors().items()}


def read(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def check(folder):
    expected, found = doubled(), read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert (folder / "tokenizer.json").exists()


def left_beside(dest):
    return sorted(path.name for path in dest.parent.iterdir() if path.name not in (dest.name, "source"))


@pytest.mark.parametrize("shard_bytes", [1, SHARD, 10**9])
def test_shards(source, tmp_path, shard_bytes):
    written = []
    convert(conversion(source, shard_bytes), tmp_path / "dest", written.append)
    check(tmp_path / "dest")
    sizes = {name: tensor.nbytes for name, tensor in tensors().items()}
    assert sum(written) == sum(sizes.values())
    files = sorted((tmp_path / "dest").glob("*.safetensors"))
    index = tmp_path / "dest" / "model.safetensors.index.json"
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
        return
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    holds = {name: file.name for file in files for name in load_file(file)}
    stored = json.loads(index.read_text())
    assert stored["weight_map"] == holds and stored["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        names = [name for name, where in holds.items() if where == file.name]
        assert sum(sizes[name] for name in names) <= shard_bytes or len(names) == 1
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        data = file.read_bytes()  # aligned for whoever maps the file
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name in names:
            start = 8 + length + header[name]["data_offsets"][0]
            assert start % tensors()[name].dtype.itemsize == 0, name


def test_nothing_is_written_over(source, tmp_path):
    (tmp_path / "dest").mkdir()
    convert(conversion(source), tmp_path / "dest")  # an empty folder is as good as none
    check(tmp_path / "dest")
    with pytest.raises(ValueError, match="dest is there already; name another destination"):
        convert(conversion(source), tmp_path / "dest")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is there already"):
        convert(conversion(source), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_written_for_a_wrong_source(source, tmp_path):
    """Each wrong source is one sentence with the tensor's name, and leaves nothing at all."""

    def refused(change, match):
        wrong = conversion(source)
        change(wrong.plan.source.specs)
        with pytest.raises(ValueError, match=match) as error:
            convert(wrong, tmp_path / "dest")
        assert str(error.value).count("\n") == 0
        assert not (tmp_path / "dest").exists() and left_beside(tmp_path / "dest") == []

    refused(lambda specs: specs.pop("t03"), "lacks the tensor t03, which its config asks for: fetch or write")
    refused(lambda specs: specs.update(more=specs["t00"]), "has the tensor more, which no layer of its config has")
    refused(
        lambda specs: specs.update(t05=Spec((1, 2), torch.float32)), r"has t05 with shape \(1, 2\) where .* \(15, 16\)"
    )


def test_a_source_that_is_cut_short(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read, from the tensor t\d\d on"):
        conversion(source)


def test_a_full_disk(source, tmp_path, monkeypatch):
    dest, calls, real = tmp_path / "dest", [], writing.tensor_bytes

    def full(tensor):
        calls.append(tensor)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(writing, "tensor_bytes", full)
    with pytest.raises(
        OSError, match=r"The disk of .*dest is full; make room and run it again: it goes on from"
    ) as error:
        convert(conversion(source), dest)
    assert ".dest.partial" in str(error.value)
    assert not dest.exists() and left_beside(dest) == [".dest.partial"]
    partial = tmp_path / ".dest.partial"
    whole = {file.name: file.stat().st_ino for file in partial.glob("model-*")}
    assert len(whole) >= 2 and not list(partial.glob(".model*"))  # the file that it stopped in is not left there

    monkeypatch.setattr(writing, "tensor_bytes", real)
    written = []
    convert(conversion(source), dest, written.append)
    check(dest)
    assert left_beside(dest) == []
    assert {name: (dest / name).stat().st_ino for name in whole} == whole  # not written again
    assert sum(written) == sum(tensor.nbytes for tensor in tensors().values())  # a bar still reaches its end


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_torch_does_not_hide_what_stopped_it(source, tmp_path, stop):
    """`torch.save` raises a RuntimeError over whatever stops it."""

    class File:
        calls = 0

        def write(self, data):
            self.calls += 1
            if self.calls == 3:
                raise stop
            return len(data)

        def flush(self):
            pass

    def write(folder, done):
        torch.save({"a": torch.ones(9)}, File())

    with pytest.raises(RuntimeError):
        write(None, None)
    wrong = conversion(source)
    wrong.write = write
    with pytest.raises((OSError, KeyboardInterrupt)) as error:
        convert(wrong, tmp_path / "dest")
    assert isinstance(error.value, KeyboardInterrupt) or "is full; make room and run it again" in str(error.value)
    assert left_beside(tmp_path / "dest") == [".dest.partial"]


def test_what_a_rerun_would_not_finish_leaves_nothing(source, tmp_path):
    wrong = conversion(source)
    wrong.plan.entries[-1] = Entry("t", Spec((10, 16), torch.float16), {"t00": (10, 16)}, lambda t: t * 1e6)
    wrong.plan.unused = dict.fromkeys(wrong.plan.source.specs, "for this test")
    with pytest.raises(ValueError, match="t has values that float16 cannot hold"):
        convert(wrong, tmp_path / "dest")
    assert not (tmp_path / "dest").exists() and left_beside(tmp_path / "dest") == []


def test_another_error_of_the_disk_is_not_called_a_full_one(source, tmp_path, monkeypatch):
    def broken(tensor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writing, "tensor_bytes", broken)
    with pytest.raises(OSError, match="Input/output error"):
        convert(conversion(source), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_killed_in_the_middle(source, tmp_path):
    dest, partial = tmp_path / "dest", tmp_path / ".dest.partial"
    child = os.fork()
    if child == 0:  # sleeps in the middle of its fourth file, until it is killed
        try:
            convert(conversion(source), dest, lambda nbytes: len(list(partial.glob("model-*"))) < 3 or time.sleep(100))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("model-*")) if partial.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not dest.exists()
    whole = {file.name: file.stat().st_ino for file in partial.glob("model-*")}
    assert len(whole) == 3 and list(partial.glob(".model*"))  # it was killed inside a file

    convert(conversion(source), dest)
    check(dest)
    assert left_beside(dest) == []
    assert {name: (dest / name).stat().st_ino for name in whole} == whole
    convert(conversion(source), tmp_path / "at once")
    for file in dest.iterdir():
        assert file.read_bytes() == (tmp_path / "at once" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("change", ["source", "options"])
def test_what_was_begun_of_something_else_is_not_gone_on_with(source, tmp_path, monkeypatch, change):
    real = writing.tensor_bytes
    monkeypatch.setattr(writing, "tensor_bytes", lambda tensor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        convert(conversion(source), tmp_path / "dest")
    monkeypatch.setattr(writing, "tensor_bytes", real)
    stale = tmp_path / ".dest.partial" / "model-00001-of-00006.safetensors"
    stale.write_bytes(b"of the run before")
    (tmp_path / ".dest.partial" / "subfolder").mkdir()
    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    convert(conversion(source, options=("other",) if change == "options" else ()), tmp_path / "dest")
    check(tmp_path / "dest")


def test_two_runs_at_once(source, tmp_path):
    refusals = []

    def meanwhile(nbytes):
        if not refusals:
            with pytest.raises(ValueError, match=r"Another process is writing .*dest; wait for it") as error:
                convert(conversion(source), tmp_path / "dest")
            refusals.append(error)

    convert(conversion(source), tmp_path / "dest", meanwhile)
    assert refusals
    check(tmp_path / "dest")


def test_a_result_that_is_one_file(source, tmp_path):
    plan = conversion(source).plan

    def write(folder, done):
        with writing.atomic_write(folder / "result.bin") as temporary:
            temporary.write_bytes(b"whole")
            done(plan.nbytes)

    convert(Conversion("bin", plan, write, file="result.bin"), tmp_path / "deep" / "model.bin")
    assert (tmp_path / "deep" / "model.bin").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.bin"]


def test_one_file_does_not_go_where_a_folder_is(source, tmp_path, monkeypatch):
    plan = conversion(source).plan
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is a folder and bin is one file; name a file"):
        convert(Conversion("bin", plan, lambda folder, done: None, file="result.bin"), tmp_path / "empty")
    assert left_beside(tmp_path / "dest") == ["empty"]
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", ".."):
        with pytest.raises(ValueError, match=r"^\.\.? is a folder that is there; name one in it"):
            convert(conversion(source), name)


def test_half_a_file_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stop, full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (Exception("No space left on device (os error 28)"), True),  # as tokenizers has it
        (OSError(errno.EFBIG, "File too large"), False),
        (SafetensorError("I/O error: File too large (os error 27)"), False),
        (ValueError("a weight is NaN"), False),
    ],
    ids=str,
)
def test_a_full_disk_whoever_says_so(tmp_path, stop, full):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError if full else type(stop)) as error, writing.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise stop
    sentence = f"The disk of {tmp_path / 'file'} is full; make room and run it again."
    assert str(error.value) == sentence if full else error.value is stop
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_full_disk_within_a_conversion(source, tmp_path):
    """Found by `whole`, said by `convert`, which says where it goes on from."""
    wrong = conversion(source)

    def write(folder, done):
        with writing.atomic_write(folder / "a"):
            raise OSError(errno.ENOSPC, "No space left on device")

    wrong.write = write
    with pytest.raises(OSError, match=r"The disk of .*dest is full; make room and run it again: it goes on from"):
        convert(wrong, tmp_path / "dest")


def test_companions(tmp_path):
    belong = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE.md", "generation_config.json"]
    for name in [*belong, "config.json", "model.safetensors", "notes.txt"]:
        (tmp_path / name).write_text(name)
    assert sorted(path.name for path in writing.companions(tmp_path)) == sorted(belong)


def somebodys(folder):
    """A folder of somebody's, and what must still be in it."""
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "photo").write_text("mine")
    (folder / "letter").write_text("mine")
    return lambda: (folder / "deep" / "photo").read_text() == (folder / "letter").read_text() == "mine"


def test_a_folder_in_the_place_of_its_beginnings_that_no_conversion_made_is_left_alone(source, tmp_path):
    partial = tmp_path / ".dest.partial"
    for mark in (None, "", "my notes", "0" * 63, "A" * 64, "0" * 64 + "\n"):
        shutil.rmtree(partial, ignore_errors=True)
        untouched = somebodys(partial)
        if mark is not None:
            (partial / ".conversion").write_text(mark)
        with pytest.raises(ValueError, match=r"\.dest\.partial is a folder which no conversion made: take it away"):
            convert(conversion(source), tmp_path / "dest")
        assert untouched() and not (tmp_path / "dest").exists()
        assert mark is None or (partial / ".conversion").read_text() == mark
    shutil.rmtree(partial)
    partial.mkdir()  # stopped before there was a mark
    convert(conversion(source), tmp_path / "dest")
    check(tmp_path / "dest")


@pytest.mark.parametrize("to", ["a folder", "a conversion", "nothing", "a file"])
def test_a_link_in_the_place_of_its_beginnings_is_left_alone(to, source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    untouched = somebodys(elsewhere) if "f" in to else lambda: True
    if to == "a conversion":
        elsewhere.mkdir()
        (elsewhere / ".conversion").write_text("0" * 64)
        (elsewhere / "stale").write_text("of another run")
    partial = tmp_path / ".dest.partial"
    partial.symlink_to(elsewhere / "letter" if to == "a file" else elsewhere)
    before = sorted(path.name for path in elsewhere.rglob("*"))
    with pytest.raises(ValueError, match=r"\.dest\.partial is a link, which no conversion made"):
        convert(conversion(source), tmp_path / "dest")
    assert untouched() and partial.is_symlink() and not os.path.lexists(tmp_path / "dest")
    assert sorted(path.name for path in elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", ["photos", ".model-00001-of-00006.safetensors.writing", ".conversion"])
def test_a_link_among_its_beginnings_is_not_followed(name, source, tmp_path):
    wrong = conversion(source)
    with pytest.raises(KeyboardInterrupt):
        convert(wrong, tmp_path / "dest", lambda nbytes: (_ for _ in ()).throw(KeyboardInterrupt))
    partial, untouched = tmp_path / ".dest.partial", somebodys(tmp_path / "elsewhere")
    (partial / name).unlink(missing_ok=True)
    (partial / name).symlink_to(tmp_path / "elsewhere" / ("letter" if name != "photos" else ""))
    for options in ((), ("other",)):
        with pytest.raises(ValueError, match="which no conversion made"):
            convert(conversion(source, options=options), tmp_path / "dest")
    assert untouched()


def test_a_link_that_leads_nowhere_is_there(source, tmp_path):
    for target in ("gone", "empty"):
        dest = tmp_path / f"to {target}"
        if target == "empty":
            (tmp_path / target).mkdir()
        dest.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="is there already"):
            convert(conversion(source), dest)
        assert dest.is_symlink() and not list(tmp_path.glob(".*partial"))


def test_what_came_to_the_destination_meanwhile_is_left_there(source, tmp_path):
    def meanwhile(nbytes):
        (tmp_path / "dest").write_text("mine")

    with pytest.raises(ValueError, match="is there already"):
        convert(conversion(source), tmp_path / "dest", meanwhile)
    assert (tmp_path / "dest").read_text() == "mine"


def test_a_temporary_name_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".file.writing").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="in the way"), writing.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("lost")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / ".file.writing").is_symlink()
