"""Devices that models run on: a table of data sheets, and the machine that lowbit runs on, measured.

    find_device("H100")     a row of the table, however it is spelled
    find_device("this")     this machine: its CUDA card if it has one, else its processor, measured

Light to import: torch is imported when something is measured.
"""

from lowbit.hardware.measured import find_device, this_machine, this_processor
from lowbit.hardware.table import DEVICES, Device

__all__ = ["DEVICES", "Device", "find_device", "this_machine", "this_processor"]
