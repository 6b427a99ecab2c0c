"""Recognise which published data set a row is from.

docs/datasets.md shows the table of the sets; a test compares them.
"""

from functools import lru_cache

from medicalgpt.formats.general_sets import GENERAL_SETS
from medicalgpt.formats.medical_sets import MEDICAL_SETS
from medicalgpt.formats.preference_sets import PREFERENCE_SETS
from medicalgpt.formats.shapes import Preset, Row

PRESETS = {preset.name: preset for preset in (*MEDICAL_SETS, *GENERAL_SETS, *PREFERENCE_SETS)}


def recognise(row: Row) -> Preset | None:
    """The preset whose shape the row has; of several, the one that reads most of its fields."""
    return next((preset for preset in _possible(frozenset(row)) if preset.check is None or preset.check(row)), None)


@lru_cache(maxsize=1_000)
def _possible(names: frozenset[str]) -> tuple[Preset, ...]:
    """The presets that rows with these fields may have, the closest first. Rows of a file have few sets of fields."""
    found = [preset for preset in PRESETS.values() if preset.by_shape and names.issuperset(preset.needs + preset.marks)]
    return tuple(sorted(found, key=lambda preset: -len(preset.needs + preset.marks)))
