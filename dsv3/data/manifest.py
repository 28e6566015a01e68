"""The manifest of a prepared folder: which shards it has, of which sources, by which tokenizer, and their digests.

    prepared/manifest.json                    written last: where it is, the folder is whole
    prepared/<split>/<source>/00000.*.npy     shards, see `shards.py`

The manifest ends with a digest of itself, which is the identity of the data: a run that goes on compares one number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data.tokenizer import SpecialIds

FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("tokens.npy", "starts.npy", "bytes.npy", "hashes.npy")
FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KEYS = {"tokenizer": str, "vocab_size": int, "special": dict, "settings": dict, "sources": dict, "splits": dict}
_COUNTS = ("tokens", "documents", "bytes")


class Manifest(NamedTuple):
    """What a prepared folder holds.

    Attributes:
      tokenizer: fingerprint of the tokenizer, see `tokenizer_fingerprint`.
      vocab_size: ids are below it.
      special: ids of bos, eos and pad.
      settings: what decided the content, as JSON.
      sources: by source a mapping with its licence, path, counts and what was dropped; not looked at here.
      splits: by split and source the list of shards' entries, as `write_shard` returns them.
    """

    tokenizer: str
    vocab_size: int
    special: SpecialIds
    settings: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]
    splits: Mapping[str, Mapping[str, list[dict[str, Any]]]]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Names a tokenizer by all that decides its ids.

    Args:
      tokenizer: the tokenizer.

    Returns:
      32 hexadecimal digits: BLAKE2b of `tokenizer.to_str()`.
    """
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


def manifest_digest(manifest: Manifest) -> str:
    """Names the data of a prepared folder: two folders with one digest give the same tokens.

    Args:
      manifest: the manifest.

    Returns:
      32 hexadecimal digits: BLAKE2b of the manifest as JSON with sorted keys.
    """
    text = json.dumps(_as_json(manifest), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Writes `manifest.json`, the last file of a prepared folder, when all shards that it names are there.

    Args:
      folder: the prepared folder.
      manifest: what it holds.

    Raises:
      ValueError: there is a manifest already; a name that is no folder's name; an entry's counts do not agree; a shard's
        file has another size.
      FileNotFoundError, OSError: a shard's file is missing; the manifest cannot be written.
    """
    root = Path(folder)
    taken = f"write_manifest: {str(root)!r} has a {MANIFEST}, want a folder without one: it would be overwritten"
    check(not (root / MANIFEST).exists(), taken)
    content = _as_json(manifest)
    _check_content("write_manifest", root, content)
    check_sizes("write_manifest", root, manifest)
    text = json.dumps({**content, "digest": manifest_digest(manifest)}, ensure_ascii=False, indent=1)
    write_files("write_manifest", root, {MANIFEST: [text.encode(), b"\n"]})


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Reads and checks the manifest of a prepared folder.

    Args:
      folder: the prepared folder.

    Returns:
      The manifest.

    Raises:
      FileNotFoundError: no manifest: no prepared folder, or one whose preparation has not ended.
      ValueError: not JSON, another format, changed after it was written, or counts that do not agree.
    """
    root = Path(folder)
    try:
        data = (root / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        reason = "want a prepared folder whose preparation has ended"
        raise FileNotFoundError(f"read_manifest: {str(root)!r} has no {MANIFEST}, {reason}") from None
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"read_manifest: {str(root / MANIFEST)!r} is not JSON ({error})") from None
    where = f"read_manifest: {str(root / MANIFEST)!r}"
    known = isinstance(content, dict) and content.get("format")
    check(known == FORMAT, f"{where} has format {known!r}, want {FORMAT}")
    _check_content("read_manifest", root, content)
    special = SpecialIds(**content["special"])
    manifest = Manifest(**{key: content[key] for key in _KEYS if key != "special"}, special=special)
    got, want = manifest_digest(manifest), content.get("digest")
    check(got == want, f"{where} has digest {got}, want {want}: it was changed after it was written")
    return manifest


def check_sizes(function: str, root: Path, manifest: Manifest, splits: tuple[str, ...] | None = None) -> None:
    """Raises unless every file that the manifest names is there with its size; `splits`: of these only."""
    for split in manifest.splits if splits is None else splits:
        for source, entries in manifest.splits[split].items():
            for entry in entries:
                for kind, file in entry["files"].items():
                    path = root / split / source / f"{entry['name']}.{kind}"
                    _check_size(function, path, source, file["bytes"])


def write_files(function: str, folder: Path, files: Mapping[str, list[Any]]) -> None:
    """Writes files whole or not at all: beside under hidden names, to the disk, and then renamed together.

    Args:
      function: that writes, for messages. folder: where; made if it is not there.
      files: name → pieces of its content, bytes or contiguous arrays.

    Raises:
      OSError: the disk is full, or the folder cannot be written; no hidden file is left.
    """
    parts = {name: folder / f".{name}.part" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pieces in files.items():
            with parts[name].open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        for name, part in parts.items():
            os.replace(part, folder / name)
        _sync_folder(folder)
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise OSError(error.errno, f"{function}: cannot write to {str(folder)!r} ({reason})") from None
    finally:
        for part in parts.values():
            try:
                part.unlink(missing_ok=True)
            except OSError:  # the folder is no folder
                pass


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {"format": FORMAT, **manifest._asdict(), "special": manifest.special._asdict()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_size(function: str, path: Path, source: str, want: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{function}: {str(path)!r} of source {source!r} is missing") from None
    check(size == want, f"{function}: {str(path)!r} of source {source!r} has {size} bytes, want {want}")


def _check_content(function: str, root: Path, content: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless a manifest has its parts, in the right types, and counts that agree."""
    where = f"{function}: {str(root / MANIFEST)!r}"
    for key, kind in _KEYS.items():
        got = content.get(key)
        check(isinstance(got, kind), f"{where} has {key} {got!r:.60}, want {kind.__name__}")
    ids = content["special"]
    known = set(ids) == set(SpecialIds._fields) and all(isinstance(i, int) for i in ids.values())
    check(known, f"{where} has special {ids!r:.60}, want ids of bos, eos and pad")
    for split, sources in content["splits"].items():
        check(isinstance(sources, Mapping), f"{where}: split {split!r} is {sources!r:.60}, want sources by name")
        for source, entries in sources.items():
            for name in (split, source):
                check(bool(FOLDER_NAME.fullmatch(name)), f"{where}: {name!r} is no name for a folder (letters, digits, _.-)")
            for entry in entries:
                fault = _entry_fault(entry)
                check(not fault, f"{where}: a shard of {split}/{source} {fault}")


def _entry_fault(entry: Any) -> str:
    """What is wrong with a shard's entry; empty: nothing."""
    try:
        counts = [entry[name] for name in _COUNTS]
        sums = [sum(window[name] for window in entry["windows"]) for name in _COUNTS[:2]]
        files = {kind: (file["bytes"], file["digest"]) for kind, file in entry["files"].items()}
        digests = [window["digest"] for window in entry["windows"]]
        name = entry["name"]
    except (KeyError, TypeError, AttributeError) as error:
        return f"is {str(entry)[:60]!r}, without {error}"
    if not (isinstance(name, str) and name.isdigit() and set(files) == set(FILES) and all(digests)):
        return f"is named {name!r} with files {', '.join(files)}, want digits and {', '.join(FILES)}"
    if not all(isinstance(n, int) and n >= 0 for n in counts) or sums != counts[:2]:
        got = f"{sums[0]} tokens in {sums[1]} documents in its windows"
        return f"({name}) has {got}, want {counts[0]} in {counts[1]}"
    return ""
