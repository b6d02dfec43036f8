"""Paths on whatever fsspec reaches, object stores included, with those methods of ``pathlib.Path`` that a store needs.

All errors are FileNotFoundError or UnreachableError, naming the URL. No listing comes from a cache: another process
writes there.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


class LocationError(ValueError):
    """A URL that nothing here can reach; the message says what to install or to write instead."""


class UnreachableError(OSError):
    """A remote store did not do what was asked: nothing follows for the bytes that it holds, or does not hold."""


@dataclass(frozen=True)
class Stat:
    st_size: int


@contextlib.contextmanager
def _naming(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from error
    except OSError as error:
        number = error.errno or errno.EIO
        raise UnreachableError(number, error.strerror or str(error) or type(error).__name__, url) from error
    except Exception as error:
        raise UnreachableError(errno.EIO, f"{type(error).__name__}: {error}", url) from error


@lru_cache(maxsize=16)
def _opened(root: str) -> tuple[Any, str]:
    """The file system of a URL, and what it calls the place. Some connect at once. Errors are not cached."""
    import fsspec

    with _naming(root):
        fs, path = fsspec.url_to_fs(root)
    return fs, path.rstrip("/")


@dataclass(frozen=True, order=True)
class RemotePath:
    """The URL ``root`` as the user wrote it, and what lies ``inside`` it ("" for itself)."""

    root: str
    inside: str = ""

    @classmethod
    def parse(cls, url: str) -> RemotePath:
        """Reaches nothing yet. Raises LocationError for an unknown protocol or a missing package."""
        from fsspec import get_filesystem_class

        if url.startswith(":"):
            raise LocationError(f"{url}: no protocol before the colon; write e.g. s3://BUCKET/FOLDER, or a folder")
        for link in url.split("::"):
            try:
                get_filesystem_class(link.partition("://")[0])
            except ImportError as error:
                raise LocationError(f"{url}: {error}; install that package, or choose another place") from error
            except ValueError as error:
                raise LocationError(f"{url}: {error}; write e.g. s3://BUCKET/FOLDER, or a local folder") from error
        return cls(url.rstrip("/"))

    @property
    def fs(self) -> Any:
        return _opened(self.root)[0]

    @property
    def path(self) -> str:
        """As the file system calls it."""
        return "/".join(filter(None, (_opened(self.root)[1], self.inside)))

    def __str__(self) -> str:
        return "/".join(filter(None, (self.root, self.inside)))

    @property
    def url(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.root, "/".join(filter(None, (self.inside, name))))

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        """Of a path inside the root."""
        assert self.inside
        return RemotePath(self.root, "/".join([*self.inside.split("/")[:-1], name]))

    def _info(self) -> dict[str, Any]:
        with _naming(self.url):
            self.fs.invalidate_cache()
            return dict(self.fs.info(self.path))

    def exists(self) -> bool:
        """Unlike fsspec's own, which takes every error for a no. Raises UnreachableError."""
        try:
            self._info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        try:
            return bool(self._info()["type"] == "directory")
        except FileNotFoundError:
            return False

    def stat(self) -> Stat:
        return Stat(int(self._info()["size"]))

    def iterdir(self) -> Iterator[RemotePath]:
        with _naming(self.url):
            self.fs.invalidate_cache()
            names = {path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False)}
        # Some stores list an empty object that stands for the folder itself.
        return iter([self / name for name in sorted(names - {"", self.name})])

    def read_bytes(self) -> bytes:
        with _naming(self.url):
            return bytes(self.fs.cat_file(self.path))

    def write_bytes(self, data: bytes) -> None:
        """One put: on an object store it is there whole or not at all."""
        with _naming(self.url):
            self.fs.pipe_file(self.path, data)

    def copy_to(self, target: RemotePath) -> None:
        with _naming(self.url):
            self.fs.cp_file(self.path, target.path)

    def mkdir(self) -> None:
        with _naming(self.url):
            self.fs.makedirs(self.path, exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _naming(self.url):
                self.fs.rm_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        with contextlib.suppress(FileNotFoundError), _naming(self.url):
            self.fs.invalidate_cache()
            self.fs.rm(self.path, recursive=True)

    def open(self, mode: str = "rb", buffering: int = -1) -> RemoteFile:
        with _naming(self.url):
            self.fs.invalidate_cache()
            return RemoteFile(self.fs.open(self.path, mode), self.url)


class RemoteFile(io.RawIOBase):
    """A file of a remote path. What was written is there once it is closed."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return bool(self._file.readable())

    def writable(self) -> bool:
        return bool(self._file.writable())

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with _naming(self._url):
            return int(self._file.readinto(buffer))

    def write(self, data: Any) -> int:
        with _naming(self._url):
            self._file.write(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _naming(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if self.closed:
            return
        try:
            with _naming(self._url):
                self._file.close()
        finally:
            super().close()
