"""The figures of the SOGNS paper (Gray, Samar & Hestness 2023), drawn anew from fresh numbers."""

from gnsmon.figures.book import NAMES, make

__all__ = ["NAMES", "make"]
