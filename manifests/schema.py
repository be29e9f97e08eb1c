"""The five manifests, column by column.

Every column's meaning stands here once, as Arrow field metadata; `docs/manifests.md` is
generated from it. Columns may be added; those here keep name and meaning. A manifest file
carries, as key-value metadata, what it is (`stage`, `schema_version`), who wrote it
(`tool_version`, `created_at`) and what it was made from (`fingerprint`).
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

#: Raised when a column changes its meaning. A reader refuses files with a larger number.
SCHEMA_VERSION = 1


def _column(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, kind, metadata={"doc": doc})


@dataclass(frozen=True)
class Manifest:
    """One kind of manifest: its name, the stage that writes it, its columns and key columns."""

    name: str
    stage: str
    doc: str
    schema: pa.Schema
    key: tuple[str, ...]

    def empty(self) -> pa.Table:
        """A table with this manifest's columns and no row."""
        return self.schema.empty_table()


FILES = Manifest(
    "files",
    "discover",
    "A log of what reading each file found. A file is opened again only when its size or "
    "modification time changes.",
    pa.schema(
        [
            _column("dataset", pa.string(), "`id` of the dataset; of masks with `:mask` behind it"),
            _column("path", pa.string(), "path from the root of dataset or masks, with `/`"),
            _column("size", pa.int64(), "bytes"),
            _column("mtime_ns", pa.int64(), "modification time, nanoseconds since 1970"),
            _column("read_at_ns", pa.int64(), "when the file was read, nanoseconds since 1970"),
            _column("content_hash", pa.string(), "BLAKE3 of the bytes, first 128 bits, hex"),
            _column("format", pa.string(), "Pillow's name of the format, such as `JPEG`"),
            _column("width", pa.int32(), "pixels, after EXIF orientation"),
            _column("height", pa.int32(), "pixels, after EXIF orientation"),
            _column("mode", pa.string(), "Pillow's pixel mode, such as `RGB` or `CMYK`"),
            _column("frames", pa.int32(), "number of frames; more than 1 is an animation"),
            _column("status", pa.string(), "`ok` or `rejected`"),
            _column("reason", pa.string(), "why it was rejected; null when ok"),
        ]
    ),
    ("dataset", "path", "size", "mtime_ns"),
)

IMAGES = Manifest(
    "images",
    "discover",
    "A snapshot: one row per file that the last walk found.",
    pa.schema(
        [
            _column("dataset", pa.string(), "`id` of the dataset"),
            _column("path", pa.string(), "path from the dataset's root, with `/`"),
            _column("size", pa.int64(), "bytes"),
            _column("mtime_ns", pa.int64(), "modification time, nanoseconds since 1970"),
            _column("content_hash", pa.string(), "BLAKE3 of the bytes, first 128 bits, hex"),
            _column("format", pa.string(), "Pillow's name of the format"),
            _column("width", pa.int32(), "pixels, after EXIF orientation"),
            _column("height", pa.int32(), "pixels, after EXIF orientation"),
            _column("mode", pa.string(), "Pillow's pixel mode"),
            _column("frames", pa.int32(), "number of frames"),
            _column("captions", pa.list_(pa.string()), "the captions, in order; one is enough"),
            _column("caption_path", pa.string(), "file the captions came from; null for names"),
            _column("caption_size", pa.int64(), "bytes of that file"),
            _column("caption_mtime_ns", pa.int64(), "modification time of that file"),
            _column("mask_path", pa.string(), "file of the loss mask, from the folder `mask`"),
            _column("mask_size", pa.int64(), "bytes of that file"),
            _column("mask_mtime_ns", pa.int64(), "modification time of that file"),
            _column("mask_hash", pa.string(), "BLAKE3 of its bytes; of the image's, for alpha"),
            _column("status", pa.string(), "`ok` or `rejected`"),
            _column("reason", pa.string(), "why it was rejected; null when ok"),
        ]
    ),
    ("dataset", "path"),
)

SAMPLES = Manifest(
    "samples",
    "bucket",
    "A snapshot: one row per image and crop, used or not, with its geometry and keys.",
    pa.schema(
        [
            _column("sample_id", pa.string(), "key of the sample; names it in training"),
            _column("dataset", pa.string(), "`id` of the dataset"),
            _column("split", pa.string(), "`train`, `eval` or `regularisation`"),
            _column("path", pa.string(), "path from the dataset's root, with `/`"),
            _column("content_hash", pa.string(), "BLAKE3 of the image's bytes"),
            _column("width", pa.int32(), "pixels of the image, after EXIF orientation"),
            _column("height", pa.int32(), "pixels of the image, after EXIF orientation"),
            _column("crop_index", pa.int32(), "0, 1, … where several crops per image are asked"),
            _column("bucket", pa.string(), "target size, `WIDTHxHEIGHT` in pixels"),
            _column("resize_width", pa.int32(), "pixels after the resize, before the crop"),
            _column("resize_height", pa.int32(), "pixels after the resize, before the crop"),
            _column("crop_left", pa.int32(), "pixels from the left of the resized image"),
            _column("crop_top", pa.int32(), "pixels from the top of the resized image"),
            _column("pixels_key", pa.string(), "key of the pixels that the VAE gets"),
            _column("captions", pa.list_(pa.string()), "the captions, in order"),
            _column("prompt_keys", pa.list_(pa.string()), "key of each caption's prompt"),
            _column("mask_path", pa.string(), "file of the loss mask, from the folder `mask`"),
            _column("mask_hash", pa.string(), "BLAKE3 of its bytes; of the image's, for alpha"),
            _column("mask_key", pa.string(), "key of the loss mask in this geometry, or null"),
            _column("repeats", pa.int32(), "extra times per epoch: seen `repeats` + 1 times"),
            _column("status", pa.string(), "`ok`, `filtered` (by an option) or `rejected`"),
            _column("reason", pa.string(), "why it is not used; null when ok"),
        ]
    ),
    ("sample_id",),
)

LATENTS = Manifest(
    "latents",
    "encode-vae",
    "A log: one row per encoded latent, or per failure. One fragment per shard, same name. Loss "
    "masks at the latents' resolution stand in it too, under the vae_key of masks.",
    pa.schema(
        [
            _column("pixels_key", pa.string(), "key of the pixels; of a mask its mask_key"),
            _column("vae_key", pa.string(), "key of the VAE and how it was run; one for all masks"),
            _column("content_hash", pa.string(), "BLAKE3 of the file's bytes; null if unknown"),
            _column("bucket", pa.string(), "`WIDTHxHEIGHT` in pixels"),
            _column("shard", pa.string(), "the tar, from the workspace; null when failed"),
            _column("offset", pa.int64(), "bytes from the tar's start to the raw array"),
            _column("nbytes", pa.int64(), "bytes of the raw array"),
            _column("checksum", pa.uint64(), "XXH3-64 of the raw array"),
            _column(
                "shape", pa.list_(pa.int32()), "`[8, H/8, W/8]`: mean, log-variance; or a mask, 1"
            ),
            _column("dtype", pa.string(), "`float16` or `float32`, little-endian"),
            _column("shard_nbytes", pa.int64(), "bytes of the whole tar"),
            _column("shard_checksum", pa.uint64(), "XXH3-64 of the whole tar"),
            _column("written_at_ns", pa.int64(), "when, nanoseconds since 1970"),
            _column("status", pa.string(), "`ok`, `failed` or `damaged`"),
            _column("reason", pa.string(), "why it failed; null when ok"),
        ]
    ),
    ("pixels_key", "vae_key"),
)

PROMPTS = Manifest(
    "prompts",
    "tokenize",
    "A log: one row per prompt and tokenizer.",
    pa.schema(
        [
            _column("prompt_key", pa.string(), "key of caption text and template"),
            _column("tokenizer_key", pa.string(), "key of the tokenizer"),
            _column("text", pa.string(), "the caption, before the template"),
            _column("input_ids", pa.list_(pa.int32()), "token ids of the whole prompt"),
            _column("length", pa.int32(), "number of ids"),
            _column("written_at_ns", pa.int64(), "when, nanoseconds since 1970"),
            _column("status", pa.string(), "`ok` or `failed`"),
            _column("reason", pa.string(), "why it failed; null when ok"),
        ]
    ),
    ("prompt_key", "tokenizer_key"),
)

MANIFESTS = (FILES, IMAGES, SAMPLES, LATENTS, PROMPTS)
