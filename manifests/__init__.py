"""The ground floor: schemas, keys, atomic publishing, snapshots, logs and queries.

Knows Parquet, Arrow and DuckDB, and nothing of images, models or torch.
"""
