"""Photographs and what is known of them."""

from whalelib.data.catalog import Catalog, CatalogError, open_catalog
from whalelib.data.images import PhotographError, read_image
from whalelib.data.layouts import NEW_WHALE
from whalelib.data.statistics import photograph_statistics, sharpness, statistics

__all__ = [
    "NEW_WHALE",
    "Catalog",
    "CatalogError",
    "PhotographError",
    "open_catalog",
    "photograph_statistics",
    "read_image",
    "sharpness",
    "statistics",
]
