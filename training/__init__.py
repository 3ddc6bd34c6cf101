"""Fine-tuning recipes that end in a classifiers/ folder."""
