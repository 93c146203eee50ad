"""Files that are there whole or not at all: texts, checkpoints, locks."""

import contextlib
import dataclasses
import hashlib
import inspect
import os
import secrets
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import torch

from kit.errors import UserError
from kit.flags import BaseConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # small trained weights, made by docs/pack.py; an OUT


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when it is whole; what was there before stays till then."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")  # libraries go by the suffix
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)  # a full disk's does not say which file
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, "utf-8")  # on Windows it would be something else


LOCKS: dict[Path, typing.IO] = {}  # of this process; the system releases them when it ends, however it ends


def lock(folder: Path) -> None:
    """Keeps other processes out of a folder. Raises UserError when one is in it. (Not on Windows.)"""
    path = folder.resolve() / "lock"
    if fcntl is None or path in LOCKS:
        return
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run; wait for it, or choose another --out") from None
    except OSError:
        return  # some network file systems have no locks
    LOCKS[path] = file


def fingerprint(path: Path) -> str:
    """Of a file's or folder's content, cheaply: names inside, sizes, and three samples of the bytes of each."""
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        size = file.stat().st_size
        digest.update(repr((file.relative_to(path).as_posix(), size)).encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - 2**16)):
                opened.seek(start)
                digest.update(opened.read(2**16))
    return digest.hexdigest()[:16]


def my_part(folder: Path, name: str = "") -> Path:
    """A file in the making that no other process has. (Python's tempfile would close what comes of it to all others
    but its owner, colleagues on a cluster among them.)"""
    return folder / f"{name}{secrets.token_hex(8)}.part"


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes tensors and primitives to a temporary file beside `path` and renames it: never half a checkpoint."""
    part = my_part(path.parent, f"{path.name}-")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; the one saved before is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path, made_by: str) -> dict:
    """Reads a checkpoint onto the CPU. `made_by` is the command that makes it, for the error when it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds of exception for a broken file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); make it anew with: {made_by}") from None
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(f"{path} is not a checkpoint of this project; make it anew with: {made_by}")
    return content


def config_of(config_class: type, content: dict):
    """The configuration a checkpoint was trained with (torch.save keeps tuples; json would not).

    Raises UserError for settings that this version of the script does not have: they may have shaped the weights.
    """
    unknown = content["config"].keys() - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        lesson = Path(inspect.getfile(config_class)).stem
        names = ", ".join(sorted(unknown))
        raise UserError(f"the checkpoint of {lesson} was made by another version of it, with {names} among its "
                        f"settings; make it anew with {lesson}.py --overwrite")
    return config_class(**content["config"])


def command(script: str, config: BaseConfig, *flags: str) -> str:
    """The command line that makes a predecessor's checkpoint in the same OUT, to be pasted."""
    parts = ["python", f"{script}.py", "--preset", config.preset]
    parts += ["--data", config.data] if config.data != "driving" else []
    parts += ["--final-fps", f"{config.final_fps:g}"] if config.final_fps != 30 else []
    parts += ["--out", config.out] if config.out else []
    return shlex.join([*parts, *flags])


def check_lineage(content: dict, lineage: dict) -> None:
    """A checkpoint trained on other data, another size or another autoencoder than its neighbours is a UserError.

    content: as Run.trained gives it.
    """
    theirs = content.get("lineage", {})
    for name, value in lineage.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{content['path']} was trained with {name} {theirs.get(name)}, this run has {value}; "
                f"make it anew with: {content['remedy']} --overwrite"
            )
