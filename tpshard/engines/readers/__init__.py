"""Folders whose files say of themselves, or show by their shapes, what each rank holds: read by code, not by a profile.

Each reader gives every logical tensor a layout and places, so that merge, reshard and verify work as for any folder.
"""
