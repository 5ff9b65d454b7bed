"""Datasets: where images come from, which of them train, and what a person should know of them."""

from backboned.server.training.datasets.data_roots import resolve_dataset
from backboned.server.training.datasets.dataset import Dataset
from backboned.server.training.datasets.findings import Findings
from backboned.server.training.datasets.inspector import Inspector
from backboned.server.training.datasets.opening import Access
from backboned.server.training.datasets.reading import check_dataset, read_dataset
from backboned.server.training.datasets.record import Record, inspect
from backboned.server.training.datasets.samples import Sample
from backboned.server.training.datasets.store import Store

__all__ = [
    "Access",
    "Dataset",
    "Findings",
    "Inspector",
    "Record",
    "Sample",
    "Store",
    "check_dataset",
    "inspect",
    "read_dataset",
    "resolve_dataset",
]
