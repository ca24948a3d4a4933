"""The version of this package, which pyproject.toml alone states."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("gsda-fast")
except PackageNotFoundError:  # a checkout that was put on the path
    VERSION = "0+unknown"
