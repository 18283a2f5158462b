"""The work folder as other machines see it: workers of a cluster make sure that it is the driver's."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_b2 import __version__
from megatron_b2.corpus.pipeline.checked import manifest_path
from megatron_b2.errors import LaunchError
from megatron_b2.files.atomic import atomic_file

IDENTITY = ".identity"


@dataclass(frozen=True)
class Site:
    """Where the driver works, to be compared with what a worker finds. Picklable."""

    host: str
    work: Path
    """Absolute."""
    identity: str
    """What the file WORK/.identity says; random, so that another folder of the same name has another."""
    directory: Path
    """The driver's current folder; relative paths of settings start there."""
    version: str
    """Of this package."""

    @classmethod
    def of(cls, work: Path) -> Self:
        """The site of this process, for one driver at a time."""
        path = work / IDENTITY
        if not path.exists():
            with atomic_file(path) as file:
                file.write(uuid.uuid4().hex.encode())
        return cls(socket.gethostname(), work.absolute(), path.read_text(), Path.cwd(), __version__)

    def enter(self, inputs: Iterable[Path] = ()) -> None:
        """Make this process one that works for the driver, in its folder.

        Args:
            inputs: files of the work folder that are about to be read.

        Raises:
            LaunchError: the work folder or the current folder is not here, or this package is another.
        """
        here = socket.gethostname()
        if self.version != __version__:
            raise LaunchError(
                f"node {here} has megatron_b2 {__version__}, the driver on {self.host} {self.version}; "
                "install one version on all nodes"
            )
        try:
            same = (self.work / IDENTITY).read_text() == self.identity
        except OSError:
            same = False
        if not same:
            raise LaunchError(
                f"node {here} does not see the work folder {self.work} of the driver on {self.host}; put "
                "`work` on a file system that every node mounts under the same path (NFS, Lustre, ...)"
            )
        try:
            os.chdir(self.directory)
        except OSError as error:
            raise LaunchError(
                f"node {here} cannot go to {self.directory}, where the run was started and relative paths "
                f"begin ({error.strerror}); start the run in a folder that every node mounts"
            ) from error
        look_again(inputs)


def look_again(paths: Iterable[Path]) -> None:
    """See files that other machines have just written.

    NFS may go on to say for a minute that a name does not exist, if it did not when it was asked for last;
    to list the folder makes it ask the server.
    """
    missing = [path for path in paths if not (path.exists() and manifest_path(path).exists())]
    for folder in {path.parent for path in missing}:
        if folder.is_dir():
            os.listdir(folder)
