"""torchrun, which ends without a traceback of its own when a process of the run has reported an error.

python -m medicalgpt.launch --standalone --nproc_per_node 2 supervised_finetuning.py ...

The flags are those of torchrun. The exit code is that of the process that failed first; 128 plus the number of a signal
that killed it.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
