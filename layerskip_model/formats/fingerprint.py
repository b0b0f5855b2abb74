"""Which model exactly: a hash over a checkpoint's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file

from layerskip_model.errors import UserError

# The first pattern that matches anything: some repositories have their weights twice.
WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
BLOCK = 1 << 24


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's weight files. Reads all of them: about a second a gigabyte.

    Raises UserError where there are none.
    """
    files = next((found for pattern in WEIGHTS if (found := sorted(checkpoint.glob(pattern)))), [])
    if not files:
        raise UserError(f"model '{checkpoint}': there are no weights in it; download or save them first")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def checkpoint_directory(name_or_path: str) -> Path:
    """Where a checkpoint that was loaded by this name lies. Raises UserError where it does not."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    try:
        found = cached_file(name_or_path, CONFIG_NAME, local_files_only=True)
    except OSError:
        found = None
    if found is None:
        raise UserError(f"model '{name_or_path}' is neither a directory nor in the local cache of the hub")
    return Path(found).parent
