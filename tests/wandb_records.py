"""Reading an offline Weights & Biases run: a 7-byte header, then LevelDB-style records in blocks of 32 KiB."""

import json
import struct
import time
from dataclasses import dataclass, field

BLOCK = 32768


@dataclass
class OfflineRun:
    config: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    kinds: set = field(default_factory=set)
    about: object = None
    """The record of the run itself: name, group, kind, tags, commit."""
    defined: list = field(default_factory=list)
    """The records of `define_metric`."""
    charts: dict = field(default_factory=dict)
    """Key -> the chart's configuration."""
    artifacts: list = field(default_factory=list)
    """(kind, path in the artifact -> local file), in the order of logging."""


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
    """What a finished run has written; its service closes the file a moment after `wandb.finish` has returned."""
    end = time.monotonic() + 20
    while "exit" not in (run := _read(run_dir)).kinds:
        assert time.monotonic() < end, "the run has no end"
        time.sleep(0.1)
    return run


def _read(run_dir):
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    run = OfflineRun()
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        run.kinds.add(kind)
        if kind == "run":
            run.about = record.run
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "metric":
            run.defined.append(record.metric)
        elif kind == "config":
            for item in record.config.update:
                if list(item.nested_key[:2]) == ["_wandb", "visualize"]:
                    run.charts[item.nested_key[2]] = json.loads(item.value_json)
        elif kind == "artifact":
            files = {entry.path: entry.local_path for entry in record.artifact.manifest.contents}
            run.artifacts.append((record.artifact.type, files))
        elif kind == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            run.history.append(row)
        elif kind == "summary":
            run.summary |= {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update
            }
    return run
