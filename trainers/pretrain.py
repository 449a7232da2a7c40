"""The door of `python -m trainers.pretrain`: makes the embedded models again (trainers/embedded/pretrain.py)."""

import sys

from allocators.core.errors import StudyError
from trainers.embedded.pretrain import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
