"""Run by `test_resume_distributed.py`: the `calig` command, which one of its processes sends itself a signal in.

usage: stop_at_batch.py RANK BATCH SIGNAL run key=value ...
"""

import os
import sys

from calig.pipeline.cli import main
from calig.pipeline.module import ClassificationModule

rank, number, sent = map(int, sys.argv[1:4])
step, count = ClassificationModule.training_step, 0


def counted(module, batch, batch_idx):
    global count
    count += 1
    if count == number and int(os.environ.get("LOCAL_RANK", 0)) == rank:
        os.kill(os.getpid(), sent)
    return step(module, batch, batch_idx)


ClassificationModule.training_step = counted
sys.exit(main(sys.argv[4:]))
