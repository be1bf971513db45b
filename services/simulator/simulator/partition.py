"""How one data set is dealt out to many simulated clients: pure functions of labels and a seed.

A division is one array of places, sorted by client, and the bounds of each client in it, so that a hundred thousand clients
cost a few megabytes. Every client gets at least one example.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fl_client.partition import MAX_ALPHA, apportion
from medhive.errors import InvalidInput, NotFound

MAX_CLIENTS = 100_000
MAX_SHARDS = 1000  # a client; more is IID in all but name
SITES = "sites"
COLUMNS = 2  # of a partition file: example, client

Places = npt.NDArray[np.int64]


class WrongPartition(InvalidInput):
    """The partition is none, or cannot be made of these data."""

    code = "wrong-partition"


@dataclass(frozen=True)
class Partition:
    """How to divide.

    kind: `iid` deals evenly; `dirichlet` draws each class's shares over the clients (`value` is alpha; Hsu et al. 2019,
    arXiv:1909.06335); `shards` sorts by class, cuts, and deals `value` shards to each client (McMahan et al. 2017,
    arXiv:1602.05629); `sites` takes what lies in each folder or file; `file` reads who has what from `path`.
    """

    kind: Literal["iid", "dirichlet", "shards", "sites", "file"]
    value: float = 0.0
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """`iid`, `dirichlet:0.5`, `shards:2`, `sites`, or the path of a CSV file.

        Raises:
            WrongPartition: it is none of these.
        """
        name, _, value = text.partition(":")
        try:
            if text in ("iid", SITES):
                return cls("iid" if text == "iid" else "sites")
            if name == "dirichlet" and 0 < float(value) <= MAX_ALPHA:
                return cls("dirichlet", float(value))
            if name == "shards" and 0 < int(value) <= MAX_SHARDS:
                return cls("shards", int(value))
        except ValueError:
            pass
        if name not in ("dirichlet", "shards") and Path(text).is_file():
            return cls("file", path=Path(text))
        raise WrongPartition(
            f"{text!r} is no partition; give iid, dirichlet:ALPHA (up to {MAX_ALPHA:g}), shards:COUNT (up to {MAX_SHARDS}), "
            "sites, or a CSV file with the columns example and client."
        )


@dataclass(frozen=True)
class Division:
    """Who has which examples: `names` of the clients in their order, and the places of client i between two bounds."""

    names: Sequence[str]
    places: Places
    bounds: Places

    @classmethod
    def of_owners(cls, owners: Places, names: Sequence[str]) -> "Division":
        """From the (n,) index of each example's client; -1 leaves an example to nobody."""
        order = np.argsort(owners, kind="stable")
        order = order[owners[order] >= 0]
        counts = np.bincount(owners[order], minlength=len(names))
        return cls(names, order.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def of(self, client: int) -> Places:
        """The places of one client's examples."""
        return self.places[self.bounds[client] : self.bounds[client + 1]]


def client_names(count: int) -> list[str]:
    """`client-1`, `client-2`, ..., padded so that the order of names is that of numbers."""
    width = len(str(count))
    return [f"client-{number:0{width}d}" for number in range(1, count + 1)]


def divide(partition: Partition, labels: Places, examples: Sequence[str], clients: int, seed: int) -> Division:
    """Deal out the examples; the same seed deals the same way.

    Args:
        partition: any but `sites`.
        labels: (n,) class indices.
        examples: (n,) names, which a file refers to.
        clients: how many; a file says that itself.
        seed: of the draw.

    Raises:
        WrongPartition: there are fewer examples than clients or shards, or the file does not fit the data.
    """
    if partition.kind == "file" and partition.path is not None:
        return _from_file(partition.path, examples)
    if not 1 <= clients <= MAX_CLIENTS:
        raise WrongPartition(f"There must be 1 to {MAX_CLIENTS} clients, not {clients}.")
    if len(labels) < clients:
        raise WrongPartition(f"{len(labels)} examples do not do for {clients} clients; use fewer clients.")
    rng = np.random.default_rng([seed, clients])
    deal = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards}[partition.kind]
    return Division.of_owners(deal(labels, clients, partition.value, rng), client_names(clients))


def _iid(labels: Places, clients: int, _value: float, rng: np.random.Generator) -> Places:
    return rng.permutation(np.arange(len(labels), dtype=np.int64) % clients)


def _dirichlet(labels: Places, clients: int, alpha: float, rng: np.random.Generator) -> Places:
    owners = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        # With a tiny alpha all of Dirichlet's gamma variates may underflow: then one client gets the class.
        shares = np.nan_to_num(rng.dirichlet(np.full(clients, alpha)))
        if shares.sum() <= 0:
            shares = np.eye(clients)[rng.integers(clients)]
        sizes = apportion(len(places), shares / shares.sum(), least=0)
        owners[places] = rng.permutation(np.repeat(np.arange(clients), sizes))
    return _nobody_empty(owners, clients)


def _nobody_empty(owners: Places, clients: int) -> Places:
    """Give each client without any example one of those who have most."""
    counts = np.bincount(owners, minlength=clients)
    empty = np.flatnonzero(counts == 0)
    order = np.argsort(owners, kind="stable")
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The deepest in a client's pile first, so that the piles are cut to one height; nobody's last one is taken.
    spare = order[np.argsort(-rank, kind="stable")][: len(empty)]
    owners[spare] = empty
    return owners


def _shards(labels: Places, clients: int, value: float, rng: np.random.Generator) -> Places:
    shards = clients * int(value)
    if len(labels) < shards:
        raise WrongPartition(f"{len(labels)} examples do not do for {shards} shards; use fewer clients or shards.")
    # Within a class the order is drawn: that of the files would tell shards apart by more than their class.
    drawn = rng.permutation(len(labels))
    order = drawn[np.argsort(labels[drawn], kind="stable")]
    owners = np.empty(len(labels), dtype=np.int64)
    dealt = rng.permutation(shards) // int(value)
    for shard, places in enumerate(np.array_split(order, shards)):
        owners[places] = dealt[shard]
    return owners


def _from_file(path: Path, examples: Sequence[str]) -> Division:
    rows = _rows(path)
    unknown = sorted(rows.keys() - set(examples))
    if unknown:
        raise WrongPartition(
            f"{path} names {len(unknown)} examples that the data do not have, such as {unknown[0][:80]!r}; name them by "
            f"their files below --data, as {examples[0][:80]!r}.",
            count=len(unknown),
        )
    names = _names(path, rows)
    place = {name: index for index, name in enumerate(names)}
    owners = np.array([place[rows[name]] if name in rows else -1 for name in examples], dtype=np.int64)
    return Division.of_owners(owners, names)


def names_of(path: Path) -> list[str]:
    """The clients that a partition file names, in order.

    Raises:
        NotFound: it cannot be read.
        WrongPartition: it is no such file.
    """
    return _names(path, _rows(path))


def _names(path: Path, rows: Mapping[str, str]) -> list[str]:
    names = sorted(set(rows.values()))
    if len(names) > MAX_CLIENTS:
        raise WrongPartition(f"{path} names {len(names)} clients; at most {MAX_CLIENTS} are taken.")
    return names


def _rows(path: Path) -> dict[str, str]:
    """Example → client, out of a CSV with or without the header example,client."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NotFound(f"The partition {path} cannot be read as a CSV file: {error}.") from error
    if any(len(row) < COLUMNS for row in rows):
        raise WrongPartition(f"Each line of {path} needs two columns: example and client.")
    found = {row[0].strip(): row[1].strip() for row in rows if row[:COLUMNS] != ["example", "client"]}
    unfit = next((name for name in found.values() if not fits(name)), None)
    if not found or unfit is not None:
        raise WrongPartition(
            f"{path} has no usable client name{f' ({unfit[:80]!r})' if unfit else ''}; use letters and digits."
        )
    return found


def fits(name: str) -> bool:
    """Whether a client's name can be a site's: it becomes part of file names."""
    return 0 < len(name) <= 63 and name[0].isalnum() and all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
