"""Triton looks for a class of this name here; it lives in the package."""

from nvila.vision.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
