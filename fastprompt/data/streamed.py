"""Data sets of the Hugging Face Hub, read from it image by image, without downloading them first.

On the Hub a data set is a set of Parquet files (of most others it keeps such a copy). Their footers say where the rows
lie, in groups of some hundred. The labels are read once. An image is read with its group, and the last groups stay in
memory, so an epoch goes through the groups in random order, and through a few of them at a time in any order
(`batches.local_order`): which images come when follows from seed and epoch alone.
"""

from __future__ import annotations

import bisect
import re
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

from fastprompt.arguments import ArgumentError
from fastprompt.data.remote import RemoteFile, Seekable
from fastprompt.fetch import FetchError

CONVERTED = "refs/convert/parquet"
"""The Hub's own copy in Parquet of data sets in other formats."""
GROUPS_KEPT = 9
"""As many as are open at once in an epoch, and the next one."""
AT_ONCE = 8
"""Files whose footers and labels are read at the same time."""


def streamed_parts(name: str) -> Mapping[str, StreamedRows]:
    """Return the splits of a data set on the Hub, by their names there.

    Args:
        name: "OWNER/NAME", or "OWNER/NAME/FOLDER" for one of several configurations.

    Raises:
        ValueError: there is no such data set, it has no Parquet files, or several configurations. FetchError: the Hub
            cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    api, names, revision = huggingface_hub.HfApi(), list[str](), None
    for asked in (None, CONVERTED):
        try:
            info = api.dataset_info(repository, revision=asked)
        except (HfHubHTTPError, HFValidationError) as error:
            raise ArgumentError(
                "name", f"must be a data set of the Hub in Parquet files, got {name!r} ({error})"
            ) from error
        except Exception as error:  # huggingface_hub passes on whatever its HTTP client raises
            raise FetchError(f"cannot reach the Hub for {name}: {type(error).__name__}: {error}") from error
        names = sorted(file.rfilename for file in info.siblings or () if file.rfilename.endswith(".parquet"))
        names = [file for file in names if not folder or file.startswith(f"{folder}/")]
        revision = info.sha
        if names:
            break
    splits: dict[str, dict[str, list[str]]] = {}
    for file in names:
        path = PurePosixPath(file)
        part, place = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", path.stem), path.parent  # data/train-00000-of-00002.parquet
        if not part:  # default/train/0000.parquet
            part, place = path.parent.name, path.parent.parent
        splits.setdefault(str(place), {}).setdefault(part, []).append(file)
    if len(splits) != 1:
        found = f"configurations {sorted(splits)}: name one, {repository}/FOLDER" if splits else "no Parquet files"
        raise ArgumentError("name", f"must be a data set of the Hub with one configuration, got {name!r} with {found}")
    token = huggingface_hub.get_token()
    (parts,) = splits.values()
    return {
        part: StreamedRows(
            [huggingface_hub.hf_hub_url(repository, file, repo_type="dataset", revision=revision) for file in files],
            token,
            f"{revision}/{part}",
        )
        for part, files in parts.items()
    }


class StreamedRows:
    """The rows of a split, as far as `datasets.Dataset` has them too: `rows[i]`, `rows["column"]`, `features`.

    Attributes:
        together: for each row, the number of its group.
    """

    def __init__(self, addresses: list[str], token: str | None, fingerprint: str) -> None:
        import datasets

        self._fingerprint = fingerprint
        self._column = ""
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._opened: dict[int, Any] = {}
        with ThreadPoolExecutor(AT_ONCE) as threads:
            # an address has the commit in it, so its contents never change, whichever server sends them
            files = list(threads.map(lambda address: RemoteFile.find(address, token), addresses))
        self.files = [RemoteFile(file.address, file.size, "", token) for file in files]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            readers = list(threads.map(self._file, range(len(self.files))))
        self._groups = [(i, g) for i, reader in enumerate(readers) for g in range(reader.num_row_groups)]
        sizes = [readers[i].metadata.row_group(g).num_rows for i, g in self._groups]
        self._ends = list(accumulate(sizes))
        self.together = [number for number, size in enumerate(sizes) for _ in range(size)]
        self.features = datasets.Features.from_arrow_schema(readers[0].schema_arrow) if readers else {}

    def __len__(self) -> int:
        return len(self.together)

    def __getitem__(self, which: int | str) -> Any:
        if isinstance(which, str):
            with ThreadPoolExecutor(AT_ONCE) as threads:
                columns = threads.map(
                    lambda i: self._file(i).read(columns=[which], use_threads=False)[which], range(len(self.files))
                )
                return [value for column in columns for value in column.to_pylist()]
        number = bisect.bisect_right(self._ends, which)
        group = self._group(number)
        return {self._column: group[which - self._ends[number] + len(group)].as_py()}

    def cast_column(self, column: str, feature: Any) -> StreamedRows:
        """Choose the column of encoded images that `rows[i]` has."""
        self._column = column
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": OrderedDict(), "_opened": {}}  # a worker opens its own

    def _file(self, i: int) -> Any:
        if i not in self._opened:
            import pyarrow
            from pyarrow import parquet

            self._opened[i] = parquet.ParquetFile(pyarrow.PythonFile(Seekable(self.files[i]), mode="r"))
        return self._opened[i]

    def _group(self, number: int) -> Any:
        """Return the images of a group of rows."""
        if number not in self._kept:
            file, group = self._groups[number]
            rows = self._file(file).read_row_group(group, columns=[self._column], use_threads=False)
            self._kept[number] = rows[self._column]
            if len(self._kept) > GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]
