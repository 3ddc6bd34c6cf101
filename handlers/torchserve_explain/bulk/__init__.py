"""Millions of images explained on Ray Data: read from a folder, S3 or Parquet, written as Parquet."""
