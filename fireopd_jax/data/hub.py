"""Data sets that the library `datasets` reads: of the hub, saved to disk, or folders of files.

    OWNER/NAME, subset, split, revision -> load_dataset   ┐
    a folder with dataset_info.json     -> load_from_disk ┴-> (number, columns) of each row

`datasets` is imported when a source needs it: that takes most of a second. No code of a data set
is run; without a connection the error comes at once.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.files import BATCH, Rows, check_size, dense_rows
from fireopd_jax.data.settings import SourceConfig

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TIMEOUT_S = 10
SAVED = ("dataset_info.json", "dataset_dict.json")


def is_hub_name(path: str) -> bool:
    """Return whether a path can only be OWNER/NAME of the hub: there is no such folder here."""
    return NAME.fullmatch(path) is not None and not Path(path).parent.is_dir()


def read_dataset(path: str, source: SourceConfig) -> tuple[str, Rows]:
    """Return the name for origins, and the rows, of a folder or of a data set of the hub.

    Raises UserError without a connection, and for an unknown name, subset or split.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and source.revision is not None:
        raise UserError(f"data.revision={source.revision!r}: {path!r} is a folder of this machine")
    if not folder.is_dir():
        _check_reachable(path, source)
        data, split = _load(path, source)
    elif any((folder / name).is_file() for name in SAVED):
        data, split = _saved(path, str(folder), source)
    else:
        data, split = _load(str(folder), source)
    name = path if split is None else f"{path}[{split}]"
    if not len(data):
        raise UserError(f"{name}: the data set holds no rows")
    return name, _rows(name, data)


def _rows(name: str, data: Any) -> Rows:
    batches = data.with_format("arrow").iter(batch_size=BATCH)
    for number, record in enumerate(dense_rows(batches), start=1):
        check_size(record, f"{name}:{number}")
        yield number, record


def _saved(path: str, folder: str, source: SourceConfig) -> tuple[Any, str | None]:
    """Return what `save_to_disk` wrote, and the chosen split if there are several."""
    import datasets

    data = _asked(path, lambda: datasets.load_from_disk(folder))
    if not isinstance(data, datasets.DatasetDict):
        if source.split is not None:
            raise UserError(f"data.split={source.split!r}: {path} is a single data set")
        return data, None
    split = _chosen(path, source.split, list(map(str, data)))
    if split not in data:
        raise UserError(_unknown_split(path, split, list(map(str, data))))
    return data[split], split


def _load(path: str, source: SourceConfig) -> tuple[Any, str]:
    """Return one split of a data set of the hub, or of a folder of files, and the split's name."""
    import datasets

    revision = source.revision
    split = source.split
    if split is None or "[" not in split:  # train[:100] is left to `datasets`
        names = _asked(
            path,
            lambda: datasets.get_dataset_split_names(path, source.subset, revision=revision),
        )
        split = _chosen(path, split, names)
        for name in split.split("+"):
            if name not in names:
                raise UserError(_unknown_split(path, name, names))
    data = _asked(
        path,
        lambda: datasets.load_dataset(path, source.subset, split=split, revision=revision),
    )
    return data, split


def _chosen(path: str, wanted: str | None, names: Sequence[str]) -> str:
    """Return the wanted split, `train`, or the only one; raise UserError if none is obvious."""
    if wanted is not None:
        return wanted
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    raise UserError(f"data.split: {path} has the splits {', '.join(names)}; name one of them")


def _unknown_split(path: str, name: str, names: Sequence[str]) -> str:
    return f"data.split: {path} has no {name!r}{nearest(name, names)}; it has {', '.join(names)}"


def _asked(path: str, question: Callable[[], T]) -> T:
    """Return the answer of `datasets`; raise UserError with its reason in one line."""
    try:
        return question()
    except UserError:
        raise
    except Exception as error:  # Its own errors, those of pyarrow, pandas and the hub's client.
        reason = " ".join(str(error).split()) or type(error).__name__
        listed = re.search(r"available configs: \[(.*?)\]", reason)
        if listed is None:
            listed = re.search(r"Available: \[(.*?)\]", reason)
        if listed is not None:
            names = listed[1].replace("'", "")
            raise UserError(f"data.subset: {path} has the subsets {names}; name one") from error
        if isinstance(error, ConnectionError):
            raise UserError(_unreachable(path, "it is not in the cache")) from error
        raise UserError(f"data.path: {path}: `datasets` cannot read it: {reason[:300]}") from error


def _check_reachable(name: str, source: SourceConfig) -> None:
    """Raise UserError at once if the hub does not answer or lacks the data set.

    `datasets` itself would try for half a minute. With HF_HUB_OFFLINE it reads its cache.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, revision=source.revision, timeout=TIMEOUT_S)
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path: {name!r} is no file here, and the hub does not offer it (misspelt, gated "
            f"or private?): {reason}"
        ) from error
    except Exception as error:  # Those of three network libraries.
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(_unreachable(name, reason)) from error


def _unreachable(name: str, reason: str) -> str:
    remedy = (
        "give a file or a folder"
        if os.environ.get("HF_HUB_OFFLINE")
        else "set HF_HUB_OFFLINE=1 to use the cache, or give a file or a folder"
    )
    return (
        f"data.path: {name!r} is no file here, and the Hugging Face hub cannot be reached "
        f"({reason}); {remedy}"
    )
