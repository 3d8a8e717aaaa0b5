"""For setuptools, named in pyproject.toml: the source archive has all that the tests need, not test_*.py alone."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.sdist import sdist


class SourceArchive(sdist):
    """The command `sdist` with every Python file of this folder."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add what setuptools has not found by itself."""
        super().make_release_tree(base_dir, sorted({*files, *map(str, Path("tests").glob("*.py"))}))
