"""Rows of Parquet files and of data sets of the `datasets` library, as plain records."""

from collections.abc import Iterator
from pathlib import Path

from ..config.data import DatasetSource
from .errors import DataError

BATCH = 1024
"""Rows read at once."""


def parquet_records(path: str, limit: int | None) -> Iterator[dict[str, object]]:
    """The rows of a Parquet file, in order, read as they are asked for. DataError where it cannot be read."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"the data file {path!r} does not exist (looked in {Path.cwd()})")
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path!r} is a Parquet file, and pyarrow is not installed: pip install 'megatron-urlvr[data]'"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=min(BATCH, limit or BATCH)):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path!r} cannot be read as Parquet: {error}") from error


def dataset_records(source: DatasetSource) -> Iterator[dict[str, object]]:
    """The rows of a data set's split, in order. DataError where there is no such data set or split."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"dataset = {source.dataset!r} needs the datasets library: pip install 'megatron-urlvr[data]'"
        ) from error
    folder = Path(source.dataset).expanduser()
    try:
        if folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                if source.split not in found:
                    raise DataError(
                        f"{source.dataset!r} has no split {source.split!r}; it has {', '.join(map(str, found))}"
                    )
                found = found[source.split]
        else:
            found = datasets.load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever the data set, the hub or the network make of it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data set {source.dataset!r} (split {source.split!r}) cannot be loaded: {first}"
        ) from error
    for row in found:
        yield dict(row)
