"""TorchServe handlers for image classifiers that also say why."""

__version__ = "0.2.0"
