"""Files that the configuration names: which they are, how they are opened, secrets and TLS."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import inspect

from streamer.config.settings import FileSink, KafkaSink, MqttSink, Sasl, Settings, StdoutSink, Tls
from streamer.errors import ConfigError
from streamer.privilege.drop import account_of
from streamer.privilege.files import (
    DIRECT,
    READ_MOST,
    Appendable,
    AppendTarget,
    in_memory,
    own_descriptor,
    read_all,
)
from streamer.privilege.named import exposed_secrets, named_files
from streamer.sinks.credentials import read_secret, ssl_context

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- which they are


def file_settings(node: inspect.Type, name: str = "") -> Iterator[str]:
    """The names of all settings that name a file."""
    match node:
        case inspect.Metadata():
            yield from file_settings(node.type, name)
        case inspect.UnionType():
            for part in node.types:
                yield from file_settings(part, name)
        case inspect.VarTupleType():
            yield from file_settings(node.item_type, name)
        case inspect.StructType():
            for field in node.fields:
                yield from file_settings(field.type, field.name)
        case inspect.StrType() if name == "btf" or name == "path" or name.endswith("_file"):
            yield name


def test_every_file_of_a_configuration_is_named() -> None:
    """And nothing but these: a setting that names a file has to be added here, and to it."""
    tls = Tls(ca_file="/t/ca", cert_file="/t/cert", key_file="key", key_password_file="/t/pass")
    sasl = Sasl(username="u", password_file="/t/sasl")
    settings = Settings(
        btf="/t/btf",
        sinks=(
            StdoutSink(),
            FileSink(path="out/events", mode="0604"),
            FileSink(path="/dev/fd/3"),
            KafkaSink(bootstrap=("b:1",), tls=tls, sasl=sasl),
            MqttSink(host="h", username="u", password_file="/t/mqtt", tls=Tls(ca_file="/t/ca")),
        ),
    )
    named = named_files(settings)
    here = os.getcwd()
    assert {(file.path, file.use, file.bits) for file in named} == {
        ("/t/btf", "read", 0),
        (f"{here}/out/events", "append", 0o604),
        ("/t/ca", "read", 0),
        ("/t/cert", "read", 0),
        (f"{here}/key", "read", 0),
        ("/t/pass", "read", 0),
        ("/t/sasl", "read", 0),
        ("/t/mqtt", "read", 0),
    }
    assert len(set(named)) == len(named)
    # Opened before the split, and kept open.
    assert set(file_settings(inspect.type_info(Settings))) - {"state_file"} == {
        "btf",
        "ca_file",
        "cert_file",
        "key_file",
        "key_password_file",
        "password_file",
        "path",
    }


@pytest.mark.parametrize(
    ("path", "fd"),
    [
        ("/dev/fd/63", 63),
        ("/proc/self/fd/3", 3),
        ("/dev/stdout", 1),
        ("/dev/fd/3/x", None),
        ("/dev/null", None),
    ],
)
def test_paths_that_mean_a_descriptor(path: str, fd: int | None) -> None:
    assert own_descriptor(path) == fd


def test_a_descriptor_by_its_path() -> None:
    """As a shell's process substitution makes them: no other process could open it."""
    reading, writing = os.pipe()
    try:
        os.write(DIRECT.append(f"/dev/fd/{writing}", 0).open().fd, b"secret")
        os.close(writing)
        assert os.read(DIRECT.open(f"/dev/fd/{reading}"), 100) == b"secret"
    finally:
        os.close(reading)


def test_one_file_by_two_names(tmp_path: Path) -> None:
    """Links lead to it, or rotation would rename the one to the other."""
    file, other = tmp_path / "file", tmp_path / "other"
    for path in (file, other):
        path.touch()
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "new").symlink_to(tmp_path / "none")
    for first, second in (
        (FileSink(path=str(file)), FileSink(path=f"{tmp_path}/hard")),
        (FileSink(path=str(file)), FileSink(path=f"{tmp_path}/soft")),
        (FileSink(path=str(file)), FileSink(path=f"{tmp_path}/here/file")),
        (FileSink(path=f"{tmp_path}/none"), FileSink(path=f"{tmp_path}/new")),
        (FileSink(path=str(file), rotate_bytes=4096), FileSink(path=f"{file}.7.gz")),
        (FileSink(path=f"{file}.1"), FileSink(path=str(file), rotate_seconds=60)),
        (FileSink(path=str(file), rotate_bytes=4096), FileSink(path=f"{file}.gz.part")),
        (StdoutSink(), FileSink(path="/dev/stdout")),
        (FileSink(path="/dev/fd/7"), FileSink(path="/proc/self/fd/7")),
    ):
        with pytest.raises(ConfigError, match=r"^sinks\[1\]: found .* by another name"):
            named_files(Settings(sinks=(first, second)))
    sinks = (FileSink(path=str(file), rotate_bytes=4096, rotate_keep=7), StdoutSink())
    named_files(Settings(sinks=(*sinks, FileSink(path=f"{file}.8"), FileSink(path=str(other)))))


def test_a_file_that_a_descriptor_was_opened_for(tmp_path: Path) -> None:
    """As `streamer run … > FILE` does it: the two would write over each other."""
    file = tmp_path / "file"
    with file.open("wb") as opened:
        sinks = (FileSink(path=f"/dev/fd/{opened.fileno()}"), FileSink(path=str(file)))
        with pytest.raises(ConfigError, match=r"^sinks\[1\]: found .* by another name"):
            named_files(Settings(sinks=sinks))
    with open(os.devnull, "wb") as opened:
        named_files(Settings(sinks=(FileSink(path=f"/dev/fd/{opened.fileno()}"), sinks[1])))


# ---------------------------------------------------------------- opening


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    """Who can write to the directory later cannot have another file written to."""
    real, link, victim = tmp_path / "real", tmp_path / "link", tmp_path / "victim"
    link.symlink_to(real)
    target = AppendTarget(str(link), 0o600)
    os.write(target.open().fd, b"one\n")
    real.unlink()
    real.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        target.open()
    assert not victim.exists()
    target.close()


def test_a_directory_is_held(tmp_path: Path) -> None:
    """Another one that is put in its place is not written to."""
    directory, elsewhere = tmp_path / "logs", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    target = AppendTarget(str(directory / "events"), 0o600)
    directory.rename(tmp_path / "moved")
    directory.symlink_to(elsewhere)
    os.write(target.open().fd, b"one\n")
    assert (tmp_path / "moved" / "events").read_bytes() == b"one\n"
    assert not list(elsewhere.iterdir())
    target.close()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DIRECT.append(str(tmp_path / "none" / "events"), 0o600)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[AppendTarget]:
    """`events` in the directory of the test."""
    made = AppendTarget(str(tmp_path / "events"), 0o640)
    yield made
    made.close()


def written(opened: Appendable, text: str) -> None:
    os.write(opened.fd, text.encode())
    os.close(opened.fd)


def contents(directory: Path) -> dict[str, str]:
    """What the files of a directory hold, those that are compressed expanded."""
    return {
        path.name: (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode()
        for path in directory.iterdir()
    }


def pack(target: AppendTarget, keep: int) -> bool:
    """Compress the next file, if there is one."""
    packing = target.pack(keep)
    if packing is None:
        return False
    with open(packing.source, "rb") as source, open(packing.target, "wb") as packed:
        packed.write(gzip.compress(source.read()))
    target.packed(True)
    return True


def test_rotation(target: AppendTarget, tmp_path: Path) -> None:
    """The oldest goes. What somebody else renamed or removed is not renamed once more."""
    written(target.open(), "0")
    for number in range(1, 5):
        written(target.rotate(2), str(number))
    assert contents(tmp_path) == {"events": "4", "events.1": "3", "events.2": "2"}
    (tmp_path / "events").rename(tmp_path / "theirs")
    assert not target.current()
    written(target.rotate(2), "5")
    (tmp_path / "events").unlink()
    written(target.rotate(2), "6")
    kept = {"events": "6", "events.1": "3", "events.2": "2", "theirs": "4"}
    assert contents(tmp_path) == kept
    assert (tmp_path / "events").stat().st_mode & 0o7777 == 0o640


def test_compressed_files_move_on_with_the_others(target: AppendTarget, tmp_path: Path) -> None:
    written(target.open(), "0")
    for number in range(1, 4):
        written(target.rotate(3), str(number))
        assert pack(target, 3)
        assert not pack(target, 3)
    assert contents(tmp_path) == {
        "events": "3",
        "events.1.gz": "2",
        "events.2.gz": "1",
        "events.3.gz": "0",
    }
    assert (tmp_path / "events.3.gz").stat().st_mode & 0o7777 == 0o640
    for number in range(4, 7):  # not compressed: they take the others' places all the same
        written(target.rotate(3), str(number))
    assert contents(tmp_path) == {"events": "6", "events.1": "5", "events.2": "4", "events.3": "3"}
    while pack(target, 3):
        pass
    assert set(contents(tmp_path)) == {"events", "events.1.gz", "events.2.gz", "events.3.gz"}


def test_what_is_written_to_is_not_compressed(target: AppendTarget, tmp_path: Path) -> None:
    """Whatever its name: others renamed it, or there was no opening a new one after a rotation."""
    opened = target.open()
    os.write(opened.fd, b"0")
    (tmp_path / "events").rename(tmp_path / "events.1")
    assert not pack(target, 3)
    os.write(opened.fd, b"1")
    written(target.open(), "2")
    assert pack(target, 3)
    os.close(opened.fd)
    assert contents(tmp_path) == {"events": "2", "events.1.gz": "01"}


def test_a_file_whose_mode_cannot_be_set(
    target: AppendTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems without modes: nothing stays open."""

    def refuse(fd: int, bits: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("streamer.privilege.files.os.fchmod", refuse)
    with pytest.raises(PermissionError):
        target.open()
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_moves_on_while_it_is_compressed(target: AppendTarget, tmp_path: Path) -> None:
    written(target.open(), "0")
    written(target.rotate(2), "1")
    packing = target.pack(2)
    assert packing is not None
    written(target.rotate(2), "2")
    os.write(packing.target, gzip.compress(os.read(packing.source, 100)))
    target.packed(True)
    assert contents(tmp_path) == {"events": "2", "events.1": "1", "events.2.gz": "0"}
    again = target.pack(2)
    assert again is not None
    for number in (3, 4):  # now it goes before it is done
        written(target.rotate(2), str(number))
    target.packed(True)
    assert contents(tmp_path) == {"events": "4", "events.1": "3", "events.2": "2"}


def test_what_a_compressor_gave_up_stays_as_it_was(target: AppendTarget, tmp_path: Path) -> None:
    written(target.open(), "0")
    written(target.rotate(2), "1")
    packing = target.pack(2)
    assert packing is not None
    os.write(packing.target, b"half")
    target.packed(False)
    assert contents(tmp_path) == {"events": "1", "events.1": "0"}
    assert target.pack(2) is not None  # and an agent that is killed leaves the part behind
    target.packed(True)  # no second time
    target.packed(True)
    assert len(contents(tmp_path)) == 2


def test_siblings_that_others_put_there(target: AppendTarget, tmp_path: Path) -> None:
    """In a directory that others can write to, only what the agent has written is compressed."""
    secret, victim = tmp_path / "secret", tmp_path / "victim"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    written(target.open(), "0")
    for name in ("events.1", "events.2", "events.gz.part"):
        (tmp_path / name).symlink_to(victim)
    assert target.pack(5) is None
    (tmp_path / "events.gz.part").unlink()
    (tmp_path / "events.gz.part").symlink_to(victim)
    written(target.rotate(5), "1")  # the links are renamed, not followed
    os.link(secret, tmp_path / "events.4")
    secret.rename(tmp_path / "events.5")
    assert pack(target, 5)
    assert not pack(target, 5)
    assert not victim.exists()
    (tmp_path / "events.4").unlink()
    assert target.pack(5) is None, "it is not known whose that file is"
    tmp_path.chmod(0o755)
    assert target.pack(5) is not None, "nobody else can have put it there"
    target.packed(False)
    assert os.readlink(tmp_path / "events.2") == os.readlink(tmp_path / "events.3") == str(victim)
    assert (tmp_path / "events.5").read_text() == "secret"
    assert gzip.decompress((tmp_path / "events.1.gz").read_bytes()) == b"0"


@pytest.mark.parametrize(("mode", "guarded"), [(0o755, True), (0o775, False), (0o757, False)])
def test_who_else_can_have_put_a_file_there(
    target: AppendTarget, tmp_path: Path, mode: int, guarded: bool
) -> None:
    """An older file that this run has not written: another's group is as little ours as all."""
    (tmp_path / "events.1").write_text("of an earlier run, or a secret")
    tmp_path.chmod(mode)
    packing = target.pack(1)
    assert (packing is not None) == guarded
    for fd in packing or ():
        os.close(fd)


def test_what_is_not_packed_leaves_no_descriptor(tmp_path: Path) -> None:
    """A link or a file of another's, and a directory in the place of the unfinished file."""
    before = os.listdir("/proc/self/fd")
    target = AppendTarget(str(tmp_path / "events"), 0o640)
    tmp_path.chmod(0o777)
    (tmp_path / "events.1").write_text("another's")
    assert target.pack(1) is None
    tmp_path.chmod(0o755)
    os.link(tmp_path / "events.1", tmp_path / "another name")
    assert target.pack(1) is None
    (tmp_path / "another name").unlink()
    (tmp_path / "events.gz.part").mkdir()
    with pytest.raises(IsADirectoryError):
        target.pack(1)
    target.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_terminal_that_is_written_to_is_not_taken_over() -> None:
    """Else its closing would end the agent, which under a service manager has none."""
    code = (
        "import os\n"
        "from streamer.privilege.files import AppendTarget, open_read\n"
        "own, its = os.openpty()\n"
        "open_read(os.ttyname(its))\n"
        "AppendTarget(os.ttyname(its), 0o600).open()\n"
        "print(open('/proc/self/stat').read().rpartition(')')[2].split()[4])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"0\n", b"")


def test_a_file_that_others_put_in_its_place(
    target: AppendTarget, tmp_path: Path, require: Callable[[object, str], None]
) -> None:
    """Whoever can write to the directory gets no events by it, and has no file written to."""
    require(os.geteuid() == 0, "to make files of others' needs root")
    events, other = tmp_path / "events", tmp_path / "other"
    written(target.open(), "0")
    events.unlink()
    events.touch()
    os.chown(events, 65534, 65534)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PermissionError, match="others may have put a file there"):
        target.open()
    assert os.listdir("/proc/self/fd") == before
    events.unlink()
    other.touch()
    os.link(other, events)
    with pytest.raises(PermissionError):
        target.open()
    events.unlink()
    events.touch()
    written(target.open(), "1")
    assert contents(tmp_path) == {"events": "1", "other": ""}
    first = AppendTarget(str(other), 0o600)
    os.chown(other, 65534, 65534)
    for _ in range(2):  # whose it is at first is the administrator's choice
        written(first.open(), "2")
    other.unlink()
    other.touch()
    written(first.open(), "3")  # made anew by root, as logrotate does
    first.close()


def test_a_rotation_that_fails_leaves_the_file(target: AppendTarget, tmp_path: Path) -> None:
    written(target.open(), "0")
    (tmp_path / "events.1" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        target.rotate(1)
    assert (tmp_path / "events").read_text() == "0"
    assert target.current()


@pytest.mark.parametrize("moved", [False, True])
def test_a_directory_that_is_made_anew(tmp_path: Path, moved: bool) -> None:
    """It is used if whoever made it could have written to the old one, too."""
    directory = tmp_path / "logs"
    directory.mkdir(0o755)
    target = AppendTarget(str(directory / "events"), 0o600)
    written(target.open(), "0")
    if moved:
        directory.rename(tmp_path / "old")
        assert target.current(), "it is where it was, and nothing is in its place"
    else:
        shutil.rmtree(directory)
        assert not target.current()
        with pytest.raises(FileNotFoundError):
            target.open()
    directory.mkdir(0o777)
    directory.chmod(0o777)
    assert target.current() == moved, "that one is anybody's to write to"
    directory.chmod(0o755)
    assert not target.current()
    written(target.open(), "1")
    assert (directory / "events").read_text() == "1"
    target.close()


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(READ_MOST + 1)
    with pytest.raises(OSError, match="too large"):
        read_all(DIRECT.open(str(path)))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        read_all(DIRECT.open(str(tmp_path)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_path_in_memory() -> None:
    data = os.urandom(3 << 20)
    with in_memory(data) as path:
        assert Path(path).read_bytes() == data
    assert not Path(path).exists()


# ---------------------------------------------------------------- secrets and TLS


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cert` with `key`, which `password` opens; `other` is a key of something else."""
    directory = tmp_path_factory.mktemp("certificates")
    (directory / "password").write_text("open sesame\n")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    subject = ("-days", "2", "-subj", "/CN=client", "-keyout", "key", "-out", "cert")
    openssl(directory, "req", "-x509", *ec, "-passout", "pass:open sesame", *subject)
    openssl(directory, "genpkey", "-algorithm", "ed25519", "-out", "other")
    for path in directory.iterdir():
        path.chmod(0o600)
    return directory


def tls(directory: Path, **files: str) -> Tls:
    names = {"ca_file": "cert", "cert_file": "cert", "key_file": "key"}
    names |= {"key_password_file": "password"} | files
    return Tls(**{name: str(directory / file) for name, file in names.items() if file})  # type: ignore[arg-type]


def test_a_certificate_and_its_key(certificates: Path) -> None:
    context = ssl_context(tls(certificates))
    assert [dict(one)["subject"] for one in context.get_ca_certs()]
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert not [fd for fd in os.listdir("/proc/self/fd") if "memfd:streamer" in link(fd)]


def link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ca_file": "none"}, r"tls.ca_file: cannot use .*/none: No such file"),
        ({"ca_file": "password"}, r"tls.ca_file: cannot use .*/password: "),
        ({"cert_file": "none"}, r"tls.cert_file: cannot use .*/none with key .*/key: No such file"),
        ({"key_file": "other"}, r"tls.cert_file: cannot use .*/cert with key .*/other: "),
        ({"key_password_file": ""}, r"tls.cert_file: cannot use .*/cert with key .*/key: "),
        ({"key_password_file": "none"}, r"tls.key_password_file: cannot read .*/none: No such"),
    ],
)
def test_what_cannot_be_used(certificates: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ssl_context(tls(certificates, **files))
    assert "sesame" not in str(caught.value)


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    """Without the end of its line, and as UTF-8."""
    (tmp_path / "secret").write_bytes("gehe heim ü\r\n".encode())
    assert read_secret("it", None, str(tmp_path / "secret")) == "gehe heim ü"
    (tmp_path / "secret").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="it_file: cannot read"):
        read_secret("it", None, str(tmp_path / "secret"))


# ---------------------------------------------------------------- the worker's user


def test_the_user_to_become() -> None:
    assert account_of("nobody") == ("nobody", 65534, 65534)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("root", "user: found 'root', allowed: a user other than root"),
        ("no such user", "user: found 'no such user', allowed: a user of this system"),
    ],
)
def test_a_user_that_it_cannot_become(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        account_of(name)


def test_a_secret_that_every_user_can_read_is_said(tmp_path: Path) -> None:
    """Of passwords and keys; a certificate is for everybody."""
    paths = {name: tmp_path / name for name in ("ca", "cert", "key", "word", "own")}
    for path in paths.values():
        path.write_text("")
        path.chmod(0o644)
    paths["own"].chmod(0o640)
    tls = Tls(
        ca_file=str(paths["ca"]),
        cert_file=str(paths["cert"]),
        key_file=str(paths["key"]),
        key_password_file=str(tmp_path / "missing"),
    )
    kafka = KafkaSink(
        bootstrap=("k:1",), tls=tls, sasl=Sasl(username="u", password_file=str(paths["own"]))
    )
    mqtt = MqttSink(host="m", username="u", password_file=str(paths["word"]), tls=tls)
    said = list(exposed_secrets(Settings(sinks=(kafka, mqtt))))
    assert said == [f"{paths[name]}: every user can read this secret" for name in ("key", "word")]
