"""The experiments: one short file each."""
