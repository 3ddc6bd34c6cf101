"""TorchServe handlers for image classifiers that also say why."""
