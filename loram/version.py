"""The version, where setuptools, the manifests and `loram --version` read it."""

__version__ = "0.1.0"
