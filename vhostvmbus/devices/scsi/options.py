# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``vhostvmbus serve scsi``."""

from __future__ import annotations

import argparse
from uuid import UUID, uuid5

from vhostvmbus.devices.scsi.device import MAX_SUB_CHANNELS, ScsiController
from vhostvmbus.devices.scsi.disk import DiskError, DiskSpec, parse_disk
from vhostvmbus.devices.scsi.storvsp import Version

HELP = "a SCSI controller with disks from image files and block devices"


def _disk(text: str) -> DiskSpec:
    try:
        return parse_disk(text)
    except DiskError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _version(text: str) -> Version:
    for version in Version:
        if str(version) == text:
            return version
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, Version))}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the device's own arguments."""
    parser.add_argument(
        "disks",
        nargs="+",
        type=_disk,
        metavar="DISK",
        help="PATH[:SIZE][,ro][,serial=TEXT][,format=raw], LUN 0 first; with SIZE (2G) a sparse "
        "image is made if there is none; with format=raw an image that looks like one in another "
        "format is served as it is",
    )
    parser.add_argument(
        "--instance-id",
        type=UUID,
        metavar="UUID",
        help="of the VMBus device (default: made from LUN 0's serial or path)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="requests that may wait for the host's disk at a time (default 8)",
    )
    parser.add_argument(
        "--subchannels",
        type=int,
        default=MAX_SUB_CHANNELS,
        choices=range(MAX_SUB_CHANNELS + 1),
        metavar="N",
        help="how many the guest may have besides its first channel (default "
        f"{MAX_SUB_CHANNELS}: one for each vCPU; Hyper-V has one channel for four)",
    )
    parser.add_argument(
        "--protocol",
        type=_version,
        default=Version.V6_2,
        choices=tuple(Version),
        metavar="VERSION",
        help="the newest version of the storage protocol to agree upon with the guest: "
        f"{', '.join(map(str, reversed(Version)))} (default 6.2)",
    )
    parser.add_argument(
        "--no-plan",
        action="store_true",
        help="leave no READ and WRITE to the ring engine: slower, for comparison",
    )


def instance_for(disk: DiskSpec) -> UUID:
    """Returns the instance id of a controller with ``disk`` at LUN 0: always the same for the same
    serial or path.
    """
    return uuid5(ScsiController.class_id, disk.identity().naa.hex())


def make_device(options: argparse.Namespace) -> ScsiController:
    """Returns the controller; raises what opening a disk raises."""
    return ScsiController(
        options.disks,
        instance_id=options.instance_id or instance_for(options.disks[0]),
        threads=options.threads,
        sub_channels=options.subchannels,
        protocol=options.protocol,
        plans=not options.no_plan,
    )
