"""What TensorBoard would show of a folder of event files, read as its documentation describes them."""

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2


def shown_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, x, value) in the order of writing; a started session hides the earlier points from its step on."""
    points = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)  # then its checksum, the event, and the event's checksum
            event, content = event_pb2.Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points
