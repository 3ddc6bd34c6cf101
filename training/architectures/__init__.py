"""Networks that neither torchvision nor timm has; a file of them travels with the classifier as its model.py."""
