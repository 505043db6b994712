"""Placement groups of Ray Train's workers: noted where the driver sees them, so that it can release those of a trial that was stopped.

Ray removes the group of a controller that ends by itself. One that dies with its trial leaves the group, and with it the cores,
until the whole job ends; Ray's own cleaner needs a dashboard, which a local cluster does not have.
"""

from pathlib import Path

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_SUFFIX = ".placement-group"


def note_placement_group(folder: Path, group_id: str) -> None:
    """Leave the group's id in a folder; any worker of the group may."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{group_id}{_SUFFIX}").touch()


def release_placement_groups(folder: Path) -> list[str]:
    """Remove the groups that were noted anywhere in the folder and still hold resources; returns their ids."""
    noted = {path.name.removesuffix(_SUFFIX): path for path in folder.rglob(f"*{_SUFFIX}")}
    held = [name for name in noted if placement_group_table().get(name, {}).get("state") not in (None, "REMOVED")]
    for name in held:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
    for path in noted.values():
        path.unlink(missing_ok=True)
    return held
