"""Files and folders at a place that every node sees: a path, or a URI that pyarrow knows (s3://, gs://, hdfs://, file://).

    storage.put_folder("adapter", "s3://bucket/study/best")     # one call whatever the place is
    storage.get_folder("s3://bucket/study/best", "adapter")     # False where nothing lies there

A local file is replaced atomically (written beside the target, synced, renamed); an object store replaces each object
as a whole. A local folder is swapped by two renames: a reader sees the old folder, for an instant none, then the new.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from allocators.core.errors import StudyError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from torch import Tensor

Location = str | os.PathLike[str]

CHECKSUM = "checksum"  # in the metadata of a safetensors file


def is_uri(location: Location) -> bool:
    """Whether pyarrow has to read it; what has no `://` is a path."""
    return "://" in os.fspath(location)


def join(location: Location, *parts: str) -> str:
    """`join("s3://bucket/a", "b", "c")` -> `"s3://bucket/a/b/c"`; the same for paths."""
    return "/".join([os.fspath(location).rstrip("/"), *parts])


def exists(location: Location) -> bool:
    """Whether a file or folder lies there. Raises StudyError where the place cannot be reached."""
    if not is_uri(location):
        return Path(location).exists()
    from pyarrow.fs import FileType

    filesystem, path = _filesystem(location)
    try:
        return bool(filesystem.get_file_info(path).type != FileType.NotFound)
    except OSError as error:
        raise _unreachable("read", location, error) from error


class Damaged(StudyError):
    """A file is not what was written."""


def save_tensors(location: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a safetensors file as a whole, with a checksum of all that is in it.

    Raises StudyError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(location) as local:
        try:
            save_file(plain, local, metadata={**metadata, CHECKSUM: checksum(plain, metadata)})
        except SafetensorError as error:  # it has no class of its own for a full disk
            raise OSError(str(error)) from error


def load_tensors(location: Location) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote. A file of an earlier version has no checksum.

    Raises Damaged where it is not that, StudyError where it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with reading(location) as local:
        if local.is_dir():
            raise Damaged("it is a folder")
        try:
            with safe_open(local, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, UnicodeDecodeError) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            raise _unreachable("read", location, error) from error
    said = metadata.pop(CHECKSUM, None)
    if said is not None and said != checksum(tensors, metadata):
        raise Damaged("its checksum is another")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes and bytes of the tensors, and of the metadata."""
    import torch

    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def check(location: Location) -> None:
    """Raises StudyError where no file can be written in this folder, which is made where it is missing."""
    probe = join(location, f".probe-{uuid.uuid4().hex[:8]}")
    with replacing(probe) as file:
        file.write_bytes(b"probe")
    try:
        if is_uri(probe):
            filesystem, path = _filesystem(probe)
            filesystem.delete_file(path)
        else:
            Path(probe).unlink()
    except OSError as error:
        raise _unreachable("delete", probe, error) from error


def set_aside(location: Location) -> str:
    """Renames what lies there, file or folder, so that nothing does; returns the new name.

    Raises StudyError where it cannot.
    """
    new = f"{os.fspath(location)}.damaged-{uuid.uuid4().hex[:8]}"
    try:
        if is_uri(location):
            filesystem, path = _filesystem(location)
            filesystem.move(path, _filesystem(new)[1])
        else:
            os.replace(location, new)
    except OSError as error:
        raise _unreachable("rename", location, error) from error
    return new


@contextmanager
def replacing(location: Location) -> Iterator[Path]:
    """A local path to write a file to, which replaces what lies at `location` when the block ends without an error.

        with storage.replacing("s3://bucket/state") as file:
            file.write_bytes(...)

    Raises StudyError where the place cannot be written.
    """
    if is_uri(location):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            yield local
            _copy(local, location)
        return
    target = Path(location)
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, target)
    except OSError as error:
        raise _unreachable("write", location, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def reading(location: Location) -> Iterator[Path]:
    """A local path to read the file at `location` from. Raises StudyError where it cannot be read."""
    if not is_uri(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "file"
        _fetch(location, local)
        yield local


@contextmanager
def replacing_folder(location: Location) -> Iterator[Path]:
    """A local path, where nothing lies yet, to write a folder to; it replaces what lies at `location` when the block
    ends without an error, and is gone when it ends with one.

    Beside the target, so that a local folder is renamed and not copied, however large it is.

    Raises StudyError where the place cannot be written.
    """
    if is_uri(location):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "folder"
            yield local
            filesystem, path = _filesystem(location)
            try:
                filesystem.create_dir(path)
                filesystem.delete_dir_contents(path)
            except OSError as error:
                raise _unreachable("write", location, error) from error
            _copy(local, location)
        return
    target = Path(location).absolute()
    temporary, old = _beside(target), _beside(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        raise _unreachable("write", location, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def reading_folder(location: Location) -> Iterator[Path]:
    """A local path to read the folder at `location` from; it does not exist where there is none.

    Raises StudyError where the place cannot be reached.
    """
    if not is_uri(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "folder"
        get_folder(location, local)
        yield local


def put_folder(local: Location, location: Location) -> None:
    """Makes `location` a copy of the folder `local`. Raises StudyError where it cannot be written."""
    with replacing_folder(location) as temporary:
        shutil.copytree(local, temporary)


def get_folder(location: Location, local: Location) -> bool:
    """Copies the folder at `location` into the folder `local`; False where there is none."""
    if not exists(location):
        return False
    if is_uri(location):
        Path(local).mkdir(parents=True, exist_ok=True)
        _fetch(location, local)
    else:
        shutil.copytree(location, local, dirs_exist_ok=True)
    return True


def delete_folder(location: Location) -> None:
    """Removes a folder and what is in it; one that is not there is fine. Raises StudyError where it cannot."""
    if not exists(location):
        return
    try:
        if is_uri(location):
            filesystem, path = _filesystem(location)
            filesystem.delete_dir(path)
        else:
            shutil.rmtree(location)
    except OSError as error:
        raise _unreachable("delete", location, error) from error


def _beside(target: Path, kind: str = "new") -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def _filesystem(location: Location) -> tuple[FileSystem, str]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        resolved: tuple[FileSystem, str] = FileSystem.from_uri(os.fspath(location))
        return resolved
    except (ArrowInvalid, OSError) as error:
        raise _unreachable("open", location, error) from error


def _copy(local: Location, location: Location) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    filesystem, path = _filesystem(location)
    try:
        if Path(local).is_file():  # object stores have no folders; a file:// place needs its own made
            filesystem.create_dir(path.rsplit("/", 1)[0])
        copy_files(
            str(Path(local).absolute()), path, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem
        )
    except OSError as error:
        raise _unreachable("write", location, error) from error


def _fetch(location: Location, local: Location) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    filesystem, path = _filesystem(location)
    Path(local).parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_files(
            path, str(Path(local).absolute()), source_filesystem=filesystem, destination_filesystem=LocalFileSystem()
        )
    except OSError as error:
        raise _unreachable("read", location, error) from error


def _unreachable(verb: str, location: Location, error: Exception) -> StudyError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return StudyError(
        f"cannot {verb} '{os.fspath(location)}': {reason}; possible are a folder you may write, file://, s3:// and "
        "gs:// (with that store's credentials in the environment)"
    )
