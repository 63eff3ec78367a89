"""Reading an offline Weights & Biases run: a 7-byte header, then LevelDB-style records in blocks of 32 KiB."""

import json
import struct
from dataclasses import dataclass, field

BLOCK = 32768


@dataclass
class OfflineRun:
    config: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    summary: dict = field(default_factory=dict)


def records(data):
    position, partial = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind == 0:
            break
        partial = chunk if kind in (1, 2) else partial + chunk
        if kind in (1, 4):
            yield partial


def read_offline_run(run_dir):
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    run = OfflineRun()
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            run.history.append(row)
        elif kind == "summary":
            run.summary |= {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update
            }
    return run
