"""Which project each file below a directory belongs to: a git working tree, or else the directory itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from codeparrot_ds.corpus.git import GIT, enclosing_root, read_checkout
from codeparrot_ds.corpus.licences import find_licence
from codeparrot_ds.system.inputs_record import Files
from codeparrot_ds.system.paths import printable_name, text_of


@dataclass(frozen=True)
class Project:
    """The provenance that the files of a project share.

    Attributes:
        repository: name of the repository, of the package or of the directory.
        licence: "" if unknown.
        commit: in hex; "" if unknown.
    """

    repository: str
    licence: str = ""
    commit: str = ""


class Projects:
    """The projects of the files below a directory.

    Attributes:
        root: the directory.
    """

    def __init__(self, root: Path, only: Project | None = None) -> None:
        """`root` is an absolute path; `only` is the project of all files below it, if that is known."""
        self.root = root
        self._only = only
        above = None if only else enclosing_root(root)
        # Directory of a project, relative to `root` ("" for `root` and for what is above it), -> its root.
        self._roots = {"": above or root}
        self._read: dict[Path, Project] = {}

    def add(self, names: Iterable[str]) -> None:
        """Make a project of each directory that contains `.git`. `names` are paths relative to the root."""
        if self._only is None:
            paths = [PurePosixPath(name) for name in names]
            below = [path.parent.as_posix() for path in paths if path.name == GIT and len(path.parts) > 1]
            self._roots |= {directory: self.root / directory for directory in below}

    def of(self, name: str) -> tuple[Project, str]:
        """The project of a file or directory, and its path in the project; `name` is its path relative to the root.

        Raises ConfigError if there is a licence to identify and the extra `corpus` is not installed.
        """
        if self._only is not None:
            return self._only, name
        directory = name
        while directory not in self._roots:
            directory = directory.rpartition("/")[0]
        root = self._roots[directory]
        if root not in self._read:
            checkout = read_checkout(root)
            names = (checkout.repository, find_licence(root), checkout.commit)
            self._read[root] = Project(*(printable_name(text_of(name)) for name in names))
        return self._read[root], (self.root / name).relative_to(root).as_posix()

    def versions(self) -> Files:
        """What was read of the projects, to notice later that it has changed."""
        return {
            printable_name(text_of(f"{root} (repository, commit, licence)")): (
                0,
                f"{project.repository} {project.commit} {project.licence}",
            )
            for root, project in self._read.items()
            if project.commit or project.licence
        }
